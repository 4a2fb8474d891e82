"""The op mixture: Σ_k w_k p_k with its gradient, and its KL from a student (the twin of csrc/mixture.h).

A program holds whole rows up to ON_CHIP_CLASSES classes, longer ones in tiles. In units of one N·C tensor:

    probabilities   K + 1 on chip; else 2K + 1: the states of a row come from a first sweep
    backward        K + 1 reads; a teacher's gradient reads it and the upstream again, from cache, and writes
    divergence      K + 1 reads for the states, K + 1 for the value and one write, the gradient of a float32 student
                    (kd_backward makes that of another with its upstream); the second reads of rows on chip come from
                    L1 or L2. A third, of the teachers, where weights want a gradient
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kd import NARROW, WIDE, Launch, tiles
from .logits import (
    as_arguments,
    check_dtypes,
    in_units,
    layout,
    load_logits,
    load_teacher,
    place_of,
    store_contiguous,
    store_teacher_gradient,
)  # fmt: skip
from .row_stats import INF, exp_at, exp_of, larger, raising, shifted, softmax_state
from .rows import (
    DIVERGENCE_AT,
    SCALE_AT,
    SPECIALIZED,
    STUDENT_CE_AT,
    STUDENT_MAX_AT,
    STUDENT_SUM1_AT,
    STUDENT_SUM_AT,
    TEACHER_CE_AT,
    TEACHER_ENTROPY_AT,
    TEACHER_MAX_AT,
    TEACHER_SUM_AT,
    WEIGHT_AT,
    at,
    per_teacher_strides,
    row_stats_size,
    store_of_row,
    store_of_teachers,
)  # fmt: skip
from .weights import known_weights, teachers_to_read

ON_CHIP_CLASSES = 8192
SMALLEST = tl.constexpr(2.0**-100)  # a sum below it is scaled before its logarithm is taken


@triton.jit
def load_read(
    k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, in_cols, n_teachers,
    SKIP_ZERO: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Teacher k [R, C] in float32 and its weight [R]; rows of weight 0 need not be read."""
    weight = known_weights(weights, weights_strides, k, rows, in_rows, n_teachers)
    read = in_rows & (weight != 0) if SKIP_ZERO else in_rows
    t = load_teacher(teachers, strides, k, place, cols, read[:, None] & in_cols, DTYPE, UNIT)
    return t.to(tl.float32), weight


@triton.jit
def number_of(values, k):
    """Column k [R] of [R, K_PAD]."""
    return tl.sum(tl.where(tl.arange(0, values.shape[1])[None, :] == k, values, 0.0), 1)


@triton.jit
def max_of(maxima, k):
    """Column k [R] of maxima [R, K_PAD], which may be −inf."""
    return tl.max(tl.where(tl.arange(0, maxima.shape[1])[None, :] == k, maxima, -INF), 1)


@triton.jit
def absorb_state(k, t, max, sum, inv_t):
    """Joins a tile of teacher k to its state in column k of [R, K_PAD]."""
    tile_max, _, _, tile_sum = softmax_state(t, inv_t)
    before = max_of(max, k)
    new_max = larger(before, tile_max)
    _, factor, _ = raising(before, new_max, inv_t, 1)
    _, tile_factor, _ = raising(tile_max, new_max, inv_t, 1)
    return at(max, k, new_max), at(sum, k, factor * number_of(sum, k) + tile_factor * tile_sum)


