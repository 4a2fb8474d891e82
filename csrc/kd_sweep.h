// The first sweep over the columns: the states of a block of rows. Included once per instruction set.
//
// One exponential per element (two where τ is not 1, 2 or 4 and a weight rule or the hard label wants T = 1).
//
// Some rows at a time are swept in all tensors, one after the other, so that what the student leaves of them stays in
// the nearest cache; what the lanes of a row have come to is joined at the end of its block.
//
// Exponentials are relative to the largest logit of a row's first tile, which is searched for it. In the tiles that
// follow the largest is found on the way. Where it lies out of reach (Sweep), the row's states are raised and the
// tile is swept again; within reach they are raised when all tiles are done.
//
// Rows of one tile may start from a guess, the largest of a few classes and the target: a search of what comes from
// memory costs 3 to 8%, for nothing is computed meanwhile. Rows for which it lies too far below are swept again; the
// others stay relative to it. Not where the weights are entropies, small differences of what grows with the distance;
// nor where logits spread, below τ = 1; nor where the target stands apart.

// The columns that this tensor is asked for next, fetched while these are worked on: the K + 1 rows are too many short
// streams for the hardware to foresee.
struct Ahead {
  uintptr_t from;  // an address, maybe past the tensor: fetching from there does no harm
  int bytes;       // an element

  Ahead of_row(int64_t start) const { return {from + start * bytes, bytes}; }
  // Always inlined: a call, which returns nothing and writes nothing, the compiler would drop.
  template <int kVectors>
  MTKD_INLINE void prefetch(int i) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t number = i + v * MTKD_VEC_BYTES / static_cast<int>(sizeof(float));
      __builtin_prefetch(reinterpret_cast<const void*>(from + number * bytes));
    }
  }
};

// Two tiles ahead in the row (one is too short a time for a memory that is busy), then on to the next row; in rows of
// one tile a tile ahead, or two rows. Across, two blocks ahead; pixels look ahead as they are read (kd_lines.h).
template <typename T>
MTKD_INLINE Ahead ahead_of(const KDArgs<T>& args, const Logits& x, int64_t begin, bool across) {
  constexpr int64_t kDistance = 2;
  const auto data = reinterpret_cast<uintptr_t>(x.data);
  if (x.class_stride != 1) return {data, 0};
  const int bytes = element_bytes(x.dtype);
  if (across) return {data + kDistance * kLanes<T> * x.inner_stride * bytes, bytes};
  const int64_t tile = begin / kTileColumns + kDistance, tiles = (args.classes + kTileColumns - 1) / kTileColumns;
  const int64_t rows_on = tiles == 1 ? std::max(kDistance, kTileColumns / args.classes) : 1;
  const int64_t in_next = std::min(tile - tiles, tiles - 1) * kTileColumns + rows_on * x.inner_stride;
  return {data + (tile < tiles ? tile * kTileColumns : in_next) * bytes, bytes};
}

// Calls step(at, bundle, careful) for all vectors of a tile. A vector needs care if it may hold −inf.
template <typename T, typename Step>
MTKD_INLINE void for_each_vector(const Vectors<T>& x, bool careful, Step step) {
  constexpr int kTogether = kAbreast * kLanes<T>;
  const T* const values = x.values;
  const int whole = x.whole;
  int i = 0;
  if (!careful) {
    for (; i + kTogether <= whole; i += kTogether) step(i, load_bundle<kAbreast>(values + i), std::false_type());
    for (; i < whole; i += kLanes<T>) step(i, load_bundle<1>(values + i), std::false_type());
  }
  for (; i < whole + x.rest; i += kLanes<T>)
    step(i, i < whole ? load_bundle<1>(values + i) : Bundle<T, 1>{x.last}, std::true_type());
}

