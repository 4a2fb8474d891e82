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
    return fake_gradients(student, teacher, needs)


def fake_hint_fused_forward(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str, reduction: str,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    shape = student[0].shape[:1] if reduction == "none" else ()
    loss = student[0].new_empty(shape, dtype=compute_dtype(*student, *teacher))
    return loss, fake_gradients(student, teacher, needs)


def fake_gradients(student: list[Tensor], teacher: list[Tensor], needs: list[bool]) -> list[Tensor]:
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
declare_pass(
    "hint_fused_forward(Tensor[] student, Tensor[] teacher, Tensor? weights, str distance, str reduction, bool[] needs)"
    " -> (Tensor loss, Tensor[] gradients)",
    fake_hint_fused_forward,
)
