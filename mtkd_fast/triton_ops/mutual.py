"""The op mutual in Triton, and its autograd (the twin of csrc/mutual_ops.cpp)."""

import torch
from torch import Tensor

from mtkd_fast.kernels import mutual as mutual_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.autograd import refuse_double_backward
from mtkd_fast.triton_ops.kd import counted_rows, finish_gradient

ops = torch.ops.mtkd_fast


def mutual_forward(
    students, pair_weights, row_weights, num_items, temperature, scale, detach_peers, reduction, keep_stats, needs
):  # fmt: skip
    items = None
    if reduction == "mean":
        items = counted_rows(students[0], None, row_weights, 0) if num_items is None else num_items
    row_loss, row_stats, gradients = mutual_kernels.forward(
        students, pair_weights, row_weights, items,
        temperature=temperature, scale=scale, detach_peers=detach_peers, needs=needs,
    )  # fmt: skip
    if reduction == "none":
        return row_loss.view(students[0].shape[:-1]), row_stats, gradients
    loss = row_loss.sum()
    return loss if items is None else loss / items.reshape(()), row_stats, gradients


def gradients_in_forward(students: list[Tensor]) -> bool:
    """Strategy A (see csrc/mutual_ops.cpp): no fp16 gradient, rows that fit on chip."""
    half = any(z.requires_grad and z.dtype == torch.float16 for z in students)
    return not half and mutual_kernels.fits_on_chip(len(students), students[0].shape[-1])


class Mutual(torch.autograd.Function):
    """loss and row_stats, see csrc/mutual_ops.cpp."""

    @staticmethod
    def forward(ctx, options, pair_weights, row_weights, num_items, *students):
        in_forward = gradients_in_forward(students)
        needs = [in_forward and z.requires_grad for z in students]
        loss, row_stats, gradients = ops.mutual_triton_forward(
            students, pair_weights, row_weights, num_items, *options, True, needs
        )
        ctx.mark_non_differentiable(row_stats)
        ctx.set_materialize_grads(False)
        ctx.in_forward = in_forward
        ctx.options = options[:3]  # temperature, scale, detach_peers
        ctx.save_for_backward(row_stats, pair_weights, *(gradients if in_forward else students))
        return loss, row_stats

    @staticmethod
    def backward(ctx, upstream, _):
        row_stats, pair_weights, *rest = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])
        if upstream is None:
            return (None,) * (4 + len(needs))
        upstream = upstream.detach()
        if ctx.in_forward:
            found = [finish_gradient(g, upstream, row_stats[-1]) if g.numel() else g for g in rest]
        else:
            found = ops.mutual_triton_backward(rest, pair_weights, upstream, row_stats, *ctx.options, needs)
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        return refuse_double_backward(None, None, None, None, *gradients)


def mutual(students, pair_weights, row_weights, num_items, *options) -> tuple[Tensor, Tensor]:
    """The arguments of torch.ops.mtkd_fast.mutual, differentiable; row_stats is always whole."""
    *options, _ = options
    if torch.is_grad_enabled() and any(z.requires_grad for z in students):
        return Mutual.apply(tuple(options), pair_weights, row_weights, num_items, *students)
    loss, row_stats, _ = ops.mutual_triton_forward(
        students, pair_weights, row_weights, num_items, *options, True, [False] * len(students)
    )
    return loss, row_stats


implement({"mutual_triton_forward": mutual_forward, "mutual_triton_backward": mutual_kernels.backward})
