"""The op ``hint``: K pairs of features, per-sample distance, per-sample weights, as the formulas say it.

m_k[n] = the distance of sample n of f_k and g_k
loss   = Σ_k w_k[n] m_k[n], then the reduction over samples
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N], the mean of the squared differences of each sample."""
    return (student - teacher).square().flatten(1).mean(1)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of Huber's function with δ = 1: d²/2 up to |d| = 1, |d| − 1/2 beyond."""
    return F.smooth_l1_loss(student, teacher, reduction="none").flatten(1).mean(1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos of the angle between the elements of each sample, as vectors; cos is 0 with a zero vector."""
    return 1 - (direction(student) * direction(teacher)).sum(1)


def direction(x: Tensor) -> Tensor:
    """[N, ...] -> [N, E] of norm 1; a zero vector (its norm below the dtype's normal numbers) is 0, a constant."""
    x = x.flatten(1)
    with torch.no_grad():  # the direction does not depend on the scale, so its gradient needs none of this
        scale = x.abs().amax(1, keepdim=True)
        zero = scale * (x / scale).square().sum(1, keepdim=True).sqrt() < torch.finfo(x.dtype).tiny
        zero |= scale == 0
    scaled = torch.where(zero, 0.0, x) / torch.where(zero, 1.0, scale)
    return scaled / torch.where(zero, 1.0, scaled.square().sum(1, keepdim=True)).sqrt()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, C_s, ...] and [N, C_t, ...] -> [N], the mean over positions of the squared difference of attention maps."""
    return (attention_map(student) - attention_map(teacher)).square().mean(1)


def attention_map(x: Tensor) -> Tensor:
    """[N, C, ...] -> [N, S], A = Σ_c f² over its norm."""
    energy = x.square().sum(1).flatten(1)
    largest = energy.detach().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)  # so that no square overflows
    norm = scale * torch.linalg.vector_norm(energy / scale, dim=1, keepdim=True)
    return energy / (norm + 1e-6)


DISTANCES = {"mse": mse, "smooth_l1": smooth_l1, "cosine": cosine, "attention": attention}


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
        f, g = (x.to(dtype) if x.dim() > 1 else x.to(dtype)[:, None] for x in (f, g))
        used = w_k != 0
        m_used = distance_of(torch.where(per_element(used, f), f, 0.0), torch.where(per_element(used, g), g, 0.0))
        m_unused = distance_of(f.detach(), g.detach())
        m_unused = torch.where(m_unused.isfinite(), m_unused, 0.0)  # at w = 0: value 0, gradient m
        terms.append(torch.where(used, w_k * m_used, w_k * m_unused))
    per_sample = torch.stack(terms).sum(0)
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (max(n_samples, 1) if reduction == "mean" else 1)


def per_element(per_sample: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...]"""
    return per_sample.view(-1, *[1] * (like.dim() - 1))
