"""Closed-form teacher weights of a row, the Triton twin of csrc/weights.h.

Teachers lie along axis 1 of [R, K_PAD]; `lanes` says which of them exist.
"""

import triton
import triton.language as tl

from .row_stats import INF, exp_of, larger

UNIFORM = tl.constexpr(0)
GIVEN = tl.constexpr(1)
CONFIDENCE = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
WEIGHT_RULES = {"uniform": 0, "given": 1, "confidence": 2, "entropy": 3}


@triton.jit
def relative_exp(a, max):
    """e^{a−max}, where a = max = +inf counts as 1: teachers of infinite cross-entropy share the softmax."""
    return tl.where(a == max, 1.0, exp_of(a - max))


@triton.jit
def cross_entropy(sum1, max, label_logit):
    """log Σ e^{x−max} − (x_y − max), at temperature 1. A row without a finite logit is NaN, not +inf."""
    return tl.where(sum1 == 0, float("nan"), tl.log(sum1) - (label_logit - max))


@triton.jit
def entropy(sum1, dot1):
    """log Σ e^{x−max} − Σ e^{x−max}(x−max) / Σ e^{x−max}, at temperature 1."""
    return tl.log(sum1) - dot1 / sum1


@triton.jit
def confidence_shares(ce, lanes):
    """CE [R, K_PAD] -> e^{CE−M} (0 where there is no teacher) and Σ e^{CE−M} [R], M the largest CE of the row."""
    max = tl.max(tl.where(lanes, ce, -INF), 1)
    share = tl.where(lanes, relative_exp(ce, max[:, None]), 0.0)
    return share, tl.sum(share, 1)


@triton.jit
def confidence_weights(ce, lanes, n_teachers):
    """(1 − softmax_k CE_k)/(K−1); K = 1 gives 1."""
    share, total = confidence_shares(ce, lanes)
    return tl.where(n_teachers == 1, total[:, None], (1.0 - share / total[:, None]) / (n_teachers - 1))


@triton.jit
def entropy_weights(h, lanes, n_teachers):
    """(1 − H_k/Σ H)/(K−1); K = 1 gives 1, Σ H = 0 gives 1/K."""
    total = tl.sum(tl.where(lanes, h, 0.0), 1)[:, None]
    w = tl.where(n_teachers == 1, total / total, (1.0 - h / total) / (n_teachers - 1))
    return tl.where(total == 0, 1.0 / n_teachers, w)


@triton.jit
def known_weights(weights, strides, k, rows, mask, n_teachers):
    """Weights that need no pass: the given ones, or 1/K (for a rule, until it replaces them). k and rows broadcast."""
    if weights is None:
        return tl.where(mask, 1.0 / n_teachers, 0.0)
    else:
        return tl.load(weights + tl.cast(k, tl.int64) * strides[0] + rows * strides[1], mask=mask, other=0.0)


@triton.jit
def teachers_to_read(
    weights, strides, rows, counted, n_teachers,
    HAS_KD: tl.constexpr, SKIP_ZERO: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Known weights [R, K_PAD], which of the K_PAD teachers exist [1, K_PAD], and which are read in which row."""
    ks = tl.arange(0, K_PAD)[None, :]
    lanes = ks < n_teachers
    read = counted[:, None] & lanes
    if HAS_KD:
        w = known_weights(weights, strides, ks, rows[:, None], read, n_teachers)
        return w, lanes, (read & (w != 0) if SKIP_ZERO else read)
    else:
        return tl.zeros(read.shape, tl.float32), lanes, read & False


@triton.jit
def rule_weights(w, values, lanes, n_teachers, RULE: tl.constexpr):
    """The weights [R, K_PAD] of any rule, from the CE_k or H_k in `values`; `w` are those known before the pass."""
    if RULE == CONFIDENCE:
        return confidence_weights(values, lanes, n_teachers)
    elif RULE == ENTROPY:
        return entropy_weights(values, lanes, n_teachers)
    else:
        return w


@triton.jit
def pair_coefficients(values, lanes, n_teachers, RULE: tl.constexpr):
    """a and b [R] such that Σ w_k x_k = a·Σ x_k − b·Σ v_k x_k, with v_k = e^{CE_k−M} or H_k. K is at least 2."""
    if RULE == CONFIDENCE:
        _, total = confidence_shares(values, lanes)
    else:
        total = tl.sum(tl.where(lanes, values, 0.0), 1)
    a = 1.0 / (n_teachers - 1)
    if RULE == ENTROPY:
        no_entropy = total == 0
        return tl.where(no_entropy, 1.0 / n_teachers, a), tl.where(no_entropy, 0.0, a / total)
    else:
        return a + 0.0 * total, a / total


@triton.jit
def accumulate_pair(plain, valued, x, unit, value, largest, RULE: tl.constexpr):
    """Adds unit·x of teacher k to A = Σ x_k and E = Σ v_k x_k [R, C]; the E of confidence is relative to `largest`."""
    plain += x * unit[:, None]
    if RULE == CONFIDENCE:
        new_largest = larger(largest, value)
        valued *= relative_exp(largest, new_largest)[:, None]
        return plain, valued + x * (unit * relative_exp(value, new_largest))[:, None], new_largest
    else:
        return plain, valued + x * (unit * value)[:, None], largest
