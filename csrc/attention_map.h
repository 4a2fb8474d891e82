// Attention maps a = A/(‖A‖ + 1e-6) of a sample, from the energies A of its positions; the distance of two, the mean of
// (a − b)², and its slopes in both energies. V is one number or a SIMD register of them, T always one number. Included
// after distance_sums.h wherever that is, so there is no include guard.

template <typename T>
struct MapNorm {
  T divisor;  // ‖A‖ + 1e-6; NaN, not inf, where ‖A‖ overflows
  T excess;   // that over ‖A‖; 0 for a map of zeros

  MTKD_HD MapNorm(T sum_of_squares, T scale) {  // of A times a power of two, see scale_for
    const T norm = sqrt_of(sum_of_squares) / scale;
    divisor = norm + T(1e-6) + T(0) * norm;
    excess = divisor * inverse_norm(norm);
  }
};

// With d = a − b.
template <typename V>
struct MapSums {
  V dd{}, da{}, db{};

  MTKD_HD void add(V a, V b) {
    const V d = a - b;
    dd += d * d;
    da += d * a;
    db += d * b;
  }
  template <typename Other, typename Reduce>
  MTKD_HD void absorb(const Other& x, const Reduce& reduce) {
    dd += reduce(x.dd);
    da += reduce(x.da);
    db += reduce(x.db);
  }
};

// ∂distance/∂A = 2/S·(d − A/‖A‖·⟨d, a⟩)/(‖A‖ + 1e-6), and of B the same with −d. Maps are quotients wherever they are
// computed, since products would be fused with the difference, and not with the same rounding everywhere.
template <typename T>
struct MapSlopes {
  MapNorm<T> of_a, of_b;
  T a_factor, b_factor, a_projection, b_projection;

  MTKD_HD MapSlopes(MapNorm<T> of_a, MapNorm<T> of_b, const MapSums<T>& sums, int64_t positions)
      : of_a(of_a),
        of_b(of_b),
        a_factor(T(2) / static_cast<T>(positions) / of_a.divisor),
        b_factor(T(2) / static_cast<T>(positions) / of_b.divisor),
        a_projection(of_a.excess * sums.da),
        b_projection(of_b.excess * sums.db) {}

  // Energies become slopes.
  template <typename V>
  MTKD_HD void replace(V& a_energy, V& b_energy) const {
    const V a = a_energy / of_a.divisor, b = b_energy / of_b.divisor;
    a_energy = a_factor * ((a - b) - a_projection * a);
    b_energy = b_factor * ((b - a) + b_projection * b);
  }
};
