"""The op ``mixture`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.mixture."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, poisoned

F32 = torch.float32


def arguments(
    struct: type[layout.Mixture], teachers: list[Tensor], weights: Tensor | None, temperature: float, skip_zero: bool,
    *others: Tensor,
):  # fmt: skip
    """The struct, its Mixture filled in, the inputs that it points at, and `others` [..., C] as rows like them."""
    args = struct()
    rows = layout.rows_of(*teachers, *others)
    teachers, others = rows[: len(teachers)], rows[len(teachers) :]
    outer, args.inner, args.classes = teachers[0].shape
    args.rows = outer * args.inner
    args.teachers = len(teachers)
    for k, teacher in enumerate(teachers):
        args.teacher[k] = layout.logits(teacher)
    weights, args.weights_teacher_stride, args.weights_row_stride = layout.per_teacher(weights, args.rows)
    args.weights = layout.address(weights)
    args.skip_zero_weights, args.temperature = skip_zero, temperature
    return args, {f"teacher{k}": t for k, t in enumerate(teachers)} | {"weights": weights}, others


def forward(teachers, weights, temperature, skip_zero_weights):
    """-> Σ_k w_k p_k [..., C], the states of the teachers [2K, N]"""
    args, inputs, _ = arguments(layout.MixtureForward, teachers, weights, temperature, skip_zero_weights)
    probabilities, row_stats = poisoned(teachers[0].shape, F32), poisoned((2 * args.teachers, args.rows), F32)
    args.probabilities, args.row_stats = probabilities.data_ptr(), row_stats.data_ptr()
    launch("mixture_forward", args, inputs, {"probabilities": probabilities, "row_stats": row_stats})
    return probabilities, row_stats


def backward(teachers, weights, upstream, row_stats, temperature, skip_zero_weights, needs):
    """-> <upstream, p_k> [K, N], the gradient of each teacher, an empty one where none is needed."""
    upstream = upstream if not any(upstream.stride()) else upstream.contiguous()
    args, inputs, (rows,) = arguments(
        layout.MixtureBackward, teachers, weights, temperature, skip_zero_weights, upstream
    )
    row_stats = row_stats.contiguous()
    args.upstream = layout.logits(rows)
    dots = poisoned((args.teachers, args.rows), F32)
    args.row_stats, args.dots = row_stats.data_ptr(), dots.data_ptr()
    wanted = [poisoned(t.shape if need else (0,), t.dtype) for t, need in zip(teachers, needs, strict=True)]
    for k, (gradient, need) in enumerate(zip(wanted, needs, strict=True)):
        args.teacher_gradient[k] = gradient.data_ptr() if need else None
    outputs = {"dots": dots} | {f"gradient{k}": g for k, g in enumerate(wanted)}
    launch("mixture_backward", args, inputs | {"upstream": upstream, "row_stats": row_stats}, outputs)
    return dots, wanted


def divergence(student, teachers, weights, temperature, skip_zero_weights, write_gradient):
    """-> KL(pbar‖q) [...], row_stats [6K + 5, N], the student's gradient, which is empty if not asked for."""
    args, inputs, (rows,) = arguments(
        layout.MixtureDivergence, teachers, weights, temperature, skip_zero_weights, student
    )
    args.student = layout.logits(rows)
    value, row_stats = poisoned(student.shape[:-1], F32), poisoned((6 * args.teachers + 5, args.rows), F32)
    gradient = poisoned(student.shape if write_gradient else (0,), student.dtype)
    args.divergence, args.row_stats = value.data_ptr(), row_stats.data_ptr()
    args.gradient = gradient.data_ptr() if write_gradient else None
    outputs = {"divergence": value, "row_stats": row_stats, "gradient": gradient}
    launch("mixture_divergence", args, inputs | {"student": rows}, outputs)
    return value, row_stats, gradient
