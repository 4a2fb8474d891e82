// One class of a divergence D = Σ_c φ(p, q). T is one number or a SIMD register of classes, as in row_formulas.h: no
// include guard. kernels/elementwise.py is the Triton twin.
//
// φ is homogeneous of degree 1, so φ = q ∂φ/∂q + p ∂φ/∂p, and those two terms are all that is ever needed:
//   D = Σ (of_student + of_teacher)     G = Σ of_student
//   ∂D/∂s = (of_student − q·G)/τ        ∂D/∂t = (of_teacher − p·(D − G))/τ
//
// clang-format off
//                    φ             of_student                      of_teacher
//   jsd              …             (1 − β) q log(q/m)              β p log(p/m)                 m = βp + (1 − β)q
//   tvd              ½|p − q|      ½ q sign(q − p)                 ½ p sign(p − q)
//   skew_kl          p log(p/m)    −(1 − β) pq/m                   p log(p/m) + (1 − β) pq/m    m = βp + (1 − β)q
//   skew_reverse_kl  q log(q/m)    q log(q/m) + (1 − β) pq/m       −(1 − β) pq/m                m = (1 − β)p + βq
// clang-format on
//
// All are finite: a probability of 0, masked or underflowed, adds nothing but what the other side has there.
template <typename T>
struct Element {
  T of_student, of_teacher;
};

// x log(x/m) where m >= βx.
template <typename T>
MTKD_HD T log_ratio_term(T x, T log_x, T log_m) {
  return x == T{} ? T{} : x * (log_x - log_m);
}

// of_student of skew_kl, and its of_teacher; those of skew_reverse_kl with the sides swapped.
template <typename T, typename Scalar>
MTKD_HD Element<T> skewed(T p, T log_p, T q, Scalar beta) {
  const T m = beta * p + (1 - beta) * q, overlap = (1 - beta) * p * (q / m);
  const T log_ratio = log_ratio_term<T>(p, log_p, log_of(m));
  return {m == T{} ? T{} : -overlap, m == T{} ? T{} : log_ratio + overlap};
}

template <Divergence kDivergence, typename T, typename Scalar>
MTKD_HD Element<T> element(T p, T log_p, T q, T log_q, Scalar beta) {
  if constexpr (kDivergence == Divergence::jsd) {
    const T m = beta * p + (1 - beta) * q, log_m = log_of(m);
    return {m == T{} ? T{} : (1 - beta) * log_ratio_term(q, log_q, log_m),
            m == T{} ? T{} : beta * log_ratio_term(p, log_p, log_m)};
  } else if constexpr (kDivergence == Divergence::tvd) {
    const T half = number<T>(0.5), sign = q > p ? half : (q < p ? -half : p - q);  // 0, or NaN
    return {q * sign, -p * sign};
  } else if constexpr (kDivergence == Divergence::skew_kl) {
    return skewed(p, log_p, q, beta);
  } else {
    const Element<T> swapped = skewed(q, log_q, p, beta);
    return {swapped.of_teacher, swapped.of_student};
  }
}

// Calls body(std::integral_constant) for an elementwise divergence.
template <typename Body>
MTKD_HD void with_elementwise(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::jsd:
      return body(std::integral_constant<Divergence, Divergence::jsd>());
    case Divergence::tvd:
      return body(std::integral_constant<Divergence, Divergence::tvd>());
    case Divergence::skew_kl:
      return body(std::integral_constant<Divergence, Divergence::skew_kl>());
    default:
      return body(std::integral_constant<Divergence, Divergence::skew_reverse_kl>());
  }
}
