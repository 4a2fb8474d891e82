// The first sweep over the columns: the states of a block of rows. Included once per instruction set.
//
// One exponential per element (two where τ is not 1, 2 or 4 and a weight rule or the hard label wants T = 1).
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

// Two tiles ahead in the row (one is too short a time for a memory that is busy), then on to the next block's row.
// Across, two blocks ahead; pixels look ahead as they are read (kd_lines.h).
template <typename T>
Ahead ahead_of(const KDArgs<T>& args, const Logits& x, int rows, int64_t begin, bool across) {
  constexpr int64_t kDistance = 2;
  const auto data = reinterpret_cast<uintptr_t>(x.data);
  if (x.class_stride != 1) return {data, 0};
  const int bytes = element_bytes(x.dtype);
  if (across) return {data + kDistance * kLanes<T> * x.inner_stride * bytes, bytes};
  const int64_t tile = begin / kTileColumns + kDistance, tiles = (args.classes + kTileColumns - 1) / kTileColumns;
  const int64_t rows_on = std::max<int64_t>(rows, tiles == 1 ? kDistance : 1);
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
Vec<T> largest(const Vectors<T>& x) {
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
  Vec<T> high = splat(x.values[target]);
  for (int i = 0; i < kGuessed<T>; i += kLanes<T>) raise_to(high, load(x.values + i));
  return high;
}

// One tensor's part of a tile: the block's lines.
template <typename T, typename At>
struct TileLines {
  int64_t start[kLines<T, At>];  // where a row begins
  Vectors<T> line[kLines<T, At>];

  template <typename Reads>
  TileLines(const Logits& x, const Block<T>& block, int64_t begin, int count, Scratch<T>& scratch, const Reads& reads) {
    const int numbers = kIsAcross<T, At> ? count * kLanes<T> : count;
    for_each_line<At>(block, reads, [&](At at) {
      const int r = at.line;
      start[r] = block.start(x, r);
      line[r].fill(read_line(x, block, at, begin, numbers, scratch.widened(r), reads), numbers);
    });
  }

  // The largest logit of each row, in which NaN is not seen, or a guess at it.
  template <typename Reads>
  Vec<T> references(const Block<T>& block, const Reads& reads, bool guesses) const {
    Gathered<T, At> of(block, reads, -infinity<T>());
    for_each_line<At>(block, reads, [&](At at) {
      const Vectors<T>& x = line[at.line];
      const int64_t target = block.target[at.line];
      const bool guessed = !kIsAcross<T, At> && guesses && target >= 0;
      of.of[at.line] = guessed ? largest_guessed(x, target) : largest(x);
    });
    return of.largest_of_rows();
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

// After a tile, whose largest logits are known by now: which rows are to be swept again, from other references.
template <typename T>
Integers<T> settle_references(bool one_tile, States<T>& states, Lanes<T>& reference, Vec<T> max, int64_t before,
                              const Sweep<T>& sweep, Raised<T>& raised) {
  const Vec<T> above = max - reference.all();
  if (one_tile) {
    const Integers<T> far = above > kGuessReach<T>;
    states.max = reference = far != 0 ? max : reference.all();
    return far;
  }
  const Integers<T> far = above > sweep.reach;  // the block has one row, in every lane
  const Vec<T> highest = larger_of(states.max.all(), max);
  if (any_of(far)) raised = raise_row(states, reference, max[0], before, sweep.inv_t);
  states.max = highest;
  return far;
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

// What a line of the student's tile adds to its row's state, a part in each lane.
template <typename T>
struct StudentSums {
  Vec<T> max = splat(-infinity<T>()), sum{}, sum1{};
};

// The exponentials of a line and its sums.
template <typename T, AtOne kAtOne, typename Less>
MTKD_INLINE StudentSums<T> student_sums(const Vectors<T>& s, Less less, TemperedExp<T> exp, Ahead ahead, T* shifted,
                                        T* exps) {
  StudentSums<T> sums;
  for_each_part(s, [&](const Vectors<T>& part, int from) MTKD_ALWAYS_INLINE {
    StudentSums<T> of;
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
    raise_to(sums.max, of.max);
    sums.sum += of.sum;
    sums.sum1 += of.sum1;
  });
  return sums;
}

// The same of all lines of a tile.
template <typename T, typename At>
struct GatheredStudentSums {
  Gathered<T, At> max, sum, sum1;

  explicit GatheredStudentSums(const Block<T>& block)
      : max(block, kEveryRow, -infinity<T>()), sum(block, kEveryRow), sum1(block, kEveryRow) {}
};

template <typename T, AtOne kAtOne, typename At, typename Of>
void sum_student(const TileLines<T, At>& tile, const Block<T>& block, const Of& rows, const Sweep<T>& sweep,
                 int64_t begin, const Ahead& next, Scratch<T>& scratch, GatheredStudentSums<T, At>& sums) {
  Lanes<T> offset;
  offset = offset_of(block.student_reference.all());
  for_each_line<At>(block, rows, [&](At at) {
    const int line = at.line;
    const StudentSums<T> of =
        student_sums<T, kAtOne>(tile.line[line], at.of(offset), sweep.exp, next.of_row(tile.start[line]),
                                scratch.shifted(line), scratch.student_exps(line, begin));
    sums.max.of[line] = of.max;
    sums.sum.of[line] = of.sum;
    sums.sum1.of[line] = of.sum1;
  });
}

template <typename T, AtOne kAtOne, typename At>
void absorb_student(const KDArgs<T>& args, Block<T>& block, const Sweep<T>& sweep, int64_t begin, int count,
                    Scratch<T>& scratch) {
  constexpr bool kAcross = kIsAcross<T, At>;
  const TileLines<T, At> tile(args.student, block, begin, count, scratch, kEveryRow);
  States<T>& states = block.student_state;
  Lanes<T>& reference = block.student_reference;
  if (kAcross || begin == 0) {
    states.clear();
    states.max = reference = tile.references(block, kEveryRow, sweep.guesses && scratch.one_tile());
  }
  const Ahead next = ahead_of(args, args.student, block.rows, begin, kAcross);
  block.student_raised = {Raise<T>(), states.sum[0]};
  GatheredStudentSums<T, At> sums(block);
  const auto sweep_lines = [&](const auto& rows) {
    sum_student<T, kAtOne>(tile, block, rows, sweep, begin, next, scratch, sums);
  };
  sweep_lines(kEveryRow);
  if constexpr (!kAcross) {
    const int64_t before = begin - block.apart_in(0, 0, begin);
    const Integers<T> far = settle_references(scratch.one_tile(), states, reference, sums.max.largest_of_rows(), before,
                                              sweep, block.student_raised);
    if (any_of(far)) sweep_lines([&](int row) { return far[row] != 0; });
  }
  if (!kAcross && !scratch.one_tile()) scratch.reference(0, begin) = reference[0];
  states.sum = states.sum.all() + sums.sum.sum_of_rows();
  if constexpr (kAtOne == AtOne::unused) return;
  states.sum1 = states.sum1.all() + sums.sum1.sum_of_rows();
  for_each_line<At>(block, kEveryRow, [&](At at) {
    const Vectors<T>& s = tile.line[at.line];
    read_targets(block, at, begin, s, states.label);
    if (sweep.totals) add_total(states.total, block, at, begin, s, scratch.shifted(at.line));
  });
}

// Adds cross_term of row_stats.h for every element, where x − y, shifted both, is e's ratio. Careless ones are not
// finite where a logit is −inf; of other rows they are the same, bit for bit.
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

// What a line of a teacher's tile adds to its row's state, a part in each lane.
template <typename T>
struct TeacherSums {
  Vec<T> max = splat(-infinity<T>()), sum{}, sum1{}, dot1{}, cross{};

  void operator+=(const TeacherSums& more) {
    max = larger_of(max, more.max);
    sum += more.sum;
    sum1 += more.sum1;
    dot1 += more.dot1;
    cross += more.cross;
  }
};

// The exponentials of a line and its sums.
template <typename T, Expectation kExpectation, AtOne kAtOne, bool kEntropy, typename Less>
MTKD_INLINE TeacherSums<T> teacher_sums(const Vectors<T>& t, Less less, const T* student_shifted, const T* student_exps,
                                        TemperedExp<T> exp, Ahead ahead, bool careful, T* exps) {
  constexpr bool kForward = kExpectation == Expectation::teacher;
  TeacherSums<T> sums;
  for_each_part(t, [&](const Vectors<T>& part, int from) MTKD_ALWAYS_INLINE {
    TeacherSums<T> of;
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

// The same of all lines of a tile.
template <typename T, typename At>
struct GatheredSums {
  Gathered<T, At> max, sum, sum1, dot1, cross;

  template <typename Reads>
  GatheredSums(const Block<T>& block, const Reads& reads)
      : max(block, reads, -infinity<T>()),
        sum(block, reads),
        sum1(block, reads),
        dot1(block, reads),
        cross(block, reads) {}

  void set(int line, const TeacherSums<T>& of) {
    max.of[line] = of.max;
    sum.of[line] = of.sum;
    sum1.of[line] = of.sum1;
    dot1.of[line] = of.dot1;
    cross.of[line] = of.cross;
  }
};

// A tile of teacher k, and the cross sum with the student's.
template <typename T, Expectation kExpectation, AtOne kAtOne, bool kEntropy, typename At>
void absorb_teacher(const KDArgs<T>& args, Block<T>& block, int k, const Sweep<T>& sweep, int64_t begin, int count,
                    Scratch<T>& scratch) {
  const auto reads = [&](int row) { return block.reads(k, row); };
  if (!block.reads_some(k)) return;
  constexpr bool kCrosses = kExpectation != Expectation::none;
  constexpr bool kAcross = kIsAcross<T, At>;
  const TileLines<T, At> tile(args.teacher[k], block, begin, count, scratch, reads);
  States<T>& states = block.teacher_state[k];
  Lanes<T>& reference = block.teacher_reference[k];
  if (kAcross || begin == 0)
    states.max = reference = tile.references(block, reads, sweep.guesses && scratch.one_tile());
  Raised<T> raised{Raise<T>(), states.sum[0]};
  const Ahead next = ahead_of(args, args.teacher[k], block.rows, begin, kAcross);
  GatheredSums<T, At> sums(block, reads);
  Vec<T> crossed{};

  const auto sweep_lines = [&](const auto& rows, bool careful) {
    Lanes<T> offset;
    offset = offset_of(reference.all());
    for_each_line<At>(block, rows, [&](At at) {
      const int line = at.line;
      const Ahead ahead = next.of_row(tile.start[line]);
      sums.set(line, teacher_sums<T, kExpectation, kAtOne, kEntropy>(
                         tile.line[line], at.of(offset), scratch.shifted(line), scratch.student_exps(line, begin),
                         sweep.exp, ahead, careful, scratch.teacher_exps(k, line, begin)));
    });
    if constexpr (kCrosses) crossed = sums.cross.sum_of_rows();
  };
  sweep_lines(reads, false);
  if constexpr (!kAcross) {
    const Integers<T> far =
        settle_references(scratch.one_tile(), states, reference, sums.max.largest_of_rows(), begin, sweep, raised);
    if (any_of(far)) sweep_lines([&](int row) { return reads(row) && far[row] != 0; }, false);
  }
  if constexpr (kCrosses) {
    if (any_of(crossed - crossed != 0)) sweep_lines(reads, true);
    if (!kAcross && begin > 0) raise_cross(states, kExpectation, raised, block.student_raised);
    states.cross = states.cross.all() + crossed;
  }
  if (!kAcross && !scratch.one_tile()) scratch.reference(k + 1, begin) = reference[0];
  states.sum = states.sum.all() + sums.sum.sum_of_rows();
  if constexpr (kEntropy) states.dot1 = states.dot1.all() + sums.dot1.sum_of_rows();
  if constexpr (kAtOne == AtOne::unused) return;
  states.sum1 = states.sum1.all() + sums.sum1.sum_of_rows();
  for_each_line<At>(block, reads, [&](At at) { read_targets(block, at, begin, tile.line[at.line], states.label); });
}

template <typename T>
using AbsorbStudent = void (*)(const KDArgs<T>&, Block<T>&, const Sweep<T>&, int64_t, int, Scratch<T>&);
template <typename T>
using AbsorbTeacher = void (*)(const KDArgs<T>&, Block<T>&, int, const Sweep<T>&, int64_t, int, Scratch<T>&);

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

// Every state of the block's rows: the student's tile stays in cache while the K teachers pass by.
template <typename At, typename T>
void sweep_tiles(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  const AbsorbStudent<T> absorb_s = student_absorber<T, At>(sweep.student_at_one);
  const AbsorbTeacher<T> absorb_t =
      teacher_absorber<T, At>(expectation_of(args.divergence), sweep.teacher_at_one, sweep.entropy);
  for (int64_t begin = 0; begin < args.classes; begin += scratch.tile_columns()) {
    const int count = static_cast<int>(std::min(args.classes - begin, scratch.tile_columns()));
    absorb_s(args, block, sweep, begin, count, scratch);
    for (int k = 0; k < args.teachers; ++k)
      if (args.kd_scale != 0) absorb_t(args, block, k, sweep, begin, count, scratch);
  }
}

template <typename T>
void sweep_block(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  assert(block.rows == 1 || scratch.one_tile());  // see raise_row
  if (scratch.across()) return sweep_tiles<Across<T>>(args, block, sweep, scratch);
  sweep_tiles<Along<T>>(args, block, sweep, scratch);
  if (!scratch.one_tile()) raise_to_maxima(args, block, sweep);
}
