"""The op ``kd`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.kd."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, library, poisoned

VARIANTS = ("", "_registers", "_shared", "_stream")  # of kd_forward: chosen by shape, or by name


def arguments(struct: type[layout.KDArgs], student: Tensor, teachers: list[Tensor], target: Tensor | None, **options):
    """The struct with its KDArgs filled in, and the inputs that it points at."""
    args = struct()
    student, teachers = layout.rows_of(student), [layout.rows_of(t) for t in teachers]
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
    return args, inputs


def forward_arguments(
    student, teachers, target, weights, row_weights, items,
    *, rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index, skip_zero_weights,
):  # fmt: skip
    args, inputs = arguments(
        layout.KDForward, student, teachers, target, divergence=divergence, beta=beta, temperature=temperature,
        kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
    )  # fmt: skip
    args.rule = layout.RULES[rule]
    args.skip_zero_weights = skip_zero_weights
    row_weights, _ = layout.per_row(row_weights, torch.float32)
    row_weights = None if row_weights is None else row_weights.contiguous()
    items = None if items is None else torch.as_tensor(items, dtype=torch.float32).reshape(1)
    weights, args.weights_teacher_stride, args.weights_row_stride = layout.per_teacher(weights, args.rows)
    args.row_weights, args.items, args.weights = map(layout.address, (row_weights, items, weights))
    return args, inputs | {"row_weights": row_weights, "items": items, "weights": weights}


def fits_on_chip(student: Tensor) -> bool:
    """Whether the forward can write the gradient, whatever the dtypes and the rule."""
    args = layout.KDForward(classes=student.shape[-1], rows=1, inner=1, teachers=layout.MAX_TEACHERS)
    args.rule = layout.RULES["confidence"]
    return bool(library().fits_on_chip(layout.ctypes.byref(args)))


def forward(
    student, teachers, target, weights, row_weights, items,
    *, rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index,
    skip_zero_weights, write_gradient, keep_stats=True, variant="",
):  # fmt: skip
    """-> row_loss [N], row_stats, gradient [..., C], which is empty if not asked for."""
    args, inputs = forward_arguments(
        student, teachers, target, weights, row_weights, items, rule=rule, divergence=divergence, beta=beta,
        temperature=temperature, kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, skip_zero_weights=skip_zero_weights,
    )  # fmt: skip
    row_loss = poisoned((args.rows,), torch.float32)
    row_stats = poisoned((6 * args.teachers + 5, args.rows), torch.float32)
    gradient = poisoned(student.shape if write_gradient else (0,), student.dtype)
    args.row_loss, args.row_stats = row_loss.data_ptr(), row_stats.data_ptr()
    args.keep_stats = keep_stats
    args.gradient = gradient.data_ptr() if write_gradient else None
    outputs = {"row_loss": row_loss, "row_stats": row_stats, "gradient": gradient}
    launch("kd_forward" + variant, args, inputs, outputs)
    return row_loss, row_stats, gradient


def backward(
    student, teachers, target, weights, upstream, row_stats,
    divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, needs,
):  # fmt: skip
    """-> the gradients of the student and of each teacher; an empty one where none is needed."""
    args, inputs = arguments(
        layout.KDBackward, student, teachers, target, divergence=divergence, beta=beta, temperature=temperature,
        kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing,
    )  # fmt: skip
    weights, args.weights_teacher_stride, args.weights_row_stride = layout.per_teacher(weights, args.rows)
    upstream, args.upstream_stride = layout.per_row(upstream, torch.float32)
    row_stats = row_stats.contiguous()
    args.weights, args.upstream, args.row_stats = map(layout.address, (weights, upstream, row_stats))
    wanted = [poisoned(x.shape if need else (0,), x.dtype) for x, need in zip((student, *teachers), needs, strict=True)]
    args.student_gradient = wanted[0].data_ptr() if needs[0] else None
    for k, (gradient, need) in enumerate(zip(wanted[1:], needs[1:], strict=True)):
        args.teacher_gradient[k] = gradient.data_ptr() if need else None
    outputs = {"student_gradient": wanted[0]} | {f"teacher_gradient{k}": x for k, x in enumerate(wanted[1:])}
    launch("kd_backward", args, inputs | {"weights": weights, "upstream": upstream, "row_stats": row_stats}, outputs)
    return wanted


def _rescale(gradient: Tensor, out: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    args = layout.KDRescale()
    args.classes = gradient.shape[-1]
    args.rows = gradient.shape[:-1].numel()
    args.dtype = layout.DTYPES[gradient.dtype]
    upstream, args.upstream_stride = layout.per_row(upstream, torch.float32)
    scale = scale.reshape(-1).contiguous()
    args.gradient, args.out, args.upstream, args.scale = map(layout.address, (gradient, out, upstream, scale))
    launch("kd_rescale", args, {"gradient": gradient, "upstream": upstream, "scale": scale}, {"out": out})
    return out


def rescale(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    return _rescale(gradient, poisoned(gradient.shape, gradient.dtype), upstream, scale)


def rescale_(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    _rescale(gradient, gradient, upstream, scale)
