// A tile of a row in T: widened on the way in, rounded once on the way out. Included once per instruction set.
//
// Every arithmetic loop works on whole vectors of a tile that is padded with −inf, which adds nothing to any sum. So
// dtypes, strides and remainders are dealt with here and nowhere else.

constexpr int kTileColumns = 1024;  // three tiles of floats, 12 KB, stay in L1 beside the rows streaming through

template <typename T>
struct Tile {
  alignas(64) T values[kTileColumns];
};

constexpr int padded(int count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

template <typename To, typename From>
inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// The 16-bit formats, exactly. Branch-free, so that the loops over a tile vectorise.
inline float from_bf16(uint16_t x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }

inline float from_f16(uint16_t x) {
  const uint32_t magnitude = x & 0x7FFFu, sign = (x & 0x8000u) << 16;
  const float value = bits_of<float>(magnitude << 13) * 0x1p112f;  // rebiases the exponent, subnormals included
  const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return bits_of<float>(bits_of<uint32_t>(value) | special | sign);
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t x = bits_of<uint32_t>(value);
  const uint32_t rounded = (x + 0x7FFF + ((x >> 16) & 1)) >> 16, nan = (x >> 16) | 0x40;
  return static_cast<uint16_t>((x & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

inline uint16_t to_f16(float value) {
  const uint32_t x = bits_of<uint32_t>(value), sign = (x >> 16) & 0x8000, magnitude = x & 0x7FFFFFFF;
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3F000000;  // the sum rounds
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? 0x7C00 : half;  // past 65504
  half = magnitude > 0x7F800000 ? 0x7E00 : half;
  return static_cast<uint16_t>(sign | half);
}

template <typename T>
inline T widen_one(const void* row, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(row)[at];
    case DType::f64:
      return static_cast<T>(static_cast<const double*>(row)[at]);
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(row)[at]);
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(row)[at]);
  }
  __builtin_unreachable();
}

template <typename T>
inline void widen(const void* row, DType dtype, int64_t at, int count, T* __restrict to) {
  const float* f32 = static_cast<const float*>(row) + at;
  const double* f64 = static_cast<const double*>(row) + at;
  const uint16_t* half = static_cast<const uint16_t*>(row) + at;
  switch (dtype) {
    case DType::f32:
      for (int i = 0; i < count; ++i) to[i] = f32[i];
      break;
    case DType::f64:
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(f64[i]);
      break;
    case DType::bf16:
      for (int i = 0; i < count; ++i) to[i] = from_bf16(half[i]);
      break;
    case DType::f16:
      for (int i = 0; i < count; ++i) to[i] = from_f16(half[i]);
      break;
  }
}

// `count` >= kLanes numbers, copied and padded with −inf in stores of whole vectors, so that the loads that follow are
// forwarded from them; a memcpy's overlapping stores are not, which costs more than the copy.
template <typename T>
void copy_padded(const T* from, int count, T* to) {
  const int whole = count / kLanes<T> * kLanes<T>, rest = count - whole;
  for (int i = 0; i < whole; i += kLanes<T>) store(to + i, load(from + i));
  Bits<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const Vec<T> last = __builtin_shuffle(load(from + count - kLanes<T>), lane + (kLanes<T> - rest));
  store(to + whole, lane < rest ? last : splat(-infinity<T>()));
}

// Columns [begin, begin + count) of the row that starts at element `row`, padded with −inf to whole vectors. Returns
// the row itself where it can be read as it stands.
template <typename T>
const T* read_tile(const Logits& x, int64_t row, int64_t begin, int count, T* to) {
  const bool is_t = x.dtype == (sizeof(T) == sizeof(float) ? DType::f32 : DType::f64);
  if (x.class_stride == 1 && is_t && count >= kLanes<T>) {
    const T* from = static_cast<const T*>(x.data) + row + begin;
    if (count % kLanes<T> == 0) return from;
    copy_padded(from, count, to);
    return to;
  }
  if (x.class_stride == 1)
    widen(x.data, x.dtype, row + begin, count, to);
  else
    for (int i = 0; i < count; ++i) to[i] = widen_one<T>(x.data, x.dtype, row + (begin + i) * x.class_stride);
  for (int i = count; i < padded(count, kLanes<T>); ++i) to[i] = -infinity<T>();
  return to;
}

// `count` numbers to element `at` of a contiguous output.
template <typename T>
void write_tile(void* out, DType dtype, int64_t at, int count, const T* __restrict from) {
  switch (dtype) {
    case DType::f32:
      for (int i = 0; i < count; ++i) static_cast<float*>(out)[at + i] = static_cast<float>(from[i]);
      break;
    case DType::f64:
      for (int i = 0; i < count; ++i) static_cast<double*>(out)[at + i] = static_cast<double>(from[i]);
      break;
    case DType::bf16:
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(out)[at + i] = to_bf16(static_cast<float>(from[i]));
      break;
    case DType::f16:
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(out)[at + i] = to_f16(static_cast<float>(from[i]));
      break;
  }
}

inline int tile_count(int64_t classes, int64_t begin) {
  return static_cast<int>(classes - begin < kTileColumns ? classes - begin : kTileColumns);
}
