"""The divergences as finishing touches on row states, the Triton twin of csrc/divergences.h.

D = cross/(τ·sum_x) − log sum_x + log sum_y, x the side under whose softmax the expectation is taken.
"""

import triton
import triton.language as tl

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1}


@triton.jit
def kl_from_sums(cross, sum_x, sum_y, inv_t):
    """A row without a finite logit has sum 0: NaN."""
    kl = cross * inv_t / sum_x - tl.log(sum_x) + tl.log(sum_y)
    return tl.where(sum_y == 0, float("nan"), kl)


@triton.jit
def divergence_from_sums(cross, sum_s, sum_t, inv_t, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == FORWARD_KL:
        return kl_from_sums(cross, sum_t, sum_s, inv_t)
    else:
        return kl_from_sums(cross, sum_s, sum_t, inv_t)
