"""The state of one softmax row, the Triton twin of csrc/row_stats.h.

Rows lie along axis 0 of a tile [R, C]; a state is a handful of [R] (or, for K teachers side by side, [R, K]) numbers
relative to a running maximum, so a common offset of a row costs no digits. Logits are in natural units; `inv_t` is 1/τ.
The rules for −inf and NaN live here and nowhere else:

* probability 0 means that the logit is −inf, never an exponential that underflowed;
* an empty side (nothing but −inf so far) contributes 0 to a merge;
* a cross sum of +inf is absorbing; 0·inf is never formed;
* a maximum may drop a NaN, the exponentials never do.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def exp_of(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_at(d, inv_t):
    """e^{d/τ}"""
    return tl.exp2(d * (inv_t * LOG2E))


@triton.jit
def larger(a, b):
    """max that keeps no NaN: NaN reaches the sums through its own exponential."""
    return tl.maximum(a, b)


@triton.jit
def shifted(x, max):
    """x − max, where a maximum of −inf means that every logit so far is −inf."""
    return x - tl.where(max == -INF, 0.0, max)


@triton.jit
def softmax_state(x, inv_t):
    """Logits [R, C] -> max [R], x − max, e^{(x−max)/τ}, and Σ e^{(x−max)/τ} [R]."""
    max = tl.max(x, 1)
    d = shifted(x, max[:, None])
    e = exp_at(d, inv_t)
    return max, d, e, tl.sum(e, 1)


@triton.jit
def at_temperature_1(e, d, TAU: tl.constexpr):
    """e^d from e^{d/τ}: squared once for τ = 2, twice for τ = 4, else one more exponential. TAU is 1, 2, 4 or 0."""
    if TAU == 1:
        return e
    elif TAU == 2:
        return e * e
    elif TAU == 4:
        return (e * e) * (e * e)
    else:
        return exp_of(d)


@triton.jit
def entropy_term(e1, d):
    """e^d·d, which is 0 for a logit of −inf."""
    return e1 * tl.maximum(d, -LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def raising(from_max, to_max, inv_t, TAU: tl.constexpr):
    """How a state shrinks when its maximum rises: shift (at most 0; 0 for an empty state), e^{shift/τ}, e^{shift}."""
    shift = tl.where(from_max == -INF, 0.0, from_max - to_max)
    factor = exp_at(shift, inv_t)
    return shift, factor, at_temperature_1(factor, shift, TAU)


@triton.jit
def raise_dot(dot1, sum1, shift, factor1):
    """Σ e^{x−max}(x−max); `sum1` is from before its own raise."""
    return factor1 * (dot1 + shift * sum1)


@triton.jit
def raise_cross(cross, sum_x, shift_x, factor_x, shift_y):
    """Σ e^{(x−m_x)/τ}·((x−m_x) − (y−m_y)), unscaled by 1/τ; `sum_x` is from before its own raise."""
    raised = factor_x * cross + factor_x * sum_x * (shift_x - shift_y)
    nothing = cross * 0.0  # 0, or NaN if it was NaN
    raised = tl.where((sum_x == 0) | (factor_x == 0), nothing, raised)
    return tl.where(cross == INF, cross, raised)


@triton.jit
def cross_term(x, e, dx, dy):
    """One element of that sum. `e` is e^{(x−m_x)/τ}. +inf where y is impossible and x is not, even if e underflowed."""
    ratio = tl.where(x == -INF, 0.0, dx - dy)
    return tl.where(ratio == INF, ratio, e * ratio)


@triton.jit
def nan_if_infinite(x):
    """±inf becomes NaN."""
    return x + (x - x)
