// The first sweep over the columns: the states of a block of rows. Included once per instruction set.
//
// One exponential per element (two where τ is not 1, 2 or 4 and a weight rule or the hard label wants T = 1).

// The columns that this tensor is asked for next, fetched towards L2 while these are worked on: the K + 1 rows are too
// many short streams for the hardware to foresee.
struct Ahead {
  uintptr_t from;  // an address, maybe past the tensor: fetching from there does no harm
  int bytes;       // an element

  Ahead of_row(int64_t start) const { return {from + start * bytes, bytes}; }
  void prefetch(int i) const {
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<int64_t>(i) * bytes), 0, 2);
  }
};

// Two tiles ahead in the row (one is too short a time for a memory that is busy), then on to the next block's row.
template <typename T>
Ahead ahead_of(const KDArgs<T>& args, const Logits& x, int rows, int64_t begin, bool across) {
  constexpr int64_t kDistance = 2;
  const int64_t tile = begin / kTileColumns + kDistance, tiles = (args.classes + kTileColumns - 1) / kTileColumns;
  const int64_t rows_on = std::max<int64_t>(rows, tiles == 1 ? kDistance : 1);
  const int64_t in_next = std::min(tile - tiles, tiles - 1) * kTileColumns + rows_on * x.inner_stride;
  const int bytes = across || x.class_stride != 1 ? 0 : element_bytes(x.dtype);
  return {reinterpret_cast<uintptr_t>(x.data) + (tile < tiles ? tile * kTileColumns : in_next) * bytes, bytes};
}

// Calls step(at, vector, careful) for every vector of a tile. A vector needs care if it may hold −inf.
template <typename T, typename Step>
inline void for_each_vector(const Vectors<T>& x, bool careful, Step step) {
  if (careful)
    for (int i = 0; i < x.whole; i += kLanes<T>) step(i, load(x.values + i), std::true_type());
  else
    for (int i = 0; i < x.whole; i += kLanes<T>) step(i, load(x.values + i), std::false_type());
  if (x.rest) step(x.whole, x.last, std::true_type());
}

// Calls body(part, at) for stretches of a line, which starts at number `at` of it. Sums of stretches are summed: a
// class after the other, those of many would lose digits.
template <typename T, typename Body>
inline void for_each_part(const Vectors<T>& x, Body body) {
  constexpr int kPart = 32 * kLanes<T>;
  Vectors<T> part = x;
  for (int at = 0; at == 0 || at < x.whole; at += kPart) {
    const bool last = x.whole - at <= kPart;
    part.values = x.values + at;
    part.whole = last ? x.whole - at : kPart;
    part.rest = last ? x.rest : 0;
    body(part, at);
  }
}

// One tensor's part of a tile: the block's lines, and the extremes of its rows. All rows' extremes come before anything
// that waits for them.
template <typename T>
struct TileLines {
  int64_t start[kLanes<T>] = {};  // where a row begins
  Vectors<T> line[kLanes<T>];
  Lanes<T> max, min;  // along: of whole vectors only; NaN is not seen

  template <typename Reads>
  TileLines(const Logits& x, const Block<T>& block, int64_t begin, int count, Scratch<T>& scratch, Reads reads) {
    max = min = splat(-infinity<T>());
    if (scratch.across()) {
      const int numbers = count * kLanes<T>;
      line[0].fill(read_line(x, block, Across<T>(), begin, numbers, scratch.widened(0), reads), numbers);
      find_extremes(Across<T>());
      return;
    }
    for (int r = 0; r < block.rows; ++r) {
      if (!reads(r)) continue;
      start[r] = block.start(x, r);
      line[r].fill(read_line(x, block, Along<T>{r}, begin, count, scratch.widened(r), reads), count);
    }
    for (int r = 0; r < block.rows; ++r)
      if (reads(r)) find_extremes(Along<T>{r});
  }

