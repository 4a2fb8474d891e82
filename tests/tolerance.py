"""The one tolerance rule.

A row of numbers may err, against float64, by at most twice what plain PyTorch errs there, plus 4 ulp of the row's
largest magnitude. Plain PyTorch is the reference in float32 on the inputs upcast, its gradient rounded once to the
dtype it is handed out in.

The largest magnitude is that of the row's numbers in the dtype they are handed out in, or that of the terms which they
are sums of in the dtype of the arithmetic, whichever allows more: the divergence of equal distributions is 0, and so is
its gradient; the log-sum-exps and the probabilities whose difference they are, are not.

What is not finite must be of the same kind, NaN, +inf or -inf, in the same places. In a gradient the place is the row:
once an infinite divergence has met it, which elements are NaN depends on which probabilities underflowed.

Triton's interpreter truncates what it stores as bfloat16: one ulp more, there only.
"""

import torch
from torch import Tensor

ULPS = 4
TRUNCATED_STORE_ULPS = 1


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at this magnitude, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.abs().double().clamp(min=info.smallest_normal))[1] - 1
    return info.eps * torch.exp2(exponent.double())


def plain_in_float64(plain32: Tensor | None, exact32: Tensor | None, exact: Tensor | None) -> Tensor | None:
    """Plain PyTorch's result in float64, whose error float64 cannot show: as if it were that of float32, in proportion
    to the epsilons. A number's own error counts, or, since a number may be right by chance, the tensor's largest error
    as a share of its largest number.
    """
    if exact is None:
        return None
    error = torch.where(exact32.isfinite() & plain32.isfinite(), plain32.double() - exact32, 0.0).abs()
    largest = torch.where(exact32.isfinite(), exact32, 0.0).abs().amax() if exact32.numel() else error.new_zeros(())
    share = torch.where(largest > 0, error.amax() / largest, 0.0) if error.numel() else largest
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return torch.where(exact.isfinite(), exact + torch.maximum(error, share * exact.abs()) * ratio, exact)


def kind(x: Tensor) -> Tensor:
    """0 for a finite number, 1 for NaN, 2 for +inf, 3 for -inf."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def assert_numbers_close(name: str, got: Tensor, exact: Tensor, plain: Tensor, *, terms: Tensor) -> None:
    """The rule for single numbers (a loss, a statistic), each a row of its own; ``terms``: their largest terms."""
    _assert_same_shape(name, got, exact)
    of_another_kind = kind(got.cpu()) != kind(exact.to(got.dtype))
    assert not of_another_kind.any(), (
        f"{name}: {_count(of_another_kind)}: {got[of_another_kind.to(got.device)][0].item()} "
        f"where {exact[of_another_kind][0].item()} is right"
    )
    _assert_errors(name, got[..., None], exact[..., None], plain[..., None], ULPS * ulp(terms, got.dtype))


def assert_rows_close(
    name: str, got: Tensor, exact: Tensor, plain: Tensor, *, terms: Tensor, arithmetic: torch.dtype, interpreted: bool
) -> None:
    """The rule for the rows of a gradient, along the last dimension, in the dtype that the caller receives."""
    _assert_same_shape(name, got, exact)
    poisoned = ~got.cpu().isfinite().all(-1)
    should_be = ~exact.to(got.dtype).isfinite().all(-1)
    assert not (poisoned & ~should_be).any(), f"{name}: {_count(poisoned & ~should_be)} not finite"
    assert not (should_be & ~poisoned).any(), f"{name}: {_count(should_be & ~poisoned)} finite, and should not be"
    if got.shape[-1] == 0:
        return
    ulps = ULPS + (TRUNCATED_STORE_ULPS if interpreted and got.dtype == torch.bfloat16 else 0)
    largest = torch.where(exact.isfinite(), exact, 0.0).abs().amax(-1)
    margin = torch.maximum(ulps * ulp(largest, got.dtype), ULPS * ulp(terms.expand(largest.shape), arithmetic))
    _assert_errors(name, got, exact, plain, margin)


def _assert_errors(name: str, got: Tensor, exact: Tensor, plain: Tensor, margin: Tensor) -> None:
    got64 = got.detach().cpu().double()
    comparable = got64.isfinite() & exact.isfinite()
    error = torch.where(comparable, got64 - exact, 0.0).abs().amax(-1)
    plain_error = torch.where(comparable & plain.isfinite(), plain.double() - exact, 0.0).abs().amax(-1)
    allowed = 2 * plain_error + margin
    bad = error > allowed
    assert not bad.any(), (
        f"{name}: {_count(bad)} off: error {error[bad][0]:.3e}, allowed {allowed[bad][0]:.3e}, "
        f"plain PyTorch's {plain_error[bad][0]:.3e}"
    )


def _assert_same_shape(name: str, got: Tensor, exact: Tensor) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"


def _count(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()}, first at {tuple(bad.nonzero()[0].tolist())}"
