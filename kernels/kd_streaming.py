"""Strategy B of the op kd, forward: every logit is read once, in tiles, and O(N·K) numbers are saved, K + 1 reads.

Nothing of size N·C is written, so this is also the forward under no_grad. The student's tile stays on chip while the
tiles of all teachers pass it; the states of the K teachers lie side by side in [R, K_PAD] and merge elementwise. The
elementwise divergences want the sums of both softmaxes first: a second sweep, which finds in L2 what fits there of the
K + 1 rows, 2(K + 1) reads.
"""

import triton
import triton.language as tl

from .divergences import DKD, FIRST_ELEMENTWISE, REVERSE_KL, divergence_from_sums
from .dkd import (
    cross_entropy_apart,
    decoupled,
    entropy_apart,
    log_odds,
    smoothed_cross_entropy_apart,
    without_target,
)
from .elementwise import element, probabilities
from .hard_label import smoothed_cross_entropy
from .logits import in_units, load_label, load_logits, load_teacher, load_used, read_mask, rows_of_program
from .row_stats import (
    INF,
    at_temperature_1,
    cross_term,
    entropy_term,
    exp_at,
    larger,
    raise_cross,
    raise_dot,
    raising,
    shifted,
    softmax_state,
)  # fmt: skip
from .rows import SPECIALIZED, at, counted_rows, store_row_loss, store_row_stats, store_slopes
from .weights import CONFIDENCE, ENTROPY, cross_entropy, entropy, rule_weights, teachers_to_read


