"""The Triton implementation as ops of torch.ops.mtkd_fast, and their autograd (the twin of csrc/ops.cpp)."""

import torch
from torch import Tensor

from mtkd_fast.kernels import hint as hint_kernels
from mtkd_fast.kernels import kd as kd_kernels
from mtkd_fast.schemas import LIBRARY

ops = torch.ops.mtkd_fast
DOUBLE_BACKWARD = "double backward through implementation='triton' is not available; use implementation='reference'"


def kd_forward(
    student, teachers, target, weights, row_weights, num_items,
    rule, divergence, temperature, kd_scale, ce_weight, label_smoothing, ignore_index, reduction,
    skip_zero_weights, write_gradient,
):  # fmt: skip
    items = None
    if reduction == "mean":
        items = counted_rows(student, target, row_weights, ignore_index) if num_items is None else num_items
    row_loss, row_stats, gradient = kd_kernels.forward(
        student, teachers, target, weights, row_weights, items,
        rule=rule, divergence=divergence, temperature=temperature, kd_scale=kd_scale, ce_weight=ce_weight,
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


def _register() -> None:
    for name, kernel in {
        "kd_triton_forward": kd_forward,
        "kd_triton_backward": kd_kernels.backward,
        "kd_triton_rescale": kd_kernels.rescale,
        "kd_triton_rescale_": kd_kernels.rescale_,
        "hint_triton_forward": hint_kernels.forward,
        "hint_triton_backward": hint_kernels.backward,
    }.items():
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, key)


_register()
