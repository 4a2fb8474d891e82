"""The op kd in Triton, and its autograd (the twin of csrc/kd_autograd.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast.kernels import kd as kd_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.autograd import as_weights, refuse_double_backward

ops = torch.ops.mtkd_fast


def kd_forward(
    student, teachers, target, weights, row_weights, num_items,
    rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index, reduction,
    skip_zero_weights, keep_stats, write_gradient,
):  # fmt: skip
    if target is not None:
        target = target.long()  # an ignore_index of −100 would wrap in uint8
    items = None
    if reduction == "mean":
        items = counted_rows(student, target, row_weights, ignore_index) if num_items is None else num_items
    row_loss, row_stats, gradient = kd_kernels.forward(
        student, teachers, target, weights, row_weights, items,
        rule=rule, divergence=divergence, beta=beta, temperature=temperature, kd_scale=kd_scale, ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index,
        skip_zero_weights=skip_zero_weights, write_gradient=write_gradient,
    )  # fmt: skip
    if reduction == "none":
        return row_loss.view(student.shape[:-1]), row_stats, gradient
    loss = row_loss.sum()
    return loss if items is None else loss / items.reshape(()), row_stats, gradient


def counted_rows(student: Tensor, target: Tensor | None, row_weights: Tensor | None, ignore_index: int) -> Tensor:
    """The number of rows that count, at least 1, as a one-element float tensor on the device (no sync)."""
    rows = student.shape[:-1]
    if target is None and row_weights is None:
        return student.new_full((), max(rows.numel(), 1), dtype=torch.float32)
    counts = torch.ones((), dtype=torch.bool, device=student.device)
    if target is not None:
        counts = counts & (target != ignore_index)
    if row_weights is not None:
        counts = counts & (row_weights != 0)
    return counts.sum().clamp(min=1).float()


def gradient_in_forward(student: Tensor, teachers: Sequence[Tensor]) -> bool:
    """Strategy A (see csrc/kd_autograd.cpp): the student alone, not fp16, rows that fit on chip."""
    return (
        student.requires_grad
        and not any(t.requires_grad for t in teachers)
        and student.dtype != torch.float16
        and kd_kernels.fits_on_chip(student)
    )


def scales(row_stats: Tensor, n_teachers: int) -> Tensor:
    """Row weight / items of every row."""
    return row_stats[6 * n_teachers + 4]


def weight_gradient(weights: Tensor, upstream: Tensor, row_stats: Tensor, kd_scale: float) -> Tensor:
    """∂L/∂w_k = upstream · scale · kd_scale · D_k. Rows that do not count, and weights of 0 on an infinite D, get 0."""
    n_teachers = weights.shape[0]
    divergence, used = row_stats[:n_teachers], row_stats[n_teachers : 2 * n_teachers]
    scale = scales(row_stats, n_teachers)
    per_row = divergence * (scale * upstream.reshape(-1) * kd_scale)
    return as_weights(per_row.masked_fill((scale == 0) | ((used == 0) & ~divergence.isfinite()), 0), weights)


class KDLoss(torch.autograd.Function):
    """(loss, row_stats) of the op, with the strategies of csrc/kd_autograd.cpp."""

    @staticmethod
    def forward(ctx, options, student, target, weights, row_weights, num_items, *teachers):
        _, *of_backward = options[:7]  # divergence, beta, temperature, kd_scale, ce_weight, label_smoothing
        in_forward = gradient_in_forward(student, teachers)
        weights_need = weights is not None and weights.requires_grad
        loss, row_stats, gradient = ops.kd_triton_forward(
            student, teachers, target, weights, row_weights, num_items, *options, not weights_need, True, in_forward
        )
        ctx.mark_non_differentiable(row_stats)
        ctx.set_materialize_grads(False)
        ctx.in_forward = in_forward
        ctx.options = of_backward
        logits = () if in_forward else (student, *teachers)
        ctx.save_for_backward(row_stats, gradient, target, weights if weights_need else None, *logits)
        return loss, row_stats

    @staticmethod
    def backward(ctx, upstream, _):
        upstream = upstream.detach()
        row_stats, gradient, target, weights, *logits = ctx.saved_tensors
        student_gradient, teacher_gradients = None, [None] * (len(ctx.needs_input_grad) - 6)
        if ctx.in_forward:
            student_gradient = finish_gradient(gradient, upstream, scales(row_stats, len(teacher_gradients)))
        elif ctx.needs_input_grad[1] or any(ctx.needs_input_grad[6:]):
            student, *teachers = logits
            needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[6:]]
            used = row_stats[len(teachers) : 2 * len(teachers)]
            found = ops.kd_triton_backward(student, teachers, target, used, upstream, row_stats, *ctx.options, needs)
            student_gradient, *teacher_gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        weights_gradient = None
        if weights is not None:
            weights_gradient = weight_gradient(weights, upstream, row_stats, ctx.options[3])
        return refuse_double_backward(None, student_gradient, None, weights_gradient, None, None, *teacher_gradients)


def finish_gradient(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    """gradient · upstream. In place when the graph is not kept: then only saved-tensor hooks could hold it."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return ops.kd_triton_rescale(gradient, upstream, scale)
    ops.kd_triton_rescale_(gradient, upstream, scale)
    return gradient


def kd(student, teachers, target, weights, row_weights, num_items, *options) -> tuple[Tensor, Tensor]:
    """The arguments of torch.ops.mtkd_fast.kd, differentiable; row_stats is always whole."""
    inputs = (student, *teachers) if weights is None else (student, weights, *teachers)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return KDLoss.apply(options, student, target, weights, row_weights, num_items, *teachers)
    loss, row_stats, _ = ops.kd_triton_forward(
        student, teachers, target, weights, row_weights, num_items, *options, True, True, False
    )
    return loss, row_stats


def statistics(student: Tensor, teachers: Sequence[Tensor], divergence: str, beta: float, temperature: float) -> Tensor:
    """row_stats of the divergences alone."""
    options = ("uniform", divergence, beta, temperature, 1.0, 0.0, 0.0, 0, "sum")
    return ops.kd_triton_forward(student, teachers, None, None, None, None, *options, False, True, False)[1]


class KDDivergence(torch.autograd.Function):
    """D_k [K, ...], differentiable in the student and the teachers."""

    @staticmethod
    def forward(ctx, divergence, beta, temperature, student, *teachers):
        row_stats = statistics(student, teachers, divergence, beta, temperature)
        ctx.options = (divergence, beta, temperature, 1.0, 0.0, 0.0)
        ctx.save_for_backward(row_stats, student, *teachers)
        return row_stats[: len(teachers)].clone().view(len(teachers), *student.shape[:-1])

    @staticmethod
    def backward(ctx, upstream):
        row_stats, student, *teachers = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3:])
        weights = upstream.detach().reshape(len(teachers), -1)
        found = ops.kd_triton_backward(student, teachers, None, weights, None, row_stats, *ctx.options, needs)
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        return refuse_double_backward(None, None, None, *gradients)


def divergence(student: Tensor, teachers: Sequence[Tensor], divergence: str, beta: float, temperature: float) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (student, *teachers)):
        return KDDivergence.apply(divergence, beta, temperature, student, *teachers)
    row_stats = statistics(student, teachers, divergence, beta, temperature)
    return row_stats[: len(teachers)].clone().view(len(teachers), *student.shape[:-1])


implement(
    {
        "kd_triton_forward": kd_forward,
        "kd_triton_backward": kd_kernels.backward,
        "kd_triton_rescale": kd_kernels.rescale,
        "kd_triton_rescale_": kd_kernels.rescale_,
    }
)
