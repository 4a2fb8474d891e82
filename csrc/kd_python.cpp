// The short way from Python into the op `kd`: one call, where torch.ops and the checks in Python cost as much as a
// small batch's kernel. It takes only what the checks of mtkd_fast/checks.py would pass, in its plainest form (a list
// of tensors on the CPU, a rule for weights, a divergence without beta); None says: go the long way, which knows every
// form and every error.
#include "kd_python.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string_view>

#include "tensors.h"

namespace mtkd_fast {
namespace {

using KD = std::tuple<Tensor, Tensor>(const Tensor&, TensorList, const OptionalTensor&, const OptionalTensor&,
                                      const OptionalTensor&, const OptionalTensor&, c10::string_view, c10::string_view,
                                      double, double, double, double, double, int64_t, c10::string_view, bool);

bool is_plain(PyObject* x) { return THPVariable_CheckExact(x) && THPVariable_Unpack(x).is_cpu(); }

bool is_logits(const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  return x.layout() == at::kStrided &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble);
}

// A number of Python's own, NaN if it is another.
double number_of(PyObject* x) {
  if (PyFloat_CheckExact(x)) return PyFloat_AS_DOUBLE(x);
  if (!PyLong_CheckExact(x)) return NAN;
  const double value = PyLong_AsDouble(x);
  if (!PyErr_Occurred()) return value;
  PyErr_Clear();  // too large
  return NAN;
}

// A name of Python's own, empty if it is something else.
std::string_view name_of(PyObject* x) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_CheckExact(x) ? PyUnicode_AsUTF8AndSize(x, &length) : nullptr;
  if (text == nullptr) PyErr_Clear();
  return text == nullptr ? std::string_view() : std::string_view(text, length);
}

bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// The arguments, in the order in which kd.py hands them over.
enum Argument {
  kStudent,
  kTeachers,
  kTarget,
  kWeights,
  kTemperature,
  kSquared,
  kDivergence,
  kKDWeight,
  kCEWeight,
  kLabelSmoothing,
  kIgnoreIndex,
  kReduction,
  kArguments
};

struct Call {
  Tensor student;
  std::vector<Tensor> teachers;
  OptionalTensor target;
  std::string_view rule, divergence, reduction;
  double temperature, kd_scale, ce_weight, label_smoothing;
  int64_t ignore_index;

  // Whether it is one for the short way.
  bool read(PyObject* const* from) {
    return read_logits(from) && read_target(from[kTarget]) && read_options(from) &&
           (target.has_value() || (ce_weight == 0 && rule != "confidence"));
  }

 private:
  bool read_logits(PyObject* const* from) {
    PyObject* list = from[kTeachers];
    if (!is_plain(from[kStudent]) || !(PyList_CheckExact(list) || PyTuple_CheckExact(list))) return false;
    student = THPVariable_Unpack(from[kStudent]);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
    if (!is_logits(student) || student.dim() < 2 || student.size(-1) == 0 || count < 1 || count > kMaxTeachers)
      return false;
    teachers.reserve(count);
    for (Py_ssize_t k = 0; k < count; ++k) {
      PyObject* item = PySequence_Fast_GET_ITEM(list, k);
      if (!is_plain(item)) return false;
      teachers.push_back(THPVariable_Unpack(item));
      if (!is_logits(teachers.back()) || teachers.back().sizes() != student.sizes()) return false;
    }
    return true;
  }

  bool read_target(PyObject* from) {
    if (from == Py_None) return true;
    if (!is_plain(from)) return false;
    target = THPVariable_Unpack(from);
    return target->scalar_type() == at::kLong && target->sizes() == student.sizes().slice(0, student.dim() - 1);
  }

  bool read_options(PyObject* const* from) {
    rule = name_of(from[kWeights]);
    divergence = name_of(from[kDivergence]);
    reduction = name_of(from[kReduction]);
    temperature = number_of(from[kTemperature]);
    ce_weight = number_of(from[kCEWeight]);
    label_smoothing = number_of(from[kLabelSmoothing]);
    const double kd_weight = number_of(from[kKDWeight]);
    kd_scale = from[kSquared] == Py_True ? kd_weight * (temperature * temperature) : kd_weight;
    int overflow = 0;
    ignore_index = PyLong_CheckExact(from[kIgnoreIndex]) ? PyLong_AsLongLongAndOverflow(from[kIgnoreIndex], &overflow)
                                                         : (overflow = 1);
    return is_one_of(rule, {"uniform", "confidence", "entropy"}) &&
           is_one_of(divergence, {"forward_kl", "reverse_kl", "tvd"}) &&
           is_one_of(reduction, {"none", "sum", "mean"}) && PyBool_Check(from[kSquared]) && overflow == 0 &&
           temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max() &&
           std::isfinite(kd_weight) && std::isfinite(ce_weight) && label_smoothing >= 0 && label_smoothing <= 1;
  }
};

PyObject* kd_at_once(PyObject*, PyObject* const* from, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (count != kArguments || at::impl::torch_function_mode_enabled() || !call.read(from)) Py_RETURN_NONE;
  static const auto kd = c10::Dispatcher::singleton().findSchemaOrThrow("mtkd_fast::kd", "").typed<KD>();
  Tensor loss;
  {
    pybind11::gil_scoped_release release;
    loss = std::get<0>(kd.call(call.student, call.teachers, call.target, std::nullopt, std::nullopt, std::nullopt,
                               call.rule, call.divergence, /*beta=*/0.0, call.temperature, call.kd_scale,
                               call.ce_weight, call.label_smoothing, call.ignore_index, call.reduction,
                               /*stats=*/false));
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {{"kd_at_once", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kd_at_once)),
                           METH_FASTCALL, "The loss of multi_teacher_kd_loss, or None: see csrc/kd_python.cpp."},
                          {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_kd(PyObject* module) { PyModule_AddFunctions(module, kMethods); }

}  // namespace mtkd_fast
