// A distance from sums over the elements of a sample, and its gradient from what is kept of them. V is one number or a
// SIMD register of them, T always one number. So there is no include guard: it is included in the namespace of every
// instruction set, and once by CUDA.

// A mean over elements: ρ(d) of d = f − g. mse: d². smooth_l1: Huber with δ = 1, d²/2 up to |d| = 1, |d| − 1/2 beyond.
template <Distance kDistance, typename V>
MTKD_HD V slope(V d) {  // ρ'
  if constexpr (kDistance == Distance::mse) {
    return d + d;
  } else {
    const V one = number<V>(1);
    return d > one ? one : d < -one ? -one : d;
  }
}

template <Distance kDistance, typename V>
MTKD_HD V rho(V d) {
  if constexpr (kDistance == Distance::mse) {
    return d * d;
  } else {
    const V s = slope<kDistance>(d);
    return s * (d - number<V>(0.5) * s);
  }
}

// Powers of two that f and g are multiplied by before the cosine squares them.
template <typename T>
struct FeatureScales {
  T f = 1, g = 1;
};

template <Distance kDistance, typename V>
struct DistanceSums {
  V rho_sum{};

  template <typename T>
  MTKD_HD void add(V f, V g, FeatureScales<T>) {
    rho_sum += rho<kDistance>(f - g);
  }
  // Adds the sums of another, each reduced to V first.
  template <typename Other, typename Reduce>
  MTKD_HD void absorb(const Other& x, const Reduce& reduce) {
    rho_sum += reduce(x.rho_sum);
  }
};

template <typename V>
struct DistanceSums<Distance::cosine, V> {
  V ff{}, gg{}, fg{};

  template <typename T>
  MTKD_HD void add(V f, V g, FeatureScales<T> scales) {
    f *= scales.f;
    g *= scales.g;
    ff += f * f;
    gg += g * g;
    fg += f * g;
  }
  template <typename Other, typename Reduce>
  MTKD_HD void absorb(const Other& x, const Reduce& reduce) {
    ff += reduce(x.ff);
    gg += reduce(x.gg);
    fg += reduce(x.fg);
  }
};

// Within [2^-range, 2^range] a sum of squares has lost nothing to the ends of T: it has neither overflowed nor, but for
// 2^-46 of itself an element, underflowed. Beyond, f times 2^∓range has such a sum, whatever T can hold.
template <typename T>
MTKD_HD T power_of_range(int sign) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return sign < 0 ? 0x1p-80f : 0x1p80f;
  } else {
    return sign < 0 ? 0x1p-600 : 0x1p600;
  }
}

template <typename T>
MTKD_HD T scale_for(T sum_of_squares) {
  const T small = power_of_range<T>(-1), large = power_of_range<T>(1);
  return sum_of_squares > large ? small : sum_of_squares < small ? large : T(1);
}

// Whether the sums, taken at scales of 1, must be taken again, and at which scales. Only the cosine's ever: of samples
// of extreme norm, zero included.
template <Distance kDistance, typename T>
MTKD_HD bool other_scales(const DistanceSums<kDistance, T>& sums, FeatureScales<T>& scales) {
  if constexpr (kDistance == Distance::cosine) {
    scales = {scale_for(sums.ff), scale_for(sums.gg)};
    return scales.f != T(1) || scales.g != T(1);
  }
  return false;
}

// kept_numbers(distance) of them.
template <typename T>
struct Kept {
  T distance, f_norm, g_norm;
};

// A norm below the smallest normal number is that of a zero vector: its cosine and its gradient are 0.
template <typename T>
MTKD_HD bool is_zero_norm(T norm) {
  return norm < std::numeric_limits<T>::min();
}

template <typename T>
MTKD_HD T inverse_norm(T norm) {
  return is_zero_norm(norm) ? T(0) : T(1) / norm;
}

template <Distance kDistance, typename T>
MTKD_HD Kept<T> finish(const DistanceSums<kDistance, T>& sums, FeatureScales<T> scales, int64_t elements) {
  if constexpr (kDistance == Distance::cosine) {
    const T f_norm = sqrt_of(sums.ff), g_norm = sqrt_of(sums.gg);
    const T true_f_norm = f_norm / scales.f, true_g_norm = g_norm / scales.g;
    const bool zero = is_zero_norm(true_f_norm) || is_zero_norm(true_g_norm);
    const T cosine = zero ? sums.fg * T(0) : sums.fg / f_norm / g_norm;  // NaN stays NaN
    return {T(1) - cosine, true_f_norm, true_g_norm};
  } else {
    return {sums.rho_sum / static_cast<T>(elements), T(0), T(0)};
  }
}

// ∂(weight·distance)/∂f, element by element. Of the cosine c: (c·f/‖f‖ − g/‖g‖)/‖f‖.
template <Distance kDistance, typename T>
struct DistanceGradient {
  T factor, of_f, of_g;

  MTKD_HD DistanceGradient(T weight, const Kept<T>& kept, int64_t elements) {
    if constexpr (kDistance == Distance::cosine) {
      const T inverse = inverse_norm(kept.f_norm);
      factor = weight * inverse;
      of_f = (T(1) - kept.distance) * inverse;
      of_g = inverse_norm(kept.g_norm);
    } else {
      factor = weight / static_cast<T>(elements);
      of_f = of_g = 0;
    }
  }

  template <typename V>
  MTKD_HD V operator()(V f, V g) const {
    if constexpr (kDistance == Distance::cosine) {
      return factor * (of_f * f - of_g * g);
    } else {
      return factor * slope<kDistance>(f - g);
    }
  }
};
