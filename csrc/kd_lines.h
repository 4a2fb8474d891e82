// A block of logits on its way into registers and of gradients out of them, along and across (kd_block.h). Included
// once per instruction set.

constexpr auto kEveryRow = [](int) { return true; };

// Some rows of a block, or all.
struct Rows {
  int begin, end;
};

// Calls body(at) for every line of these rows. What is called goes by reference: a copy of what it has just captured, a
// register at a time, would stall.
template <typename T, typename At, typename Body>
MTKD_INLINE void for_each_line(Rows rows, const Body& body) {
  if constexpr (kIsAcross<T, At>)
    body(At());
  else
    for (int row = rows.begin; row < rows.end; ++row) body(At{row});
}
// Of every line, whichever way they go.
template <typename T, typename Body>
MTKD_INLINE void for_all_lines(const Block<T>& block, bool across, const Body& body) {
  if (across) return for_each_line<T, Across<T>>({0, block.rows}, body);
  for_each_line<T, Along<T>>({0, block.rows}, body);
}

// Whether a line is read, or a row of it.
template <typename T>
bool reads_line(const Block<T>& block, Along<T> at, int k) {
  return block.reads(k, at.line);
}
template <typename T>
bool reads_line(const Block<T>& block, Across<T>, int k) {
  return block.reads_some(k);
}

// A tile of a row as read_tile has it; a target that stands apart counts as −inf there.
template <typename T, typename Reads>
const T* read_line(const Logits& x, const Block<T>& block, Along<T> at, int64_t begin, int count, T* to, Reads) {
  const int row = at.line;
  const T* tile = read_tile(x, block.start(x, row), begin, count, to);
  if (!block.apart_in(row, begin, count)) return tile;
  if (tile != to) std::copy_n(tile, count, to);
  to[block.apart[row] - begin] = -infinity<T>();
  return to;
}

template <typename T>
void write_line(const Gradient& to, const Block<T>& block, Along<T> at, int64_t begin, int count, const T* from) {
  write_tile(to, block.start(to, at.line), begin, count, from);
}

// ------------------------------------------------------------------------------------------------------------- across
//
// A line is [classes][rows]. Neighbouring rows of a tensor in planes lie so already; others are transposed, a square of
// kLanes rows and classes at a time.

constexpr int kPixelsAhead = 64;  // fetched towards L2: planes are more streams than the hardware foresees
template <typename T>
constexpr int kStripClasses = kTileColumns / kLanes<T>;  // of each row, widened

// kLanes pixels of each of the planes, the first at element `at`.
template <typename T>
void read_planes(const Logits& x, int64_t at, int classes, T* to) {
  const int bytes = element_bytes(x.dtype);
  for (int c = 0; c < classes; ++c, at += x.class_stride) {
    __builtin_prefetch(static_cast<const char*>(x.data) + (at + kPixelsAhead) * bytes, 0, 2);
    widen(x.data, x.dtype, at, kLanes<T>, to + c * kLanes<T>);
  }
}
template <typename T>
void write_planes(const Gradient& to, int64_t at, int classes, const T* from) {
  for (int c = 0; c < classes; ++c, at += to.class_stride)
    write_tile(to.data, to.dtype, at, kLanes<T>, from + c * kLanes<T>);
}

// Lanes of rows that are not read, and those without a row, are 0: what comes of them is not used.
template <typename T, typename Reads>
void read_planes(const Logits& x, const Block<T>& block, int64_t first, int classes, T* to, Reads reads) {
  const Near<T>& near_rows = block.near;
  Integers<T> read{};
  for (int r = 0; r < block.rows; ++r) read[r] = reads(r);
  const int bytes = element_bytes(x.dtype);
  T near[2 * kLanes<T>] = {};
  int64_t at = block.start(x, 0) + first * x.class_stride;
  if (near_rows.whole && !any_of(read == 0)) return read_planes(x, at, classes, to);
  for (int c = 0; c < classes; ++c, at += x.class_stride) {
    __builtin_prefetch(static_cast<const char*>(x.data) + (at + kPixelsAhead) * bytes, 0, 2);
    widen(x.data, x.dtype, at, near_rows.span, near);
    const Vec<T> line = __builtin_shuffle(load(near), load(near + kLanes<T>), near_rows.place);
    store(to + c * kLanes<T>, read != 0 ? line : Vec<T>{});
  }
}