// Calls body(part, at) for stretches of a line, which starts at number `at` of it. Sums of stretches are summed: a
// class after the other, those of many would lose digits.
template <typename T, typename Body>
MTKD_INLINE void for_each_part(const Vectors<T>& x, const Body& body) {
  constexpr int kPart = 64 * kLanes<T>;
  Vectors<T> part;
  part.last = x.last;
  for (int at = 0; at == 0 || at < x.whole; at += kPart) {
    const bool last = x.whole - at <= kPart;
    part.values = x.values + at;
    part.whole = last ? x.whole - at : kPart;
    part.rest = last ? x.rest : 0;
    body(part, at);
  }
}

// The largest number in each lane of a line, in four chains: one would wait for every comparison.
template <typename T>
MTKD_INLINE Vec<T> largest(const Vectors<T>& x) {
  constexpr int kL = kLanes<T>;
  Vec<T> high[4];
  for (Vec<T>& h : high) h = splat(-infinity<T>());
  int i = 0;
  for (; i + 4 * kL <= x.whole; i += 4 * kL)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) raise_to(high[j], load(x.values + i + j * kL));
  for (; i < x.whole; i += kL) raise_to(high[0], load(x.values + i));
  if (x.rest) raise_to(high[1], x.last);
  raise_to(high[0], high[1]);
  raise_to(high[2], high[3]);
  raise_to(high[0], high[2]);
  return high[0];
}

template <typename T>
constexpr T kGuessReach = 8;

// The largest of a row's first numbers and its target's.
template <typename T>
Vec<T> largest_guessed(const Vectors<T>& x, int64_t target) {
  Vec<T> high[2] = {splat(x.values[target]), load(x.values)};
#pragma GCC unroll 8
  for (int i = kLanes<T>; i < kGuessed<T>; i += kLanes<T>) raise_to(high[i / kLanes<T> % 2], load(x.values + i));
  return larger_of(high[0], high[1]);
}

// What the exponentials of a line are relative to, at first: its largest logits, in which NaN is not seen, or a guess.
// All lines have theirs before one is swept: what depends on a search waits for it.
template <typename T>
MTKD_INLINE T first_reference(const Vectors<T>& x, const Block<T>& block, Along<T> at, const Sweep<T>& sweep) {
  const int64_t target = block.target[at.line];
  return max_of<T>(sweep.guesses && target >= 0 ? largest_guessed(x, target) : largest(x));
}
template <typename T>
MTKD_INLINE Vec<T> first_reference(const Vectors<T>& x, const Block<T>&, Across<T>, const Sweep<T>&) {
  return largest(x);
}

// One tensor's part of a tile: some lines of a block, those that are read.
template <typename T, typename At>
struct TileLines {
  Vectors<T> line[kLines<T, At>];

  TileLines(const Logits& x, const Block<T>& block, Rows rows, int tensor, int64_t begin, int count,
            Scratch<T>& scratch) {
    const int numbers = kIsAcross<T, At> ? count * kLanes<T> : count;
    const auto reads = [&](int row) { return tensor == 0 || block.reads(tensor - 1, row); };
    for_each_line<T, At>(rows, [&](At at) MTKD_ALWAYS_INLINE {
      if (!kIsAcross<T, At> && !reads(at.line)) return;
      line[at.line].fill(read_line(x, block, at, begin, numbers, scratch.widened(at.line), reads), numbers);
    });
  }
};

// Raises the row of a block of one to a larger maximum; `before` classes have been absorbed.
template <typename T>
Raised<T> raise_row(States<T>& states, Lanes<T>& reference, T max, int64_t before, T inv_t) {
  const Raised<T> raised{Raise<T>(reference[0], max, inv_t), states.sum[0]};
  SoftmaxState<T> state{reference[0],   states.sum[0],   states.sum1[0],
                        states.dot1[0], states.total[0], static_cast<T>(before)};
  raise(state, max, raised.by);
  states.max = reference = splat(max);
  states.sum[0] = state.sum;
  states.sum1[0] = state.sum1;
  states.dot1[0] = state.dot1;
  states.total[0] = state.total;
  return raised;
}

