"""Strategy A of the op kd: loss, weights and the student's gradient in one pass, K + 1 reads and one write.

A program holds whole rows. On chip are the student, the teacher being read, and one float32 accumulator (uniform and
given weights) or two (confidence and entropy, whose weights are known only after the last teacher), whatever K is:

    forward KL   Σ w_k p_k                     gradient (W q − Σ w_k p_k)/τ
    reverse KL   Σ w_k (t_k − max t_k)         gradient q ⊙ (W log q − Σ w_k log p_k − Σ w_k D_k)/τ
    elementwise  Σ w_k of_student_k            gradient (Σ w_k of_student_k − q Σ w_k G_k)/τ
    DKD          Σ w_k p̂_k                     gradient (q̂ Σ w_k (β − q_y + p_ky) − β Σ w_k p̂_k)/τ beside the target
"""

import triton
import triton.language as tl

from .divergences import DKD, FIRST_ELEMENTWISE, REVERSE_KL, divergence_from_sums
from .dkd import (
    cross_entropy_apart,
    decoupled,
    entropy_apart,
    log_odds,
    sigmoid,
    smoothed_cross_entropy_apart,
    softmax_at_one,
    without_target,
)
from .elementwise import element, probabilities
from .hard_label import hard_gradient, smoothed_cross_entropy
from .logits import in_units, load_label, load_logits, load_used, read_mask, rows_of_program, store_gradient
from .row_stats import INF, at_temperature_1, cross_term, entropy_term, nan_if_infinite, softmax_state
from .rows import SPECIALIZED, at, counted_rows, store_row_loss, store_row_stats, store_slopes
from .weights import (
    CONFIDENCE,
    ENTROPY,
    GIVEN,
    accumulate_pair,
    cross_entropy,
    entropy,
    pair_coefficients,
    rule_weights,
    teachers_to_read,
)  # fmt: skip