template <typename T>
void write_planes(const Gradient& to, const Block<T>& block, int64_t first, int classes, const T* from) {
  const Near<T>& near_rows = block.near;
  int64_t at = block.start(to, 0) + first * to.class_stride;
  if (near_rows.whole) return write_planes(to, at, classes, from);
  for (int c = 0; c < classes; ++c, at += to.class_stride) {
    const T* line = from + c * kLanes<T>;
    T near[2 * kLanes<T>];
    store(near, __builtin_shuffle(load(line), Vec<T>{}, near_rows.row[0]));
    store(near + kLanes<T>, __builtin_shuffle(load(line), Vec<T>{}, near_rows.row[1]));
    write_tile(to.data, to.dtype, at, near_rows.span, near);
  }
}

// How short rows are turned over: `count` classes of a row in a register, and the register of one class, or of two, of
// all rows on a line.
template <typename T>
struct Singly {
  using Element = T;
  static constexpr int kPerLane = 1;

  static Vec<T> load_row(const T* row, int count) { return load_part(row, count); }
  static void store_row(T* row, Vec<T> x, int count) { store_part(row, x, count); }
  static Vec<T> load_line(const T* line, int) { return load(line); }
  static MTKD_INLINE void store_line(T* line, Vec<T> x, int) { store(line, x); }
};

// bf16, see half_pairs.h. The last class may stand alone.
struct ByPairs {
  using Element = uint16_t;
  static constexpr int kPerLane = 2;

  static Vec<float> load_row(const uint16_t* row, int count) { return (Vec<float>)load_pairs(row, count); }
  static void store_row(uint16_t* row, Vec<float> x, int count) { store_pairs(row, (Bits<float>)x, count); }
  static Vec<float> load_line(const float* line, int classes) {
    return (Vec<float>)narrow_to_pairs({load(line), load(line + (classes > 1 ? kLanes<float> : 0))});
  }
  static MTKD_INLINE void store_line(float* line, Vec<float> x, int classes) {
    const Bundle<float, 2> both = widen_pairs((Bits<float>)x);
    store(line, both.of[0]);
    if (classes > 1) store(line + kLanes<float>, both.of[1]);
  }
};

// `classes` classes of every row, row r from row(r), which is null if it is not read.
template <typename Form, typename T, typename Row>
MTKD_INLINE void read_squares(const Row& row, bool all, int classes, T* to) {
  constexpr int kPerLane = Form::kPerLane, kSquare = kPerLane * kLanes<T>;
  for (int c = 0; c < classes; c += kSquare) {
    const int count = std::min(kSquare, classes - c);
    Vec<T> square[kLanes<T>];
    if (all)
#pragma GCC unroll 16
      for (int r = 0; r < kLanes<T>; ++r) square[r] = Form::load_row(row(r) + c, count);
    else
      for (int r = 0; r < kLanes<T>; ++r) square[r] = row(r) ? Form::load_row(row(r) + c, count) : Vec<T>{};
    transpose<T>(square);
    T* const line = to + c * kLanes<T>;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i * kPerLane >= count) break;
      Form::store_line(line + i * kSquare, square[i], count - i * kPerLane);
    }
  }
}

// At most kStripClasses classes.
template <typename T, typename Reads>
void read_rows(const Logits& x, const Block<T>& block, int64_t first, int classes, T* to, Reads reads) {
  Tile<T> strip;
  const T* rows[kLanes<T>];
  int readable = 0;
  for (int r = 0; r < kLanes<T>; ++r) {
    const bool is_read = r < block.rows && reads(r);
    T* const widened = strip.values + r * kStripClasses<T>;
    rows[r] = is_read ? read_tile(x, block.start(x, r), first, classes, widened) : nullptr;
    readable += is_read;
  }
  read_squares<Singly<T>>([&](int r) { return rows[r]; }, readable == kLanes<T>, classes, to);
}