 private:
  template <typename At>
  void find_extremes(At at) {
    const Vectors<T>& x = line[at.line];
    Vec<T> high = splat(-infinity<T>()), low = splat(infinity<T>());
    for (int i = 0; i < x.whole; i += kLanes<T>) {
      const Vec<T> v = load(x.values + i);
      high = v > high ? v : high;
      low = v < low ? v : low;
    }
    if (x.rest) high = x.last > high ? x.last : high;
    if constexpr (kIsAcross<T, At>) {
      max = high;
      min = low;
    } else {
      max[at.line] = max_of<T>(high);
      min[at.line] = -max_of<T>(-low);
    }
  }
};

// The rows' states, ready for a tile: raised to its maximum; `before` classes have been absorbed. Only rows of several
// tiles come here more than once, and those are alone in their block.
template <typename T>
Raise<T> prepare(States<T>& states, const Lanes<T>& tile_max, int64_t begin, int64_t before, T inv_t) {
  if (begin == 0) {
    states = {};
    states.max = tile_max.all();
  }
  if (begin == 0 || !(tile_max[0] > states.max[0])) return {};
  const Raise<T> by(states.max[0], tile_max[0], inv_t);
  SoftmaxState<T> state{states.max[0],  states.sum[0],   states.sum1[0],
                        states.dot1[0], states.total[0], static_cast<T>(before)};
  raise(state, tile_max[0], by);
  states.max[0] = state.max;
  states.sum[0] = state.sum;
  states.sum1[0] = state.sum1;
  states.dot1[0] = state.dot1;
  states.total[0] = state.total;
  return by;
}

// Σ (s − max) of a row's `count` numbers, `pitch` apart, but for its target.
template <typename T>
T total_without(const T* values, int pitch, int count, int64_t target, T max) {
  T total = 0;
  for (int i = 0; i < count; ++i) total += i == target ? T(0) : values[i * pitch] - max;
  return total;
}

// Adds Σ (s − max) of a tile, of which `total` has the whole vectors.
template <typename T>
void add_total(Lanes<T>& to, const Block<T>& block, Along<T> at, const Vectors<T>& s, int64_t begin, Vec<T> total,
               T max) {
  const int row = at.line, count = s.whole + s.rest;
  if (block.apart_in(row, begin, count)) {
    to[row] += total_without(s.values, 1, count, block.apart[row] - begin, max);
    return;
  }
  T rest = 0;
  for (int i = s.whole; i < count; ++i) rest += s.values[i] - max;  // not the padding
  to[row] += sum_of<T>(total) + rest;
}
template <typename T>
void add_total(Lanes<T>& to, const Block<T>& block, Across<T>, const Vectors<T>& s, int64_t, Vec<T> total, Vec<T> max) {
  to = total;
  for (int row = 0; row < block.rows; ++row)
    if (block.apart[row] >= 0)
      to[row] = total_without(s.values + row, kLanes<T>, s.whole / kLanes<T>, block.apart[row], T(max[row]));
}

template <typename T, AtOne kAtOne>
void absorb_student(const KDArgs<T>& args, Block<T>& block, const Sweep<T>& sweep, int64_t begin, int count,
                    Scratch<T>& scratch) {
  const TileLines<T> tile(args.student, block, begin, count, scratch, kEveryRow);
  States<T>& states = block.student_state;
  block.student_tile.sum_before = begin == 0 ? T(0) : states.sum[0];
  block.student_tile.raise = prepare(states, tile.max, begin, begin - block.apart_in(0, 0, begin), sweep.inv_t);
  Lanes<T> offset;
  offset = offset_of(states.max.all());
  block.student_tile.lowest = tile.min.all() - offset.all();
  const Ahead next = ahead_of(args, args.student, block.rows, begin, scratch.across());

  for_each_line(block, scratch.across(), kEveryRow, [&](auto at) {
    const int line = at.line;
    const Vectors<T>& s = tile.line[line];
    const Ahead ahead = next.of_row(tile.start[line]);
    const auto max = at.of(offset);
    T* shifted = scratch.shifted(line);
    T* exps = scratch.student_exps(line, begin);
    scratch.student_max_at(line, begin) = states.max[line];
    Vec<T> sums{}, sums1{}, total{};
    for_each_part(s, [&](const Vectors<T>& part, int from) {
      Vec<T> sum{}, sum1{};
      for_each_vector(part, false, [&](int i, Vec<T> x, auto) {
        i += from;
        ahead.prefetch(i);
        x -= max;
        const Vec<T> e = sweep.exp(x);
        store(shifted + i, x);
        store(exps + i, e);
        sum += e;
        if constexpr (kAtOne != AtOne::unused) {
          sum1 += exp_at_one<T, kAtOne>(e, x);
          if (i < s.whole) total += x;
        }
      });
      sums += sum;
      sums1 += sum1;
    });
    at.add(states.sum, sums);
    if constexpr (kAtOne != AtOne::unused) {
      at.add(states.sum1, sums1);
      add_total(states.total, block, at, s, begin, total, max);
      for_each_place(block, at, block.target, begin, s.whole + s.rest,
                     [&](int row, int64_t place) { states.label[row] = s.values[place]; });
    }
  });
}

