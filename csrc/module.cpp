// The module mtkd_fast._C: facts about the build, and the short way into the op `kd`. Importing it also registers the
// ops (kd_ops.cpp and its kin).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu_capability.h"
#include "kd_python.h"

namespace py = pybind11;
using namespace mtkd_fast;

static std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_cpu_capability()); ++i) names.emplace_back(kCapabilityNames[i]);
  return names;
}

PYBIND11_MODULE(_C, m) {
#ifdef MTKD_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_architectures") = MTKD_CUDA_ARCHITECTURES;
#else
  m.attr("cuda") = false;
  m.attr("cuda_architectures") = "";
#endif
  m.def("cpu_capabilities", cpu_capabilities, "The instruction sets this processor can run, the best last.");
  m.def("cpu_capability", [] { return kCapabilityNames[static_cast<int>(cpu_capability())]; });
  m.def("set_cpu_capability", [](const std::string& name) {
    const std::vector<std::string> names = cpu_capabilities();
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return set_cpu_capability(static_cast<CPUCapability>(i));
    throw py::value_error("this processor does not run '" + name + "'");
  });
  add_kd(m.ptr());
}
