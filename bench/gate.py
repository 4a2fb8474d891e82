"""Nothing is timed before it is right: loss and gradients against the float64 oracle of its case."""

import torch

from .case import Exact, Inputs, Loss

# Largest error of the loss, relative, and of a row's gradient, relative to the row's largest element. float32: what
# three float32 softmaxes may lose. Half precision: the gradient is rounded once, to 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float64: 1e-12}
LOSS_TOLERANCE = 1e-5


class WrongResult(AssertionError):
    """A contender that computes something else; its time would mean nothing."""


def check(name: str, loss: Loss, inputs: Inputs, exact: Exact, value: bool = True) -> dict[str, float]:
    """Raises WrongResult, or returns the errors that were found; without ``value`` only the gradients are compared."""
    arguments = inputs.fresh()
    leaves = inputs.leaves(arguments)
    found = loss(*arguments)
    found.backward()
    dtypes = [leaf.dtype for leaf in leaves]
    limits = {"loss": min(LOSS_TOLERANCE, *(TOLERANCE[dtype] for dtype in dtypes))} if value else {}
    limits["gradient"] = max(TOLERANCE[dtype] for dtype in dtypes)
    errors = {"gradient": worst(leaves, exact), "loss": abs(found.item() - exact.loss) / abs(exact.loss)}
    for what, limit in limits.items():
        if not errors[what] <= limit:  # a NaN is no pass
            raise WrongResult(f"{name}: relative error of the {what} {errors[what]:.1e}, allowed {limit:.1e}")
    return {what: errors[what] for what in limits}


def worst(leaves: list[torch.Tensor], exact: Exact) -> float:
    return max(
        _error(leaf.grad, gradient, exact.by_row) for leaf, gradient in zip(leaves, exact.gradients, strict=True)
    )


def _error(found: torch.Tensor | None, exact: torch.Tensor, by_row: bool) -> float:
    if found is None or found.shape != exact.shape:
        return float("inf")
    dtype = torch.finfo(found.dtype)
    unrepresentable = dtype.smallest_normal * dtype.eps  # what a float16 gradient of many rows loses to underflow
    difference, size = ((found.double() - exact).abs() - unrepresentable).clamp(min=0), exact.abs()
    difference, size = (x.amax(-1) if by_row else x.max() for x in (difference, size))
    return (difference / size.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
