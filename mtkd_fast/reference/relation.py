"""The op ``relation``: RKD's distance and angle losses, as published, from explicit differences.

Differences are [B, B, D] and angles [B, B, B]: a specification, not something to train with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """[B, D] -> [B, B]; a pair closer than 1e-6 counts as 1e-6 away, without a gradient; the diagonal is 0."""
    squared = (x[:, None] - x[None]).square().sum(-1).clamp_min(1e-12)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return torch.where(apart, squared, 1.0).sqrt() * apart


def angles(x: Tensor) -> Tensor:
    """[B, D] -> [B, B, B], cos of the angle at i between j and k; 0, without a gradient, where one of them is at i."""
    difference = x[None] - x[:, None]
    squared = difference.square().sum(-1, keepdim=True)
    unit = torch.where(squared == 0, 0.0, difference) / torch.where(squared == 0, 1.0, squared).sqrt()
    return unit @ unit.mT


def over_mean(d: Tensor) -> Tensor:
    positive = d > 0
    return d / (d.sum() / positive.sum().clamp(min=1))


def relation(student: Tensor, teacher: Tensor, row_mask: Tensor | None, name: str) -> Tensor:
    """[B, D_s] and [B, D_t] -> scalar. Huber's loss with threshold 1, its mean over B² pairs or B³ triples.

    Of the samples in ``row_mask`` [B], where it is given.
    """
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    if row_mask is not None:
        return among(row_mask, s, t, name)
    if name == "angle":
        return F.smooth_l1_loss(angles(s), angles(t))
    if len(s) < 2:
        return 0.0 * (s.sum() + t.sum())
    return F.smooth_l1_loss(over_mean(distances(s)), over_mean(distances(t)))


def among(row_mask: Tensor, s: Tensor, t: Tensor, name: str) -> Tensor:
    """The same, with a term of 0 for every pair or triple that a sample outside the mask is in."""
    s, t = (torch.where(row_mask[:, None], x, 0.0) for x in (s, t))
    pairs = row_mask[:, None] & row_mask
    if name == "angle":
        counted, a, b = pairs[:, :, None] & row_mask, angles(s), angles(t)
    else:
        counted, (a, b) = pairs, (over_mean(distances(x) * pairs) for x in (s, t))
    terms = torch.where(counted, F.smooth_l1_loss(a, b, reduction="none"), 0.0)
    return terms.sum() / counted.sum().clamp(min=1)


def relation_peers(points: list[Tensor], row_mask: Tensor | None, angle_weight: float) -> Tensor:
    """M times [B, D] -> [M]: of every student distance + angle_weight · angle to its peers, constants, their mean."""
    losses = []
    for k, student in enumerate(points):
        peers = [x.detach() for j, x in enumerate(points) if j != k]
        terms = [relation(student, peer, row_mask, "distance") for peer in peers]
        if angle_weight != 0:
            terms += [angle_weight * relation(student, peer, row_mask, "angle") for peer in peers]
        losses.append(sum(terms) / len(peers))
    return torch.stack(losses)