// After a tile of such a row: raises it if its largest logit lies out of reach. Whether the tile is to be swept again.
template <typename T>
bool raise_if_far(States<T>& states, Lanes<T>& reference, Vec<T> largest, int64_t before, const Sweep<T>& sweep,
                  Raised<T>& raised) {
  const T max = max_of<T>(largest), highest = std::max(states.max[0], max);
  const bool far = max - reference[0] > sweep.reach;
  if (far) raised = raise_row(states, reference, max, before, sweep.inv_t);
  states.max[0] = highest;
  return far;
}

// The same of a row of one tile, whose guess was too low: there is nothing to raise.
template <typename T>
MTKD_INLINE bool restart_if_far(Along<T> at, Lanes<T>& reference, Vec<T> largest) {
  const bool far = any_of(largest - reference[at.line] > kGuessReach<T>);
  if (far) reference[at.line] = max_of<T>(largest);
  return far;
}
template <typename T>
MTKD_INLINE bool restart_if_far(Across<T>, Lanes<T>&, Vec<T>) {
  return false;
}

// A teacher's cross sum, after it or the student has been raised.
template <typename T>
void raise_cross(States<T>& states, Expectation expectation, const Raised<T>& teacher, const Raised<T>& student) {
  states.cross[0] = expectation == Expectation::teacher
                        ? raise_cross(states.cross[0], teacher.sum_before, teacher.by, student.by)
                        : raise_cross(states.cross[0], student.sum_before, student.by, teacher.by);
}

// Σ (s − max) of a row's `count` numbers, `pitch` apart, but for its target.
template <typename T>
T total_without(const T* shifted, int pitch, int count, int64_t target) {
  T total = 0;
  for (int i = 0; i < count; ++i) total += i == target ? T(0) : shifted[i * pitch];
  return total;
}

// Adds Σ (s − max) of a tile.
template <typename T>
void add_total(Lanes<T>& to, const Block<T>& block, Along<T> at, int64_t begin, const Vectors<T>& s, const T* shifted) {
  const int row = at.line, count = s.whole + s.rest;
  if (block.apart_in(row, begin, count)) {
    to[row] += total_without(shifted, 1, count, block.apart[row] - begin);
    return;
  }
  Vec<T> total{};
  for (int i = 0; i < s.whole; i += kLanes<T>) total += load(shifted + i);
  to[row] += sum_of<T>(total) + total_without(shifted + s.whole, 1, s.rest, -1);
}
template <typename T>
void add_total(Lanes<T>& to, const Block<T>& block, Across<T>, int64_t, const Vectors<T>& s, const T* shifted) {
  Vec<T> total{};
  for (int i = 0; i < s.whole; i += kLanes<T>) total += load(shifted + i);
  to = total;
  for (int row = 0; block.some_apart && row < block.rows; ++row)
    if (block.apart[row] >= 0) to[row] = total_without(shifted + row, kLanes<T>, s.whole / kLanes<T>, block.apart[row]);
}

// The exponentials of a line and its sums.
template <typename T, AtOne kAtOne, typename Less>
MTKD_INLINE LineSums<T> student_sums(const Vectors<T>& s, Less less, TemperedExp<T> exp, Ahead ahead, T* shifted,
                                     T* exps) {
  LineSums<T> sums;
  for_each_part(s, [&](const Vectors<T>& part, int from) MTKD_ALWAYS_INLINE {
    LineSums<T> of;
    for_each_vector(part, false, [=, &of](int i, auto x, auto) MTKD_ALWAYS_INLINE {
      i += from;
      ahead.prefetch<x.size>(i);
      const auto shift = x - less, e = exp(shift);
      store(shifted + i, shift);
      store(exps + i, e);
      raise_to(of.max, x);
      add_to(of.sum, e);
      if constexpr (kAtOne != AtOne::unused) add_to(of.sum1, exp_at_one<kAtOne>(e, shift));
    });
    sums += of;
  });
  return sums;
}

