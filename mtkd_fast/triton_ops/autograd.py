"""What the autograd of every Triton op shares."""

import torch
from torch import Tensor


def as_weights(per_row: Tensor, weights: Tensor) -> Tensor:
    """Numbers [K, N] as the gradient of weights [K] or [K, ...]."""
    return (per_row.sum(1) if weights.dim() == 1 else per_row.reshape(weights.shape)).to(weights.dtype)


def refuse_double_backward(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under create_graph the gradients carry a node that says why they have no derivative of their own."""
    if not torch.is_grad_enabled():
        return gradients
    error = torch._C._functions.DelayedError(
        "double backward through implementation='triton' is not available; use implementation='reference'", 1
    )
    return tuple(None if g is None else error(g.detach().requires_grad_()) for g in gradients)