@triton.jit
def absorb_teacher(
    k, t, y, weight, s, y_s, cols, label, max_s, ds, es, sum_s, beta, inv_t,
    d, slopes, max_t, sum_t, values, plain, valued, largest,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Adds teacher k to the numbers of every row [R, K_PAD] and to the accumulators [R, C]."""
    t = without_target(t.to(tl.float32), cols, label, DIVERGENCE)
    max, dt, et, sum = softmax_state(t, inv_t)
    if DIVERGENCE >= FIRST_ELEMENTWISE:
        p, log_p = probabilities(dt, et, sum, inv_t)
        q, log_q = probabilities(ds, es, sum_s, inv_t)
        x, of_teacher = element(p, log_p, q, log_q, beta, DIVERGENCE)
        unit = tl.full(sum.shape, 1.0, tl.float32)
        d = at(d, k, tl.sum(x + of_teacher, 1))
        slopes = at(slopes, k, tl.sum(x, 1))
    elif DIVERGENCE == REVERSE_KL:
        cross = tl.sum(cross_term(s, es, ds, dt), 1)
        x, unit = tl.where(t == -INF, 0.0, dt), tl.full(sum.shape, 1.0, tl.float32)
        d = at(d, k, divergence_from_sums(cross, sum_s, sum, inv_t, DIVERGENCE))
    else:
        cross = tl.sum(cross_term(t, et, dt, ds), 1)
        x, unit = et, 1.0 / sum
        kl = divergence_from_sums(cross, sum_s, sum, inv_t, DIVERGENCE)
        if DIVERGENCE == DKD:
            unit = tl.where(sum == 0, 0.0, unit)
            odds, odds_s = log_odds(y, max, sum, inv_t), log_odds(y_s, max_s, sum_s, inv_t)
            kl = decoupled(odds, odds_s, sum, kl, beta)
            slopes = at(slopes, k, sigmoid(odds_s) - sigmoid(odds))
        d = at(d, k, kl)
    max_t = at(max_t, k, max)
    sum_t = at(sum_t, k, sum)

    value = largest  # the cross-entropy or the entropy of the teacher, from which its weight will come
    if RULE == CONFIDENCE:
        sum1 = tl.sum(at_temperature_1(et, dt, TAU), 1)
        value = cross_entropy_apart(y, max, sum1) if DIVERGENCE == DKD else cross_entropy(sum1, max, y)
    if RULE == ENTROPY:
        e1 = at_temperature_1(et, dt, TAU)
        sum1 = tl.sum(e1, 1)
        value = entropy(sum1, tl.sum(entropy_term(e1, dt), 1))
        if DIVERGENCE == DKD:
            value = entropy_apart(y, max, sum1, value)
    values = at(values, k, value)

    if PAIR:
        plain, valued, largest = accumulate_pair(plain, valued, x, unit, value, largest, RULE)
    else:
        more = plain + x * (weight * unit)[:, None]
        plain = tl.where(weight[:, None] != 0, more, plain) if RULE == GIVEN else more
    return d, slopes, max_t, sum_t, values, plain, valued, largest


@triton.jit
def kd_gradient(
    factor, ds, es, sum_s, cols, label, w, used, kd, slopes, sum_t, values, lanes, plain, valued,
    n_teachers, beta, inv_t,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """factor·∂(Σ w_k D_k)/∂s [R, C], 0 in a row without a used teacher; `kd` [R] is Σ w_k D_k."""
    some = tl.max(used.to(tl.int32), 1) != 0
    total_w = tl.sum(tl.where(used, w, 0.0), 1)
    per_e = tl.where(some, factor * inv_t / sum_s, 0.0)
    a, b = tl.full(sum_s.shape, 1.0, tl.float32), tl.full(sum_s.shape, 0.0, tl.float32)
    if PAIR:
        a, b = pair_coefficients(values, lanes, n_teachers, RULE)
    if DIVERGENCE >= FIRST_ELEMENTWISE:
        slope = tl.sum(tl.where(used, w * slopes, 0.0), 1)
        g = plain * (factor * inv_t * a)[:, None] - es * (per_e * slope)[:, None]
        if PAIR:
            g -= valued * (factor * inv_t * b)[:, None]
        return tl.where(some[:, None], g, 0.0)
    elif DIVERGENCE == DKD:
        at_target = tl.sum(tl.where(used, w * slopes, 0.0), 1)
        of_others = tl.sum(tl.where(used & (sum_t != 0), w * beta, 0.0), 1) - at_target
        per_e = tl.where((sum_s == 0) & (of_others == 0), 0.0, per_e * of_others)
        g = es * per_e[:, None] - plain * (factor * inv_t * beta * a)[:, None]
        if PAIR:
            g += valued * (factor * inv_t * beta * b)[:, None]
        return tl.where(cols == label.to(tl.int32)[:, None], (factor * inv_t * at_target)[:, None], g)
    elif DIVERGENCE != REVERSE_KL:
        g = es * (per_e * total_w)[:, None] - plain * (factor * inv_t * a)[:, None]
        if PAIR:
            g += valued * (factor * inv_t * b)[:, None]
        return g
    else:
        log_sums = tl.sum(tl.where(used, w * tl.log(sum_t), 0.0), 1)
        row = tl.where(some, nan_if_infinite(total_w * tl.log(sum_s) - log_sums + kd), 0.0)
        log_ratio = ds * (inv_t * total_w)[:, None] - plain * (inv_t * a)[:, None]
        if PAIR:
            log_ratio += valued * (inv_t * b)[:, None]
        log_ratio = tl.where(es == 0, 0.0, log_ratio)  # where it may be infinite
        return es * per_e[:, None] * (log_ratio - row[:, None])


@triton.jit(**SPECIALIZED)
def kd_on_chip(
    student, student_strides, teachers, teacher_strides, target, row_weights, weights, weights_strides, items,
    row_loss, row_stats, gradient, gradient_strides,
    n_rows, inner, n_classes, n_teachers, ignore_index, beta, inv_t, kd_scale, ce_weight, label_smoothing,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr, SKIP_ZERO: tl.constexpr,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, TAU: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, place = rows_of_program(tl.program_id(0), inner, n_rows, UNIT, PIXELS, BLOCK_N)
    in_rows = place[2]
    n_classes = in_units(n_classes, 1 if PIXELS else UNIT)
    cols = tl.arange(0, BLOCK_C)[None, :]
    in_cols = cols < n_classes
    counted, legal, label, row_weight, scale = counted_rows(
        target, row_weights, items, rows, in_rows, ignore_index, n_classes
    )
    w, lanes, read = teachers_to_read(weights, weights_strides, rows, counted, n_teachers, HAS_KD, SKIP_ZERO, K_PAD)
    active = counted if HAS_CE else tl.max(read.to(tl.int32), 1) != 0

    s_mask = read_mask(active, place, in_cols, PIXELS)
    s = load_logits(student, student_strides, place, cols, s_mask, UNIT, PIXELS)
    tiles = ()
    if HAS_KD and teacher_strides is not None:
        for k in tl.static_range(len(teachers)):  # every load is in flight before the first is waited for
            tiles += (
                load_used(
                    k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted, in_cols,
                    legal, label, n_teachers, SKIP_ZERO, (RULE == CONFIDENCE) | (DIVERGENCE == DKD), DTYPE, UNIT,
                    PIXELS,
                ),
            )  # fmt: skip

    s = without_target(s.to(tl.float32), cols, label, DIVERGENCE)
    max_s, ds, es, sum_s = softmax_state(s, inv_t)
    y_s = tl.zeros((BLOCK_N,), tl.float32)
    if ((DIVERGENCE == DKD) & HAS_KD) | HAS_CE:
        y_s = load_label(student, student_strides, place, label, legal & active, UNIT, PIXELS)
    sum1_s = tl.zeros((BLOCK_N,), tl.float32)
    hard = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_CE:
        sum1_s = tl.sum(at_temperature_1(es, ds, TAU), 1)
        if DIVERGENCE == DKD:
            total = tl.sum(tl.where(in_cols & (cols != label.to(tl.int32)[:, None]), ds, 0.0), 1)
            hard = smoothed_cross_entropy_apart(sum1_s, max_s, y_s, total, n_classes, label_smoothing)
        else:
            total = tl.sum(tl.where(in_cols, ds, 0.0), 1)
            hard = smoothed_cross_entropy(sum1_s, max_s, y_s, total, n_classes, label_smoothing)

    d = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    max_t, sum_t, values, slopes = d, d, d, d
    plain = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    valued = plain
    largest = tl.full((BLOCK_N,), -INF, tl.float32)
    if HAS_KD:
        if teacher_strides is None:
            for k in range(n_teachers):
                t, y, weight = load_used(
                    k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted, in_cols,
                    legal, label, n_teachers, SKIP_ZERO, (RULE == CONFIDENCE) | (DIVERGENCE == DKD), DTYPE, UNIT,
                    PIXELS,
                )  # fmt: skip
                d, slopes, max_t, sum_t, values, plain, valued, largest = absorb_teacher(
                    k, t, y, weight, s, y_s, cols, label, max_s, ds, es, sum_s, beta, inv_t,
                    d, slopes, max_t, sum_t, values, plain, valued, largest,
                    DIVERGENCE, RULE, PAIR, TAU,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                t, y, weight = tiles[k]
                d, slopes, max_t, sum_t, values, plain, valued, largest = absorb_teacher(
                    k, t, y, weight, s, y_s, cols, label, max_s, ds, es, sum_s, beta, inv_t,
                    d, slopes, max_t, sum_t, values, plain, valued, largest,
                    DIVERGENCE, RULE, PAIR, TAU,
                )  # fmt: skip
        w = tl.where(lanes, rule_weights(w, values, lanes, n_teachers, RULE), 0.0)
    used = read & (w != 0)
    kd = tl.sum(tl.where(used, w * d, 0.0), 1)

    store_row_loss(row_loss, kd, hard, kd_scale, ce_weight, row_weight, counted, legal, rows, in_rows, HAS_CE)
    store_row_stats(
        row_stats, d, w, max_t, sum_t, values, max_s, sum_s, sum1_s, hard, scale, counted, active, read,
        rows, in_rows, n_teachers, n_rows, RULE,
    )  # fmt: skip
    if DIVERGENCE >= FIRST_ELEMENTWISE:
        store_slopes(row_stats, slopes, read, rows, in_rows, n_teachers, n_rows)

    g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if HAS_KD:
        g = kd_gradient(
            scale * kd_scale, ds, es, sum_s, cols, label, w, used, kd, slopes, sum_t, values, lanes, plain, valued,
            n_teachers, beta, inv_t, DIVERGENCE, RULE, PAIR,
        )  # fmt: skip
    if HAS_CE:
        e1 = at_temperature_1(es, ds, TAU)
        one = sum1_s
        if DIVERGENCE == DKD:
            e1, one = softmax_at_one(e1, sum1_s, max_s, y_s, cols, label), tl.full((BLOCK_N,), 1.0, tl.float32)
        g += hard_gradient(scale * ce_weight, e1, one, cols, label, n_classes, label_smoothing)
    g = tl.where(active[:, None], g, tl.where(counted, 0.0 * scale, 0.0)[:, None])
    store_gradient(gradient, gradient_strides, place, cols, g, in_rows[:, None] & in_cols, UNIT, PIXELS)
