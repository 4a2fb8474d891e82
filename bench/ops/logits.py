"""Random logits, and what the ops on rows of logits have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..case import Case

SHARP = 3.0  # teachers are three times as sharp as the student


def random_logits(rows: int, classes: int, dtype: torch.dtype, g: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, classes, device=g.device, generator=g).mul_(scale).to(dtype)


def random_weights(count: int, rows: int, g: torch.Generator) -> Tensor:
    """[K, N], float32, summing to one over K."""
    return torch.randn(count, rows, device=g.device, generator=g).softmax(0)


@dataclass(frozen=True)
class Ensemble(Case):
    """Logits [N, C] of one student, who learns, and K teachers."""

    objective: str
    rows: int = 256
    classes: int = 100
    teachers: int = 3
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.classes} K={self.teachers}"

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.classes * self.dtype.itemsize

    def minimal_bytes(self, gradient: bool = True) -> int:
        """(K+2)·N·C elements, or K+1 without the student's gradient."""
        return (self.teachers + 1 + gradient) * self.gradient_bytes
