// Numbers of 16 bits by pairs: two neighbours in each lane of a register of floats, the first in its lower half. What
// moves lanes moves two numbers at a time, and a bf16 number is widened by one instruction. After halves.h; included
// once per instruction set.

// `count` numbers, the others 0; nothing is touched past them.
inline Bits<float> load_pairs(const uint16_t* from, int count) {
#if MTKD_VEC_BYTES == 64
  return (Bits<float>)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from);
#else
  Bits<float> pairs{};
#if MTKD_VEC_BYTES == 32
  pairs = (Bits<float>)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_lanes(count / 2));
#else
  for (int i = 0; i < count / 2; ++i) pairs[i] = from[2 * i] | uint32_t{from[2 * i + 1]} << 16;
#endif
  if (count % 2) pairs[count / 2] = from[count - 1];
  return pairs;
#endif
}
inline void store_pairs(uint16_t* to, Bits<float> pairs, int count) {
#if MTKD_VEC_BYTES == 64
  _mm512_mask_storeu_epi16(to, static_cast<__mmask32>((uint64_t{1} << count) - 1), (__m512i)pairs);
#else
#if MTKD_VEC_BYTES == 32
  _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first_lanes(count / 2), (__m256i)pairs);
#else
  for (int i = 0; i < count / 2; ++i) {
    to[2 * i] = static_cast<uint16_t>(pairs[i]);
    to[2 * i + 1] = static_cast<uint16_t>(pairs[i] >> 16);
  }
#endif
  if (count % 2) to[count - 1] = static_cast<uint16_t>(pairs[count / 2]);
#endif
}

// The first of each pair, then the second.
MTKD_INLINE Bundle<float, 2> widen_pairs(Bits<float> pairs) {
  return {(Vec<float>)(pairs << 16), (Vec<float>)(pairs & 0xFFFF0000u)};
}
MTKD_INLINE Bits<float> narrow_to_pairs(const Bundle<float, 2>& x) {
  return (round_to_bf16<Bits<float>>(x.of[0]) >> 16) | (round_to_bf16<Bits<float>>(x.of[1]) & 0xFFFF0000u);
}
