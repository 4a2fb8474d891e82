#pragma once

#include <Python.h>

namespace mtkd_fast {

void add_kd(PyObject* module);  // kd_at_once

}  // namespace mtkd_fast
