"""The op ``mixture``: the weighted mean of K softmaxes, and its divergence from the student, as the formulas say it.

With p_k = softmax(t_k/τ), q = softmax(s/τ) and weights w_k:

    pbar = Σ_k w_k p_k
    KL(pbar‖q) = Σ_c pbar (log pbar − log q)          log pbar = m + log Σ_k w_k e^{log p_k − m},  m = max_k log p_k

A teacher of weight 0 is replaced by harmless numbers before any arithmetic. What its weight receives as a gradient
comes from what it really holds, and is 0 where that is not finite.
"""

import torch
from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype

INF = float("inf")


def per_row(weights: Tensor | None, teachers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """None (1/K), [K] or [K, ...] -> [K, ..., 1]"""
    rows = teachers[0].shape[:-1]
    if weights is None:
        weights = torch.full((len(teachers),), 1 / len(teachers), dtype=dtype, device=teachers[0].device)
    if weights.dim() == 1:
        weights = weights.view(-1, *[1] * len(rows))
    return weights.to(dtype).expand(-1, *rows).unsqueeze(-1)


def ensemble_probabilities(teachers: list[Tensor], weights: Tensor | None, *, temperature: float) -> Tensor:
    """K teachers [..., C] and weights [K] or [K, ...] -> Σ_k w_k p_k [..., C]"""
    dtype = compute_dtype(*teachers)
    w = per_row(weights, teachers, dtype)
    t = torch.stack([teacher.to(dtype) for teacher in teachers]) / temperature
    p = torch.where(w != 0, t, 0.0).softmax(-1)
    unused = t.detach().softmax(-1)
    unused = torch.where(unused.isfinite(), unused, 0.0)  # at w = 0: value 0, gradient <upstream, p>
    return torch.where(w != 0, w * p, w * unused).sum(0)


def mixture_divergence(
    student: Tensor, teachers: list[Tensor], weights: Tensor | None, *, temperature: float
) -> Tensor:
    """Student [..., C], K teachers [..., C] and weights [K] or [K, ...] -> KL(Σ_k w_k p_k‖q) [...]"""
    dtype = compute_dtype(student, *teachers)
    w = per_row(weights, teachers, dtype)
    used = w != 0
    t = torch.stack([teacher.to(dtype) for teacher in teachers]) / temperature
    log_p = torch.where(used, torch.where(used, t, 0.0).log_softmax(-1), -INF)
    s = torch.where(used.any(0), student.to(dtype), 0.0) / temperature
    log_q = s.log_softmax(-1)

    largest = log_p.detach().amax(0)
    possible = largest != -INF
    largest = torch.where(possible, largest, 0.0)
    relative = torch.where(used, w * (log_p - largest).exp(), 0.0).sum(0)
    log_mixture = torch.where(possible, largest + torch.where(possible, relative, 1.0).log(), -INF)
    mixture = largest.exp() * relative
    ratio = torch.where(possible, log_mixture, 0.0) - torch.where(possible, log_q, 0.0)
    excluded = possible & (log_q == -INF) & (mixture == 0)  # by the student, where pbar has underflowed
    divergence = torch.where(excluded, INF, mixture * ratio).sum(-1)

    gradient = gradient_of_unused(t.detach(), log_mixture.detach(), (student.detach().to(dtype) / temperature))
    return divergence + torch.where(used.squeeze(-1), 0.0, w.squeeze(-1) * gradient).sum(0)  # at w = 0: value 0


def gradient_of_unused(t: Tensor, log_mixture: Tensor, s: Tensor) -> Tensor:
    """Σ_c p_k (log pbar − log q) + 1, the gradient of w_k [K, ...]; 0 where it is not finite."""
    log_p = t.log_softmax(-1)
    ratio = log_mixture - s.log_softmax(-1)
    gradient = torch.where(log_p == -INF, 0.0, log_p.exp() * ratio).sum(-1) + 1
    return torch.where(gradient.isfinite(), gradient, 0.0)
