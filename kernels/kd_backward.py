"""Strategy B of the op kd, backward: every gradient that is wanted, tile by tile, K + 1 reads and one write for each.

Purely elementwise, given the row states that the forward saved. With f = scale·upstream, for every row:

    student     f·(kd_scale·Σ_k w_k ∂D_k/∂s + ce_weight·∂CE/∂s)
    teacher k   f·kd_scale·w_k·∂D_k/∂t_k
"""

import triton
import triton.language as tl

from .divergences import FORWARD_KL
from .hard_label import hard_gradient
from .logits import in_units, load_logits, load_teacher, store_gradient, store_teacher_gradient
from .row_stats import INF, at_temperature_1, exp_at, nan_if_infinite, shifted
from .rows import (
    DIVERGENCE_AT,
    SCALE_AT,
    SPECIALIZED,
    STUDENT_MAX_AT,
    STUDENT_SUM1_AT,
    STUDENT_SUM_AT,
    TEACHER_MAX_AT,
    TEACHER_SUM_AT,
    load_of_row,
    load_of_teacher,
)  # fmt: skip
from .weights import known_weights, teachers_to_read


@triton.jit
def teacher_terms(
    k, teachers, teacher_strides, teacher_gradients, weights, weights_strides, row_stats, rows, inner, cols,
    counted, in_rows, in_cols, f, q, log_q, n_rows, n_classes, n_teachers, inv_t, mixed,
    DIVERGENCE: tl.constexpr, TO_TEACHERS: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds teacher k's part of τ·∂(Σ w_k D_k)/∂s, all but W q, and writes the gradient of the teacher itself."""
    weight = known_weights(weights, weights_strides, k, rows, counted, n_teachers)
    used = weight != 0
    t = load_teacher(teachers, teacher_strides, k, rows, inner, cols, used[:, None] & in_cols, DTYPE, UNIT)
    t = t.to(tl.float32)
    max = load_of_teacher(row_stats, TEACHER_MAX_AT, k, rows, used, n_teachers, n_rows)
    sum = load_of_teacher(row_stats, TEACHER_SUM_AT, k, rows, used, n_teachers, n_rows)
    d = load_of_teacher(row_stats, DIVERGENCE_AT, k, rows, used, n_teachers, n_rows)
    dt = shifted(t, max[:, None])
    p = exp_at(dt, inv_t) * (1.0 / sum)[:, None]
    scaled = dt * inv_t
    log_p = tl.where(scaled == -INF, 0.0, scaled - tl.log(sum)[:, None])
    if DIVERGENCE == FORWARD_KL:
        to_student = -p
        to_teacher = p * (tl.where(p == 0, 0.0, log_p - log_q) - d[:, None])
    else:
        to_student = q * (tl.where(q == 0, 0.0, log_q) - log_p - nan_if_infinite(d)[:, None])
        to_teacher = p - q
    mixed = tl.where(used[:, None], mixed + weight[:, None] * to_student, mixed)
    if TO_TEACHERS:
        g = tl.where(used[:, None], to_teacher, 0.0) * (f * weight * inv_t)[:, None]
        inside = in_rows[:, None] & in_cols
        store_teacher_gradient(teachers, teacher_gradients, k, rows, n_classes, cols, g, inside, DTYPE)
    return mixed


@triton.jit(**SPECIALIZED)
def kd_backward(
    student, student_strides, teachers, teacher_strides, target, weights, weights_strides, upstream, row_stats,
    gradient, teacher_gradients,
    n_rows, inner, n_classes, n_teachers, upstream_stride, inv_t, kd_scale, ce_weight, label_smoothing,
    DIVERGENCE: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, TO_TEACHERS: tl.constexpr,
    TAU: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_classes = in_units(n_classes, UNIT)
    n_tiles = tl.cdiv(n_classes, BLOCK_C)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_rows = rows < n_rows
    in_cols = cols < n_classes

    f = load_of_row(row_stats, SCALE_AT, rows, in_rows, n_teachers, n_rows)
    counted = f != 0
    if upstream is not None:
        f = tl.where(counted, f * tl.load(upstream + rows * upstream_stride, mask=in_rows, other=0.0), 0.0)
    w, _, read = teachers_to_read(weights, weights_strides, rows, counted, n_teachers, HAS_KD, True, K_PAD)
    active = counted if HAS_CE else tl.max(read.to(tl.int32), 1) != 0

    s = load_logits(student, student_strides, rows, inner, cols, active[:, None] & in_cols, UNIT).to(tl.float32)
    max_s = load_of_row(row_stats, STUDENT_MAX_AT, rows, active, n_teachers, n_rows)
    sum_s = load_of_row(row_stats, STUDENT_SUM_AT, rows, active, n_teachers, n_rows)
    ds = shifted(s, max_s[:, None])
    es = exp_at(ds, inv_t)

    g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if HAS_KD:
        q = es * (1.0 / sum_s)[:, None]
        log_q = ds * inv_t - tl.log(sum_s)[:, None]
        if DIVERGENCE == FORWARD_KL:
            g = q * tl.sum(w, 1)[:, None]
        if teacher_strides is None:
            for k in range(n_teachers):
                g = teacher_terms(
                    k, teachers, teacher_strides, teacher_gradients, weights, weights_strides, row_stats, rows, inner,
                    cols, counted, in_rows, in_cols, f * kd_scale, q, log_q, n_rows, n_classes, n_teachers, inv_t, g,
                    DIVERGENCE, TO_TEACHERS, DTYPE, UNIT,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                g = teacher_terms(
                    k, teachers, teacher_strides, teacher_gradients, weights, weights_strides, row_stats, rows, inner,
                    cols, counted, in_rows, in_cols, f * kd_scale, q, log_q, n_rows, n_classes, n_teachers, inv_t, g,
                    DIVERGENCE, TO_TEACHERS, DTYPE, UNIT,
                )  # fmt: skip
        some = tl.max(read.to(tl.int32), 1) != 0
        g = tl.where(some[:, None], g * (f * kd_scale * inv_t)[:, None], 0.0)
    if gradient is not None:
        if HAS_CE:
            sum1_s = load_of_row(row_stats, STUDENT_SUM1_AT, rows, active, n_teachers, n_rows)
            label = tl.load(target + rows, mask=in_rows, other=0)
            e1 = at_temperature_1(es, ds, TAU)
            g += hard_gradient(f * ce_weight, e1, sum1_s, cols, label, n_classes, label_smoothing)
        g = tl.where(active[:, None], g, tl.where(counted, 0.0 * f, 0.0)[:, None])
        store_gradient(gradient, rows, n_classes, cols, g, in_rows[:, None] & in_cols)
