// Exponentials and logarithms of a register (vec.h). Included once per instruction set.

constexpr long double kLog2E = 1.44269504088896340735992468100189L;
constexpr double kLn2 = 0.693147180559945309417232121458;

// 2^f on [−1/2, 1/2]. float: minimax of degree 6, 2e-9 relative; double: Taylor of degree 13, 4e-18.
template <int N>
MTKD_INLINE Bundle<float, N> exp2_fraction(const Bundle<float, N>& f) {
  Bundle<float, N> p = f * 1.5353362e-4f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}

template <int N>
MTKD_INLINE Bundle<double, N> exp2_fraction(const Bundle<double, N>& f) {
  const Bundle<double, N> x = f * kLn2;
  Bundle<double, N> p = each([](Vec<double>) { return splat(1.0); }, f);
  for (int n = 13; n >= 1; --n) p = p * (x * (1.0 / n)) + 1.0;
  return p;
}

template <typename T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  static constexpr uint32_t mantissa_bits = 23, one = 0x3F800000;
  static constexpr float round_magic = 12582912.0f, smallest_exponent = -126.0f;  // 1.5·2^23
};
template <>
struct FloatFormat<double> {
  static constexpr uint64_t mantissa_bits = 52, one = 0x3FF0000000000000;
  static constexpr double round_magic = 6755399441055744.0, smallest_exponent = -1022.0;  // 1.5·2^52
};

// 2^y for y up to 100; below the smallest normal number 0; NaN stays NaN. 14 instructions. `low`: digits that y has no
// room for; what they are is no matter where the result is 0.
template <typename T, int N, typename... Low>
MTKD_INLINE Bundle<T, N> exp2_of(const Bundle<T, N>& y, const Low&... low) {
  using F = FloatFormat<T>;
  const Bundle<T, N> shifted = y + F::round_magic;  // its low mantissa bits are the nearest integer
  const Bundle<T, N> fraction = ((y - (shifted - F::round_magic)) + ... + low);
  const auto times_power = [](Vec<T> x, Vec<T> shifted, Vec<T> y) {
    const Vec<T> power = (Vec<T>)(((Bits<T>)shifted << F::mantissa_bits) + F::one);
    return y < F::smallest_exponent ? Vec<T>{} : x * power;
  };
  return each(times_power, exp2_fraction(fraction), shifted, y);
}

// e^{x/τ} for x up to some τ, as 2^{x·log2(e)/τ}. A double takes the factor in two parts: rounded to one, it would be
// that of another temperature, an error that all elements share.
template <typename T>
class TemperedExp {
 public:
  explicit TemperedExp(T temperature)
      : high_(static_cast<T>(kLog2E / temperature)),
        low_(static_cast<T>(kLog2E / temperature - high_)),
        lowest_(std::max(FloatFormat<T>::smallest_exponent / high_, std::numeric_limits<T>::lowest())) {}

  template <int N>
  MTKD_INLINE Bundle<T, N> operator()(const Bundle<T, N>& x) const {
    if constexpr (std::is_same_v<T, double>) return exp2_of(x * high_, x * low_);
#if MTKD_VEC_BYTES == 64
    if constexpr (std::is_same_v<T, float>) return exp_by_table(x);
#endif
    return exp2_of(x * high_);
  }
  MTKD_INLINE Vec<T> operator()(Vec<T> x) const { return (*this)(Bundle<T, 1>{x}).of[0]; }

 private:
#if MTKD_VEC_BYTES == 64
  // AVX-512 looks the powers of 2^{1/32} up in two registers, less what the shifted number adds to their exponents and
  // mantissas. Multipliers are what bounds the sums around this: of its 10 instructions 5 go to the two of them, 2 to
  // the two adders. 2^f on [−1/64, 1/64]: minimax of degree 2, 5.3e-8 relative, odd in f.
  template <int N>
  MTKD_INLINE Bundle<float, N> exp_by_table(const Bundle<float, N>& x) const {
    const Vec<float> powers = {1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f,
                               1.1387886f, 1.1637249f, 1.1892071f, 1.2152474f, 1.2418578f, 1.2690510f,
                               1.2968396f, 1.3252367f, 1.3542556f, 1.3839099f};  // 2^{i/32}
    const Vec<float> more_powers = {1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f,
                                    1.6104903f, 1.6457555f, 1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f,
                                    1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};
    const Integers<float> place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr int kToExponent = 23 - 5;
    const Vec<float> low = (Vec<float>)((Bits<float>)powers - (Bits<float>)(place << kToExponent));
    const Vec<float> high = (Vec<float>)((Bits<float>)more_powers - (Bits<float>)((place + 16) << kToExponent));
    const Vec<float> by = splat(high_), magic = splat(FloatFormat<float>::round_magic / 32), lowest = splat(lowest_);
    const auto round = [=](Vec<float> x) -> Vec<float> { return _mm512_fmadd_ps(x, by, magic); };
    const auto rest = [=](Vec<float> x, Vec<float> shifted) -> Vec<float> {
      return _mm512_fmsub_ps(x, by, shifted - magic);
    };
    const auto power_of = [=](Vec<float> shifted) -> Vec<float> {
      const Bits<float> power = (Bits<float>)_mm512_permutex2var_ps(low, (__m512i)shifted, high);
      return (Vec<float>)(power + ((Bits<float>)shifted << kToExponent));
    };
    const auto times = [=](Vec<float> power, Vec<float> fraction, Vec<float> series, Vec<float> x) -> Vec<float> {
      const __mmask16 normal = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);
      return _mm512_maskz_fmadd_ps(normal, series * fraction, power, power);  // no product is subnormal
    };
    const Bundle<float, N> shifted = each(round, x), f = each(rest, x, shifted), power = each(power_of, shifted);
    const Bundle<float, N> series = f * 2.4022649e-1f + 6.9315733e-1f;
    return each(times, power, f, series, x);
  }
#endif
  T high_, low_;
  T lowest_;  // −inf lies below it at any temperature
};

using mtkd_fast::exp_of, mtkd_fast::log_of;
inline Vec<float> exp_of(Vec<float> x) { return TemperedExp<float>(1)(x); }
inline Vec<double> exp_of(Vec<double> x) { return TemperedExp<double>(1)(x); }

// ln x for a normal x > 0; −inf for 0, NaN for NaN and +inf. x = 2^n·m with m in [√½, √2), and with s = (m−1)/(m+1)
// ln m = 2s·(1 + s²/3 + s⁴/5 + …), s² <= 0.0295: 5 terms are good to 2e-9 relative, 12 to 3e-20.
template <typename T, int kTerms>
inline Vec<T> log_series(Vec<T> x) {
  using F = FloatFormat<T>;
  const Bits<T> root_half = (Bits<T>)splat(T(0.70710678118654752));
  const Integers<T> n = (Integers<T>)((Bits<T>)x - root_half) >> F::mantissa_bits;
  const Vec<T> m = (Vec<T>)((Bits<T>)x - ((Bits<T>)n << F::mantissa_bits));
  const Vec<T> s = (m - 1) / (m + 1), z = s * s;
  Vec<T> series{};
  for (int i = kTerms; i > 0; --i) series = series * z + T(1.0 / (2 * i - 1));
  const Vec<T> result = 2 * s * series + __builtin_convertvector(n, Vec<T>) * T(kLn2);
  return x == 0 ? splat(-infinity<T>()) : result + (x - x);
}

inline Vec<float> log_of(Vec<float> x) { return log_series<float, 5>(x); }
inline Vec<double> log_of(Vec<double> x) { return log_series<double, 12>(x); }
