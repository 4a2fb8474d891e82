"""Decoupled distillation, TCKD + β·NCKD, the Triton twin of csrc/dkd.h, which has the formulas.

Sums run over the classes beside the target, which is left out where it is read; it comes back through its log-odds.
"""

import triton
import triton.language as tl

from .divergences import DKD
from .row_stats import INF, exp_of


@triton.jit
def without_target(x, cols, label, DIVERGENCE: tl.constexpr):
    """Logits [R, C]; a target that stands apart counts as −inf."""
    if DIVERGENCE == DKD:
        return tl.where(cols == label.to(tl.int32)[:, None], -INF, x)
    else:
        return x


@triton.jit
def log_odds(label, max, sum, inv_t):
    """log x_y/(1 − x_y) from the sums over the others; +inf without another class."""
    odds = (label - tl.where(max == -INF, 0.0, max)) * inv_t - tl.log(sum)
    return tl.where(label == INF, float("nan"), odds)


@triton.jit
def log_sigmoid(a):
    return tl.where(a < 0, a, 0.0) - tl.log(1 + exp_of(tl.where(a < 0, a, -a)))


@triton.jit
def sigmoid(a):
    return exp_of(log_sigmoid(a))


@triton.jit
def kl_term(log_x, log_y):
    """x (log x − log y): 0 where x is impossible, +inf where y is and x is not, also if x underflows."""
    impossible = log_x == -INF
    ratio = tl.where(impossible, 0.0, log_x) - log_y
    return tl.where(impossible, 0.0, tl.where(ratio == INF, ratio, exp_of(log_x) * ratio))


@triton.jit
def binary_kl(a, b):
    return kl_term(log_sigmoid(a), log_sigmoid(b)) + kl_term(log_sigmoid(-a), log_sigmoid(-b))


@triton.jit
def decoupled(a, b, sum, kl, beta):
    """D; `kl` is that of the others, where the teacher, of `sum`, allows any."""
    of_others = tl.where((sum == 0) | (beta == 0), 0.0, kl)
    return binary_kl(a, b) + tl.where(beta == 0, 0.0, beta * of_others)


@triton.jit
def pull_on_target(a, b):
    """p_y (1 − p_y)(a − b)"""
    variance = sigmoid(a) * sigmoid(-a)
    return tl.where(variance == 0, 0.0, variance * (a - b))


@triton.jit
def entropy_of(log_x):
    return tl.where(log_x == -INF, 0.0, -exp_of(log_x) * log_x)


@triton.jit
def cross_entropy_apart(label, max, sum1):
    return -log_sigmoid(log_odds(label, max, sum1, 1.0))


@triton.jit
def entropy_apart(label, max, sum1, entropy_of_others):
    odds = log_odds(label, max, sum1, 1.0)
    others = tl.where(sum1 == 0, 0.0, sigmoid(-odds) * entropy_of_others)
    return entropy_of(log_sigmoid(odds)) + entropy_of(log_sigmoid(-odds)) + others


@triton.jit
def smoothed_cross_entropy_apart(sum1, max, label_logit, total, n_classes, label_smoothing):
    """As smoothed_cross_entropy of hard_label.py, from the sums of the others."""
    odds = log_odds(label_logit, max, sum1, 1.0)
    label = label_logit - tl.where(max == -INF, 0.0, max)
    log_sum = tl.where(sum1 == 0, label, tl.log(sum1) - log_sigmoid(-odds))
    label_part = tl.where(label_smoothing < 1, -(1 - label_smoothing) * log_sigmoid(odds), 0.0)
    mean_part = tl.where(label_smoothing > 0, label_smoothing * (log_sum - (total + label) / n_classes), 0.0)
    return label_part + mean_part


@triton.jit
def softmax_at_one(e1, sum1, max, label_logit, cols, label):
    """The student's softmax at temperature 1 [R, C], from the sums of the others."""
    odds = log_odds(label_logit, max, sum1, 1.0)
    of_others = tl.where(sum1 == 0, 0.0, sigmoid(-odds) / sum1)
    return tl.where(cols == label.to(tl.int32)[:, None], sigmoid(odds)[:, None], e1 * of_others[:, None])
