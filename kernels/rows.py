"""The rows of one program: which of them count, their numbers in `row_stats`, and vectors of K numbers a row.

``row_stats`` is [row_stats_size, N] float32 (``RowStats`` in csrc/kd.h); element (i, row) at i·N + row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import ELEMENTWISE
from .weights import CONFIDENCE, ENTROPY

# Integers of a call that never make another kernel: only strides and sizes of 1 do, and UNIT speaks for alignment.
SPECIALIZED = dict(
    do_not_specialize=[
        "n_rows", "n_classes", "n_teachers", "n_students", "ignore_index", "weights_strides", "upstream_stride",
        "kept_stride", "weights_pair_stride", "weights_sample_stride",
    ],
    do_not_specialize_on_alignment=[
        "inner", "student_strides", "teacher_strides", "gradient_strides", "teacher_gradient_strides", "out_strides",
        "elements",
    ],
)  # fmt: skip

DIVERGENCE_AT = tl.constexpr(0)  # blocks of K rows each
WEIGHT_AT = tl.constexpr(1)
TEACHER_MAX_AT = tl.constexpr(2)
TEACHER_SUM_AT = tl.constexpr(3)
TEACHER_CE_AT = tl.constexpr(4)
TEACHER_ENTROPY_AT = tl.constexpr(5)
STUDENT_MAX_AT = tl.constexpr(0)  # single rows, after the blocks
STUDENT_SUM_AT = tl.constexpr(1)
STUDENT_SUM1_AT = tl.constexpr(2)
STUDENT_CE_AT = tl.constexpr(3)
SCALE_AT = tl.constexpr(4)
SLOPE_AT = tl.constexpr(5)  # K rows after those


def row_stats_size(n_teachers: int, divergence: str) -> int:
    return (7 if divergence in ELEMENTWISE else 6) * n_teachers + 5


def per_teacher_strides(weights: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """[K] or [K, ...] -> float32, and its strides from teacher to teacher and from row to row."""
    weights = weights.to(torch.float32)
    if weights.dim() == 1:
        return weights, (weights.stride(0), 0)
    weights = weights.reshape(weights.shape[0], -1)
    return weights, weights.stride()


@triton.jit
def counted_rows(target, row_weights, items, rows, inside, ignore_index, n_classes):
    """Which rows count, which of those have a legal label, the label [R] (0 without one), row weight and scale [R].

    A label out of range makes the scale NaN, and with it every gradient of the row, in the backward too.
    """
    counted = inside
    row_weight = tl.full(rows.shape, 1.0, tl.float32)
    if row_weights is not None:
        row_weight = tl.load(row_weights + rows, mask=inside, other=0.0)
        counted &= row_weight != 0
    label = tl.zeros(rows.shape, tl.int64)
    legal = counted
    if target is not None:
        label = tl.load(target + rows, mask=inside, other=0)
        counted &= label != ignore_index
        legal = counted & (label >= 0) & (label < n_classes)
    scale = row_weight
    if items is not None:
        scale = row_weight / tl.load(items)
    scale = tl.where(counted, tl.where(legal, scale, float("nan")), 0.0)
    return counted, legal, label, row_weight, scale


@triton.jit
def at(values, k, value):
    """values [R, K_PAD] with value [R] in column k."""
    ks = tl.arange(0, values.shape[1])
    return tl.where(ks[None, :] == k, value[:, None], values)


@triton.jit
def store_of_teachers(row_stats, block, values, kept, rows, in_rows, n_teachers, n_rows):
    """values [R, K_PAD] of a block; 0 where `kept` says that they were not computed."""
    ks = tl.arange(0, values.shape[1])[None, :]
    pointers = row_stats + (n_teachers * block + ks).to(tl.int64) * n_rows + rows[:, None]
    tl.store(pointers, tl.where(kept, values, 0.0), mask=(ks < n_teachers) & in_rows[:, None])


@triton.jit
def load_of_teacher(row_stats, block, k, rows, inside, n_teachers, n_rows):
    """[R], the number of teacher k."""
    k = n_teachers * block + k
    return tl.load(row_stats + tl.cast(k, tl.int64) * n_rows + rows, mask=inside, other=0.0)


@triton.jit
def store_of_row(row_stats, i, values, kept, rows, in_rows, n_teachers, n_rows):
    pointers = row_stats + (n_teachers * 6 + i).to(tl.int64) * n_rows + rows
    tl.store(pointers, tl.where(kept, values, 0.0), mask=in_rows)


@triton.jit
def load_of_row(row_stats, i, rows, inside, n_teachers, n_rows):
    return tl.load(row_stats + (n_teachers * 6 + i).to(tl.int64) * n_rows + rows, mask=inside, other=0.0)


@triton.jit
def store_slopes(row_stats, slopes, read, rows, in_rows, n_teachers, n_rows):
    """G_k of elementwise.py, [R, K_PAD]."""
    ks = tl.arange(0, slopes.shape[1])[None, :]
    pointers = row_stats + (n_teachers * 6 + SLOPE_AT + ks).to(tl.int64) * n_rows + rows[:, None]
    tl.store(pointers, tl.where(read, slopes, 0.0), mask=(ks < n_teachers) & in_rows[:, None])


@triton.jit
def store_row_stats(
    row_stats, d, w, max_t, sum_t, values, max_s, sum_s, sum1_s, hard, scale, counted, active, read,
    rows, in_rows, n_teachers, n_rows, RULE: tl.constexpr,
):  # fmt: skip
    """Everything the forward knows of its rows; `values` are the CE_k or H_k of the rule."""
    store_of_teachers(row_stats, DIVERGENCE_AT, d, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, WEIGHT_AT, w, counted[:, None], rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_MAX_AT, max_t, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_SUM_AT, sum_t, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_CE_AT, values, read & (RULE == CONFIDENCE), rows, in_rows, n_teachers, n_rows)
    store_of_teachers(
        row_stats, TEACHER_ENTROPY_AT, values, read & (RULE == ENTROPY), rows, in_rows, n_teachers, n_rows
    )
    store_of_row(row_stats, STUDENT_MAX_AT, max_s, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_SUM_AT, sum_s, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_SUM1_AT, sum1_s, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_CE_AT, hard, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, SCALE_AT, scale, counted, rows, in_rows, n_teachers, n_rows)


@triton.jit
def store_row_loss(
    row_loss, kd, hard, kd_scale, ce_weight, row_weight, counted, legal, rows, in_rows, HAS_CE: tl.constexpr
):
    """row_weight·(kd_scale·Σ w_k D_k + ce_weight·CE); 0 in a row that does not count, NaN if the label is illegal."""
    loss = kd_scale * kd
    if HAS_CE:
        loss += ce_weight * hard
    loss = tl.where(legal, row_weight * loss, float("nan"))
    tl.store(row_loss + rows, tl.where(counted, loss, 0.0), mask=in_rows)
