"""Inputs of one measurement, and the objectives that are measured on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import Shape

TEMPERATURE = 4.0
OBJECTIVES = ("confidence", "uniform")  # CE + τ² Σ_k w_k KL(p_k‖q): CA-MKD's logit objective, and the plain average


class Problem(NamedTuple):
    student: Tensor  # [N, C]
    teachers: list[Tensor]  # K tensors [N, C], each its own memory, as K forward passes give them
    target: Tensor  # [N]

    def leaf(self) -> Tensor:
        """The student without a gradient yet, in the same memory: every timed call starts from a fresh leaf."""
        return self.student.detach().requires_grad_()


def make(shape: Shape, device: str, seed: int = 0) -> Problem:
    """Teachers three times as sharp as the student, sure of the label in half of the rows."""
    g = torch.Generator(device).manual_seed(seed)

    def logits(scale: float) -> Tensor:
        x = torch.randn(shape.rows, shape.classes, device=device, generator=g)
        return x.mul_(scale).to(shape.dtype)

    target = torch.randint(shape.classes, (shape.rows,), device=device, generator=g)
    teachers = [logits(3.0) for _ in range(shape.teachers)]
    for teacher in teachers:
        teacher[::2].scatter_(1, target[::2, None], 12.0)
    return Problem(logits(1.0), teachers, target)
