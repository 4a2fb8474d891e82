"""The passes of the op hint for the distance "attention"."""

import math

import torch
from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare_pass


def fake_attention_forward(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The distances [K, N], and [N, positions] of every student, then of every teacher: ∂distance/∂(Σ_c f²)."""
    dtype = compute_dtype(*student, *teacher)
    distance = student[0].new_empty((len(student), student[0].shape[0]), dtype=dtype)
    return distance, [f.new_empty((f.shape[0], math.prod(f.shape[2:])), dtype=dtype) for f in (*student, *teacher)]


def fake_attention_backward(
    features: list[Tensor], slopes: list[Tensor], weights: Tensor, needs: list[bool]
) -> list[Tensor]:
    """In the memory layout of the features, where that is contiguous or channels last; else contiguous."""

    def gradient(f: Tensor) -> Tensor:
        return torch.empty_like(f if f.movedim(1, -1).is_contiguous() else f.contiguous())

    return [gradient(f) if need else f.new_empty((0,)) for f, need in zip(features, needs, strict=True)]


declare_pass(
    "attention_forward(Tensor[] student, Tensor[] teacher, Tensor? weights) -> (Tensor distance, Tensor[] slopes)",
    fake_attention_forward,
)
declare_pass(
    "attention_backward(Tensor[] features, Tensor[] slopes, Tensor weights, bool[] needs) -> Tensor[]",
    fake_attention_backward,
)
