"""Divergences between a teacher p and the student q, from their log-probabilities, one value per row.

Adding an entry here makes a divergence available everywhere through the reference; the fused kernels take it up from
their own tables (csrc/divergences.h, kernels/divergences.py), and the tests find it by its name.
"""

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


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
