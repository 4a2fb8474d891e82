// The numbers of a row from its sums. T is one number, the row of a CUDA thread, or a SIMD register, a row in each
// lane: T{} is zero and ?: selects. So there is no include guard: it is included in the namespace of every instruction
// set, and once by CUDA.

// What is subtracted from a row's logits: the maximum, or 0 where that is −inf (nothing but −inf so far).
template <typename T>
MTKD_HD T offset_of(T max) {
  return max == number<T>(-INFINITY) ? T{} : max;
}

// D = cross/(τ·sum_x) − log sum_x + log sum_y, x the side under whose softmax the expectation is taken.
// sum_x, sum_y: Σ e^{(·−max)/τ}; cross: Σ e^{(x−m_x)/τ}((x−m_x) − (y−m_y)). A row without a finite logit has sum 0:
// NaN.
template <typename T, typename Scalar>
MTKD_HD T kl_from_sums(T cross, T sum_x, T log_sum_x, T sum_y, T log_sum_y, Scalar inv_t) {
  return sum_y == T{} ? number<T>(NAN) : cross * inv_t / sum_x - log_sum_x + log_sum_y;
}

// CE = log Σ e^{t−max} − (t_y − max), at temperature 1. A row without a finite logit is NaN, not +inf.
template <typename T>
MTKD_HD T cross_entropy(T sum1, T max, T label_logit) {
  return sum1 == T{} ? number<T>(NAN) : log_of(sum1) - (label_logit - max);
}

// H = log Σ e^{t−max} − Σ e^{t−max}(t−max) / Σ e^{t−max}, at temperature 1.
template <typename T>
MTKD_HD T entropy(T sum1, T dot1) {
  return log_of(sum1) - dot1 / sum1;
}

// e^{a−max}, where a = max = +inf counts as 1: teachers of infinite cross-entropy share the softmax.
template <typename T>
MTKD_HD T relative_exp(T a, T max) {
  return a == max ? number<T>(1) : exp_of(a - max);
}
