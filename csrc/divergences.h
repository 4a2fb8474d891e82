// The divergences as finishing touches on row states, host and device. kernels/divergences.py is the Triton twin.
//
// D = cross/(τ·sum_x) − log sum_x + log sum_y, x the side under whose softmax the expectation is taken.
#pragma once

#include "row_stats.h"

namespace mtkd_fast {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1 };

struct NamedDivergence {
  const char* name;
  Divergence value;
};
constexpr NamedDivergence kDivergences[] = {{"forward_kl", Divergence::forward_kl},
                                            {"reverse_kl", Divergence::reverse_kl}};

// sum_x, sum_y: Σ e^{(·−max)/τ}; cross: Σ e^{(x−m_x)/τ}((x−m_x) − (y−m_y)). A row without a finite logit has sum 0:
// NaN.
template <typename T>
MTKD_HD T kl_from_sums(T cross, T sum_x, T log_sum_x, T sum_y, T log_sum_y, T inv_t) {
  if (sum_y == T(0)) return std::numeric_limits<T>::quiet_NaN();
  return cross * inv_t / sum_x - log_sum_x + log_sum_y;
}

template <typename T>
MTKD_HD T kl_from_sums(T cross, T sum_x, T sum_y, T inv_t) {
  return kl_from_sums(cross, sum_x, log_of(sum_x), sum_y, log_of(sum_y), inv_t);
}

}  // namespace mtkd_fast