// Adds what a line's tile has come to, or puts it beside that of the block's other rows. Which sums there are: kSum1 if
// the exponentials at one are used, kDot1 for entropies, kCross of a teacher where a cross sum is wanted.
template <typename T, bool kSum1s, bool kDot1s, bool kCrosses, typename At>
MTKD_INLINE void add_sums(At at, const LineSums<T>& of, int tensor, States<T>& states, Scratch<T>& scratch) {
  const bool gathers = scratch.gathers();
  T* const to = gathers ? scratch.sums(tensor, at.line) : nullptr;
  const auto add = [&](Sum which, Lanes<T>& state, Vec<T> sum) MTKD_ALWAYS_INLINE {
    if (gathers)
      store(to + which * kLanes<T>, sum);
    else
      at.add(state, sum);
  };
  add(kSum, states.sum, of.sum);
  if constexpr (kSum1s) add(kSum1, states.sum1, of.sum1);
  if constexpr (kDot1s) add(kDot1, states.dot1, of.dot1);
  if constexpr (kCrosses) add(kCross, states.cross, of.cross);
}

// The states of rows whose sums have been put side by side: the lanes of all rows are joined at once, for 16 rows of 16
// lanes take 45 instructions, where each by itself takes 15.
template <typename T>
Vec<T> join_gathered(int rows, int tensor, Sum which, Scratch<T>& scratch) {
  const auto of_row = [&](int row) { return load(scratch.sums(tensor, row) + which * kLanes<T>); };
  if (rows == 1) return splat(sum_of<T>(of_row(0)));
  Vec<T> sums[kLanes<T>];
  for (int r = 0; r < kLanes<T>; ++r) sums[r] = r < rows ? of_row(r) : Vec<T>{};
  return join_rows<T>(sums, [](Vec<T> x, Vec<T> y) { return x + y; });
}
template <typename T, bool kSum1s, bool kDot1s, bool kCrosses>
void join_sums(int rows, int tensor, const Lanes<T>& reference, States<T>& states, Scratch<T>& scratch) {
  states.max = reference.all();
  states.sum = join_gathered(rows, tensor, kSum, scratch);
  if constexpr (kSum1s) states.sum1 = join_gathered(rows, tensor, kSum1, scratch);
  if constexpr (kDot1s) states.dot1 = join_gathered(rows, tensor, kDot1, scratch);
  if constexpr (kCrosses) states.cross = join_gathered(rows, tensor, kCross, scratch);
}

// A tile of the student, some lines of it.
template <typename T, AtOne kAtOne, typename At>
void absorb_student(const KDArgs<T>& args, Block<T>& block, Rows rows, const Sweep<T>& sweep, int64_t begin, int count,
                    Scratch<T>& scratch) {
  const Logits& x = args.student;
  States<T>& states = block.student_state;
  Lanes<T>& reference = block.student_reference;
  const Ahead next = ahead_of(args, x, begin, kIsAcross<T, At>);
  const TileLines<T, At> tile(x, block, rows, 0, begin, count, scratch);
  if (begin == 0)
    for_each_line<T, At>(rows, [&](At at) MTKD_ALWAYS_INLINE {
      at.set(reference, first_reference(tile.line[at.line], block, at, sweep));
    });
  if (begin == 0 && !scratch.gathers()) states.max = reference.all();
  for_each_line<T, At>(rows, [&](At at) MTKD_ALWAYS_INLINE {
    const Vectors<T>& s = tile.line[at.line];
    const int64_t start = block.start(x, at.line);
    LineSums<T> sums;
    block.student_raised = {Raise<T>(), states.sum[0]};
    const auto again = [&] {
      if (scratch.one_tile()) return restart_if_far(at, reference, sums.max);
      const int64_t before = begin - block.apart_in(0, 0, begin);
      return raise_if_far(states, reference, sums.max, before, sweep, block.student_raised);
    };
    do {
      sums = student_sums<T, kAtOne>(s, offset_of(at.of(reference)), sweep.exp, next.of_row(start),
                                     scratch.shifted(at.line), scratch.student_exps(at.line, begin));
    } while (again());
    if (!scratch.one_tile()) scratch.reference(0, begin) = reference[0];
    add_sums<T, kAtOne != AtOne::unused, false, false>(at, sums, 0, states, scratch);
    if constexpr (kAtOne == AtOne::unused) return;
    read_targets(block, at, begin, s, states.label);
    if (sweep.totals) add_total(states.total, block, at, begin, s, scratch.shifted(at.line));
  });
  if (scratch.gathers() && rows.end == block.rows)
    join_sums<T, kAtOne != AtOne::unused, false, false>(block.rows, 0, reference, states, scratch);
}

