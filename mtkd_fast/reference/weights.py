"""Teacher weights per row, [K, N], from the teachers' log-probabilities at temperature 1. They sum to one over K."""

import torch
from torch import Tensor

from mtkd_fast.reference.divergences import INF


def cross_entropy(log_p1: Tensor, target: Tensor) -> Tensor:
    """CE_k = −log p_k[y] at temperature 1; log_p1 [..., N, C], target [N] in range -> [..., N]."""
    return -log_p1.gather(-1, target.expand(log_p1.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def entropy(log_p1: Tensor) -> Tensor:
    """H = −Σ_c p log p, where a class of probability 0 adds 0; log_p1 [..., N, C] -> [..., N]."""
    return -(log_p1.exp() * torch.where(log_p1 == -INF, 0.0, log_p1)).sum(-1)


def uniform(like: Tensor) -> Tensor:
    """1/K for every teacher and row."""
    return torch.full_like(like, 1.0 / like.shape[0])


def confidence(ce: Tensor) -> Tensor:
    """(1 − softmax_k CE_k)/(K − 1): CA-MKD (arXiv 2201.00007, section 2), ce [K, N]. K = 1 gives 1.

    j teachers with CE = +inf share the softmax, 1/j each. A NaN anywhere makes the row's weights NaN.
    """
    if ce.shape[0] == 1:
        return torch.where(ce.isnan(), ce, 1.0)
    hopeless = ce == INF
    among_hopeless = hopeless.to(ce.dtype) / hopeless.sum(0)
    share = torch.where(hopeless.any(0), among_hopeless, ce.softmax(0))
    share = torch.where(ce.isnan().any(0), float("nan"), share)
    return (1 - share) / (ce.shape[0] - 1)


def entropy_weights(h: Tensor) -> Tensor:
    """(1 − H_k/Σ_j H_j)/(K − 1): EBKD, h [K, N]. K = 1 gives 1; Σ H = 0 gives 1/K."""
    n_teachers = h.shape[0]
    if n_teachers == 1:
        return torch.where(h.isnan(), h, 1.0)
    total = h.sum(0)
    return torch.where(total == 0, 1.0 / n_teachers, (1 - h / total) / (n_teachers - 1))
