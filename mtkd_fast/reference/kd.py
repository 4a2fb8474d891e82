"""The op ``kd``, as the formulas say it: specification, fallback, float64 oracle and benchmark baseline.

With q = softmax(s/τ), p_k = softmax(t_k/τ), D_k the divergence between them, and CE the hard cross-entropy at T = 1:

    row_loss = r · (kd_scale · Σ_k w_k D_k + ce_weight · CE)         kd_scale = kd_weight · τ², or kd_weight
    loss     = Σ_rows row_loss / n                                   n rows count: target kept, r not 0

A row that does not count, and a teacher of weight 0 in a row, are replaced by harmless numbers before any arithmetic,
so that whatever they hold (NaN, inf) reaches neither the value nor the gradient.

Everything is plain differentiable PyTorch, in float32 or, when any logits are float64, in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtkd_fast.reference import weights as rules
from mtkd_fast.reference.divergences import between


class KDStats(NamedTuple):
    """Detached per-row numbers of one call. What the pass did not compute is None; what it did not read is 0."""

    divergence: Tensor | None  # [K, ...]
    weights: Tensor | None  # [K, ...]
    teacher_ce: Tensor | None  # [K, ...], only for weights="confidence"
    teacher_entropy: Tensor | None  # [K, ...], only for weights="entropy"
    student_ce: Tensor | None  # [...], only where ce_weight is not 0


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """float64 as soon as one of the tensors is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def kd(
    student: Tensor,
    teachers: list[Tensor],
    target: Tensor | None,
    weights: Tensor | None,
    row_weights: Tensor | None,
    num_items: Tensor | None,
    *,
    rule: str,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, KDStats]:
    """student [..., C] and K teachers [..., C] -> (loss, stats). The public function has checked the arguments."""
    rows, n_classes = student.shape[:-1], student.shape[-1]
    dtype = compute_dtype(student, *teachers)
    s = student.reshape(-1, n_classes).to(dtype)
    t = torch.stack([teacher.reshape(-1, n_classes) for teacher in teachers]).to(dtype)  # [K, N, C]
    y = None if target is None else target.reshape(-1).long()
    r = torch.ones(s.shape[:1], dtype=dtype, device=s.device)
    if row_weights is not None:
        r = row_weights.reshape(-1).to(dtype)

    counts = r != 0
    if y is not None:
        counts = counts & (y != ignore_index)
    s = torch.where(counts[:, None], s, 0.0)
    t = torch.where(counts[:, None], t, 0.0)
    valid = torch.ones_like(counts)
    if y is not None:
        valid = ~counts | ((y >= 0) & (y < n_classes))
        y = torch.where(counts & valid, y, 0)

    row_loss = torch.zeros_like(r)
    w = d = ce = h = hard = None
    if kd_scale != 0:
        w, ce, h = teacher_weights(t.detach(), y, weights, rule)

        def divergence_of(log_p: Tensor, log_q: Tensor) -> Tensor:
            return between(divergence, log_p, log_q, beta, y)

        d, kd_row = weighted_divergence(s, t, w, counts, divergence_of, temperature, routed=rule == "given")
        row_loss = row_loss + kd_scale * kd_row
    else:
        row_loss = row_loss + attached_zero(student, *teachers, *(() if weights is None else (weights,)))
    if ce_weight != 0:
        hard = smoothed_cross_entropy(s, y, label_smoothing)
        row_loss = row_loss + ce_weight * hard
    row_loss = torch.where(counts, r * row_loss, 0.0) * torch.where(valid, 1.0, float("nan"))

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(counts, x.detach(), 0.0).reshape(x.shape[:-1] + rows)

    stats = KDStats(*map(per_row, (d, w, ce, h, hard)))
    return reduce_rows(row_loss, counts, num_items, reduction).reshape(rows if reduction == "none" else ()), stats


def attached_zero(*tensors: Tensor) -> Tensor:
    """0, with a gradient of 0 to each tensor, whatever it holds."""
    return sum(torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0).sum() for x in tensors)


def teacher_weights(
    t: Tensor, y: Tensor | None, given: Tensor | None, rule: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """t [K, N, C] -> weights [K, N], and the cross-entropies and entropies [K, N] that they came from, if any."""
    if rule == "given":
        return given.to(t.dtype).reshape(t.shape[0], -1).expand(t.shape[:2]), None, None
    if rule == "uniform":
        return rules.uniform(t[..., 0]), None, None
    log_p1 = t.log_softmax(-1)
    if rule == "confidence":
        ce = rules.cross_entropy(log_p1, y)
        return rules.confidence(ce), ce, None
    h = rules.entropy(log_p1)
    return rules.entropy_weights(h), None, h


def weighted_divergence(
    s: Tensor, t: Tensor, w: Tensor, counts: Tensor, divergence_of: Callable, temperature: float, routed: bool
) -> tuple[Tensor, Tensor]:
    """D_k [K, N] as they are, and Σ_k w_k D_k [N] in which a zero weight removes its term and its gradient.

    ``routed``: weights that the caller gave. A teacher of weight 0 is then not read at all (its D is 0), unless the
    weights want a gradient, which is D.
    """
    used = (w != 0) & counts
    log_q = (torch.where(used.any(0)[:, None], s, 0.0) / temperature).log_softmax(-1)
    d, terms = [], []
    for t_k, w_k, used_k in zip(t, w, used, strict=True):
        harmless = torch.where(used_k[:, None], t_k / temperature, log_q.detach())
        d_used = divergence_of(harmless.log_softmax(-1), log_q)
        if routed and not w.requires_grad:
            d_k = torch.where(used_k, d_used, 0.0)
        else:
            d_k = divergence_of((t_k / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)).detach()
        for_weight = torch.where(d_k.isfinite(), d_k, 0.0)  # at w = 0: value 0, gradient D
        terms.append(torch.where(used_k, w_k * d_used, w_k * for_weight))
        d.append(d_k)
    return torch.stack(d), torch.stack(terms).sum(0)


def smoothed_cross_entropy(s: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """(1 − ε) · (−log q[y]) + ε · mean_c(−log q[c]) at temperature 1, as in torch.nn.functional.cross_entropy."""
    log_q1 = s.log_softmax(-1)
    hard = torch.zeros_like(s[:, 0])
    if label_smoothing < 1:
        hard = hard + (1 - label_smoothing) * rules.cross_entropy(log_q1, y)
    if label_smoothing > 0:
        hard = hard - label_smoothing * log_q1.mean(-1)
    return hard


def reduce_rows(row_loss: Tensor, counts: Tensor, num_items: Tensor | None, reduction: str) -> Tensor:
    """none: [N]. sum: Σ. mean: Σ over num_items, or over the number of rows that count (at least 1)."""
    if reduction == "none":
        return row_loss
    total = row_loss.sum()
    if reduction == "sum":
        return total
    return total / (counts.sum().clamp(min=1) if num_items is None else num_items.to(total.dtype).reshape(()))


def divergences(student: Tensor, teachers: list[Tensor], *, divergence: str, beta: float, temperature: float) -> Tensor:
    """D_k for every teacher and row, [K, ...], differentiable in all logits."""
    dtype = compute_dtype(student, *teachers)
    log_q = (student.to(dtype) / temperature).log_softmax(-1)
    log_p = [(t.to(dtype) / temperature).log_softmax(-1) for t in teachers]
    return torch.stack([between(divergence, x, log_q, beta) for x in log_p])
