// One SIMD register of floats or doubles in GNU vector types, in whatever instruction set is being compiled: included
// once per set by instruction_sets.h, inside namespace mtkd_fast::MTKD_ISA, so there is no include guard.

// What the loops over the columns are made of: a call in them would spill every register. A closure takes the attribute
// alone; one that is called, not inlined, reads what it has captured from memory just written, and stalls.
#define MTKD_ALWAYS_INLINE __attribute__((always_inline))
#define MTKD_INLINE inline MTKD_ALWAYS_INLINE

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float values __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef int32_t integers __attribute__((vector_size(MTKD_VEC_BYTES)));
};
template <>
struct VecTypes<double> {
  typedef double values __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(MTKD_VEC_BYTES)));
  typedef int64_t integers __attribute__((vector_size(MTKD_VEC_BYTES)));
};
template <typename T>
using Vec = typename VecTypes<T>::values;
template <typename T>
using Bits = typename VecTypes<T>::bits;
template <typename T>
using Integers = typename VecTypes<T>::integers;
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

// Its first `count` lanes, the others 0; nothing is touched past them.
template <typename T>
inline Vec<T> load_part(const T* from, int count) {
  if (count == kLanes<T>) return load(from);
  Vec<T> x{};
  for (int i = 0; i < count; ++i) x[i] = from[i];
  return x;
}

template <typename T>
inline void store_part(T* to, Vec<T> x, int count) {
  if (count == kLanes<T>) return store(to, x);
  for (int i = 0; i < count; ++i) to[i] = x[i];
}

#if MTKD_VEC_BYTES == 64
template <>
inline Vec<float> load_part<float>(const float* from, int count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, from);
}
template <>
inline void store_part<float>(float* to, Vec<float> x, int count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, x);
}
#elif MTKD_VEC_BYTES == 32
inline __m256i first_lanes(int count) {
  const Integers<float> lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(lane < count);
}
template <>
inline Vec<float> load_part<float>(const float* from, int count) {
  return _mm256_maskload_ps(from, first_lanes(count));
}
template <>
inline void store_part<float>(float* to, Vec<float> x, int count) {
  _mm256_maskstore_ps(to, first_lanes(count), x);
}
#endif

// Lane i: from[at[i]].
template <typename T>
inline Vec<T> gather(const T* from, Integers<T> at) {
  Vec<T> x{};
  for (int i = 0; i < kLanes<T>; ++i) x[i] = from[at[i]];
  return x;
}
template <typename T>
inline void scatter(T* to, Integers<T> at, Vec<T> x) {
  for (int i = 0; i < kLanes<T>; ++i) to[at[i]] = x[i];
}
#if MTKD_VEC_BYTES == 64
template <>
inline Vec<float> gather<float>(const float* from, Integers<float> at) {
  return _mm512_i32gather_ps((__m512i)at, from, sizeof(float));
}
template <>
inline void scatter<float>(float* to, Integers<float> at, Vec<float> x) {
  _mm512_i32scatter_ps(to, (__m512i)at, x, sizeof(float));
}
#elif MTKD_VEC_BYTES == 32
template <>
inline Vec<float> gather<float>(const float* from, Integers<float> at) {
  return _mm256_i32gather_ps(from, (__m256i)at, sizeof(float));
}
#endif

// The transpose of a square of numbers, a register a row: each pass interleaves the two halves of the registers.
template <typename T>
inline void transpose(Vec<T> (&x)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
  Integers<T> low{}, high{};
  for (int i = 0; i < kLanes<T>; ++i) {
    low[i] = i / 2 + i % 2 * kLanes<T>;
    high[i] = low[i] + kHalf;
  }
#pragma GCC unroll 4
  for (int pass = 1; pass < kLanes<T>; pass *= 2) {
    Vec<T> y[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kHalf], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kHalf], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) x[i] = y[i];
  }
}

#if MTKD_VEC_BYTES == 64
// By quarters: squares of four within them, on any of four pipes, then the quarters, on two; what permutes all 16 lanes
// has those two alone.
template <>
inline void transpose<float>(Vec<float> (&x)[16]) {
  Vec<float> of_group[4][4];  // [rows 4g to 4g + 3][j]: columns j, 4 + j, 8 + j, 12 + j, a quarter each
  const auto low = [](Vec<float> a, Vec<float> b) { return (__m512d)_mm512_unpacklo_ps(a, b); };
  const auto high = [](Vec<float> a, Vec<float> b) { return (__m512d)_mm512_unpackhi_ps(a, b); };
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const Vec<float>* const row = x + 4 * g;
    const __m512d low01 = low(row[0], row[1]), high01 = high(row[0], row[1]), low23 = low(row[2], row[3]),
                  high23 = high(row[2], row[3]);
    of_group[g][0] = (Vec<float>)_mm512_unpacklo_pd(low01, low23);
    of_group[g][1] = (Vec<float>)_mm512_unpackhi_pd(low01, low23);
    of_group[g][2] = (Vec<float>)_mm512_unpacklo_pd(high01, high23);
    of_group[g][3] = (Vec<float>)_mm512_unpackhi_pd(high01, high23);
  }
  constexpr int kEven = 0x88, kOdd = 0xDD;  // quarters 0 and 2, or 1 and 3, of both
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(of_group[0][j], of_group[1][j], kEven),
                 odd01 = _mm512_shuffle_f32x4(of_group[0][j], of_group[1][j], kOdd),
                 even23 = _mm512_shuffle_f32x4(of_group[2][j], of_group[3][j], kEven),
                 odd23 = _mm512_shuffle_f32x4(of_group[2][j], of_group[3][j], kOdd);
    x[j] = _mm512_shuffle_f32x4(even01, even23, kEven);
    x[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, kEven);
    x[8 + j] = _mm512_shuffle_f32x4(even01, even23, kOdd);
    x[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, kOdd);
  }
}
#endif

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

// The larger of two, lane by lane; NaN of y is not seen.
template <typename V>
inline V larger_of(V x, V y) {
  return y > x ? y : x;
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
  Integers<T> from{};
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

#if MTKD_VEC_BYTES == 64  // in halves: cheaper than moving lanes of a whole register
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

// Lane r of the result joins all lanes of x[r]: each pass halves both the registers and the lanes of a row.
template <typename T, typename Both>
inline Vec<T> join_rows(const Vec<T> (&x)[kLanes<T>], Both both) {
  Vec<T> y[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) y[i] = x[i];
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    Integers<T> low{};  // of both registers, the lower half of the lanes of every row
    for (int i = 0; i < kLanes<T>; ++i) low[i] = i / (2 * half) * (2 * half) + i % half + (i / half % 2) * kLanes<T>;
    const Integers<T> high = low + half;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      y[i] = both(__builtin_shuffle(y[i], y[i + half], low), __builtin_shuffle(y[i], y[i + half], high));
  }
  return y[0];
}

template <typename T>
struct SumOfLanes {
  T operator()(Vec<T> x) const { return sum_of<T>(x); }
};

inline bool any_of(bool x) { return x; }
template <typename Mask>
inline bool any_of(Mask x) {  // of the lanes of a comparison
#if MTKD_VEC_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif MTKD_VEC_BYTES == 32
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  bool any = false;
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) any |= x[i] != 0;
  return any;
#endif
}