// Adds cross_term of row_stats.h for every element, where x − y, shifted both, is e's ratio. Careless ones are not
// finite where a logit is −inf; elsewhere they are the same, bit for bit.
template <typename T, int N>
MTKD_INLINE void add_cross(Vec<T>& sum, const Bundle<T, N>& dx, const Bundle<T, N>& e, const Bundle<T, N>& dy,
                           std::false_type) {
  add_to(sum, e * (dx - dy));
}
template <typename T, int N>
MTKD_INLINE void add_cross(Vec<T>& sum, const Bundle<T, N>& dx, const Bundle<T, N>& e, const Bundle<T, N>& dy,
                           std::true_type) {
  const auto ratio = [](Vec<T> dx, Vec<T> dy) { return dx == -infinity<T>() ? Vec<T>{} : dx - dy; };
  const auto weight = [](Vec<T> ratio, Vec<T> e) { return ratio == infinity<T>() ? splat(T(1)) : e; };
  const Bundle<T, N> ratios = each(ratio, dx, dy);
  add_to(sum, each(weight, ratios, e) * ratios);
}

// The exponentials of a line and its sums.
template <typename T, Expectation kExpectation, AtOne kAtOne, bool kEntropy, typename Less>
MTKD_INLINE LineSums<T> teacher_sums(const Vectors<T>& t, Less less, const T* student_shifted, const T* student_exps,
                                     TemperedExp<T> exp, Ahead ahead, bool careful, T* exps) {
  constexpr bool kForward = kExpectation == Expectation::teacher;
  LineSums<T> sums;
  for_each_part(t, [&](const Vectors<T>& part, int from) MTKD_ALWAYS_INLINE {
    LineSums<T> of;
    // By value: a store may write to whatever is referred to.
    for_each_vector(part, careful, [=, &of](int i, auto x, auto careful) MTKD_ALWAYS_INLINE {
      i += from;
      ahead.prefetch<x.size>(i);
      const auto dt = x - less, e = exp(dt);
      store(exps + i, e);
      raise_to(of.max, x);
      add_to(of.sum, e);
      if constexpr (kExpectation != Expectation::none) {
        const auto ds = load_bundle<x.size>(student_shifted + i);
        if constexpr (kForward)
          add_cross(of.cross, dt, e, ds, careful);
        else
          add_cross(of.cross, ds, load_bundle<x.size>(student_exps + i), dt, careful);
      }
      if constexpr (kAtOne != AtOne::unused) {
        const auto e1 = exp_at_one<kAtOne>(e, dt);
        add_to(of.sum1, e1);
        if constexpr (kEntropy)
          add_to(of.dot1, each([](Vec<T> e, Vec<T> d) { return d == -infinity<T>() ? Vec<T>{} : e * d; }, e1, dt));
      }
    });
    sums += of;
  });
  return sums;
}

