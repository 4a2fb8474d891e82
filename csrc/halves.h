// The 16-bit formats, a number or a register at a time, exactly as they say: widening loses nothing, narrowing rounds
// once, to nearest even, and NaN stays NaN. After vec.h; included once per instruction set.

template <typename To, typename From>
inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// X is uint32_t with float, or a register of them with a register of floats.
template <typename F, typename X>
inline F widen_bf16(X x) {
  return bits_of<F>(x << 16);
}

template <typename F, typename X>
inline F widen_f16(X x) {
  const X magnitude = x & 0x7FFFu, sign = (x & 0x8000u) << 16;
  const F value = bits_of<F>(magnitude << 13) * 0x1p112f;  // rebiases the exponent, subnormals included
  const X special = magnitude >= 0x7C00u ? X{} + 0x7F800000u : X{};
  return bits_of<F>(bits_of<X>(value) | special | sign);
}

// The upper half of the result; what is below is no part of it.
template <typename X, typename F>
inline X round_to_bf16(F value) {
  const X x = bits_of<X>(value), nan = x | 0x400000u;
  return (x & 0x7FFFFFFFu) > 0x7F800000u ? nan : x + 0x7FFFu + ((x >> 16) & 1u);
}
template <typename X, typename F>
inline X narrow_bf16(F value) {
  return round_to_bf16<X>(value) >> 16;
}

template <typename X, typename F>
inline X narrow_f16(F value) {
  const X x = bits_of<X>(value), sign = (x >> 16) & 0x8000u, magnitude = x & 0x7FFFFFFFu;
  const X normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const X subnormal = bits_of<X>(bits_of<F>(magnitude) + 0.5f) - 0x3F000000u;  // the sum rounds
  X half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? X{} + 0x7C00u : half;  // past 65504
  half = magnitude > 0x7F800000u ? X{} + 0x7E00u : half;
  return sign | half;
}

inline float from_bf16(uint16_t x) { return widen_bf16<float>(uint32_t{x}); }
inline float from_f16(uint16_t x) { return widen_f16<float>(uint32_t{x}); }
inline uint16_t to_bf16(float x) { return static_cast<uint16_t>(narrow_bf16<uint32_t>(x)); }
inline uint16_t to_f16(float x) { return static_cast<uint16_t>(narrow_f16<uint32_t>(x)); }

typedef uint16_t HalfBits __attribute__((vector_size(MTKD_VEC_BYTES / 2)));  // as many as a register has floats

// The compiler's own conversion takes a register by quarters, five instructions where there is one.
inline Bits<float> load_halves(const uint16_t* from) {
#if MTKD_VEC_BYTES == 64
  return (Bits<float>)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif MTKD_VEC_BYTES == 32
  return (Bits<float>)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  HalfBits x;
  __builtin_memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Bits<float>);
#endif
}
inline void store_halves(uint16_t* to, Bits<float> x) {
#if MTKD_VEC_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
#else
  const HalfBits halves = __builtin_convertvector(x, HalfBits);
  __builtin_memcpy(to, &halves, sizeof(halves));
#endif
}

// Calls step(at) for registers that cover [0, count): the last one ends with the last number. False if there are fewer
// numbers than a register holds.
template <typename Step>
inline bool for_each_register(int count, Step step) {
  constexpr int kL = kLanes<float>;
  if (count < kL) return false;
#pragma GCC unroll 4
  for (int i = 0; i + kL <= count; i += kL) step(i);
  if (count % kL) step(count - kL);
  return true;
}

inline void widen_bf16(const uint16_t* __restrict from, int count, float* __restrict to) {
  if (for_each_register(count, [=](int i) { store(to + i, widen_bf16<Vec<float>>(load_halves(from + i))); })) return;
  for (int i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
}
inline void widen_f16(const uint16_t* __restrict from, int count, float* __restrict to) {
  if (for_each_register(count, [=](int i) { store(to + i, widen_f16<Vec<float>>(load_halves(from + i))); })) return;
  for (int i = 0; i < count; ++i) to[i] = from_f16(from[i]);
}
inline void narrow_bf16(const float* __restrict from, int count, uint16_t* __restrict to) {
  if (for_each_register(count, [=](int i) { store_halves(to + i, narrow_bf16<Bits<float>>(load(from + i))); })) return;
  for (int i = 0; i < count; ++i) to[i] = to_bf16(from[i]);
}
inline void narrow_f16(const float* __restrict from, int count, uint16_t* __restrict to) {
  if (for_each_register(count, [=](int i) { store_halves(to + i, narrow_f16<Bits<float>>(load(from + i))); })) return;
  for (int i = 0; i < count; ++i) to[i] = to_f16(from[i]);
}

// From and to doubles, in which no logits that are half come alone.
inline void widen_bf16(const uint16_t* from, int count, double* to) {
  for (int i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
}
inline void widen_f16(const uint16_t* from, int count, double* to) {
  for (int i = 0; i < count; ++i) to[i] = from_f16(from[i]);
}
inline void narrow_bf16(const double* from, int count, uint16_t* to) {
  for (int i = 0; i < count; ++i) to[i] = to_bf16(static_cast<float>(from[i]));
}
inline void narrow_f16(const double* from, int count, uint16_t* to) {
  for (int i = 0; i < count; ++i) to[i] = to_f16(static_cast<float>(from[i]));
}
