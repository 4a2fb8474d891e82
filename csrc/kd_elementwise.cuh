// The elementwise divergences (elementwise.h): sums over the classes that want whole softmaxes first, so that a row's
// columns are passed over twice.
#pragma once

#include "kd_formulas.cuh"

namespace mtkd_fast {

// A softmax at temperature τ whose row has been summed.
struct Softmax {
  float max;
  float inv_sum;  // 1/Σ e^{(x−max)/τ}
  float log_sum;
};

MTKD_DEVICE Softmax softmax_of(float max, float sum) { return {max, 1.0f / sum, log_of(sum)}; }

// Both sides alike, so that equal logits are equally likely: there total variation has slope 0.
template <int N>
MTKD_DEVICE void probabilities(const float (&x)[N], const Softmax& of, const Terms& terms, float (&p)[N],
                               float (&log_p)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float dx = shifted(x[i], of.max);
    p[i] = device::exp2(dx * terms.log2e_t) * of.inv_sum;
    log_p[i] = dx * terms.inv_t - of.log_sum;
  }
}

// Calls step(i, Element) for every column.
template <int N, typename Step>
MTKD_DEVICE void for_each_element(Divergence divergence, float beta, const float (&p)[N], const float (&log_p)[N],
                                  const float (&q)[N], const float (&log_q)[N], const Step& step) {
  with_elementwise(divergence, [&](auto which) {
#pragma unroll
    for (int i = 0; i < N; ++i) step(i, element<decltype(which)::value>(p[i], log_p[i], q[i], log_q[i], beta));
  });
}

// D and G of one teacher.
struct ElementSums {
  float divergence = 0;
  float slope = 0;

  MTKD_DEVICE void add(const Element<float>& of) {
    divergence += of.of_student + of.of_teacher;
    slope += of.of_student;
  }
  template <typename Reduce>
  MTKD_DEVICE void absorb(const ElementSums& x, const Reduce& reduce) {
    divergence += reduce(x.divergence);
    slope += reduce(x.slope);
  }
};

}  // namespace mtkd_fast