// A tile of teacher k, some lines of it, and the cross sums with the student's.
template <typename T, Expectation kExpectation, AtOne kAtOne, bool kEntropy, typename At>
void absorb_teacher(const KDArgs<T>& args, Block<T>& block, Rows rows, int k, const Sweep<T>& sweep, int64_t begin,
                    int count, Scratch<T>& scratch) {
  constexpr bool kCrosses = kExpectation != Expectation::none;
  const Logits& x = args.teacher[k];
  States<T>& states = block.teacher_state[k];
  Lanes<T>& reference = block.teacher_reference[k];
  const auto add = [&](At at, const LineSums<T>& sums) MTKD_ALWAYS_INLINE {
    add_sums<T, kAtOne != AtOne::unused, kEntropy, kCrosses>(at, sums, k + 1, states, scratch);
  };
  const Ahead next = ahead_of(args, x, begin, kIsAcross<T, At>);
  const TileLines<T, At> tile(x, block, rows, k + 1, begin, count, scratch);
  if (begin == 0)
    for_each_line<T, At>(rows, [&](At at) MTKD_ALWAYS_INLINE {
      if (reads_line(block, at, k)) at.set(reference, first_reference(tile.line[at.line], block, at, sweep));
    });
  if (begin == 0 && !scratch.gathers()) states.max = reference.all();
  for_each_line<T, At>(rows, [&](At at) MTKD_ALWAYS_INLINE {
    LineSums<T> sums;
    if (!reads_line(block, at, k)) return add(at, sums);
    const Vectors<T>& t = tile.line[at.line];
    const int64_t start = block.start(x, at.line);
    Raised<T> raised{Raise<T>(), states.sum[0]};
    bool careful = false;
    const auto again = [&] {
      if (scratch.one_tile() ? restart_if_far(at, reference, sums.max)
                             : raise_if_far(states, reference, sums.max, begin, sweep, raised))
        return true;
      if (!kCrosses || careful) return false;
      careful = any_of(sums.cross - sums.cross != 0);
      return careful;
    };
    do {
      sums = teacher_sums<T, kExpectation, kAtOne, kEntropy>(
          t, offset_of(at.of(reference)), scratch.shifted(at.line), scratch.student_exps(at.line, begin), sweep.exp,
          next.of_row(start), careful, scratch.teacher_exps(k, at.line, begin));
    } while (again());
    if (kCrosses && !scratch.one_tile() && begin > 0) raise_cross(states, kExpectation, raised, block.student_raised);
    if (!scratch.one_tile()) scratch.reference(k + 1, begin) = reference[0];
    add(at, sums);
    if constexpr (kAtOne != AtOne::unused) read_targets(block, at, begin, t, states.label);
  });
  if (scratch.gathers() && rows.end == block.rows)
    join_sums<T, kAtOne != AtOne::unused, kEntropy, kCrosses>(block.rows, k + 1, reference, states, scratch);
}

template <typename T>
using AbsorbStudent = void (*)(const KDArgs<T>&, Block<T>&, Rows, const Sweep<T>&, int64_t, int, Scratch<T>&);
template <typename T>
using AbsorbTeacher = void (*)(const KDArgs<T>&, Block<T>&, Rows, int, const Sweep<T>&, int64_t, int, Scratch<T>&);

