"""Strategy B of the op kd, backward: every gradient that is wanted, tile by tile, K + 1 reads and one write for each.

Purely elementwise, given the row states that the forward saved. With f = scale·upstream, for every row:

    student     f·(kd_scale·Σ_k w_k ∂D_k/∂s + ce_weight·∂CE/∂s)
    teacher k   f·kd_scale·w_k·∂D_k/∂t_k
"""

import triton
import triton.language as tl

from .divergences import DKD, FIRST_ELEMENTWISE, REVERSE_KL
from .dkd import binary_kl, log_odds, pull_on_target, sigmoid, softmax_at_one, without_target
from .elementwise import element
from .hard_label import hard_gradient
from .logits import (
    in_units,
    load_label,
    load_logits,
    load_teacher,
    read_mask,
    rows_of_program,
    store_gradient,
    store_teacher_gradient,
)
from .row_stats import INF, at_temperature_1, exp_at, nan_if_infinite, shifted
from .rows import (
    DIVERGENCE_AT,
    SCALE_AT,
    SLOPE_AT,
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
    k, teachers, teacher_strides, teacher_gradients, teacher_gradient_strides, weights, weights_strides, row_stats,
    rows, place, cols, label, odds_s, counted, in_cols, f, q, log_q, n_rows, n_classes, n_teachers, beta, inv_t, mixed,
    DIVERGENCE: tl.constexpr, TO_TEACHERS: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Adds teacher k's part of τ·∂(Σ w_k D_k)/∂s, all but W q, and writes the gradient of the teacher itself."""
    weight = known_weights(weights, weights_strides, k, rows, counted, n_teachers)
    used = weight != 0
    mask = read_mask(used, place, in_cols, PIXELS)
    t = load_teacher(teachers, teacher_strides, k, place, cols, mask, DTYPE, UNIT, PIXELS)
    t = without_target(t.to(tl.float32), cols, label, DIVERGENCE)
    max = load_of_teacher(row_stats, TEACHER_MAX_AT, k, rows, used, n_teachers, n_rows)
    sum = load_of_teacher(row_stats, TEACHER_SUM_AT, k, rows, used, n_teachers, n_rows)
    d = load_of_teacher(row_stats, DIVERGENCE_AT, k, rows, used, n_teachers, n_rows)
    dt = shifted(t, max[:, None])
    p = exp_at(dt, inv_t) * (1.0 / sum)[:, None]
    scaled = dt * inv_t
    log_p = tl.where(scaled == -INF, 0.0, scaled - tl.log(sum)[:, None])
    if DIVERGENCE >= FIRST_ELEMENTWISE:
        slope = load_of_row(row_stats, SLOPE_AT + k, rows, used, n_teachers, n_rows)
        of_student, of_teacher = element(p, scaled - tl.log(sum)[:, None], q, log_q, beta, DIVERGENCE)
        to_student = of_student - q * slope[:, None]
        to_teacher = of_teacher - p * (d - slope)[:, None]
    elif DIVERGENCE == DKD:
        legal = used & (label >= 0) & (label < n_classes)
        y = load_teacher(teachers, teacher_strides, k, place, label[:, None], legal[:, None], DTYPE, UNIT, PIXELS)
        odds = log_odds(tl.sum(y.to(tl.float32), 1), max, sum, inv_t)
        pull, gap = pull_on_target(odds, odds_s), sigmoid(odds_s) - sigmoid(odds)
        p = tl.where((sum == 0)[:, None], 0.0, p)
        at_target = cols == label.to(tl.int32)[:, None]
        of_others = tl.where(sum == 0, 0.0, beta) - gap
        to_student = tl.where((of_others == 0)[:, None], 0.0, q * of_others[:, None]) - beta * p
        to_student = tl.where(at_target, gap[:, None], to_student)
        ratio = tl.where((p == 0) | (beta == 0), 0.0, beta * (log_p - log_q))
        to_teacher = p * (ratio - (d - binary_kl(odds, odds_s) + pull)[:, None])
        to_teacher = tl.where(at_target, pull[:, None], to_teacher)
    elif DIVERGENCE != REVERSE_KL:
        to_student = -p
        to_teacher = p * (tl.where(p == 0, 0.0, log_p - log_q) - d[:, None])
    else:
        to_student = q * (tl.where(q == 0, 0.0, log_q) - log_p - nan_if_infinite(d)[:, None])
        to_teacher = p - q
    mixed = tl.where(used[:, None], mixed + weight[:, None] * to_student, mixed)
    if TO_TEACHERS:
        g = tl.where(used[:, None], to_teacher, 0.0) * (f * weight * inv_t)[:, None]
        store_teacher_gradient(
            teachers, teacher_gradients, teacher_gradient_strides, k, place, cols, g,
            place[2][:, None] & in_cols, DTYPE, UNIT, PIXELS,
        )  # fmt: skip
    return mixed


@triton.jit(**SPECIALIZED)
def kd_backward(
    student, student_strides, teachers, teacher_strides, target, weights, weights_strides, upstream, row_stats,
    gradient, gradient_strides, teacher_gradients, teacher_gradient_strides,
    n_rows, inner, n_classes, n_teachers, upstream_stride, beta, inv_t, kd_scale, ce_weight, label_smoothing,
    DIVERGENCE: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, TO_TEACHERS: tl.constexpr,
    TAU: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_classes = in_units(n_classes, 1 if PIXELS else UNIT)
    n_tiles = tl.cdiv(n_classes, BLOCK_C)
    rows, place = rows_of_program(tl.program_id(0) // n_tiles, inner, n_rows, UNIT, PIXELS, BLOCK_N)
    cols = (tl.program_id(0) % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_rows = place[2]
    in_cols = cols < n_classes

    f = load_of_row(row_stats, SCALE_AT, rows, in_rows, n_teachers, n_rows)
    counted = f != 0
    if upstream is not None:
        f = tl.where(counted, f * tl.load(upstream + rows * upstream_stride, mask=in_rows, other=0.0), 0.0)
    w, _, read = teachers_to_read(weights, weights_strides, rows, counted, n_teachers, HAS_KD, True, K_PAD)
    active = counted if HAS_CE else tl.max(read.to(tl.int32), 1) != 0

    label = tl.zeros((BLOCK_N,), tl.int64)
    if (DIVERGENCE == DKD) | HAS_CE:
        label = tl.load(target + rows, mask=in_rows, other=0)
    s_mask = read_mask(active, place, in_cols, PIXELS)
    s = load_logits(student, student_strides, place, cols, s_mask, UNIT, PIXELS)
    s = without_target(s.to(tl.float32), cols, label, DIVERGENCE)
    max_s = load_of_row(row_stats, STUDENT_MAX_AT, rows, active, n_teachers, n_rows)
    sum_s = load_of_row(row_stats, STUDENT_SUM_AT, rows, active, n_teachers, n_rows)
    ds = shifted(s, max_s[:, None])
    es = exp_at(ds, inv_t)
    y_s, odds_s = f, f
    if DIVERGENCE == DKD:
        legal = active & (label >= 0) & (label < n_classes)
        y_s = load_label(student, student_strides, place, label, legal, UNIT, PIXELS)
        odds_s = log_odds(y_s, max_s, sum_s, inv_t)

    g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if HAS_KD:
        q = es * (1.0 / sum_s)[:, None]
        log_q = ds * inv_t - tl.log(sum_s)[:, None]
        if (DIVERGENCE != REVERSE_KL) & (DIVERGENCE < DKD):
            g = q * tl.sum(w, 1)[:, None]
        if teacher_strides is None:
            for k in range(n_teachers):
                g = teacher_terms(
                    k, teachers, teacher_strides, teacher_gradients, teacher_gradient_strides, weights,
                    weights_strides, row_stats, rows, place, cols, label, odds_s, counted, in_cols, f * kd_scale,
                    q, log_q, n_rows, n_classes, n_teachers, beta, inv_t, g,
                    DIVERGENCE, TO_TEACHERS, DTYPE, UNIT, PIXELS,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                g = teacher_terms(
                    k, teachers, teacher_strides, teacher_gradients, teacher_gradient_strides, weights,
                    weights_strides, row_stats, rows, place, cols, label, odds_s, counted, in_cols, f * kd_scale,
                    q, log_q, n_rows, n_classes, n_teachers, beta, inv_t, g,
                    DIVERGENCE, TO_TEACHERS, DTYPE, UNIT, PIXELS,
                )  # fmt: skip
        some = tl.max(read.to(tl.int32), 1) != 0
        g = tl.where(some[:, None], g * (f * kd_scale * inv_t)[:, None], 0.0)
    if gradient is not None:
        if HAS_CE:
            sum1_s = load_of_row(row_stats, STUDENT_SUM1_AT, rows, active, n_teachers, n_rows)
            e1 = at_temperature_1(es, ds, TAU)
            if DIVERGENCE == DKD:
                e1 = softmax_at_one(e1, sum1_s, max_s, y_s, cols, label)
                sum1_s = tl.full((BLOCK_N,), 1.0, tl.float32)
            g += hard_gradient(f * ce_weight, e1, sum1_s, cols, label, n_classes, label_smoothing)
        g = tl.where(active[:, None], g, tl.where(counted, 0.0 * f, 0.0)[:, None])
        store_gradient(gradient, gradient_strides, place, cols, g, in_rows[:, None] & in_cols, UNIT, PIXELS)
