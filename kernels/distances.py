"""The distances of a pair of features and their gradients: the Triton twin of csrc/distances.h and distance_sums.h."""

import triton
import triton.language as tl

MSE = tl.constexpr(0)
SMOOTH_L1 = tl.constexpr(1)
COSINE = tl.constexpr(2)
DISTANCES = {"mse": 0, "smooth_l1": 1, "cosine": 2}

SMALLEST = tl.constexpr(2.0**-126)  # of the normal numbers: a smaller norm is that of a zero vector
SMALL = tl.constexpr(2.0**-80)
LARGE = tl.constexpr(2.0**80)


def kept_numbers(distance: str) -> int:
    """Of a pair and a sample: the distance, and for the cosine ‖f‖ and ‖g‖."""
    return 3 if distance == "cosine" else 1


@triton.jit
def slope(d, DISTANCE: tl.constexpr):
    """ρ'(d), d = f − g. mse: ρ = d². smooth_l1: ρ = d²/2 up to |d| = 1, |d| − 1/2 beyond."""
    if DISTANCE == MSE:
        return d + d
    else:
        return tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))


@triton.jit
def rho(d, DISTANCE: tl.constexpr):
    if DISTANCE == MSE:
        return d * d
    else:
        s = slope(d, DISTANCE)
        return s * (d - 0.5 * s)


@triton.jit
def scale_for(sum_of_squares):
    """The power of two by which features whose squares leave [2^-80, 2^80] are multiplied before they are squared."""
    return tl.where(sum_of_squares > LARGE, SMALL, tl.where(sum_of_squares < SMALL, LARGE, 1.0))


@triton.jit
def inverse_norm(norm):
    return tl.where(norm < SMALLEST, 0.0, tl.div_rn(1.0, norm))


@triton.jit
def cosine_from_sums(ff, gg, fg, scale_f, scale_g):
    """The cosine and both norms; 0 with a zero vector, but NaN stays NaN."""
    norm_f, norm_g = tl.sqrt_rn(ff), tl.sqrt_rn(gg)
    true_f, true_g = tl.div_rn(norm_f, scale_f), tl.div_rn(norm_g, scale_g)
    zero = (true_f < SMALLEST) | (true_g < SMALLEST)
    return tl.where(zero, fg * 0.0, tl.div_rn(tl.div_rn(fg, norm_f), norm_g)), true_f, true_g