@triton.jit
def teacher_states(
    teachers, strides, weights, weights_strides, rows, place, in_rows, n_classes, n_teachers, inv_t,
    SKIP_ZERO: tl.constexpr, K_PAD: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first sweep: max and Σ e^{(t−max)/τ} of every teacher, [R, K_PAD]."""
    max = tl.full((BLOCK_N, K_PAD), -INF, tl.float32)
    sum = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        if strides is None:
            for k in range(n_teachers):
                t, _ = load_read(
                    k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes,
                    n_teachers, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
                max, sum = absorb_state(k, t, max, sum, inv_t)
        else:
            for k in tl.static_range(len(teachers)):
                t, _ = load_read(
                    k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes,
                    n_teachers, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
                max, sum = absorb_state(k, t, max, sum, inv_t)
    return max, sum


@triton.jit
def add_probabilities(mixture, e, sum, weight):
    """mixture + weight·p, where a weight of 0 removes its term."""
    return tl.where((weight != 0)[:, None], mixture + e * (weight / sum)[:, None], mixture)


# ------------------------------------------------------------------------------------------------------- probabilities


@triton.jit
def absorb_on_chip(
    k, mixture, max, sum, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, n_classes,
    n_teachers, inv_t, SKIP_ZERO: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    t, weight = load_read(
        k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes, n_teachers,
        SKIP_ZERO, DTYPE, UNIT,
    )  # fmt: skip
    max_t, _, e, sum_t = softmax_state(t, inv_t)
    return add_probabilities(mixture, e, sum_t, weight), at(max, k, max_t), at(sum, k, sum_t)


@triton.jit
def absorb_again(
    k, mixture, max, sum, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, n_classes,
    n_teachers, inv_t, SKIP_ZERO: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    t, weight = load_read(
        k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes, n_teachers,
        SKIP_ZERO, DTYPE, UNIT,
    )  # fmt: skip
    e = exp_at(shifted(t, max_of(max, k)[:, None]), inv_t)
    return add_probabilities(mixture, e, number_of(sum, k), weight)


@triton.jit(**SPECIALIZED)
def mixture_forward(
    teachers, teacher_strides, weights, weights_strides, probabilities, row_stats,
    n_rows, inner, n_classes, n_teachers, inv_t,
    SKIP_ZERO: tl.constexpr, ON_CHIP: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    place = place_of(rows, inner, in_rows)
    n_classes = in_units(n_classes, UNIT)
    if ON_CHIP:
        cols = tl.arange(0, BLOCK_C)[None, :]
        max = tl.full((BLOCK_N, K_PAD), -INF, tl.float32)
        sum = tl.zeros((BLOCK_N, K_PAD), tl.float32)
        mixture = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        if teacher_strides is None:
            for k in range(n_teachers):
                mixture, max, sum = absorb_on_chip(
                    k, mixture, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place, cols,
                    in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                mixture, max, sum = absorb_on_chip(
                    k, mixture, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place, cols,
                    in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
        store_contiguous(probabilities, rows, n_classes, cols, mixture, in_rows[:, None] & (cols < n_classes))
    else:
        max, sum = teacher_states(
            teachers, teacher_strides, weights, weights_strides, rows, place, in_rows, n_classes, n_teachers, inv_t,
            SKIP_ZERO, K_PAD, DTYPE, UNIT, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        for start in range(0, n_classes, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)[None, :]
            mixture = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            if teacher_strides is None:
                for k in range(n_teachers):
                    mixture = absorb_again(
                        k, mixture, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place, cols,
                        in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                    )  # fmt: skip
            else:
                for k in tl.static_range(len(teachers)):
                    mixture = absorb_again(
                        k, mixture, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place, cols,
                        in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                    )  # fmt: skip
            store_contiguous(probabilities, rows, n_classes, cols, mixture, in_rows[:, None] & (cols < n_classes))
    _, _, read = teachers_to_read(weights, weights_strides, rows, in_rows, n_teachers, True, SKIP_ZERO, K_PAD)
    store_pair(row_stats, max, sum, read, rows, in_rows, n_teachers, n_rows)


@triton.jit
def store_pair(row_stats, max, sum, read, rows, in_rows, n_teachers, n_rows):
    """[2K, N]: the maxima, then the sums; 0 for what was not read."""
    store_of_teachers(row_stats, tl.full((), 0, tl.int32), max, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, tl.full((), 1, tl.int32), sum, read, rows, in_rows, n_teachers, n_rows)


@triton.jit
def load_state(row_stats, k, rows, in_rows, n_teachers, n_rows):
    """max and sum [R] of teacher k, from [2K, N]."""
    of_max = row_stats + tl.cast(k, tl.int64) * n_rows + rows
    of_sum = row_stats + tl.cast(n_teachers + k, tl.int64) * n_rows + rows
    return tl.load(of_max, mask=in_rows, other=0.0), tl.load(of_sum, mask=in_rows, other=1.0)


@triton.jit
def load_upstream(upstream, strides, rows, cols, mask, UNIT: tl.constexpr):
    return tl.load(upstream + rows[:, None] * in_units(strides[0], UNIT) + cols * strides[1], mask=mask, other=0.0)


@triton.jit
def mixture_backward_of(
    k, teachers, teacher_strides, weights, weights_strides, upstream, upstream_strides, row_stats, dots,
    gradients, gradient_strides, rows, place, in_rows, n_rows, n_classes, n_teachers, inv_t,
    SKIP_ZERO: tl.constexpr, TO_TEACHERS: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<G, p_k> and the gradient of teacher k."""
    weight = known_weights(weights, weights_strides, k, rows, in_rows, n_teachers)
    read = in_rows & (weight != 0) if SKIP_ZERO else in_rows
    max, sum = load_state(row_stats, k, rows, read, n_teachers, n_rows)
    dot = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        mask = read[:, None] & (cols < n_classes)
        t = load_teacher(teachers, teacher_strides, k, place, cols, mask, DTYPE, UNIT).to(tl.float32)
        g = load_upstream(upstream, upstream_strides, rows, cols, mask, UNIT)
        dot += tl.sum(exp_at(shifted(t, max[:, None]), inv_t) * g, 1)
    dot = tl.where(read, dot / sum, 0.0)
    tl.store(dots + tl.cast(k, tl.int64) * n_rows + rows, dot, mask=in_rows)
    if TO_TEACHERS:
        used = read & (weight != 0)
        for start in range(0, n_classes, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)[None, :]
            mask = used[:, None] & (cols < n_classes)
            t = load_teacher(teachers, teacher_strides, k, place, cols, mask, DTYPE, UNIT).to(tl.float32)
            g = load_upstream(upstream, upstream_strides, rows, cols, mask, UNIT)
            p = exp_at(shifted(t, max[:, None]), inv_t) * (1.0 / sum)[:, None]
            to_teacher = p * (g - dot[:, None]) * (weight * inv_t)[:, None]
            to_teacher = tl.where(used[:, None], to_teacher, 0.0)
            inside = in_rows[:, None] & (cols < n_classes)
            store_teacher_gradient(
                teachers, gradients, gradient_strides, k, place, cols, to_teacher, inside, DTYPE, UNIT
            )


@triton.jit(**SPECIALIZED)
def mixture_backward(
    teachers, teacher_strides, weights, weights_strides, upstream, upstream_strides, row_stats, dots,
    teacher_gradients, teacher_gradient_strides, n_rows, inner, n_classes, n_teachers, inv_t,
    SKIP_ZERO: tl.constexpr, TO_TEACHERS: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    place = place_of(rows, inner, in_rows)
    n_classes = in_units(n_classes, UNIT)
    if teacher_strides is None:
        for k in range(n_teachers):
            mixture_backward_of(
                k, teachers, teacher_strides, weights, weights_strides, upstream, upstream_strides, row_stats, dots,
                teacher_gradients, teacher_gradient_strides, rows, place, in_rows, n_rows, n_classes, n_teachers,
                inv_t, SKIP_ZERO, TO_TEACHERS, DTYPE, UNIT, BLOCK_N, BLOCK_C,
            )  # fmt: skip
    else:
        for k in tl.static_range(len(teachers)):
            mixture_backward_of(
                k, teachers, teacher_strides, weights, weights_strides, upstream, upstream_strides, row_stats, dots,
                teacher_gradients, teacher_gradient_strides, rows, place, in_rows, n_rows, n_classes, n_teachers,
                inv_t, SKIP_ZERO, TO_TEACHERS, DTYPE, UNIT, BLOCK_N, BLOCK_C,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- divergence


@triton.jit
def absorb_logarithm(
    k, largest, relative, max, sum, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, n_classes,
    n_teachers, inv_t, SKIP_ZERO: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds w·p of teacher k to the mixture e^largest · relative [R, C], which cannot underflow."""
    t, weight = load_read(
        k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes, n_teachers,
        SKIP_ZERO, DTYPE, UNIT,
    )  # fmt: skip
    log_p = shifted(t, max_of(max, k)[:, None]) * inv_t - tl.log(number_of(sum, k))[:, None]
    new = larger(largest, log_p)
    more = exp_of(shifted(largest, new)) * relative + exp_of(shifted(log_p, new)) * weight[:, None]
    used = (weight != 0)[:, None]
    return tl.where(used, new, largest), tl.where(used, more, relative)


@triton.jit
def absorb_dot(
    k, dots, ratio, max, sum, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, n_classes,
    n_teachers, inv_t, SKIP_ZERO: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds Σ_c p_k·(log pbar − log q) of the tile to column k of [R, K_PAD]."""
    t, _ = load_read(
        k, teachers, strides, weights, weights_strides, rows, place, cols, in_rows, cols < n_classes, n_teachers,
        SKIP_ZERO, DTYPE, UNIT,
    )  # fmt: skip
    e = exp_at(shifted(t, max_of(max, k)[:, None]), inv_t)
    term = tl.where(ratio == INF, ratio, e * ratio)  # +inf also where e has underflowed
    return at(dots, k, number_of(dots, k) + tl.sum(tl.where(t == -INF, 0.0, term), 1))


@triton.jit
def log_normal(x):
    """log x for x that may be subnormal, which tl.log may take for 0."""
    tiny = x < SMALLEST
    return tl.log(tl.where(tiny, x * 18446744073709551616.0, x)) - tl.where(tiny, 44.3614195558365, 0.0)


@triton.jit(**SPECIALIZED)
def mixture_divergence(
    student, student_strides, teachers, teacher_strides, weights, weights_strides, divergence, row_stats, gradient,
    n_rows, inner, n_classes, n_teachers, inv_t,
    SKIP_ZERO: tl.constexpr, DOTS: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    place = place_of(rows, inner, in_rows)
    n_classes = in_units(n_classes, UNIT)
    w, _lanes, read = teachers_to_read(weights, weights_strides, rows, in_rows, n_teachers, True, SKIP_ZERO, K_PAD)
    active = tl.max(read.to(tl.int32), 1) != 0
    used = read & (w != 0)
    some = tl.max(used.to(tl.int32), 1) != 0
    total_w = tl.sum(tl.where(used, w, 0.0), 1)

    max, sum = teacher_states(
        teachers, teacher_strides, weights, weights_strides, rows, place, in_rows, n_classes, n_teachers, inv_t,
        SKIP_ZERO, K_PAD, DTYPE, UNIT, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    max_s = tl.full((BLOCK_N,), -INF, tl.float32)
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        mask = active[:, None] & (cols < n_classes)
        s = load_logits(student, student_strides, place, cols, mask, UNIT).to(tl.float32)
        tile_max, _, _, tile_sum = softmax_state(s, inv_t)
        new_max = larger(max_s, tile_max)
        _, factor, _ = raising(max_s, new_max, inv_t, 1)
        _, tile_factor, _ = raising(tile_max, new_max, inv_t, 1)
        max_s, sum_s = new_max, factor * sum_s + tile_factor * tile_sum

    value = tl.zeros((BLOCK_N,), tl.float32)
    dots = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        in_cols = cols < n_classes
        s = load_logits(student, student_strides, place, cols, active[:, None] & in_cols, UNIT).to(tl.float32)
        largest = tl.full((BLOCK_N, BLOCK_C), -INF, tl.float32)
        relative = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        if teacher_strides is None:
            for k in range(n_teachers):
                largest, relative = absorb_logarithm(
                    k, largest, relative, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place,
                    cols, in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                largest, relative = absorb_logarithm(
                    k, largest, relative, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place,
                    cols, in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                )  # fmt: skip
        ds = shifted(s, max_s[:, None])
        log_q = ds * inv_t - tl.log(sum_s)[:, None]
        mixture = exp_of(largest) * relative
        ratio = tl.where(largest == -INF, -INF, largest + log_normal(relative)) - log_q
        term = tl.where(ratio == INF, ratio, mixture * ratio)
        impossible = (largest == -INF) & (relative == 0)  # a sum that is NaN is not
        value += tl.sum(tl.where(impossible, 0.0, term), 1)
        if DOTS:
            if teacher_strides is None:
                for k in range(n_teachers):
                    dots = absorb_dot(
                        k, dots, ratio, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place,
                        cols, in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                    )  # fmt: skip
            else:
                for k in tl.static_range(len(teachers)):
                    dots = absorb_dot(
                        k, dots, ratio, max, sum, teachers, teacher_strides, weights, weights_strides, rows, place,
                        cols, in_rows, n_classes, n_teachers, inv_t, SKIP_ZERO, DTYPE, UNIT,
                    )  # fmt: skip
        if gradient is not None:
            g = (exp_at(ds, inv_t) * (total_w / sum_s)[:, None] - mixture) * inv_t
            g = tl.where(some[:, None], g, 0.0)
            store_contiguous(gradient, rows, n_classes, cols, g, in_rows[:, None] & in_cols)

    empty = tl.max((used & (sum == 0)).to(tl.int32), 1) != 0
    value = tl.where(empty | (sum_s == 0), float("nan"), value)
    tl.store(divergence + rows, tl.where(some, value, 0.0), mask=in_rows)
    dots = tl.where((sum == 0) | (sum_s == 0)[:, None], float("nan"), dots / sum) + 1.0
    store_stats(row_stats, dots, w, max, sum, max_s, sum_s, read, active, in_rows, rows, n_teachers, n_rows)


@triton.jit
def store_stats(row_stats, dots, w, max, sum, max_s, sum_s, read, active, in_rows, rows, n_teachers, n_rows):
    """``RowStats``, with ∂KL/∂w_k in place of D_k and a scale of 1."""
    store_of_teachers(row_stats, DIVERGENCE_AT, dots, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, WEIGHT_AT, w, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_MAX_AT, max, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_SUM_AT, sum, read, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_CE_AT, sum, read & False, rows, in_rows, n_teachers, n_rows)
    store_of_teachers(row_stats, TEACHER_ENTROPY_AT, sum, read & False, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_MAX_AT, max_s, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_SUM_AT, sum_s, active, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_SUM1_AT, sum_s, active & False, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, STUDENT_CE_AT, sum_s, active & False, rows, in_rows, n_teachers, n_rows)
    store_of_row(row_stats, SCALE_AT, tl.full(sum_s.shape, 1.0, tl.float32), in_rows, rows, in_rows, n_teachers, n_rows)


# ----------------------------------------------------------------------------------------------------------- launchers


def common_arguments(
    teachers: Sequence[Tensor], weights: Tensor | None, temperature: float, skip_zero_weights: bool, block_n: int,
    block_c: int, *, student: Tensor | None = None, gradients: Sequence[Tensor | None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What every kernel of the op is told."""
    tensors = [*teachers] if student is None else [student, *teachers]
    check_dtypes(tensors)
    where = layout([*tensors, *(gradients or ())])
    strides = where.strides[len(tensors) - len(teachers) :]
    table = as_arguments(teachers, strides[: len(teachers)], gradients or (), strides[len(teachers) :])
    given, given_strides = (None, None) if weights is None else per_teacher_strides(weights)
    arguments = dict(
        teachers=table.pointers, teacher_strides=table.strides, weights=given, weights_strides=given_strides,
        n_rows=teachers[0].shape[:-1].numel(), inner=where.inner, n_classes=teachers[0].shape[-1],
        n_teachers=len(teachers), inv_t=1.0 / temperature, SKIP_ZERO=weights is not None and skip_zero_weights,
        DTYPE=table.dtype, UNIT=where.unit, BLOCK_N=block_n, BLOCK_C=block_c,
    )  # fmt: skip
    if student is not None:
        arguments |= dict(student=student, student_strides=where.strides[0])
    if gradients is not None:
        arguments |= dict(teacher_gradients=table.gradients, teacher_gradient_strides=table.gradient_strides)
    return arguments


def forward(
    teachers: Sequence[Tensor], weights: Tensor | None, temperature: float, skip_zero_weights: bool
) -> tuple[Tensor, Tensor]:
    """``MixtureForward``: Σ_k w_k p_k [..., C] float32, and the states of the teachers [2K, N]."""
    first = teachers[0]
    probabilities = first.new_empty(first.shape, dtype=torch.float32)
    row_stats = first.new_empty((2 * len(teachers), first.shape[:-1].numel()), dtype=torch.float32)
    if probabilities.numel() > 0:
        forward_launch(teachers, weights, temperature, skip_zero_weights, probabilities, row_stats).run()
    return probabilities, row_stats


def forward_launch(
    teachers: Sequence[Tensor], weights: Tensor | None, temperature: float, skip_zero_weights: bool,
    probabilities: Tensor, row_stats: Tensor,
) -> Launch:  # fmt: skip
    n_rows, n_classes = row_stats.shape[1], probabilities.shape[-1]
    plan = tiles(mixture_forward, n_classes, WIDE, 8)
    arguments = common_arguments(teachers, weights, temperature, skip_zero_weights, plan.block_n, plan.block_c)
    arguments |= dict(
        probabilities=probabilities, row_stats=row_stats, ON_CHIP=n_classes <= ON_CHIP_CLASSES,
        K_PAD=triton.next_power_of_2(len(teachers)),
    )  # fmt: skip
    return Launch(plan.kernel, (triton.cdiv(n_rows, plan.block_n),), arguments, plan.num_warps)


def backward(
    teachers: Sequence[Tensor], weights: Tensor | None, upstream: Tensor, row_stats: Tensor, temperature: float,
    skip_zero_weights: bool, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``MixtureBackward``: <upstream, p_k> [K, N], and the teachers' gradients, empty tensors where none are needed."""
    dots = row_stats.new_empty((len(teachers), row_stats.shape[1]))
    gradients = [t.new_empty(t.shape if need else 0) for t, need in zip(teachers, needs, strict=True)]
    if dots.numel() > 0:
        backward_launch(
            teachers, weights, upstream, row_stats, temperature, skip_zero_weights, dots,
            [g if need else None for g, need in zip(gradients, needs, strict=True)],
        ).run()  # fmt: skip
    return dots, gradients


def backward_launch(
    teachers: Sequence[Tensor], weights: Tensor | None, upstream: Tensor, row_stats: Tensor, temperature: float,
    skip_zero_weights: bool, dots: Tensor, gradients: Sequence[Tensor | None],
) -> Launch:  # fmt: skip
    n_classes = teachers[0].shape[-1]
    plan = tiles(mixture_backward, n_classes, NARROW, 4)
    arguments = common_arguments(
        teachers, weights, temperature, skip_zero_weights, plan.block_n, plan.block_c, gradients=gradients
    )
    g, g_strides = upstream_rows(upstream)
    arguments |= dict(
        upstream=g, upstream_strides=g_strides, row_stats=row_stats, dots=dots,
        TO_TEACHERS=any(x is not None for x in gradients),
    )  # fmt: skip
    return Launch(plan.kernel, (triton.cdiv(dots.shape[1], plan.block_n),), arguments, plan.num_warps)


def upstream_rows(upstream: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """[..., C] as autograd gives it, and its strides from row to row and class to class: expanded from one number, or
    dense."""
    if not any(upstream.stride()):
        return upstream, (0, 0)
    return upstream.contiguous(), (upstream.shape[-1], 1)


def divergence(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, temperature: float, skip_zero_weights: bool,
    write_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``MixtureDivergence``: KL(pbar‖q) [...], row_stats [6K + 5, N], and the gradient for an upstream of 1."""
    n_rows = student.shape[:-1].numel()
    value = student.new_empty(student.shape[:-1], dtype=torch.float32)
    row_stats = student.new_empty((row_stats_size(len(teachers), "forward_kl"), n_rows), dtype=torch.float32)
    gradient = student.new_empty(student.shape if write_gradient else 0)
    if n_rows > 0:
        divergence_launch(
            student, teachers, weights, temperature, skip_zero_weights, value, row_stats,
            gradient if write_gradient else None,
        ).run()  # fmt: skip
    return value, row_stats, gradient


def divergence_launch(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, temperature: float, skip_zero_weights: bool,
    value: Tensor, row_stats: Tensor, gradient: Tensor | None,
) -> Launch:  # fmt: skip
    """The weights' gradient takes another read of the teachers: only where they want one, when no zero is skipped."""
    plan = tiles(mixture_divergence, student.shape[-1], NARROW, 8)
    plan = plan._replace(block_n=max(1, plan.block_n // 2))  # two accumulators: half the short rows
    arguments = common_arguments(
        teachers, weights, temperature, skip_zero_weights, plan.block_n, plan.block_c, student=student
    )
    arguments |= dict(
        divergence=value, row_stats=row_stats, gradient=gradient, DOTS=weights is not None and not skip_zero_weights,
        K_PAD=triton.next_power_of_2(len(teachers)),
    )  # fmt: skip
    return Launch(plan.kernel, (triton.cdiv(row_stats.shape[1], plan.block_n),), arguments, plan.num_warps)