// e·ratio, and +inf for a ratio of +inf even if e underflowed to 0.
template <typename T>
inline Vec<T> infinite_or_product(Vec<T> e, Vec<T> ratio) {
  return ratio == infinity<T>() ? ratio : e * ratio;
}

// A tile of teacher k, and the cross sum with the student's.
template <typename T, Expectation kExpectation, AtOne kAtOne, bool kEntropy>
void absorb_teacher(const KDArgs<T>& args, Block<T>& block, int k, const Sweep<T>& sweep, int64_t begin, int count,
                    Scratch<T>& scratch) {
  constexpr bool kForward = kExpectation == Expectation::teacher;
  const auto reads = [&](int row) { return block.reads(k, row); };
  if (!block.reads_some(k)) return;
  const TileLines<T> tile(args.teacher[k], block, begin, count, scratch, reads);
  States<T>& states = block.teacher_state[k];
  const StudentTile<T>& student = block.student_tile;
  const T sum_before = states.sum[0];
  const Raise<T> raise = prepare(states, tile.max, begin, begin, sweep.inv_t);
  if (begin > 0 && kExpectation != Expectation::none)
    states.cross[0] = kForward ? raise_cross(states.cross[0], sum_before, raise, student.raise)
                               : raise_cross(states.cross[0], student.sum_before, student.raise, raise);
  Lanes<T> offset;
  offset = offset_of(states.max.all());
  const Vec<T> lowest = tile.min.all() - offset.all(), lowest_s = student.lowest.all();
  Lanes<T> lower;  // of both
  lower = lowest < lowest_s ? lowest : lowest_s;
  const Ahead next = ahead_of(args, args.teacher[k], block.rows, begin, scratch.across());

  for_each_line(block, scratch.across(), reads, [&](auto at) {
    const int line = at.line;
    const Vectors<T>& t = tile.line[line];
    const Ahead ahead = next.of_row(tile.start[line]);
    const auto max = at.of(offset);
    const T* student_shifted = scratch.shifted(line);
    const T* student_exps = scratch.student_exps(line, begin);
    T* exps = scratch.teacher_exps(k, line, begin);
    scratch.teacher_max_at(k, line, begin) = states.max[line];
    const bool careful = any_of(at.of(lower) == -infinity<T>());
    Vec<T> sums{}, sums1{}, dots1{}, crosses{};
    for_each_part(t, [&](const Vectors<T>& part, int from) {
      Vec<T> sum{}, sum1{}, dot1{}, crossed{};
      for_each_vector(part, careful, [&](int i, Vec<T> dt, auto careful) {
        i += from;
        ahead.prefetch(i);
        dt -= max;
        const Vec<T> ds = load(student_shifted + i);
        const Vec<T> e = sweep.exp(dt);
        store(exps + i, e);
        sum += e;
        // cross_term of row_stats.h, a vector at a time
        if constexpr (kExpectation != Expectation::none) {
          const Vec<T> e_x = kForward ? e : load(student_exps + i), ratio = kForward ? dt - ds : ds - dt;
          if constexpr (careful)
            crossed += (kForward ? dt : ds) == -infinity<T>() ? Vec<T>{} : infinite_or_product<T>(e_x, ratio);
          else
            crossed += e_x * ratio;
        }
        if constexpr (kAtOne != AtOne::unused) {
          const Vec<T> e1 = exp_at_one<T, kAtOne>(e, dt);
          sum1 += e1;
          if constexpr (kEntropy) dot1 += dt == -infinity<T>() ? Vec<T>{} : e1 * dt;
        }
      });
      sums += sum;
      sums1 += sum1;
      dots1 += dot1;
      crosses += crossed;
    });
    at.add(states.sum, sums);
    at.add(states.cross, crosses);
    if constexpr (kAtOne != AtOne::unused) {
      at.add(states.sum1, sums1);
      for_each_place(block, at, block.target, begin, t.whole + t.rest,
                     [&](int row, int64_t place) { states.label[row] = t.values[place]; });
    }
    if constexpr (kEntropy) at.add(states.dot1, dots1);
  });
}

