"""Strategy A of the op kd: loss, weights and the student's gradient in one pass, K + 1 reads and one write.

A program holds whole rows. On chip are the student, the teacher being read, and one float32 accumulator (uniform and
given weights) or two (confidence and entropy, whose weights are known only after the last teacher), whatever K is:

    forward KL   Σ w_k p_k                     gradient (W q − Σ w_k p_k)/τ
    reverse KL   Σ w_k (t_k − max t_k)         gradient q ⊙ (W log q − Σ w_k log p_k − Σ w_k D_k)/τ
"""

import triton
import triton.language as tl

from .divergences import FORWARD_KL, divergence_from_sums
from .hard_label import hard_gradient, smoothed_cross_entropy
from .logits import in_units, load_label, load_logits, load_used, store_gradient
from .row_stats import INF, at_temperature_1, cross_term, entropy_term, nan_if_infinite, softmax_state
from .rows import SPECIALIZED, at, counted_rows, store_row_loss, store_row_stats
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
    k, t, y, weight, s, ds, es, sum_s, inv_t, d, max_t, sum_t, values, plain, valued, largest,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Adds teacher k to the numbers of every row [R, K_PAD] and to the accumulators [R, C]."""
    t = t.to(tl.float32)
    max, dt, et, sum = softmax_state(t, inv_t)
    if DIVERGENCE == FORWARD_KL:
        cross = tl.sum(cross_term(t, et, dt, ds), 1)
        x, unit = et, 1.0 / sum
    else:
        cross = tl.sum(cross_term(s, es, ds, dt), 1)
        x, unit = tl.where(t == -INF, 0.0, dt), tl.full(sum.shape, 1.0, tl.float32)
    d = at(d, k, divergence_from_sums(cross, sum_s, sum, inv_t, DIVERGENCE))
    max_t = at(max_t, k, max)
    sum_t = at(sum_t, k, sum)

    value = largest  # the cross-entropy or the entropy of the teacher, from which its weight will come
    if RULE == CONFIDENCE:
        value = cross_entropy(tl.sum(at_temperature_1(et, dt, TAU), 1), max, y)
    if RULE == ENTROPY:
        e1 = at_temperature_1(et, dt, TAU)
        value = entropy(tl.sum(e1, 1), tl.sum(entropy_term(e1, dt), 1))
    values = at(values, k, value)

    if PAIR:
        plain, valued, largest = accumulate_pair(plain, valued, x, unit, value, largest, RULE)
    else:
        more = plain + x * (weight * unit)[:, None]
        plain = tl.where(weight[:, None] != 0, more, plain) if RULE == GIVEN else more
    return d, max_t, sum_t, values, plain, valued, largest


@triton.jit
def kd_gradient(
    factor, ds, es, sum_s, w, used, kd, sum_t, values, lanes, plain, valued, n_teachers, inv_t,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """factor·∂(Σ w_k D_k)/∂s [R, C], 0 in a row without a used teacher; `kd` [R] is Σ w_k D_k."""
    some = tl.max(used.to(tl.int32), 1) != 0
    total_w = tl.sum(tl.where(used, w, 0.0), 1)
    per_e = tl.where(some, factor * inv_t / sum_s, 0.0)
    a, b = tl.full(sum_s.shape, 1.0, tl.float32), tl.full(sum_s.shape, 0.0, tl.float32)
    if PAIR:
        a, b = pair_coefficients(values, lanes, n_teachers, RULE)
    if DIVERGENCE == FORWARD_KL:
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
    row_loss, row_stats, gradient,
    n_rows, inner, n_classes, n_teachers, ignore_index, inv_t, kd_scale, ce_weight, label_smoothing,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, PAIR: tl.constexpr, SKIP_ZERO: tl.constexpr,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, TAU: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_classes = in_units(n_classes, UNIT)
    cols = tl.arange(0, BLOCK_C)[None, :]
    in_cols = cols < n_classes
    counted, legal, label, row_weight, scale = counted_rows(
        target, row_weights, items, rows, rows < n_rows, ignore_index, n_classes
    )
    w, lanes, read = teachers_to_read(weights, weights_strides, rows, counted, n_teachers, HAS_KD, SKIP_ZERO, K_PAD)
    active = counted if HAS_CE else tl.max(read.to(tl.int32), 1) != 0

    s = load_logits(student, student_strides, rows, inner, cols, active[:, None] & in_cols, UNIT)
    tiles = ()
    if HAS_KD and teacher_strides is not None:
        for k in tl.static_range(len(teachers)):  # every load is in flight before the first is waited for
            tiles += (
                load_used(
                    k, teachers, teacher_strides, weights, weights_strides, rows, inner, cols, counted, in_cols,
                    legal, label, n_teachers, SKIP_ZERO, RULE == CONFIDENCE, DTYPE, UNIT,
                ),
            )  # fmt: skip

    s = s.to(tl.float32)
    max_s, ds, es, sum_s = softmax_state(s, inv_t)
    sum1_s = tl.zeros((BLOCK_N,), tl.float32)
    hard = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_CE:
        sum1_s = tl.sum(at_temperature_1(es, ds, TAU), 1)
        total = tl.sum(tl.where(in_cols, ds, 0.0), 1)
        y = load_label(student, student_strides, rows, inner, label, legal, UNIT)
        hard = smoothed_cross_entropy(sum1_s, max_s, y, total, n_classes, label_smoothing)

    d = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    max_t, sum_t, values = d, d, d
    plain = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    valued = plain
    largest = tl.full((BLOCK_N,), -INF, tl.float32)
    if HAS_KD:
        if teacher_strides is None:
            for k in range(n_teachers):
                t, y, weight = load_used(
                    k, teachers, teacher_strides, weights, weights_strides, rows, inner, cols, counted, in_cols,
                    legal, label, n_teachers, SKIP_ZERO, RULE == CONFIDENCE, DTYPE, UNIT,
                )  # fmt: skip
                d, max_t, sum_t, values, plain, valued, largest = absorb_teacher(
                    k, t, y, weight, s, ds, es, sum_s, inv_t, d, max_t, sum_t, values, plain, valued, largest,
                    DIVERGENCE, RULE, PAIR, TAU,
                )  # fmt: skip
        else:
            for k in tl.static_range(len(teachers)):
                t, y, weight = tiles[k]
                d, max_t, sum_t, values, plain, valued, largest = absorb_teacher(
                    k, t, y, weight, s, ds, es, sum_s, inv_t, d, max_t, sum_t, values, plain, valued, largest,
                    DIVERGENCE, RULE, PAIR, TAU,
                )  # fmt: skip
        w = tl.where(lanes, rule_weights(w, values, lanes, n_teachers, RULE), 0.0)
    used = read & (w != 0)
    kd = tl.sum(tl.where(used, w * d, 0.0), 1)

    store_row_loss(row_loss, kd, hard, kd_scale, ce_weight, row_weight, counted, legal, rows, n_rows, HAS_CE)
    store_row_stats(
        row_stats, d, w, max_t, sum_t, values, max_s, sum_s, sum1_s, hard, scale, counted, active, read,
        rows, n_teachers, n_rows, RULE,
    )  # fmt: skip

    g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if HAS_KD:
        g = kd_gradient(
            scale * kd_scale, ds, es, sum_s, w, used, kd, sum_t, values, lanes, plain, valued, n_teachers, inv_t,
            DIVERGENCE, RULE, PAIR,
        )  # fmt: skip
    if HAS_CE:
        e1 = at_temperature_1(es, ds, TAU)
        g += hard_gradient(scale * ce_weight, e1, sum1_s, cols, label, n_classes, label_smoothing)
    g = tl.where(active[:, None], g, tl.where(counted, 0.0 * scale, 0.0)[:, None])
    store_gradient(gradient, rows, n_classes, cols, g, (rows < n_rows)[:, None] & in_cols)
