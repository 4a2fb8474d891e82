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

struct Probability {
  float p, log_p;
};

// Both sides alike, so that equal logits are equally likely: there total variation has slope 0.
MTKD_DEVICE Probability probability_of_shifted(float dx, const Softmax& of, const Terms& terms) {
  return {device::exp2(dx * terms.log2e_t) * of.inv_sum, dx * terms.inv_t - of.log_sum};
}
MTKD_DEVICE Probability probability(float x, const Softmax& of, const Terms& terms) {
  return probability_of_shifted(shifted(x, of.max), of, terms);
}

// Columns between two looks at the divergence: their logarithms, all under way at once, take the registers.
constexpr int kTogether = 4;

// Calls step(i, p, Element) for N columns, whose Probability teacher(i) and student(i) give.
template <int N, int together = kTogether, typename Teacher, typename Student, typename Step>
MTKD_DEVICE void for_each_element(Divergence divergence, float beta, const Teacher& teacher, const Student& student,
                                  const Step& step) {
#pragma unroll
  for (int first = 0; first < N; first += together) {
    with_elementwise(divergence, [&](auto which) {
#pragma unroll
      for (int i = first; i < first + together; ++i) {
        const Probability p = teacher(i), q = student(i);
        step(i, p.p, element<decltype(which)::value>(p.p, p.log_p, q.p, q.log_p, beta));
      }
    });
  }
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