template <typename T>
using AbsorbStudent = void (*)(const KDArgs<T>&, Block<T>&, const Sweep<T>&, int64_t, int, Scratch<T>&);
template <typename T>
using AbsorbTeacher = void (*)(const KDArgs<T>&, Block<T>&, int, const Sweep<T>&, int64_t, int, Scratch<T>&);

template <typename T>
AbsorbStudent<T> student_absorber(AtOne at_one) {
  constexpr AbsorbStudent<T> kTable[] = {absorb_student<T, AtOne::unused>, absorb_student<T, AtOne::same>,
                                         absorb_student<T, AtOne::square>, absorb_student<T, AtOne::fourth>,
                                         absorb_student<T, AtOne::own>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T, Expectation kExpectation, bool kEntropy>
AbsorbTeacher<T> teacher_absorber(AtOne at_one) {
  constexpr AbsorbTeacher<T> kTable[] = {
      absorb_teacher<T, kExpectation, AtOne::unused, kEntropy>, absorb_teacher<T, kExpectation, AtOne::same, kEntropy>,
      absorb_teacher<T, kExpectation, AtOne::square, kEntropy>,
      absorb_teacher<T, kExpectation, AtOne::fourth, kEntropy>, absorb_teacher<T, kExpectation, AtOne::own, kEntropy>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T>
AbsorbTeacher<T> teacher_absorber(Expectation expectation, AtOne at_one, bool entropy) {
  constexpr Expectation kTeacher = Expectation::teacher, kStudent = Expectation::student, kNone = Expectation::none;
  switch (expectation) {
    case kTeacher:
      return entropy ? teacher_absorber<T, kTeacher, true>(at_one) : teacher_absorber<T, kTeacher, false>(at_one);
    case kStudent:
      return entropy ? teacher_absorber<T, kStudent, true>(at_one) : teacher_absorber<T, kStudent, false>(at_one);
    case kNone:
      return entropy ? teacher_absorber<T, kNone, true>(at_one) : teacher_absorber<T, kNone, false>(at_one);
  }
  __builtin_unreachable();
}

// Every state of the block's rows: the student's tile stays in cache while the K teachers pass by.
template <typename T>
void sweep_block(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  const AbsorbStudent<T> absorb_s = student_absorber<T>(sweep.student_at_one);
  const AbsorbTeacher<T> absorb_t =
      teacher_absorber<T>(expectation_of(args.divergence), sweep.teacher_at_one, sweep.entropy);
  assert(block.rows == 1 || scratch.one_tile());  // see prepare
  for (int64_t begin = 0; begin < args.classes; begin += scratch.tile_columns()) {
    const int count = static_cast<int>(std::min(args.classes - begin, scratch.tile_columns()));
    absorb_s(args, block, sweep, begin, count, scratch);
    for (int k = 0; k < args.teachers; ++k)
      if (args.kd_scale != 0) absorb_t(args, block, k, sweep, begin, count, scratch);
  }
}