// Whether the rows of the block are one piece of memory.
template <typename T, typename Tensor>
bool is_one_piece(const Tensor& x, const Block<T>& block) {
  return x.class_stride == 1 && x.inner_stride == block.classes && block.near.span == block.rows;
}

// Whole rows, read as one piece.
template <typename T>
void read_piece(const Logits& x, const Block<T>& block, int classes, T* to) {
  alignas(64) T widened[kLanes<T> * kShortRow];
  const T* const piece = read_tile(x, block.start(x, 0), 0, block.rows * classes, widened);
  const auto row = [&](int r) { return r < block.rows ? piece + r * classes : nullptr; };
  read_squares<Singly<T>>(row, block.rows == kLanes<T>, classes, to);
}

// Whether numbers of 16 bits are taken by pairs, from where they stand and to where they belong.
template <typename T, typename Tensor>
bool goes_by_pairs(const Tensor& x) {
  return std::is_same_v<T, float> && x.dtype == DType::bf16 && x.class_stride == 1;
}

template <typename Reads>
void read_paired(const Logits& x, const Block<float>& block, int64_t first, int classes, float* to, Reads reads) {
  const uint16_t* rows[kLanes<float>];
  bool all = true;
  for (int r = 0; r < kLanes<float>; ++r) {
    const bool is_read = r < block.rows && reads(r);
    rows[r] = is_read ? static_cast<const uint16_t*>(x.data) + block.start(x, r) + first : nullptr;
    all &= is_read;
  }
  read_squares<ByPairs>([&](int r) { return rows[r]; }, all, classes, to);
}

// Classes [begin, begin + count)/kLanes of the block.
template <typename T, typename Reads>
const T* read_line(const Logits& x, const Block<T>& block, Across<T>, int64_t begin, int count, T* to, Reads reads) {
  const int64_t first = begin / kLanes<T>;
  const int classes = count / kLanes<T>;
  if (lies_in_planes(x) && block.near.span > 0) {
    read_planes(x, block, first, classes, to, reads);
  } else if (goes_by_pairs<T>(x)) {
    if constexpr (std::is_same_v<T, float>) read_paired(x, block, first, classes, to, reads);
  } else if (classes == block.classes && classes <= kShortRow && is_one_piece(x, block) && block.all_read(reads)) {
    read_piece(x, block, classes, to);
  } else {
    for (int c = 0; c < classes; c += kStripClasses<T>)
      read_rows(x, block, first + c, std::min(kStripClasses<T>, classes - c), to + c * kLanes<T>, reads);
  }
  for (int row = 0; block.some_apart && row < block.rows; ++row)
    if (block.apart_in(row, first, classes)) to[(block.apart[row] - first) * kLanes<T> + row] = -infinity<T>();
  return to;
}

// `classes` classes of `rows` rows, row r to row(r).
template <typename Form, typename T, typename Row>
MTKD_INLINE void write_squares(const Row& row, int rows, int classes, const T* from) {
  constexpr int kPerLane = Form::kPerLane, kSquare = kPerLane * kLanes<T>;
  for (int c = 0; c < classes; c += kSquare) {
    const int count = std::min(kSquare, classes - c);
    Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      const int at = i * kPerLane < count ? i * kPerLane : 0;
      square[i] = Form::load_line(from + (c + at) * kLanes<T>, count - at);
    }
    transpose<T>(square);
    if (rows == kLanes<T>)
#pragma GCC unroll 16
      for (int r = 0; r < kLanes<T>; ++r) Form::store_row(row(r) + c, square[r], count);
    else
      for (int r = 0; r < rows; ++r) Form::store_row(row(r) + c, square[r], count);
  }
}

