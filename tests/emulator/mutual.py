"""The op ``mutual`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.mutual."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, library, poisoned


def arguments(struct: type[layout.MutualArgs], students: list[Tensor], pair_weights: Tensor | None, **options):
    """The struct with its MutualArgs filled in, the inputs that it points at, and the gradients."""
    args, needs = struct(), options.pop("needs")
    rows = layout.rows_of(*students)
    outer, args.inner, args.classes = rows[0].shape
    args.rows, args.students = outer * args.inner, len(rows)
    gradients = [poisoned(z.shape if need else (0,), z.dtype) for z, need in zip(students, needs, strict=True)]
    for i, (z, gradient, need) in enumerate(zip(rows, gradients, needs, strict=True)):
        args.student[i] = layout.logits(z)
        args.gradient[i] = gradient.data_ptr() if need else None
    weights = None if pair_weights is None else pair_weights.float().contiguous()
    args.pair_weights = layout.address(weights)
    for name, value in options.items():
        setattr(args, name, value)
    return args, {f"student{i}": z for i, z in enumerate(rows)} | {"pair_weights": weights}, gradients


def fits_on_chip(n_students: int, n_classes: int) -> bool:
    args = layout.MutualForward(classes=n_classes, students=n_students)
    return bool(library().mutual_on_chip(layout.ctypes.byref(args)))


def forward(students, pair_weights, row_weights, items, *, temperature, scale, detach_peers, needs, keep_stats=True):
    """-> row_loss [N], row_stats [M² + 2M + 1, N], the gradients, empty where not asked for."""
    args, inputs, gradients = arguments(
        layout.MutualForward, students, pair_weights,
        temperature=temperature, scale=scale, detach_peers=detach_peers, needs=needs,
    )  # fmt: skip
    m = args.students
    row_loss = poisoned((args.rows,), torch.float32)
    row_stats = poisoned((m * m + 2 * m + 1, args.rows), torch.float32)
    row_weights, _ = layout.per_row(row_weights, torch.float32)
    row_weights = None if row_weights is None else row_weights.expand(args.rows).contiguous()
    items = None if items is None else torch.as_tensor(items, dtype=torch.float32).reshape(1)
    args.row_weights, args.items = layout.address(row_weights), layout.address(items)
    args.row_loss, args.row_stats, args.keep_stats = row_loss.data_ptr(), row_stats.data_ptr(), keep_stats
    outputs = {"row_loss": row_loss, "row_stats": row_stats} | {f"gradient{i}": g for i, g in enumerate(gradients)}
    launch("mutual_forward", args, inputs | {"row_weights": row_weights, "items": items}, outputs)
    return row_loss, row_stats, gradients


def backward(students, pair_weights, upstream, row_stats, temperature, scale, detach_peers, needs):
    """-> the gradient of each student; an empty one where none is needed."""
    args, inputs, gradients = arguments(
        layout.MutualBackward, students, pair_weights,
        temperature=temperature, scale=scale, detach_peers=detach_peers, needs=needs,
    )  # fmt: skip
    upstream, args.upstream_stride = layout.per_row(upstream, torch.float32)
    row_stats = row_stats.contiguous()
    args.upstream, args.row_stats = layout.address(upstream), row_stats.data_ptr()
    outputs = {f"gradient{i}": g for i, g in enumerate(gradients)}
    launch("mutual_backward", args, inputs | {"upstream": upstream, "row_stats": row_stats}, outputs)
    return gradients
