// What the autograd of every op shares.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "tensors.h"

namespace mtkd_fast {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Numbers [K, N] as the gradient of weights [K] or [K, ...].
inline Tensor as_weights(const Tensor& per_row, const Tensor& weights) {
  const Tensor found = weights.dim() == 1 ? per_row.sum(1) : per_row.reshape_symint(weights.sym_sizes());
  return found.to(weights.scalar_type());
}

// The dispatcher's handle on one of our ops.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool any_requires_grad(TensorList tensors) {
  for (const Tensor& x : tensors)
    if (x.requires_grad()) return true;
  return false;
}

// Under create_graph the gradients carry a node that says why they have no derivative of their own.
inline void refuse_double_backward(variable_list& gradients) {
  if (!at::GradMode::is_enabled()) return;
  for (Tensor& gradient : gradients) {
    if (!gradient.defined()) continue;
    auto error = std::make_shared<torch::autograd::DelayedError>(
        "double backward through implementation='cpp' is not available; use implementation='reference'", 1);
    gradient = (*error)({gradient.detach().requires_grad_(true)})[0];
  }
}

// A fake or functional tensor: torch.compile is tracing, so nothing may be changed in place.
inline bool is_traced(const Tensor& x) {
  return x.key_set().has(c10::DispatchKey::Python) || x.key_set().has(c10::DispatchKey::Functionalize) || x.is_meta();
}

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

}  // namespace mtkd_fast
