// The state of one softmax row: it absorbs an element or a block, and merges with another state. The same merge joins
// SIMD lanes, threads, warps, CTAs and column shards. Host and device; kernels/row_stats.py is its Triton twin.
//
// All sums are relative to running maxima, so a common offset of a row costs no digits. Logits are in natural units;
// `inv_t` is 1/τ. The rules for −inf and NaN:
//   * probability 0 means that the logit is −inf, never an exponential that underflowed;
//   * an empty side (nothing but −inf so far) contributes 0 to a merge;
//   * a cross sum of +inf is absorbing; 0·inf is never formed; NaN is never masked.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define MTKD_HD __host__ __device__ __forceinline__
#else
#define MTKD_HD inline
#endif

namespace mtkd_fast {

template <typename T>
MTKD_HD constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

template <typename T>
MTKD_HD constexpr T number(double x) {
  return static_cast<T>(x);
}

MTKD_HD float exp_of(float x) { return expf(x); }
MTKD_HD double exp_of(double x) { return exp(x); }
MTKD_HD float log_of(float x) { return logf(x); }
MTKD_HD double log_of(double x) { return log(x); }

// max that keeps no NaN: NaN reaches the sums through its own exponential.
template <typename T>
MTKD_HD T larger(T a, T b) {
  return b > a ? b : a;
}

// x − max, where a maximum of −inf means that every logit so far is −inf.
template <typename T>
MTKD_HD T shifted(T x, T max) {
  return x - (max == -infinity<T>() ? T(0) : max);
}

// One softmax: the largest logit, Σ e^{(x−max)/τ}, and at temperature 1 Σ e^{x−max}, Σ e^{x−max}(x−max), Σ (x−max).
template <typename T>
struct SoftmaxState {
  T max = -infinity<T>();
  T sum = 0;    // Σ e^{(x−max)/τ}
  T sum1 = 0;   // Σ e^{x−max}
  T dot1 = 0;   // Σ e^{x−max}·(x−max), for the entropy; a logit of −inf adds 0
  T total = 0;  // Σ (x−max), for label smoothing
  T count = 0;  // how many logits are in `total`
};

// How a state shrinks when its maximum rises from `from` to `to`.
template <typename T>
struct Raise {
  T shift;    // from − to, at most 0; 0 for an empty state, whose sums are 0 anyway
  T factor;   // e^{shift/τ}
  T factor1;  // e^{shift}

  MTKD_HD Raise() : shift(0), factor(1), factor1(1) {}  // the maximum stays
  MTKD_HD Raise(T from, T to, T inv_t) : Raise() {
    if (from == -infinity<T>() || from == to) return;
    shift = from - to;
    factor = exp_of(shift * inv_t);
    factor1 = inv_t == T(1) ? factor : exp_of(shift);
  }
};

template <typename T>
MTKD_HD void raise(SoftmaxState<T>& x, T max, const Raise<T>& by) {
  x.dot1 = by.factor1 * (x.dot1 + by.shift * x.sum1);
  x.sum *= by.factor;
  x.sum1 *= by.factor1;
  x.total += x.count * (x.max == -infinity<T>() ? (x.count > 0 ? -infinity<T>() : T(0)) : by.shift);
  x.max = max;
}

// Σ e^{(x−m_x)/τ}·((x−m_x) − (y−m_y)), unscaled by 1/τ: the numerator of a divergence of x from y. Raising it needs the
// sum of x from before its own raise, and the shifts of both.
template <typename T>
MTKD_HD T raise_cross(T cross, T sum_x, const Raise<T>& x, const Raise<T>& y) {
  if (cross == infinity<T>()) return cross;
  if (sum_x == T(0) || x.factor == T(0)) return cross * T(0);  // 0, or NaN if it was NaN
  return x.factor * cross + x.factor * sum_x * (x.shift - y.shift);
}

// One element of that sum. `e` is e^{(x−m_x)/τ}, `dx` and `dy` are the shifted logits. Where y is impossible and x is
// not, the term is +inf, also if e underflowed.
template <typename T>
MTKD_HD T cross_term(T x, T e, T dx, T dy) {
  const T ratio = x == -infinity<T>() ? T(0) : dx - dy;
  return ratio == infinity<T>() ? ratio : e * ratio;
}

}  // namespace mtkd_fast
