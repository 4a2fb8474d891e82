// Closed-form teacher weights of one row, from numbers that the pass has anyway. kernels/weights.py is the Triton twin.
#pragma once

#include "row_stats.h"

namespace mtkd_fast {

enum class WeightRule : int { uniform = 0, given = 1, confidence = 2, entropy = 3 };

struct NamedWeightRule {
  const char* name;
  WeightRule value;
};
constexpr NamedWeightRule kWeightRules[] = {{"uniform", WeightRule::uniform},
                                            {"given", WeightRule::given},
                                            {"confidence", WeightRule::confidence},
                                            {"entropy", WeightRule::entropy}};

// e^{a−max}, where a = max = +inf counts as 1: teachers of infinite cross-entropy share the softmax.
template <typename T>
MTKD_HD T relative_exp(T a, T max) {
  return a == max ? T(1) : exp_of(a - max);
}

// CE_k = log Σ e^{t−max} − (t_y − max), at temperature 1. A row without a finite logit is NaN, not +inf.
template <typename T>
MTKD_HD T cross_entropy(T sum1, T max, T label_logit) {
  if (sum1 == T(0)) return std::numeric_limits<T>::quiet_NaN();
  return log_of(sum1) - (label_logit - max);
}

// H_k = log Σ e^{t−max} − Σ e^{t−max}(t−max) / Σ e^{t−max}, at temperature 1.
template <typename T>
MTKD_HD T entropy(T sum1, T dot1) {
  return log_of(sum1) - dot1 / sum1;
}

// (1 − softmax_k CE_k)/(K−1), written over `ce` -> `w`, element k at k·stride.
template <typename T>
MTKD_HD void confidence_weights(const T* ce, T* w, int n_teachers, long long stride) {
  T max = ce[0], sum = 0;
  for (int k = 1; k < n_teachers; ++k) max = larger(max, ce[k * stride]);
  for (int k = 0; k < n_teachers; ++k) sum += relative_exp(ce[k * stride], max);
  for (int k = 0; k < n_teachers; ++k)
    w[k * stride] = n_teachers == 1 ? sum : (1 - relative_exp(ce[k * stride], max) / sum) / (n_teachers - 1);
}

// (1 − H_k/Σ H)/(K−1); Σ H = 0 gives 1/K.
template <typename T>
MTKD_HD void entropy_weights(const T* h, T* w, int n_teachers, long long stride) {
  T sum = 0;
  for (int k = 0; k < n_teachers; ++k) sum += h[k * stride];
  for (int k = 0; k < n_teachers; ++k)
    w[k * stride] = sum == T(0)       ? T(1) / n_teachers
                    : n_teachers == 1 ? h[0] / h[0]
                                      : (1 - h[k * stride] / sum) / (n_teachers - 1);
}

}  // namespace mtkd_fast
