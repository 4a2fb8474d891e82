"""The op hint: mean over samples of Σ_k w_k[n] · distance of K pairs of features [N, width], with the K gradients."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import hint_loss

from ..case import Case, Exact, Inputs, Loss, blocks, generator, upcast
from .logits import random_logits, random_weights


@dataclass(frozen=True)
class Hint(Case):
    op = "hint"
    OBJECTIVES = ("mse", "smooth_l1", "cosine")

    objective: str = "mse"
    rows: int = 64
    width: int = 4096
    teachers: int = 3
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"N={self.rows} E={self.width} K={self.teachers}"

    @property
    def gradient_bytes(self) -> int:
        return self.teachers * self.rows * self.width * self.dtype.itemsize

    @property
    def number_bytes(self) -> int:
        return 6 * self.teachers * self.rows * 4

    def minimal_bytes(self, gradient: bool = True) -> int:
        """K students and K teachers read, K gradients written."""
        return (2 + gradient) * self.gradient_bytes

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        g = generator(device, seed)
        sides = [[random_logits(self.rows, self.width, self.dtype, g) for _ in range(self.teachers)] for _ in range(2)]
        return Inputs((*sides, random_weights(self.teachers, self.rows, g)))

    def oracle(self, inputs: Inputs) -> Exact:
        students, teachers, weights = inputs.arguments
        gradients, total = [torch.empty_like(f, dtype=torch.float64) for f in students], 0.0
        for block in blocks(self.rows, self.width):
            leaves = [f[block].double().requires_grad_() for f in students]
            constants = [g[block].double() for g in teachers]
            found = hint_loss(
                leaves, constants, weights=weights[:, block].double(), distance=self.objective, reduction="sum",
                implementation="reference",
            )  # fmt: skip
            part = found / self.rows
            part.backward()
            total += part.item()
            for gradient, leaf in zip(gradients, leaves, strict=True):
                gradient[block] = leaf.grad
        return Exact(total, gradients)

    def eager(self) -> dict[str, Loss]:
        return {"eager": partial(loop, distance=self.objective)}

    def fused(self, implementation: str) -> Loss:
        return partial(fused, distance=self.objective, implementation=implementation)

    def few(self) -> "Hint":
        return replace(self, rows=min(8, self.rows), width=min(100, self.width))

    def strategy(self, implementation: str, device: str, gradient: bool) -> str:
        return "the backward reads the features again" if gradient else "value only"


def loop(students: list[Tensor], teachers: list[Tensor], weights: Tensor, distance: str) -> Tensor:
    terms = [w * DISTANCES[distance](upcast(f), upcast(g)) for f, g, w in zip(students, teachers, weights, strict=True)]
    return torch.stack(terms).sum(0).mean()


DISTANCES = {
    "mse": lambda f, g: F.mse_loss(f, g, reduction="none").mean(1),
    "smooth_l1": lambda f, g: F.smooth_l1_loss(f, g, reduction="none").mean(1),
    "cosine": lambda f, g: 1 - F.cosine_similarity(f, g, dim=1),
}


def fused(
    students: list[Tensor], teachers: list[Tensor], weights: Tensor, distance: str, implementation: str
) -> Tensor:
    return hint_loss(students, teachers, weights=weights, distance=distance, implementation=implementation)
