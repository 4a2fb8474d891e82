"""The op kd. ``row_stats`` is one buffer of N numbers, N the flattened rows, many times: see ``RowStats`` in csrc/kd.h.
Without ``stats`` or ``keep_stats`` only its scale is defined. ``beta`` is 0 for a divergence that takes none.
"""

import math

import torch
from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare, declare_pass

_LOSS = (
    "Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, Tensor? row_weights, Tensor? num_items, "
    "str rule, str divergence, float beta, float temperature, float kd_scale, float ce_weight, float label_smoothing, "
    "int ignore_index, str reduction"
)
_BACKWARD = (
    "Tensor student, Tensor[] teachers, Tensor? target, Tensor weights, Tensor? upstream, Tensor row_stats, "
    "str divergence, float beta, float temperature, float kd_scale, float ce_weight, float label_smoothing, "
    "bool[] needs"
)


ELEMENTWISE = ("jsd", "tvd", "skew_kl", "skew_reverse_kl")  # sums of φ(p, q) over the classes


def row_stats_size(n_teachers: int, divergence: str) -> int:
    return (7 if divergence in ELEMENTWISE else 6) * n_teachers + 5


def n_rows(logits: Tensor) -> int:
    return math.prod(logits.shape[:-1])  # Size.numel() would fix a symbolic size


def fake_gradient(logits: Tensor, student: Tensor, needed: bool) -> Tensor:
    """Dense, in the memory order of the student's logits."""
    return torch.empty_like(student, dtype=logits.dtype) if needed else logits.new_empty(0)


def fake_kd_forward(student: Tensor, teachers: list[Tensor], *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, _, _, divergence, *_, reduction, _, _, write_gradient = arguments
    dtype = compute_dtype(student, *teachers)
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=dtype)
    row_stats = student.new_empty((row_stats_size(len(teachers), divergence), n_rows(student)), dtype=dtype)
    return loss, row_stats, fake_gradient(student, student, write_gradient)


def fake_kd_backward(student: Tensor, teachers: list[Tensor], *arguments: object) -> list[Tensor]:
    """One gradient for the student and each teacher; an empty one where none is needed."""
    needs = arguments[-1]
    return [fake_gradient(x, student, need) for x, need in zip((student, *teachers), needs, strict=True)]


def fake_kd_rescale(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def fake_kd_rescale_(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    return None


declare(f"kd({_LOSS}, bool stats) -> (Tensor loss, Tensor row_stats)")
declare("kd_divergence(Tensor student, Tensor[] teachers, str divergence, float beta, float temperature) -> Tensor")
declare_pass(
    f"kd_forward({_LOSS}, bool skip_zero_weights, bool keep_stats, bool write_gradient) -> "
    "(Tensor loss, Tensor row_stats, Tensor gradient)",
    fake_kd_forward,
)
declare_pass(f"kd_backward({_BACKWARD}) -> Tensor[]", fake_kd_backward)
declare_pass("kd_rescale(Tensor gradient, Tensor upstream, Tensor scale) -> Tensor", fake_kd_rescale)
declare_pass("kd_rescale_(Tensor(a!) gradient, Tensor upstream, Tensor scale) -> ()", fake_kd_rescale_)
