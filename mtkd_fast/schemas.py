"""The ops of torch.ops.mtkd_fast: their schemas and what they return, without a kernel.

Declared here and nowhere else, so that a build without C++ has the same ops, and torch.compile sees one graph either
way. C++ adds the implementations of ``kd*``, ``hint*`` and ``relation*`` (csrc/*_ops.cpp, *_autograd.cpp), Triton
those of ``*_triton*`` (triton_ops.py), so far not of the relations.

    kd, kd_divergence, hint, relation    with autograd; what the public functions call
    *_forward, *_backward, ...           the passes over memory, without autograd

``row_stats`` is one [6K + 5, N] buffer, N the flattened rows: see ``RowStats`` in csrc/kd.h. Without ``stats`` or
``keep_stats`` only its last row, the scale, is defined.
"""

import math

import torch
from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype

LIBRARY = torch.library.Library("mtkd_fast", "DEF")

_LOSS = (
    "Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, Tensor? row_weights, Tensor? num_items, "
    "str rule, str divergence, float temperature, float kd_scale, float ce_weight, float label_smoothing, "
    "int ignore_index, str reduction"
)
_BACKWARD = (
    "Tensor student, Tensor[] teachers, Tensor? target, Tensor weights, Tensor? upstream, Tensor row_stats, "
    "str divergence, float temperature, float kd_scale, float ce_weight, float label_smoothing, bool[] needs"
)
FUSED = (
    f"kd({_LOSS}, bool stats) -> (Tensor loss, Tensor row_stats)",
    "kd_divergence(Tensor student, Tensor[] teachers, str divergence, float temperature) -> Tensor",
    "hint(Tensor[] student, Tensor[] teacher, Tensor? weights, str reduction) -> Tensor",
    "relation(Tensor student, Tensor teacher, str relation) -> Tensor",
)
PASSES = (
    f"kd_forward({_LOSS}, bool skip_zero_weights, bool keep_stats, bool write_gradient) -> "
    "(Tensor loss, Tensor row_stats, Tensor gradient)",
    f"kd_backward({_BACKWARD}) -> Tensor[]",
    "kd_rescale(Tensor gradient, Tensor upstream, Tensor scale) -> Tensor",
    "kd_rescale_(Tensor(a!) gradient, Tensor upstream, Tensor scale) -> ()",
    "hint_forward(Tensor[] student, Tensor[] teacher, Tensor? weights) -> Tensor",
    "hint_backward(Tensor[] student, Tensor[] teacher, Tensor weights, bool[] needs) -> Tensor[]",
)
CPP_PASSES = (  # without a Triton twin, so far
    "relation_forward(Tensor student, Tensor teacher, str relation, bool write_gradient) -> "
    "(Tensor loss, Tensor gradient)",
)


def triton_name(schema: str) -> str:
    """kd_forward(...) -> kd_triton_forward(...)."""
    op, rest = schema.split("_", 1)
    return f"{op}_triton_{rest}"


def row_stats_size(n_teachers: int) -> int:
    return 6 * n_teachers + 5


def n_rows(logits: Tensor) -> int:
    return math.prod(logits.shape[:-1])  # Size.numel() would fix a symbolic size


def fake_kd_forward(student: Tensor, teachers: list[Tensor], *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, _, _, write_gradient = arguments
    dtype = compute_dtype(student, *teachers)
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=dtype)
    row_stats = student.new_empty((row_stats_size(len(teachers)), n_rows(student)), dtype=dtype)
    gradient = student.new_empty(student.shape if write_gradient else (0,))
    return loss, row_stats, gradient


def fake_kd_backward(student: Tensor, teachers: list[Tensor], *arguments: object) -> list[Tensor]:
    """One gradient for the student and each teacher; an empty one where none is needed."""
    needs = arguments[-1]
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip((student, *teachers), needs, strict=True)]


def fake_kd_rescale(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def fake_kd_rescale_(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    return None


def fake_hint_forward(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """[K, N]"""
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=compute_dtype(*student, *teacher))


def fake_hint_backward(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor, needs: list[bool]
) -> list[Tensor]:
    """In the memory layout of the features, where a pair shares one that is dense; else contiguous."""

    def gradient(f: Tensor, g: Tensor) -> Tensor:
        kept = torch.empty_like(f)  # has the strides of f only where f is dense
        alike = f.stride() == g.stride() == kept.stride() and f.stride(0) * f.shape[0] == f.numel()
        return kept if alike else torch.empty_like(f, memory_format=torch.contiguous_format)

    pairs = zip(student, teacher, needs, strict=True)
    return [gradient(f, g) if need else f.new_empty((0,)) for f, g, need in pairs]


def fake_relation_forward(
    student: Tensor, teacher: Tensor, relation: str, write_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    return loss, student.new_empty(student.shape if write_gradient else (0,))


FAKES = {
    "kd_forward": fake_kd_forward,
    "kd_backward": fake_kd_backward,
    "kd_rescale": fake_kd_rescale,
    "kd_rescale_": fake_kd_rescale_,
    "hint_forward": fake_hint_forward,
    "hint_backward": fake_hint_backward,
}
CPP_FAKES = {"relation_forward": fake_relation_forward}

for schema in (*FUSED, *PASSES, *map(triton_name, PASSES), *CPP_PASSES):
    LIBRARY.define(schema)
for name, fake in FAKES.items():
    for op in (name, triton_name(name)):
        torch.library.register_fake(f"mtkd_fast::{op}", fake, lib=LIBRARY)
for name, fake in CPP_FAKES.items():
    torch.library.register_fake(f"mtkd_fast::{name}", fake, lib=LIBRARY)
