"""The op ``kd`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.kd."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, library, poisoned, poisoned_like
from mtkd_fast.schemas.kd import row_stats_size

# Of kd_forward: chosen by shape, or by name.
VARIANTS = ("", "_registers", "_short", "_shared", "_pairs", "_clusters", "_stream", "_pixels", "_stream_of_pixels")


def arguments(
    struct: type[layout.KDArgs], student: Tensor, teachers: list[Tensor], gradient: Tensor | None,
    target: Tensor | None, **options,
):  # fmt: skip
    """The struct with its KDArgs filled in, the inputs that it points at, and where a gradient is written."""
    args = struct()
    student, *teachers = layout.rows_of(student, *teachers, *(() if gradient is None else (gradient,)))
    written = layout.Gradient() if gradient is None else layout.gradient(teachers.pop())
    outer, args.inner, args.classes = student.shape
    args.rows = outer * args.inner
    args.teachers = len(teachers)
    args.student = layout.logits(student)
    for k, teacher in enumerate(teachers):
        args.teacher[k] = layout.logits(teacher)
    target, _ = layout.per_row(target, torch.int64)
    target = None if target is None else target.contiguous()
    args.target = layout.address(target)
    args.divergence = layout.DIVERGENCES[options.pop("divergence")]
    for name, value in options.items():
        setattr(args, name, value)
    inputs = {"student": student, "target": target}
    inputs |= {f"teacher{k}": teacher for k, teacher in enumerate(teachers)}
    return args, inputs, written


def forward_arguments(
    student, teachers, gradient, target, weights, row_weights, items,
    *, rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index, skip_zero_weights,
):  # fmt: skip
    args, inputs, written = arguments(
        layout.KDForward, student, teachers, gradient, target, divergence=divergence, beta=beta,
        temperature=temperature, kd_scale=kd_scale, ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index,
    )  # fmt: skip
    args.gradient = written
    args.rule = layout.RULES[rule]
    args.skip_zero_weights = skip_zero_weights
    row_weights, _ = layout.per_row(row_weights, torch.float32)
    row_weights = None if row_weights is None else row_weights.contiguous()
    items = None if items is None else torch.as_tensor(items, dtype=torch.float32).reshape(1)
    weights, args.weights_teacher_stride, args.weights_row_stride = layout.per_teacher(weights, args.rows)
    args.row_weights, args.items, args.weights = map(layout.address, (row_weights, items, weights))
    return args, inputs | {"row_weights": row_weights, "items": items, "weights": weights}


def fits_on_chip(student: Tensor) -> bool:
    """Whether the forward can write the gradient, whatever the teachers, their dtypes, the rule and the divergence."""
    (rows,) = layout.rows_of(student)
    outer, inner, classes = rows.shape
    args = layout.KDForward(rows=outer * inner, inner=inner, classes=classes, teachers=layout.MAX_TEACHERS)
    args.student = layout.logits(rows)
    args.rule, args.divergence = layout.RULES["confidence"], layout.DIVERGENCES["jsd"]
    return bool(library().fits_on_chip(layout.ctypes.byref(args)))


class Placement(layout.ctypes.Structure):
    _fields_ = (
        ("blocks", layout.ctypes.c_int),
        ("threads", layout.ctypes.c_int),
        ("places", layout.ctypes.c_int),
        ("shared_bytes", layout.int64),
    )


def placement(classes: int, dtype: torch.dtype, n_teachers: int, rule: str, divergence: str) -> Placement:
    """Where a long row lies (csrc/kd_variants.h)."""
    args = layout.KDForward(rows=1, inner=1, classes=classes, teachers=n_teachers)
    args.rule, args.divergence = layout.RULES[rule], layout.DIVERGENCES[divergence]
    for logits in (args.student, *args.teacher):
        logits.dtype = layout.DTYPES[dtype]
    found = Placement()
    library().placement(layout.ctypes.byref(args), layout.ctypes.byref(found))
    return found


def forward(
    student, teachers, target, weights, row_weights, items,
    *, rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index,
    skip_zero_weights, write_gradient, keep_stats=True, variant="",
):  # fmt: skip
    """-> row_loss [N], row_stats, gradient [..., C], which is empty if not asked for."""
    gradient = poisoned_like(student, student, write_gradient)
    args, inputs = forward_arguments(
        student, teachers, gradient if write_gradient else None, target, weights, row_weights, items,
        rule=rule, divergence=divergence, beta=beta, temperature=temperature, kd_scale=kd_scale, ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, skip_zero_weights=skip_zero_weights,
    )  # fmt: skip
    row_loss = poisoned((args.rows,), torch.float32)
    row_stats = poisoned((row_stats_size(args.teachers, divergence), args.rows), torch.float32)
    args.row_loss, args.row_stats = row_loss.data_ptr(), row_stats.data_ptr()
    args.keep_stats = keep_stats
    outputs = {"row_loss": row_loss, "row_stats": row_stats, "gradient": gradient}
    launch("kd_forward" + variant, args, inputs, outputs)
    return row_loss, row_stats, gradient


def backward(
    student, teachers, target, weights, upstream, row_stats,
    divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, needs,
):  # fmt: skip
    """-> the gradients of the student and of each teacher; an empty one where none is needed."""
    wanted = [poisoned_like(x, student, need) for x, need in zip((student, *teachers), needs, strict=True)]
    some = next((g for g, need in zip(wanted, needs, strict=True) if need), None)
    args, inputs, written = arguments(
        layout.KDBackward, student, teachers, some, target, divergence=divergence, beta=beta, temperature=temperature,
        kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing,
    )  # fmt: skip
    weights, args.weights_teacher_stride, args.weights_row_stride = layout.per_teacher(weights, args.rows)
    upstream, args.upstream_stride = layout.per_row(upstream, torch.float32)
    row_stats = row_stats.contiguous()
    args.weights, args.upstream, args.row_stats = map(layout.address, (weights, upstream, row_stats))
    args.student_gradient = written
    args.student_gradient.data = wanted[0].data_ptr() if needs[0] else None
    args.student_gradient.dtype = args.student.dtype
    for k, (gradient, need) in enumerate(zip(wanted[1:], needs[1:], strict=True)):
        args.teacher_gradient[k] = gradient.data_ptr() if need else None
    outputs = {"student_gradient": wanted[0]} | {f"teacher_gradient{k}": x for k, x in enumerate(wanted[1:])}
    launch("kd_backward", args, inputs | {"weights": weights, "upstream": upstream, "row_stats": row_stats}, outputs)
    return wanted


def _rescale(gradient: Tensor, out: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    args = layout.KDRescale()
    (rows,) = layout.rows_of(gradient)
    outer, args.inner, args.classes = rows.shape
    args.rows = outer * args.inner
    args.gradient = layout.gradient(rows)
    upstream, args.upstream_stride = layout.per_row(upstream, torch.float32)
    scale = scale.reshape(-1).contiguous()
    args.out, args.upstream, args.scale = map(layout.address, (out, upstream, scale))
    launch("kd_rescale", args, {"gradient": gradient, "upstream": upstream, "scale": scale}, {"out": out})
    return out


def rescale(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    return _rescale(gradient, poisoned_like(gradient, gradient, True), upstream, scale)


def rescale_(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    _rescale(gradient, gradient, upstream, scale)
