"""Divergences between a teacher p and the student q, from their log-probabilities, one value per row.

Adding an entry here makes a divergence available everywhere through the reference; the fused kernels take it up from
their own tables (csrc/divergences.h, kernels/divergences.py), and the tests find it by its name.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")


def expected_log_ratio(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ_c x (log x − log y) over the last dimension.

    A class with log x = −inf adds 0 whatever y holds. One with log x > −inf and log y = −inf adds +inf, also where x
    itself underflows to 0 (there the product would be 0·inf).
    """
    possible = log_x != -INF
    x = log_x.exp()
    ratio = torch.where(possible, log_x, 0.0) - torch.where(possible, log_y, 0.0)
    impossible_for_y = possible & (log_y == -INF) & (x == 0)
    return torch.where(impossible_for_y, INF, x * ratio).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q): the teacher's expectation of log p − log q."""
    return expected_log_ratio(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p): the student's expectation of log q − log p."""
    return expected_log_ratio(log_q, log_p)


def log_mixture(log_x: Tensor, log_y: Tensor, share: float) -> Tensor:
    """log(share·x + (1 − share)·y), 0 < share < 1; −inf where both are."""
    possible = (log_x != -INF) | (log_y != -INF)
    mixed = torch.logaddexp(
        torch.where(possible, log_x, 0.0) + math.log(share), torch.where(possible, log_y, 0.0) + math.log1p(-share)
    )
    return torch.where(possible, mixed, -INF)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q: the generalised Jensen-Shannon divergence of GKD (2306.13649)."""
    log_m = log_mixture(log_p, log_q, beta)
    return beta * expected_log_ratio(log_p, log_m) + (1 - beta) * expected_log_ratio(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The total variation distance ½ Σ |p − q|; where p = q the subgradient is 0."""
    difference = log_p.exp() - log_q.exp()
    sign = torch.where(difference.isnan(), difference, difference.sign()).detach()  # NaN has sign 0 in PyTorch
    return 0.5 * (sign * difference).sum(-1)


def skew_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(p‖λp + (1 − λ)q), λ = beta: DistiLLM (2402.03898)."""
    return expected_log_ratio(log_p, log_mixture(log_p, log_q, beta))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(q‖(1 − λ)p + λq), λ = beta: DistiLLM (2402.03898)."""
    return expected_log_ratio(log_q, log_mixture(log_q, log_p, beta))


def dkd(log_p: Tensor, log_q: Tensor, beta: float, target: Tensor) -> Tensor:
    """TCKD + β·NCKD: Decoupled Knowledge Distillation (2203.08679), target [N] in range.

    TCKD is the KL of (p_y, 1 − p_y), NCKD that of the classes beside the target, each side renormalised. A teacher that
    allows no class beside the target has none to teach: its NCKD is 0.
    """
    at_target = torch.arange(log_p.shape[-1], device=target.device) == target[..., None]
    target_part = expected_log_ratio(of_target(log_p, at_target), of_target(log_q, at_target))
    if beta == 0:
        return target_part
    rest_p, rest_q = log_p.masked_fill(at_target, -INF), log_q.masked_fill(at_target, -INF)
    nothing = (rest_p == -INF).all(-1, keepdim=True)
    rest_p, rest_q = (torch.where(nothing, 0.0, rest).log_softmax(-1) for rest in (rest_p, rest_q))
    return target_part + beta * expected_log_ratio(rest_p, rest_q)


def of_target(log_x: Tensor, at_target: Tensor) -> Tensor:
    """(log x_y, log(1 − x_y)) [..., 2], the second from the other classes, so that it is exact where x_y is near 1."""
    rest = log_x.masked_fill(at_target, -INF)
    nothing = (rest == -INF).all(-1)
    log_rest = torch.where(nothing[..., None], 0.0, rest).logsumexp(-1)
    return torch.stack((log_x[at_target].reshape(nothing.shape), torch.where(nothing, -INF, log_rest)), -1)


class Divergence(NamedTuple):
    """A divergence as a row of the registry."""

    of: Callable[..., Tensor]  # (log p, log q, then beta and the target if it takes them) -> one value a row
    beta: float | None = None  # what beta is by default; None: it takes none
    below: float = math.inf  # beta is in [0, below), or
    most: float = math.inf  # in [0, most]
    limits: tuple[tuple[float, str], ...] = ()  # the divergences that it becomes at the ends of its range
    takes_target: bool = False


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "jsd": Divergence(jsd, beta=0.5, most=1.0, limits=((0.0, "forward_kl"), (1.0, "reverse_kl"))),
    "tvd": Divergence(tvd),
    "skew_kl": Divergence(skew_kl, beta=0.1, below=1.0, limits=((0.0, "forward_kl"),)),
    "skew_reverse_kl": Divergence(skew_reverse_kl, beta=0.1, below=1.0, limits=((0.0, "reverse_kl"),)),
    "dkd": Divergence(dkd, beta=8.0, takes_target=True),
}


def between(name: str, log_p: Tensor, log_q: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """The divergence called ``name``, one value a row; ``beta`` and ``target`` go to those that take them."""
    divergence = DIVERGENCES[name]
    options = (() if divergence.beta is None else (beta,)) + ((target,) if divergence.takes_target else ())
    return divergence.of(log_p, log_q, *options)