template <typename T, typename At>
AbsorbStudent<T> student_absorber(AtOne at_one) {
  constexpr AbsorbStudent<T> kTable[] = {absorb_student<T, AtOne::unused, At>, absorb_student<T, AtOne::same, At>,
                                         absorb_student<T, AtOne::square, At>, absorb_student<T, AtOne::fourth, At>,
                                         absorb_student<T, AtOne::own, At>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T, typename At, Expectation kExpectation, bool kEntropy>
AbsorbTeacher<T> teacher_absorber(AtOne at_one) {
  constexpr AbsorbTeacher<T> kTable[] = {absorb_teacher<T, kExpectation, AtOne::unused, kEntropy, At>,
                                         absorb_teacher<T, kExpectation, AtOne::same, kEntropy, At>,
                                         absorb_teacher<T, kExpectation, AtOne::square, kEntropy, At>,
                                         absorb_teacher<T, kExpectation, AtOne::fourth, kEntropy, At>,
                                         absorb_teacher<T, kExpectation, AtOne::own, kEntropy, At>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T, typename At, Expectation kExpectation>
AbsorbTeacher<T> teacher_absorber(AtOne at_one, bool entropy) {
  return entropy ? teacher_absorber<T, At, kExpectation, true>(at_one)
                 : teacher_absorber<T, At, kExpectation, false>(at_one);
}

template <typename T, typename At>
AbsorbTeacher<T> teacher_absorber(Expectation expectation, AtOne at_one, bool entropy) {
  switch (expectation) {
    case Expectation::teacher:
      return teacher_absorber<T, At, Expectation::teacher>(at_one, entropy);
    case Expectation::student:
      return teacher_absorber<T, At, Expectation::student>(at_one, entropy);
    case Expectation::none:
      return teacher_absorber<T, At, Expectation::none>(at_one, entropy);
  }
  __builtin_unreachable();
}

// The states of a row of several tiles, so far relative to what was within reach of the largest logits.
template <typename T>
void raise_to_maxima(const KDArgs<T>& args, Block<T>& block, const Sweep<T>& sweep) {
  const auto raise = [&](States<T>& states, Lanes<T>& reference, int64_t count) {
    return raise_row(states, reference, states.max[0], count, sweep.inv_t);
  };
  const int64_t apart = block.apart_in(0, 0, args.classes);
  const Raised<T> student = raise(block.student_state, block.student_reference, args.classes - apart);
  for (int k = 0; k < args.teachers; ++k) {
    if (args.kd_scale == 0 || !block.reads(k, 0)) continue;
    const Raised<T> teacher = raise(block.teacher_state[k], block.teacher_reference[k], args.classes);
    if (expectation_of(args.divergence) == Expectation::none) continue;
    raise_cross(block.teacher_state[k], expectation_of(args.divergence), teacher, student);
  }
}

// Every state of the block's rows, some rows at a time: what the student leaves of them stays in the nearest cache
// while the K teachers pass by.
template <typename At, typename T>
void sweep_tiles(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  const AbsorbStudent<T> absorb_s = student_absorber<T, At>(sweep.student_at_one);
  const AbsorbTeacher<T> absorb_t =
      teacher_absorber<T, At>(expectation_of(args.divergence), sweep.teacher_at_one, sweep.entropy);
  const int teachers = args.kd_scale != 0 ? args.teachers : 0;
  block.student_state.clear();
  block.student_reference = splat(-infinity<T>());  // of rows that are not there, or not read
  for (int k = 0; k < teachers; ++k) block.teacher_reference[k] = splat(-infinity<T>());
  for (int64_t begin = 0; begin < args.classes; begin += scratch.tile_columns()) {
    const int count = static_cast<int>(std::min(args.classes - begin, scratch.tile_columns()));
    for (Rows rows{0, 0}; rows.end < block.rows;) {
      rows = {rows.end, std::min(rows.end + scratch.rows_together(), block.rows)};
      absorb_s(args, block, rows, sweep, begin, count, scratch);
      for (int k = 0; k < teachers; ++k)
        if (block.reads_some(k)) absorb_t(args, block, rows, k, sweep, begin, count, scratch);
    }
  }
}

template <typename T>
void sweep_block(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  assert(block.rows == 1 || scratch.one_tile());  // see raise_row
  if (scratch.across()) return sweep_tiles<Across<T>>(args, block, sweep, scratch);
  sweep_tiles<Along<T>>(args, block, sweep, scratch);
  if (!scratch.one_tile()) raise_to_maxima(args, block, sweep);
}