// Whole neighbouring rows from element `start` on, put in order first: then they are cast past the caches, or
// converted, as one piece.
template <typename Form, typename T>
void write_piece(const Gradient& to, int64_t start, int rows, int classes, bool streams, const T* from) {
  alignas(64) typename Form::Element piece[kLanes<T> * kShortRow];
  write_squares<Form>([&](int r) { return piece + r * classes; }, rows, classes, from);
  const int numbers = rows * classes;
  if constexpr (!std::is_same_v<typename Form::Element, T>) {
    auto* const there = static_cast<typename Form::Element*>(to.data) + start;
    streams ? stream_numbers(there, numbers, piece) : void(std::copy_n(piece, numbers, there));
  } else if (streams)
    stream_tile(to.data, to.dtype, start, numbers, piece);
  else
    write_tile(to.data, to.dtype, start, numbers, piece);
}

template <typename T>
void write_rows(const Gradient& to, const Block<T>& block, int64_t first, int classes, const T* from) {
  if constexpr (std::is_same_v<T, float>)
    if (goes_by_pairs<T>(to)) {
      uint16_t* rows[kLanes<T>];
      for (int r = 0; r < block.rows; ++r) rows[r] = static_cast<uint16_t*>(to.data) + block.start(to, r) + first;
      return write_squares<ByPairs>([&](int r) { return rows[r]; }, block.rows, classes, from);
    }
  Tile<T> strip;
  const bool native = to.class_stride == 1 && to.dtype == kNative<T>;
  T* rows[kLanes<T>];
  for (int r = 0; r < block.rows; ++r)
    rows[r] = native ? static_cast<T*>(to.data) + block.start(to, r) + first : strip.values + r * kStripClasses<T>;
  write_squares<Singly<T>>([&](int r) { return rows[r]; }, block.rows, classes, from);
  for (int r = 0; r < block.rows && !native; ++r)
    write_tile(to, block.start(to, r), first, classes, strip.values + r * kStripClasses<T>);
}

// At most kTileColumns numbers.
template <typename T>
void write_line(const Gradient& to, const Block<T>& block, Across<T>, int64_t begin, int count, const T* from) {
  const int64_t first = begin / kLanes<T>;
  const int classes = count / kLanes<T>;
  if (lies_in_planes(to) && block.near.span > 0)
    write_planes(to, block, first, classes, from);
  else
    write_rows(to, block, first, classes, from);
}

// --------------------------------------------------------------------------------------------- one number of every row

// Calls visit(row, place) for the column of each row, `place` where it stands in the line's tile at `begin`, if it
// does.
template <typename T, typename Visit>
void for_each_place(const Block<T>& block, Along<T> at, const int64_t* columns, int64_t begin, int count, Visit visit) {
  const int64_t place = columns[at.line] - begin;
  if (place >= 0 && place < count) visit(at.line, place);
}
template <typename T, typename Visit>
void for_each_place(const Block<T>& block, Across<T>, const int64_t* columns, int64_t begin, int count, Visit visit) {
  for (int row = 0; row < block.rows; ++row) {
    const int64_t place = columns[row] * kLanes<T> + row - begin;
    if (place >= 0 && place < count) visit(row, place);
  }
}

// The logits at the targets of a line that are in the tile at `begin`; the other rows' numbers stay.
template <typename T>
void read_targets(const Block<T>& block, Along<T> at, int64_t begin, const Vectors<T>& x, Lanes<T>& labels) {
  const int64_t place = block.target[at.line] - begin;
  if (place >= 0 && place < x.whole + x.rest) labels[at.line] = x.values[place];
}
template <typename T>
void read_targets(const Block<T>& block, Across<T>, int64_t, const Vectors<T>& x, Lanes<T>& labels) {
  labels = gather(x.values, block.near.target);
}

// Subtracts a number of each row at its target in the tile.
template <typename T, typename At>
void subtract_at_targets(const Block<T>& block, At at, int64_t begin, int count, const Lanes<T>& less, T* from) {
  if (kIsAcross<T, At> && count == block.classes * kLanes<T>) {
    const Integers<T> places = block.near.target;
    return scatter(from, places, Vec<T>(gather(from, places) - less.all()));
  }
  for_each_place(block, at, block.target, begin, count, [&](int row, int64_t place) { from[place] -= less[row]; });
}
