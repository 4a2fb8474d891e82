// How the gradient of the weights follows from the row_stats that a forward of the op `kd` has kept.
#pragma once

#include "autograd.h"

namespace mtkd_fast {

// ∂L/∂w_k = upstream·scale·kd_scale·D_k, in the shape of the weights. Rows that do not count, and teachers of weight 0
// whose divergence is not finite, get 0.
inline Tensor weight_gradient(const Tensor& weights, const Tensor& upstream, const Tensor& row_stats,
                              int64_t n_teachers, double kd_scale) {
  const Tensor divergence = row_stats.narrow(0, 0, n_teachers), used = row_stats.narrow(0, n_teachers, n_teachers);
  const Tensor scale = row_stats.select(0, RowStats{static_cast<int>(n_teachers)}.scale());
  const Tensor up = upstream.dim() == 0 ? upstream : upstream.reshape({-1});
  const Tensor removed = scale.eq(0).logical_or(used.eq(0).logical_and(divergence.isfinite().logical_not()));
  return as_weights((divergence * (scale * up * kd_scale)).masked_fill(removed, 0), weights);
}

}  // namespace mtkd_fast
