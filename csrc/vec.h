// One SIMD register of floats or doubles in GNU vector types, in whatever instruction set is being compiled: included
// once per set by instruction_sets.h, inside namespace mtkd_fast::MTKD_ISA, so there is no include guard.

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float values __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef int32_t bits __attribute__((vector_size(MTKD_VEC_BYTES)));
};
template <>
struct VecTypes<double> {
  typedef double values __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef int64_t bits __attribute__((vector_size(MTKD_VEC_BYTES)));
};
template <typename T>
using Vec = typename VecTypes<T>::values;
template <typename T>
using Bits = typename VecTypes<T>::bits;
template <typename T>
constexpr int kLanes = MTKD_VEC_BYTES / sizeof(T);

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
inline void store(T* to, Vec<T> x) {
  __builtin_memcpy(to, &x, sizeof(x));
}

// Past the caches, to an address aligned to a whole vector. Needs a stream_fence() before others read.
template <typename T>
inline void stream(T* to, Vec<T> x) {
#if MTKD_VEC_BYTES == 64
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x);
#elif MTKD_VEC_BYTES == 32
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)x);
#else
  store(to, x);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// A constant as a T, which is a number or, one in every lane, a register of them.
template <typename T>
inline T number(double x) {
  if constexpr (std::is_arithmetic_v<T>)
    return static_cast<T>(x);
  else
    return T{} + static_cast<std::decay_t<decltype(T{}[0])>>(x);
}

// x with its upper half moved onto its lower half, `kHalf` lanes down: one step of a reduction tree.
template <typename T, int kHalf>
inline Vec<T> lower(Vec<T> x) {
  Bits<T> from{};
  for (int i = 0; i < kHalf; ++i) from[i] = i + kHalf;
  return __builtin_shuffle(x, from);
}

template <typename T, int kHalf = kLanes<T> / 2>
inline T sum_of(Vec<T> x) {
  x += lower<T, kHalf>(x);
  if constexpr (kHalf > 1) return sum_of<T, kHalf / 2>(x);
  return x[0];
}

template <typename T, int kHalf = kLanes<T> / 2>
inline T max_of(Vec<T> x) {
  const Vec<T> y = lower<T, kHalf>(x);
  x = y > x ? y : x;
  if constexpr (kHalf > 1) return max_of<T, kHalf / 2>(x);
  return x[0];
}

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.693147180559945309417232121458;

// 2^f on [−1/2, 1/2]. float: minimax of degree 6, 2e-9 relative; double: Taylor of degree 13, 4e-18.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat(1.5353362e-4f);
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}

inline Vec<double> exp2_fraction(Vec<double> f) {
  const Vec<double> x = f * kLn2;
  Vec<double> p = splat(1.0);
  for (int n = 13; n >= 1; --n) p = p * (x * (1.0 / n)) + 1.0;
  return p;
}

template <typename T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  static constexpr int32_t mantissa_bits = 23, one = 0x3F800000;
  static constexpr float round_magic = 12582912.0f, smallest_exponent = -126.0f;  // 1.5·2^23
};
template <>
struct FloatFormat<double> {
  static constexpr int64_t mantissa_bits = 52, one = 0x3FF0000000000000;
  static constexpr double round_magic = 6755399441055744.0, smallest_exponent = -1022.0;  // 1.5·2^52
};

// 2^y for y <= 0; below the smallest normal number 0; NaN stays NaN. 14 instructions.
template <typename T>
inline Vec<T> exp2_of(Vec<T> y) {
  using F = FloatFormat<T>;
  const Vec<T> shifted = y + F::round_magic;  // its low mantissa bits are the nearest integer
  const Vec<T> fraction = y - (shifted - F::round_magic);
  const Vec<T> power = (Vec<T>)(((Bits<T>)shifted << F::mantissa_bits) + F::one);
  const Vec<T> result = exp2_fraction(fraction) * power;
  return y < F::smallest_exponent ? Vec<T>{} : result;
}

#if MTKD_VEC_BYTES == 64
// The same in 10.
template <>
inline Vec<float> exp2_of<float>(Vec<float> y) {
  const __mmask16 normal = _mm512_cmp_ps_mask(y, splat(FloatFormat<float>::smallest_exponent), _CMP_NLT_UQ);
  const Vec<float> integer = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(normal, exp2_fraction(y - integer), integer);
}
#endif

#if MTKD_VEC_BYTES == 64
template <>
inline float sum_of<float>(Vec<float> x) {
  return _mm512_reduce_add_ps(x);
}
template <>
inline double sum_of<double>(Vec<double> x) {
  return _mm512_reduce_add_pd(x);
}
template <>
inline float max_of<float>(Vec<float> x) {
  return _mm512_reduce_max_ps(x);
}
template <>
inline double max_of<double>(Vec<double> x) {
  return _mm512_reduce_max_pd(x);
}
#endif

using mtkd_fast::exp_of, mtkd_fast::log_of;
inline Vec<float> exp_of(Vec<float> x) { return exp2_of<float>(x * float(kLog2E)); }
inline Vec<double> exp_of(Vec<double> x) { return exp2_of<double>(x * kLog2E); }

// ln x for a normal x > 0; −inf for 0, NaN for NaN and +inf. x = 2^n·m with m in [√½, √2), and with s = (m−1)/(m+1)
// ln m = 2s·(1 + s²/3 + s⁴/5 + …), s² <= 0.0295: 5 terms are good to 2e-9 relative, 12 to 3e-20.
template <typename T, int kTerms>
inline Vec<T> log_series(Vec<T> x) {
  using F = FloatFormat<T>;
  const Bits<T> root_half = (Bits<T>)splat(T(0.70710678118654752));
  const Bits<T> n = ((Bits<T>)x - root_half) >> F::mantissa_bits;
  const Vec<T> m = (Vec<T>)((Bits<T>)x - (n << F::mantissa_bits));
  const Vec<T> s = (m - 1) / (m + 1), z = s * s;
  Vec<T> series{};
  for (int i = kTerms; i > 0; --i) series = series * z + T(1.0 / (2 * i - 1));
  const Vec<T> result = 2 * s * series + __builtin_convertvector(n, Vec<T>) * T(kLn2);
  return x == 0 ? splat(-infinity<T>()) : result + (x - x);
}

inline Vec<float> log_of(Vec<float> x) { return log_series<float, 5>(x); }
inline Vec<double> log_of(Vec<double> x) { return log_series<double, 12>(x); }
