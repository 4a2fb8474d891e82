"""The op ``hint`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.hint."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, poisoned


def dense(x: Tensor) -> Tensor:
    """[N, ...] whose samples lie in the order of their dimensions."""
    return x if x[:1].is_contiguous() and x.stride(0) >= 0 else x.contiguous()


def arguments(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str,
    struct: type[layout.Hint] = layout.Hint,
):  # fmt: skip
    """The struct and the tensors that it points at; a pair is read in place where its samples are dense."""
    args = struct()
    args.distance = layout.DISTANCES[distance]
    student, teacher = [dense(f) for f in student], [dense(g) for g in teacher]
    args.pairs, args.samples = len(student), student[0].shape[0]
    for pair, f, g in zip(args.pair, student, teacher, strict=False):
        pair.student, pair.teacher = f.data_ptr(), g.data_ptr()
        pair.student_stride, pair.teacher_stride = f.stride(0), g.stride(0)
        pair.elements = f.shape[1:].numel()
        pair.student_dtype, pair.teacher_dtype = layout.DTYPES[f.dtype], layout.DTYPES[g.dtype]
    weights, args.weights_pair_stride, args.weights_sample_stride = layout.per_teacher(weights, args.samples)
    args.weights = layout.address(weights)
    inputs = {f"student{k}": f for k, f in enumerate(student)} | {f"teacher{k}": g for k, g in enumerate(teacher)}
    return args, inputs | {"weights": weights}


def forward(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str) -> Tensor:
    """-> what is kept, [kept_numbers, K, N]; first the distances"""
    args, inputs = arguments(student, teacher, weights, distance)
    kept = poisoned((3 if distance == "cosine" else 1, args.pairs, args.samples), torch.float32)
    args.kept = kept.data_ptr()
    launch("hint_forward", args, inputs, {"kept": kept})
    return kept


def backward(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor,
    kept: Tensor,
    needs: list[bool],
    distance: str,
) -> list[Tensor]:
    """-> the gradient of each student's features; an empty one where none is needed."""
    args, inputs = arguments(student, teacher, weights, distance)
    kept = kept.contiguous()
    args.kept = kept.data_ptr()
    wanted = room_for_gradients(args, student, needs)
    launch("hint_backward", args, inputs | {"kept": kept}, {f"gradient{k}": x for k, x in enumerate(wanted)})
    return wanted


def fused(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor | None,
    distance: str,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """-> the distances [K, N], the gradients of scale·Σ weight·distance; an empty one where none is needed."""
    args, inputs = arguments(student, teacher, weights, distance, layout.HintFused)
    distances = poisoned((args.pairs, args.samples), torch.float32)
    args.kept, args.scale = distances.data_ptr(), scale
    wanted = room_for_gradients(args, student, needs)
    launch("hint_fused", args, inputs, {"distances": distances} | {f"gradient{k}": x for k, x in enumerate(wanted)})
    return distances, wanted


def room_for_gradients(args: layout.Hint, student: list[Tensor], needs: list[bool]) -> list[Tensor]:
    wanted = [poisoned(f.shape if need else (0,), f.dtype) for f, need in zip(student, needs, strict=True)]
    for pair, gradient, need in zip(args.pair, wanted, needs, strict=False):
        pair.gradient = gradient.data_ptr() if need else None
    return wanted
