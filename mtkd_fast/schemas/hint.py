"""The op hint."""

import torch
from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare, declare_pass


def kept_numbers(distance: str) -> int:
    """Of a pair and a sample the forward keeps the distance, and for the cosine both norms (csrc/distances.h)."""
    return 3 if distance == "cosine" else 1


def fake_hint_forward(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str) -> Tensor:
    """What is kept, [kept_numbers, K, N]; first the distances."""
    shape = (kept_numbers(distance), len(student), student[0].shape[0])
    return student[0].new_empty(shape, dtype=compute_dtype(*student, *teacher))


def fake_hint_backward(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor, kept: Tensor, needs: list[bool], distance: str
) -> list[Tensor]:
    """In the memory layout of the features, where a pair shares one that is dense; else contiguous."""

    def gradient(f: Tensor, g: Tensor) -> Tensor:
        kept = torch.empty_like(f)  # has the strides of f only where f is dense
        alike = f.stride() == g.stride() == kept.stride() and f.stride(0) * f.shape[0] == f.numel()
        return kept if alike else torch.empty_like(f, memory_format=torch.contiguous_format)

    pairs = zip(student, teacher, needs, strict=True)
    return [gradient(f, g) if need else f.new_empty((0,)) for f, g, need in pairs]


declare("hint(Tensor[] student, Tensor[] teacher, Tensor? weights, str distance, str reduction) -> Tensor")
declare_pass(
    "hint_forward(Tensor[] student, Tensor[] teacher, Tensor? weights, str distance) -> Tensor", fake_hint_forward
)
declare_pass(
    "hint_backward(Tensor[] student, Tensor[] teacher, Tensor weights, Tensor kept, bool[] needs, str distance)"
    " -> Tensor[]",
    fake_hint_backward,
)
