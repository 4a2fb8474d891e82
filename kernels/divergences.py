"""The divergences: what they are called and how they are come by, the Triton twin of csrc/divergences.h.

KL: D = cross/(τ·sum_x) − log sum_x + log sum_y, x the side under whose softmax the expectation is taken. The formulas
of the others are in elementwise.py and dkd.py.
"""

import triton
import triton.language as tl

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
DKD = tl.constexpr(2)
JSD = tl.constexpr(3)
TVD = tl.constexpr(4)
SKEW_KL = tl.constexpr(5)
SKEW_REVERSE_KL = tl.constexpr(6)
FIRST_ELEMENTWISE = JSD  # and all after it
DIVERGENCES = {
    "forward_kl": 0, "reverse_kl": 1, "dkd": 2, "jsd": 3, "tvd": 4, "skew_kl": 5, "skew_reverse_kl": 6,
}  # fmt: skip
ELEMENTWISE = ("jsd", "tvd", "skew_kl", "skew_reverse_kl")  # sums of φ(p, q) over the classes: elementwise.py


@triton.jit
def kl_from_sums(cross, sum_x, sum_y, inv_t):
    """A row without a finite logit has sum 0: NaN."""
    kl = cross * inv_t / sum_x - tl.log(sum_x) + tl.log(sum_y)
    return tl.where(sum_y == 0, float("nan"), kl)


@triton.jit
def divergence_from_sums(cross, sum_s, sum_t, inv_t, DIVERGENCE: tl.constexpr):
    """D, or of DKD the KL of the classes beside the target."""
    if DIVERGENCE == REVERSE_KL:
        return kl_from_sums(cross, sum_s, sum_t, inv_t)
    else:
        return kl_from_sums(cross, sum_t, sum_s, inv_t)
