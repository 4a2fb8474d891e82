// What the passes over K pairs of features share.
#pragma once

#include "pair_weights.h"
#include "tensors.h"

namespace mtkd_fast {

inline void check_pairs(TensorList student, TensorList teacher) {
  TORCH_CHECK_VALUE(!student.empty() && student.size() == teacher.size() && student.size() <= kMaxTeachers,
                    "student_features and teacher_features must hold 1 to ", kMaxTeachers, " pairs");
}

inline at::ScalarType dtype_of_pairs(TensorList student, TensorList teacher) {
  const bool wide =
      compute_dtype(student[0], student) == at::kDouble || compute_dtype(teacher[0], teacher) == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

template <typename T>
constexpr at::ScalarType dtype_as() {
  return std::is_same_v<T, double> ? at::kDouble : at::kFloat;
}

inline OptionalTensor in_compute_dtype(const OptionalTensor& x, at::ScalarType dtype) {
  return x ? OptionalTensor(in_compute_dtype(*x, dtype)) : x;
}

// Of a tensor in the compute dtype, which must outlive them.
template <typename T>
PairWeights<T> pair_weights(const OptionalTensor& weights, int64_t pairs, int64_t samples) {
  if (!weights) return {nullptr, 0, 0};
  const Tensor& w = *weights;
  TORCH_CHECK_VALUE(w.size(0) == pairs && (w.dim() == 1 || (w.dim() == 2 && w.size(1) == samples)),
                    "weights must have shape [K] or [K, N]");
  return {w.template const_data_ptr<T>(), w.stride(0), w.dim() == 1 ? 0 : w.stride(1)};
}

inline int64_t mean_elements(TensorList features) {
  int64_t elements = 0;
  for (const Tensor& f : features) elements += f.numel();
  return elements / std::max<int64_t>(1, static_cast<int64_t>(features.size()) * features[0].size(0));
}

}  // namespace mtkd_fast
