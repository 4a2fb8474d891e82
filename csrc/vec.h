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

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
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
  constexpr double kLn2 = 0.693147180559945309417232121458;
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

// 2^y for y <= 0; below the smallest normal number 0; NaN stays NaN. 13 instructions.
template <typename T>
inline Vec<T> exp2_of(Vec<T> y) {
  using F = FloatFormat<T>;
  const Vec<T> shifted = y + F::round_magic;  // its low mantissa bits are the nearest integer
  const Vec<T> fraction = y - (shifted - F::round_magic);
  const Vec<T> power = (Vec<T>)(((Bits<T>)shifted << F::mantissa_bits) + F::one);
  const Vec<T> result = exp2_fraction(fraction) * power;
  return y < F::smallest_exponent ? Vec<T>{} : result;
}
