// Decoupled distillation, D = TCKD + β·NCKD: a KL in which the target y stands apart. T is a number or a SIMD register
// of rows, as in row_formulas.h: no include guard. kernels/dkd.py is the Triton twin.
//
// All sums of a row run over the other classes, the target's element is left out where it is read, never subtracted
// afterwards; p̂ and q̂ are the softmaxes of the others. The target comes back through its log-odds a = log p_y/(1 −
// p_y): p_y = σ(a), and in terms of the student's b = log q_y/(1 − q_y)
//   TCKD = KL of (σ(a), σ(−a)) from (σ(b), σ(−b))            NCKD = Σ_{c≠y} p̂ (log p̂ − log q̂)
//   ∂D/∂s_y = (q_y − p_y)/τ                ∂D/∂s_c = (β(q̂ − p̂) − (q_y − p_y) q̂)/τ
//   ∂D/∂t_y = v/τ                          ∂D/∂t_c = p̂ (β(log p̂ − log q̂ − NCKD) − v)/τ,     v = p_y(1 − p_y)(a − b)
// At temperature 1 the same log-odds give the cross-entropies, −log σ, and the entropies.

// Of label and max the logits, of the others log Σ e^{(x−max)/τ}, −inf where there is none: then +inf. A row without
// any finite logit is NaN.
template <typename T, typename Scalar>
MTKD_HD T log_odds(T label, T max, T log_sum, Scalar inv_t) {
  return label == number<T>(INFINITY) ? number<T>(NAN) : (label - offset_of(max)) * inv_t - log_sum;
}

template <typename T>
MTKD_HD T log_sigmoid(T a) {
  const T negative = a < T{} ? a : -a, low = a < T{} ? a : T{};
  return low - log_of(1 + exp_of(negative));
}

template <typename T>
MTKD_HD T sigmoid(T a) {
  return exp_of(log_sigmoid(a));
}

// x (log x − log y): 0 where x is impossible, +inf where y is and x is not, also if x underflows.
template <typename T>
MTKD_HD T kl_term(T log_x, T log_y) {
  const T possible = log_x == number<T>(-INFINITY) ? T{} : log_x, ratio = possible - log_y;
  const T term = ratio == number<T>(INFINITY) ? ratio : exp_of(log_x) * ratio;
  return log_x == number<T>(-INFINITY) ? T{} : term;
}

template <typename T>
MTKD_HD T binary_kl(T a, T b) {
  return kl_term(log_sigmoid(a), log_sigmoid(b)) + kl_term(log_sigmoid(-a), log_sigmoid(-b));
}

// The KL of the other classes; 0 where the teacher allows none. `sum`: of the teacher, `kl`: kl_from_sums.
template <typename T>
MTKD_HD T kl_of_others(T sum, T kl) {
  return sum == T{} ? T{} : kl;
}

template <typename T, typename Scalar>
MTKD_HD T decoupled(T target_kl, T kl_of_others, Scalar beta) {
  return beta == 0 ? target_kl : target_kl + beta * kl_of_others;
}

// v = p_y(1 − p_y)(a − b)
template <typename T>
MTKD_HD T pull_on_target(T a, T b) {
  const T variance = sigmoid(a) * sigmoid(-a);
  return variance == T{} ? T{} : variance * (a - b);
}

// −x log x
template <typename T>
MTKD_HD T entropy_of(T log_x) {
  return log_x == number<T>(-INFINITY) ? T{} : -exp_of(log_x) * log_x;
}

// H of all classes, from that of the others: `odds` at temperature 1.
template <typename T>
MTKD_HD T entropy_with_target(T odds, T sum1, T entropy_of_others) {
  const T others = sum1 == T{} ? T{} : sigmoid(-odds) * entropy_of_others;
  return entropy_of(log_sigmoid(odds)) + entropy_of(log_sigmoid(-odds)) + others;
}

// log Σ e^{s−max} of all classes, from that of the others.
template <typename T>
MTKD_HD T log_sum_with_target(T odds, T label, T max, T sum1) {
  return sum1 == T{} ? label - offset_of(max) : log_of(sum1) - log_sigmoid(-odds);
}
