// The divergences, p the teacher, q the student: what they are called and how they are come by. Their formulas are in
// row_formulas.h (KL), elementwise.h and dkd.h. kernels/divergences.py is the Triton twin.
#pragma once

namespace mtkd_fast {

enum class Divergence : int {
  forward_kl = 0,       // KL(p‖q)
  reverse_kl = 1,       // KL(q‖p)
  dkd = 2,              // KL of (p_y, 1 − p_y) + β KL among the other classes
  jsd = 3,              // β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q, 0 < β < 1
  tvd = 4,              // ½ Σ |p − q|
  skew_kl = 5,          // KL(p‖βp + (1 − β)q), 0 < β < 1
  skew_reverse_kl = 6,  // KL(q‖(1 − β)p + βq), 0 < β < 1
};

struct NamedDivergence {
  const char* name;
  Divergence value;
};
constexpr NamedDivergence kDivergences[] = {{"forward_kl", Divergence::forward_kl},
                                            {"reverse_kl", Divergence::reverse_kl},
                                            {"dkd", Divergence::dkd},
                                            {"jsd", Divergence::jsd},
                                            {"tvd", Divergence::tvd},
                                            {"skew_kl", Divergence::skew_kl},
                                            {"skew_reverse_kl", Divergence::skew_reverse_kl}};

// Under whose softmax the one-pass sums take the expectation of the log ratio.
enum class Expectation { teacher, student, none };

constexpr Expectation expectation_of(Divergence divergence) {
  if (divergence == Divergence::forward_kl || divergence == Divergence::dkd) return Expectation::teacher;
  return divergence == Divergence::reverse_kl ? Expectation::student : Expectation::none;
}

// Sums of φ(p, q) over the classes, which want the sums of both softmaxes first: elementwise.h.
constexpr bool is_elementwise(Divergence divergence) { return expectation_of(divergence) == Expectation::none; }

}  // namespace mtkd_fast
