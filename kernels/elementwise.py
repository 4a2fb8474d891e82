"""One class of a divergence D = Σ_c φ(p, q), the Triton twin of csrc/elementwise.h, which has the formulas.

of_student is q ∂φ/∂q, of_teacher p ∂φ/∂p, and φ their sum:

    D = Σ (of_student + of_teacher)     G = Σ of_student
    ∂D/∂s = (of_student − q·G)/τ        ∂D/∂t = (of_teacher − p·(D − G))/τ
"""

import triton
import triton.language as tl

from .divergences import JSD, SKEW_KL, TVD


@triton.jit
def log_ratio_term(x, log_x, log_m):
    """x log(x/m) where m >= βx."""
    return tl.where(x == 0, 0.0, x * (log_x - log_m))


@triton.jit
def skewed(p, log_p, q, beta):
    m = beta * p + (1 - beta) * q
    overlap = (1 - beta) * p * (q / m)
    log_ratio = log_ratio_term(p, log_p, tl.log(m))
    return tl.where(m == 0, 0.0, -overlap), tl.where(m == 0, 0.0, log_ratio + overlap)


@triton.jit
def element(p, log_p, q, log_q, beta, DIVERGENCE: tl.constexpr):
    """of_student and of_teacher."""
    if DIVERGENCE == JSD:
        m = beta * p + (1 - beta) * q
        log_m = tl.log(m)
        of_student = tl.where(m == 0, 0.0, (1 - beta) * log_ratio_term(q, log_q, log_m))
        of_teacher = tl.where(m == 0, 0.0, beta * log_ratio_term(p, log_p, log_m))
    elif DIVERGENCE == TVD:
        sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, p - q))  # 0, or NaN
        of_student, of_teacher = q * sign, -p * sign
    elif DIVERGENCE == SKEW_KL:
        of_student, of_teacher = skewed(p, log_p, q, beta)
    else:
        of_teacher, of_student = skewed(q, log_q, p, beta)
    return of_student, of_teacher


@triton.jit
def probabilities(d, e, sum, inv_t):
    """p and log p from x − max, its exponential at τ, and their sum: [R, C], [R, C], [R]."""
    return e * (1.0 / sum)[:, None], d * inv_t - tl.log(sum)[:, None]
