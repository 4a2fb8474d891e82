// How gradients follow from what a forward of the op `kd` has kept: its row_stats, and the student's gradient for an
// upstream of 1.
#pragma once

#include "autograd.h"

namespace mtkd_fast {

// gradient·upstream. In place when the graph is not kept: then only hooks on saved tensors could still hold the buffer.
inline Tensor finish_gradient(const Tensor& gradient, const Tensor& upstream, const Tensor& scale) {
  static const auto rescale = op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("mtkd_fast::kd_rescale");
  static const auto rescale_ = op<void(const Tensor&, const Tensor&, const Tensor&)>("mtkd_fast::kd_rescale_");
  at::AutoDispatchBelowADInplaceOrView below;
  if (is_traced(gradient) || torch::autograd::get_current_graph_task_keep_graph())
    return rescale.call(gradient, upstream, scale);
  rescale_.call(gradient, upstream, scale);
  return gradient;
}

// ∂L/∂w_k = upstream·scale·kd_scale·D_k, in the shape of the weights. Rows that do not count, and teachers of weight 0
// whose divergence is not finite, get 0.
inline Tensor weight_gradient(const Tensor& weights, const Tensor& upstream, const Tensor& row_stats,
                              int64_t n_teachers, double kd_scale) {
  const Tensor divergence = row_stats.narrow(0, 0, n_teachers), used = row_stats.narrow(0, n_teachers, n_teachers);
  const Tensor scale = row_stats.select(0, RowStats{static_cast<int>(n_teachers)}.scale());
  const Tensor up = upstream.dim() == 0 ? upstream : upstream.reshape({-1});
  const Tensor removed = scale.eq(0).logical_or(used.eq(0).logical_and(divergence.isfinite().logical_not()));
  const Tensor per_row = (divergence * (scale * up * kd_scale)).masked_fill(removed, 0);
  return (weights.dim() == 1 ? per_row.sum(1) : per_row.reshape_symint(weights.sym_sizes())).to(weights.scalar_type());
}

}  // namespace mtkd_fast
