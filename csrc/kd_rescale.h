// gradient·upstream, rows of scale 0 stay 0. Elements that lie side by side are those of a row or, of a gradient in
// planes, those of a class. Included once per instruction set.

template <typename T>
struct Rescale {
  const KDRescale<T>& args;
  Tile<T> tile;

  bool in_place() const { return args.out == args.gradient.data; }
  T upstream(int64_t n) const { return args.upstream[n * args.upstream_stride]; }
  int64_t start(int64_t n) const { return row_start(args.gradient, n, args.inner); }

  void row(int64_t n) {
    const Gradient &g = args.gradient, out{args.out, 0, 0, g.class_stride, g.dtype};
    const T by = upstream(n);
    if (in_place() && by == 1) return;
    if (args.scale[n] == 0) return zero_row<T>(out, start(n), args.classes);
    const bool native = g.class_stride == 1 && g.dtype == kNative<T>;
    for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
      const int count = tile_count(args.classes, begin);
      const T* x = read_tile(Logits{g.data, 0, 0, g.class_stride, g.dtype}, start(n), begin, count, tile.values);
      T* const to = native ? static_cast<T*>(args.out) + start(n) + begin : tile.values;
      for (int i = 0; i < count; i += kLanes<T>) {
        const int part = std::min(kLanes<T>, count - i);
        store_part(to + i, load_part(x + i, part) * by, part);
      }
      if (!native) write_tile(out, start(n), begin, count, to);
    }
  }

  // `count` pixels of one map.
  void pixels(int64_t n, int count) {
    int ones = 0;
    for (int i = 0; i < count; ++i) ones += upstream(n + i) == 1;
    if (in_place() && ones == count) return;
    for (int64_t c = 0; c < args.classes; ++c) {
      const int64_t at = start(n) + c * args.gradient.class_stride;
      widen(args.gradient.data, args.gradient.dtype, at, count, tile.values);
      for (int i = 0; i < count; ++i) tile.values[i] = args.scale[n + i] != 0 ? tile.values[i] * upstream(n + i) : T(0);
      write_tile(args.out, args.gradient.dtype, at, count, tile.values);
    }
  }
};

template <typename T>
void rescale(const KDRescale<T>& args, int64_t begin, int64_t end) {
  Rescale<T> rescale{args, {}};
  if (!lies_in_planes(args.gradient)) {
    for (int64_t n = begin; n < end; ++n) rescale.row(n);
    return;
  }
  for (int64_t n = begin, count; n < end; n += count) {
    count = std::min({int64_t{kTileColumns}, end - n, args.inner - n % args.inner});
    rescale.pixels(n, static_cast<int>(count));
  }
}
