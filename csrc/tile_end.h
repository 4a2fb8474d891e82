// The end of a row that fills no whole register. After tile.h; included once per instruction set.

// x, and `other` from lane `count` on: what lies beyond the last class.
template <typename T>
inline Vec<T> first_lanes(Vec<T> x, int count, Vec<T> other = Vec<T>{}) {
  if (count >= kLanes<T>) return x;
  Integers<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < count ? x : other;
}

// `count` numbers as Vectors, by a masked load of the last ones: a copy of few of them, one by one, would be waited
// for.
template <typename T>
inline void fill(Vectors<T>& x, const T* tile, int count) {
  x.values = tile;
  x.whole = count / kLanes<T> * kLanes<T>;
  x.rest = count - x.whole;
  if (x.rest) x.last = first_lanes<T>(load_part(tile + x.whole, x.rest), x.rest, splat(-infinity<T>()));
}

// Vectors go to memory that is theirs: whole ones, or the first numbers of one.
template <typename T, int kCount>
inline void put(T* out, const Vec<T> (&x)[kCount], int count) {
  if constexpr (kCount == 1)
    store_part(out, x[0], count < kLanes<T> ? count : kLanes<T>);
  else
    for (int u = 0; u < kCount; ++u) store(out + u * kLanes<T>, x[u]);
}

constexpr int kGroup = 4;  // vectors at a time

// Calls body(i, how many vectors as a constant, how many numbers there are from i on) for a tile of `count` numbers.
template <typename T, typename Body>
inline void for_each_group(int count, Body body) {
  int i = 0;
  for (; i + kGroup * kLanes<T> <= count; i += kGroup * kLanes<T>)
    body(i, std::integral_constant<int, kGroup>(), count - i);
  for (; i < count; i += kLanes<T>) body(i, std::integral_constant<int, 1>(), count - i);
}

// Tiles of a contiguous output: each goes straight to where it belongs, unless it is converted, or cast past the
// caches.
template <typename T>
class Output {
 public:
  Output(void* data, DType dtype, int64_t classes, bool streams, T* tile)
      : data_(data), dtype_(dtype), classes_(classes), tile_(tile), streams_(streams) {}

  T* begin(int64_t n, int64_t column) {
    at_ = n * classes_ + column;
    return dtype_ == kNative<T> && !streams_ ? static_cast<T*>(data_) + at_ : tile_;
  }
  void end(int count) const {
    if (streams_)
      stream_tile(data_, dtype_, at_, count, tile_);
    else if (dtype_ != kNative<T>)
      write_tile(data_, dtype_, at_, count, tile_);
  }

 private:
  void* data_;
  DType dtype_;
  int64_t classes_, at_ = 0;
  T* tile_;
  bool streams_;
};
