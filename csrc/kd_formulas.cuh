// The mathematics of a row for one CUDA thread.
#pragma once

#include <type_traits>

#include "kd_states.cuh"

namespace mtkd_fast {

#include "row_formulas.h"
//
#include "dkd.h"
//
#include "elementwise.h"

}  // namespace mtkd_fast
