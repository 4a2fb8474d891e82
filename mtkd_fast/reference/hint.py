"""The op ``hint``: K pairs of features, per-sample distance, per-sample weights, as the formulas say it.

m_k[n] = mean over the elements of sample n of (f_k − g_k)²
loss   = Σ_k w_k[n] m_k[n], then the reduction over samples
"""

import torch
from torch import Tensor


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N], the mean of the squared differences of each sample."""
    return (student - teacher).square().flatten(1).mean(1)


DISTANCES = {"mse": mse}


def hint(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, *, distance: str, reduction: str
) -> Tensor:
    """K pairs [N, ...] -> loss: [N] for reduction "none", else a scalar; weights [K] or [K, N], None counts as ones."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in (*student, *teacher)) else torch.float32
    n_samples = student[0].shape[0]
    distance_of = DISTANCES[distance]
    if weights is None:
        weights = torch.ones(len(student), 1, dtype=dtype, device=student[0].device)
    w = weights.to(dtype).reshape(len(student), -1).expand(-1, n_samples)

    terms = []
    for f, g, w_k in zip(student, teacher, w, strict=True):
        f, g = f.to(dtype).flatten(1), g.to(dtype).flatten(1)
        used = w_k != 0
        m_used = distance_of(torch.where(used[:, None], f, 0.0), torch.where(used[:, None], g, 0.0))
        m_unused = distance_of(f.detach(), g.detach())
        m_unused = torch.where(m_unused.isfinite(), m_unused, 0.0)  # at w = 0: value 0, gradient m
        terms.append(torch.where(used, w_k * m_used, w_k * m_unused))
    per_sample = torch.stack(terms).sum(0)
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (max(n_samples, 1) if reduction == "mean" else 1)
