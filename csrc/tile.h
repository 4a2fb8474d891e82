// A tile of a row in T: widened on the way in, rounded once on the way out. Included once per instruction set.
//
// Dtypes, strides and remainders are dealt with here and nowhere else.

constexpr int kTileColumns = 2048;  // 8 KB of floats: a few tiles share L1 with the rows streaming through

template <typename T>
struct Tile {
  alignas(64) T values[kTileColumns];
};

constexpr int element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <typename T>
constexpr DType kNative = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;

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
      widen_bf16(half, count, to);
      break;
    case DType::f16:
      widen_f16(half, count, to);
      break;
  }
}

// The element at which row n starts.
template <typename Tensor>
int64_t row_start(const Tensor& x, int64_t n, int64_t inner) {
  return n / inner * x.outer_stride + n % inner * x.inner_stride;
}

template <typename T>
void widen_tile(const Logits& x, int64_t row, int64_t begin, int count, T* to) {
  if (x.class_stride == 1) return widen(x.data, x.dtype, row + begin, count, to);
  for (int i = 0; i < count; ++i) to[i] = widen_one<T>(x.data, x.dtype, row + (begin + i) * x.class_stride);
}

// Columns [begin, begin + count) of the row that starts at element `row`: where they stand, if they can be read there,
// else widened to `to`.
template <typename T>
inline const T* read_tile(const Logits& x, int64_t row, int64_t begin, int count, T* to) {
  if (x.class_stride == 1 && x.dtype == kNative<T>) return static_cast<const T*>(x.data) + row + begin;
  widen_tile(x, row, begin, count, to);
  return to;
}

// A tile as whole vectors and a last one that is padded with −inf, which adds nothing to any sum.
template <typename T>
struct Vectors {
  const T* values;
  int whole;    // numbers in whole vectors
  int rest;     // and after them
  Vec<T> last;  // the rest, padded

  Vectors() {}  // filled later, in place: a copy of scalars just stored, a vector at a time, would stall
  Vectors(const T* tile, int count) { fill(tile, count); }

  void fill(const T* tile, int count) {
    values = tile;
    whole = count / kLanes<T> * kLanes<T>;
    rest = count - whole;
    if (rest == 0) return;
    Integers<T> lane{};
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
    if (whole > 0) {  // a load that ends with the tile, moved down: nothing is read past the row, nothing is copied
      const Vec<T> end = __builtin_shuffle(load(tile + count - kLanes<T>), lane + (kLanes<T> - rest));
      last = lane < rest ? end : splat(-infinity<T>());
    } else {
      last = splat(-infinity<T>());
      for (int i = 0; i < rest; ++i) last[i] = tile[i];
    }
  }
};

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
      narrow_bf16(from, count, static_cast<uint16_t*>(out) + at);
      break;
    case DType::f16:
      narrow_f16(from, count, static_cast<uint16_t*>(out) + at);
      break;
  }
}

// Columns [begin, begin + count) of the row that starts at element `row`.
template <typename T>
void write_tile(const Gradient& out, int64_t row, int64_t begin, int count, const T* from) {
  if (out.class_stride == 1) return write_tile(out.data, out.dtype, row + begin, count, from);
  for (int i = 0; i < count; ++i) write_tile(out.data, out.dtype, row + (begin + i) * out.class_stride, 1, from + i);
}

// `count` numbers past the caches: for an output that will have left them before it is read. It spares the read of
// every line that a plain store begins with.
template <typename E>
void stream_numbers(E* out, int count, const E* from) {
  constexpr int kVector = MTKD_VEC_BYTES / sizeof(E);
  int i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(out + i) % MTKD_VEC_BYTES; ++i) out[i] = from[i];
  for (; i + kVector <= count; i += kVector) {
    Vec<float> x;
    __builtin_memcpy(&x, from + i, sizeof(x));
    stream(reinterpret_cast<float*>(out + i), x);
  }
  for (; i < count; ++i) out[i] = from[i];
}

// Fetches a line of each page of an output that is soon to be written, so that the processor looks up meanwhile where
// the page lies. A store waits for that, and every store behind it. Always inlined, see Ahead (kd_sweep.h).
MTKD_INLINE void touch_pages(const void* out, int64_t bytes) {
  constexpr int64_t kPage = 4096;
  const auto* const first = static_cast<const char*>(out);
  for (int64_t at = 0; at < bytes; at += kPage) __builtin_prefetch(first + at);
  __builtin_prefetch(first + bytes - 1);
}

// Whether write_tile has a form that goes past the caches.
template <typename T>
constexpr bool can_stream(DType dtype) {
  return dtype == kNative<T> || element_bytes(dtype) == 2;
}

template <typename T>
void stream_tile(void* out, DType dtype, int64_t at, int count, const T* from) {
  if (dtype == kNative<T>) return stream_numbers(static_cast<T*>(out) + at, count, from);
  uint16_t halves[kTileColumns];
  for (int i = 0; i < count; i += kTileColumns) {
    const int now = std::min(count - i, kTileColumns);
    write_tile(halves, dtype, 0, now, from + i);
    stream_numbers(static_cast<uint16_t*>(out) + at + i, now, halves);
  }
}

inline int tile_count(int64_t classes, int64_t begin) {
  return static_cast<int>(classes - begin < kTileColumns ? classes - begin : kTileColumns);
}

template <typename T>
void zero_row(const Gradient& out, int64_t row, int64_t classes) {
  const T zeros[kTileColumns] = {};
  for (int64_t begin = 0; begin < classes; begin += kTileColumns)
    write_tile(out, row, begin, tile_count(classes, begin), zeros);
}

// Row n of a contiguous gradient of `like`.
template <typename T>
void zero_row(const Logits& like, void* gradient, int64_t n, int64_t classes) {
  zero_row<T>(Gradient{gradient, classes, 0, 1, like.dtype}, n * classes, classes);
}

// A gradient larger than a core's share of the last cache goes past the caches: 1.05 to 1.3 times as fast in all. Short
// rows end in the middle of a line, which costs more than it saves.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kStreamColumns = 512;

inline bool outgrows_caches(DType dtype, int64_t rows, int64_t classes) {
  return rows * classes * element_bytes(dtype) >= kStreamBytes;
}

template <typename T>
bool streams_gradient(DType dtype, int64_t rows, int64_t classes) {
  return can_stream<T>(dtype) && classes >= kStreamColumns && outgrows_caches(dtype, rows, classes);
}
