"""The op relation: RKD's angle and distance losses of a batch [B, D], against the form in which they were published."""

import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import rkd_angle_loss, rkd_distance_loss

from ..case import Case, Exact, Inputs, Loss, generator, upcast
from .logits import random_logits

FUSED = {"angle": rkd_angle_loss, "distance": rkd_distance_loss}


@dataclass(frozen=True)
class Relation(Case):
    op = "relation"
    OBJECTIVES = ("angle", "distance")
    unit = "B×B matrices"

    objective: str = "angle"
    rows: int = 64
    width: int = 512
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"B={self.rows} D={self.width}"

    @property
    def gradient_bytes(self) -> int:
        """One B×B matrix of float32, which is what the memory of a relation grows with."""
        return 4 * self.rows**2

    @property
    def number_bytes(self) -> int:
        """The gradient [B, D]."""
        return self.rows * self.width * self.dtype.itemsize

    def minimal_bytes(self, gradient: bool = True) -> int:
        """Student and teacher read, the gradient written. The work is B² D and B³: no copy is its floor."""
        return (2 + gradient) * self.rows * self.width * self.dtype.itemsize

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        g = generator(device, seed)
        return Inputs(tuple(random_logits(self.rows, self.width, self.dtype, g) for _ in range(2)))

    def oracle(self, inputs: Inputs) -> Exact:
        """By autograd in float64, the angles one vertex after another: all at once would not fit."""
        x, y = (p.double() for p in inputs.arguments)
        x.requires_grad_()
        if self.objective == "distance":
            loss = F.smooth_l1_loss(published_distances(x), published_distances(y))
            return Exact(loss.item(), list(torch.autograd.grad(loss, x)), by_row=False)
        s, t = x @ x.t(), y @ y.t()
        leaf, total = s.detach().requires_grad_(), 0.0
        for i in range(self.rows):
            loss = F.smooth_l1_loss(cosines_at(leaf, i), cosines_at(t, i)) / self.rows
            loss.backward()
            total += loss.item()
        return Exact(total, list(torch.autograd.grad(s, x, leaf.grad)), by_row=False)

    def eager(self) -> dict[str, Loss]:
        return {"eager": partial(published, relation=self.objective)}

    def fused(self, implementation: str) -> Loss:
        return partial(FUSED[self.objective], implementation=implementation)

    def few(self) -> "Relation":
        return replace(self, rows=min(8, self.rows))

    def settle(self) -> None:
        """PyTorch's products of these sizes: the packing buffers of its BLAS, some 3 MB, stay with the process."""
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(self.rows, self.width, dtype=dtype)
            (x @ x.t()) @ x

    def why_not(self, form: str, device: str) -> str | None:
        """Differences, norms and units of both sides with the student's gradients; angles, errors, gradients."""
        of_angles = 6 * self.rows**2 * self.width + 5 * self.rows**3
        needed = 4 * (of_angles if self.objective == "angle" else 12 * self.rows**2)
        return f"needs some {needed >> 30} GiB" if needed > free_bytes(device) // 2 else None

    def strategy(self, implementation: str, device: str, gradient: bool) -> str:
        return "a float64 Gram matrix, no B×B×D, no B×B×B"


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# The published forms (code: github.com/lenscloth/RKD), whose teacher has no gradient.


def published(student: Tensor, teacher: Tensor, relation: str) -> Tensor:
    relations = published_angles if relation == "angle" else published_distances
    with torch.no_grad():
        target = relations(upcast(teacher))
    return F.smooth_l1_loss(relations(upcast(student)), target)


def published_angles(x: Tensor) -> Tensor:
    """The differences [B, B, D], normalised, and their products [B, B, B]."""
    unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
    return torch.bmm(unit, unit.transpose(1, 2))


def published_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    d = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.t()).clamp(min=1e-12).sqrt()
    d = d * ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return d / d[d > 0].mean()


def cosines_at(gram: Tensor, i: int) -> Tensor:
    """[B, B], at vertex i."""
    own, row = gram[i, i], gram[i]
    squared = gram.diagonal() + own - 2 * row
    vertex = torch.arange(len(gram), device=gram.device) == i
    inverse = torch.where(vertex, 0.0, torch.where(vertex, 1.0, squared).rsqrt())
    return (gram - row[:, None] - row[None] + own) * inverse[:, None] * inverse[None]