@triton.jit
def absorb_tile(
    k, t, s, cols, label, ds, es, inv_t, max, sum, cross, sum1, dot1,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Puts the state of teacher k's tile, relative to the tile's own maxima, into column k of [R, K_PAD]."""
    t = without_target(t.to(tl.float32), cols, label, DIVERGENCE)
    max_t, dt, et, sum_t = softmax_state(t, inv_t)
    max = at(max, k, max_t)
    sum = at(sum, k, sum_t)
    if DIVERGENCE < FIRST_ELEMENTWISE:
        term = cross_term(s, es, ds, dt) if DIVERGENCE == REVERSE_KL else cross_term(t, et, dt, ds)
        cross = at(cross, k, tl.sum(term, 1))
    if (RULE == CONFIDENCE) | (RULE == ENTROPY):
        e1 = at_temperature_1(et, dt, TAU)
        sum1 = at(sum1, k, tl.sum(e1, 1))
        if RULE == ENTROPY:
            dot1 = at(dot1, k, tl.sum(entropy_term(e1, dt), 1))
    return max, sum, cross, sum1, dot1


@triton.jit
def of_teacher_k(values, k):
    """Column k of [R, K_PAD]."""
    return tl.sum(tl.where(tl.arange(0, values.shape[1])[None, :] == k, values, 0), 1)


@triton.jit
def add_elements(k, t, q, log_q, beta, inv_t, max_t, sum_t, d, slopes, DIVERGENCE: tl.constexpr):
    """Adds a tile of teacher k to D_k and G_k [R, K_PAD], given its whole rows' states."""
    dt = shifted(t.to(tl.float32), of_teacher_k(max_t, k)[:, None])
    p, log_p = probabilities(dt, exp_at(dt, inv_t), of_teacher_k(sum_t, k), inv_t)
    of_student, of_teacher = element(p, log_p, q, log_q, beta, DIVERGENCE)
    d = at(d, k, of_teacher_k(d, k) + tl.sum(of_student + of_teacher, 1))
    return d, at(slopes, k, of_teacher_k(slopes, k) + tl.sum(of_student, 1))


@triton.jit
def label_logit(
    k, teachers, teacher_strides, place, label, legal, read, logits,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Puts teacher k's logit of each row's label into column k of [R, K_PAD]."""
    legal &= of_teacher_k(read.to(tl.int32), k) != 0
    y = load_teacher(teachers, teacher_strides, k, place, label[:, None], legal[:, None], DTYPE, UNIT, PIXELS)
    return at(logits, k, tl.sum(y.to(tl.float32), 1))


@triton.jit(**SPECIALIZED)
def kd_streaming(
    student, student_strides, teachers, teacher_strides, target, row_weights, weights, weights_strides, items,
    row_loss, row_stats,
    n_rows, inner, n_classes, n_teachers, ignore_index, beta, inv_t, kd_scale, ce_weight, label_smoothing,
    DIVERGENCE: tl.constexpr, RULE: tl.constexpr, SKIP_ZERO: tl.constexpr,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, TAU: tl.constexpr, K_PAD: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, place = rows_of_program(tl.program_id(0), inner, n_rows, UNIT, PIXELS, BLOCK_N)
    in_rows = place[2]
    n_classes = in_units(n_classes, 1 if PIXELS else UNIT)
    counted, legal, label, row_weight, scale = counted_rows(
        target, row_weights, items, rows, in_rows, ignore_index, n_classes
    )
    w, lanes, read = teachers_to_read(weights, weights_strides, rows, counted, n_teachers, HAS_KD, SKIP_ZERO, K_PAD)
    active = counted if HAS_CE else tl.max(read.to(tl.int32), 1) != 0

    max_s = tl.full((BLOCK_N,), -INF, tl.float32)
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    sum1_s, total_s, count_s, hard = sum_s, sum_s, sum_s, sum_s
    max_t = tl.full((BLOCK_N, K_PAD), -INF, tl.float32)
    sum_t = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    cross, sum1_t, dot1_t = sum_t, sum_t, sum_t

    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        in_cols = cols < n_classes
        s_mask = read_mask(active, place, in_cols, PIXELS)
        s = load_logits(student, student_strides, place, cols, s_mask, UNIT, PIXELS)
        tiles = ()
        if HAS_KD and teacher_strides is not None:
            for k in tl.static_range(len(teachers)):  # every load is in flight before the first is waited for
                tiles += (
                    load_used(
                        k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted, in_cols,
                        legal, label, n_teachers, SKIP_ZERO, False, DTYPE, UNIT, PIXELS,
                    ),
                )  # fmt: skip
        s = without_target(s.to(tl.float32), cols, label, DIVERGENCE)
        tile_max_s, ds, es, tile_sum_s = softmax_state(s, inv_t)
        new_max_s = larger(max_s, tile_max_s)
        shift_s, factor_s, factor1_s = raising(max_s, new_max_s, inv_t, TAU)
        tile_shift_s, tile_factor_s, tile_factor1_s = raising(tile_max_s, new_max_s, inv_t, TAU)

        if HAS_KD:
            tile_max_t = tl.full((BLOCK_N, K_PAD), -INF, tl.float32)
            tile_sum_t = tl.zeros((BLOCK_N, K_PAD), tl.float32)
            tile_cross, tile_sum1_t, tile_dot1_t = tile_sum_t, tile_sum_t, tile_sum_t
            if teacher_strides is None:
                for k in range(n_teachers):
                    t, _, _ = load_used(
                        k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted, in_cols,
                        legal, label, n_teachers, SKIP_ZERO, False, DTYPE, UNIT, PIXELS,
                    )  # fmt: skip
                    tile_max_t, tile_sum_t, tile_cross, tile_sum1_t, tile_dot1_t = absorb_tile(
                        k, t, s, cols, label, ds, es, inv_t,
                        tile_max_t, tile_sum_t, tile_cross, tile_sum1_t, tile_dot1_t, DIVERGENCE, RULE, TAU,
                    )  # fmt: skip
            else:
                for k in tl.static_range(len(teachers)):
                    t, _, _ = tiles[k]
                    tile_max_t, tile_sum_t, tile_cross, tile_sum1_t, tile_dot1_t = absorb_tile(
                        k, t, s, cols, label, ds, es, inv_t,
                        tile_max_t, tile_sum_t, tile_cross, tile_sum1_t, tile_dot1_t, DIVERGENCE, RULE, TAU,
                    )  # fmt: skip
            new_max_t = larger(max_t, tile_max_t)
            shift, factor, factor1 = raising(max_t, new_max_t, inv_t, TAU)
            tile_shift, tile_factor, tile_factor1 = raising(tile_max_t, new_max_t, inv_t, TAU)
            if (DIVERGENCE != REVERSE_KL) & (DIVERGENCE < FIRST_ELEMENTWISE):
                cross = raise_cross(cross, sum_t, shift, factor, shift_s[:, None])
                cross += raise_cross(tile_cross, tile_sum_t, tile_shift, tile_factor, tile_shift_s[:, None])
            elif DIVERGENCE == REVERSE_KL:
                cross = raise_cross(cross, sum_s[:, None], shift_s[:, None], factor_s[:, None], shift)
                cross += raise_cross(
                    tile_cross, tile_sum_s[:, None], tile_shift_s[:, None], tile_factor_s[:, None], tile_shift
                )
            dot1_t = raise_dot(dot1_t, sum1_t, shift, factor1)
            dot1_t += raise_dot(tile_dot1_t, tile_sum1_t, tile_shift, tile_factor1)
            sum1_t = factor1 * sum1_t + tile_factor1 * tile_sum1_t
            sum_t = factor * sum_t + tile_factor * tile_sum_t
            max_t = new_max_t
        if HAS_CE:
            summed = in_cols
            if DIVERGENCE == DKD:
                summed = in_cols & (cols != label.to(tl.int32)[:, None])
            tile_count = tl.sum(tl.where(summed, 1.0, 0.0), 1)
            tile_total = tl.sum(tl.where(summed, ds, 0.0), 1)
            total_s += count_s * shift_s + tile_total + tile_count * tile_shift_s
            count_s += tile_count
            sum1_s = factor1_s * sum1_s + tile_factor1_s * tl.sum(at_temperature_1(es, ds, TAU), 1)
        sum_s = factor_s * sum_s + tile_factor_s * tile_sum_s
        max_s = new_max_s

    y_s = sum_s
    if ((DIVERGENCE == DKD) & HAS_KD) | HAS_CE:
        y_s = load_label(student, student_strides, place, label, legal & active, UNIT, PIXELS)
    if HAS_CE:
        if DIVERGENCE == DKD:
            hard = smoothed_cross_entropy_apart(sum1_s, max_s, y_s, total_s, n_classes, label_smoothing)
        else:
            hard = smoothed_cross_entropy(sum1_s, max_s, y_s, total_s, n_classes, label_smoothing)
    values = tl.zeros((BLOCK_N, K_PAD), tl.float32)
    d, slopes = values, values
    if HAS_KD:
        if (RULE == CONFIDENCE) | (DIVERGENCE == DKD):
            if teacher_strides is None:
                for k in range(n_teachers):
                    values = label_logit(
                        k, teachers, teacher_strides, place, label, legal, read, values, DTYPE, UNIT, PIXELS
                    )
            else:
                for k in tl.static_range(len(teachers)):
                    values = label_logit(
                        k, teachers, teacher_strides, place, label, legal, read, values, DTYPE, UNIT, PIXELS
                    )
        if DIVERGENCE >= FIRST_ELEMENTWISE:
            for start in range(0, n_classes, BLOCK_C):
                cols = start + tl.arange(0, BLOCK_C)[None, :]
                in_cols = cols < n_classes
                s_mask = read_mask(active, place, in_cols, PIXELS)
                s = load_logits(student, student_strides, place, cols, s_mask, UNIT, PIXELS)
                ds = shifted(s.to(tl.float32), max_s[:, None])
                q, log_q = probabilities(ds, exp_at(ds, inv_t), sum_s, inv_t)
                if teacher_strides is None:
                    for k in range(n_teachers):
                        t, _, _ = load_used(
                            k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted,
                            in_cols, legal, label, n_teachers, SKIP_ZERO, False, DTYPE, UNIT, PIXELS,
                        )  # fmt: skip
                        d, slopes = add_elements(k, t, q, log_q, beta, inv_t, max_t, sum_t, d, slopes, DIVERGENCE)
                else:
                    for k in tl.static_range(len(teachers)):
                        t, _, _ = load_used(
                            k, teachers, teacher_strides, weights, weights_strides, rows, place, cols, counted,
                            in_cols, legal, label, n_teachers, SKIP_ZERO, False, DTYPE, UNIT, PIXELS,
                        )  # fmt: skip
                        d, slopes = add_elements(k, t, q, log_q, beta, inv_t, max_t, sum_t, d, slopes, DIVERGENCE)
            store_slopes(row_stats, slopes, read, rows, in_rows, n_teachers, n_rows)
        else:
            d = divergence_from_sums(cross, sum_s[:, None], sum_t, inv_t, DIVERGENCE)
        labels = values
        if DIVERGENCE == DKD:
            odds, odds_s = log_odds(labels, max_t, sum_t, inv_t), log_odds(y_s, max_s, sum_s, inv_t)
            d = decoupled(odds, odds_s[:, None], sum_t, d, beta)
        if RULE == CONFIDENCE:
            if DIVERGENCE == DKD:
                values = cross_entropy_apart(labels, max_t, sum1_t)
            else:
                values = cross_entropy(sum1_t, max_t, labels)
        if RULE == ENTROPY:
            values = entropy(sum1_t, dot1_t)
            if DIVERGENCE == DKD:
                values = entropy_apart(labels, max_t, sum1_t, values)
        w = tl.where(lanes, rule_weights(w, values, lanes, n_teachers, RULE), 0.0)
    kd = tl.sum(tl.where(read & (w != 0), w * d, 0.0), 1)

    store_row_loss(row_loss, kd, hard, kd_scale, ce_weight, row_weight, counted, legal, rows, in_rows, HAS_CE)
    store_row_stats(
        row_stats, d, w, max_t, sum_t, values, max_s, sum_s, sum1_s, hard, scale, counted, active, read,
        rows, in_rows, n_teachers, n_rows, RULE,
    )  # fmt: skip
