// A block of rows: up to one a lane, so that what is done once a row (logarithms, weights, factors of the gradient) is
// done for all of them in SIMD registers. Included once per instruction set.

// How e^{x} follows from e^{x/τ}: its τ-th power for τ = 1, 2, 4, its own exponential for other τ.
enum class AtOne { unused, same, square, fourth, own };

// Whether the student's gradient is a weighted sum of exponentials; else it takes logarithms too.
inline bool weighs_exps(Divergence divergence) { return expectation_of(divergence) == Expectation::teacher; }

template <typename T>
AtOne at_one(T temperature, bool used) {
  if (!used) return AtOne::unused;
  if (temperature == 1) return AtOne::same;
  if (temperature == 2) return AtOne::square;
  return temperature == 4 ? AtOne::fourth : AtOne::own;
}

// Calls body(at_one as a constant).
template <typename Body>
MTKD_INLINE void with_constant(AtOne at_one, const Body& body) {
  switch (at_one) {
    case AtOne::unused:
      return body(std::integral_constant<AtOne, AtOne::unused>());
    case AtOne::same:
      return body(std::integral_constant<AtOne, AtOne::same>());
    case AtOne::square:
      return body(std::integral_constant<AtOne, AtOne::square>());
    case AtOne::fourth:
      return body(std::integral_constant<AtOne, AtOne::fourth>());
    case AtOne::own:
      return body(std::integral_constant<AtOne, AtOne::own>());
  }
}

template <AtOne kAtOne, typename T, int N>
MTKD_INLINE Bundle<T, N> exp_at_one(const Bundle<T, N>& e, const Bundle<T, N>& x) {
  if constexpr (kAtOne == AtOne::same) return e;
  const Bundle<T, N> square = e * e;
  if constexpr (kAtOne == AtOne::square) return square;
  if constexpr (kAtOne == AtOne::fourth) return square * square;
  return TemperedExp<T>(1)(x);
}

template <typename T>
constexpr int kGuessed = 8 * kLanes<T>;  // classes

// What the sweeps over the columns need to know.
template <typename T>
struct Sweep {
  T inv_t;  // 1/τ
  T reach;  // how far a logit may lie above what the exponentials are relative to: e⁴ at the colder of τ and 1
  TemperedExp<T> exp;
  AtOne student_at_one, teacher_at_one;
  bool entropy, totals;
  bool guesses;  // where rows of one tile start from, see kd_sweep.h

  Sweep(const KDArgs<T>& args, bool hard, bool teacher_weights, bool entropy)
      : inv_t(1 / args.temperature),
        reach(4 * std::min(T(1), args.temperature)),
        exp(args.temperature),
        student_at_one(at_one(args.temperature, hard)),
        teacher_at_one(at_one(args.temperature, teacher_weights)),
        entropy(entropy),
        totals(hard && args.label_smoothing != 0),
        guesses(args.classes >= 2 * kGuessed<T> && args.classes <= kTileColumns && args.temperature >= 1 && !entropy &&
                args.divergence != Divergence::dkd) {}
};

template <typename T>
struct Lanes {  // a number of every row
  alignas(MTKD_VEC_BYTES) T of[kLanes<T>];

  T& operator[](int row) { return of[row]; }
  T operator[](int row) const { return of[row]; }
  Vec<T> all() const { return load(of); }
  Vec<T> operator=(Vec<T> x) {
    store(of, x);
    return x;
  }
};

// How a block passes through the registers. Along: a row at a time, its columns in the lanes. Across: all rows at once,
// one in each lane, a column at a time; the block is then one line of classes·kLanes numbers, class c from c·kLanes on.
template <typename T>
struct Along {
  int line;  // the row

  T of(const Lanes<T>& x) const { return x[line]; }
  void set(Lanes<T>& x, T value) const { x[line] = value; }
  void add(Lanes<T>& x, Vec<T> more) const { x[line] += sum_of<T>(more); }
};
template <typename T>
struct Across {
  static constexpr int line = 0;

  Vec<T> of(const Lanes<T>& x) const { return x.all(); }
  void set(Lanes<T>& x, Vec<T> value) const { x = value; }
  void add(Lanes<T>& x, Vec<T> more) const { x = x.all() + more; }
};
template <typename T, typename At>
constexpr bool kIsAcross = std::is_same_v<At, Across<T>>;
template <typename T, typename At>
constexpr int kLines = kIsAcross<T, At> ? 1 : kLanes<T>;  // of a block at most

// What the sweep leaves of one tensor's rows (SoftmaxState of row_stats.h), and a teacher's cross sum.
template <typename T>
struct States {
  Lanes<T> max;  // or what stands in for it, a logit of the row at most kGuessReach below (kd_sweep.h)
  Lanes<T> sum, sum1, dot1, total, cross;
  Lanes<T> label;  // the logit at the target, where a cross-entropy is wanted

  void clear() {  // by registers: an assignment of {} is a slow string instruction
    max = sum = sum1 = dot1 = total = cross = label = Vec<T>{};
  }
};

// What follows from them.
template <typename T>
struct TeacherNumbers {
  Lanes<T> divergence, weight;
  Lanes<T> slope;   // G of elementwise.h
  Lanes<T> odds;    // log-odds of the target, where it stands apart: dkd.h
  Lanes<T> signal;  // what a computed weight comes from: cross-entropy or entropy
  Lanes<T> log_sum;
  Lanes<T> factor;  // of its softmax numerators in the student's gradient

  void clear() { divergence = weight = slope = odds = signal = log_sum = factor = Vec<T>{}; }
};

// The gradient of one row in the student is, for every column c, with e = e^{(s−max)/τ}, e1 = e^{s−max}:
//   soft·e − share + hard·e1 + constant, and −label at the target; share = Σ_k factor_k·(e of the teacher, or
//   of_student of elementwise.h). Reverse KL: soft·e·(W log q − Σ w_k log p_k − Σ w_k D_k) + …
template <typename T>
struct StudentNumbers {
  Lanes<T> cross_entropy, log_sum;
  Lanes<T> odds;  // log-odds of the target, where it stands apart: dkd.h
  Lanes<T> soft, hard, constant, label;
  Lanes<T> used;             // how many teachers have a weight
  Lanes<T> total_weight;     // W = Σ w_k
  Lanes<T> mean_divergence;  // Σ w_k D_k, NaN if not finite: reverse KL has no gradient where it is infinite
};

// How far a row's states have been raised since the last tile, and its sum before.
template <typename T>
struct Raised {
  Raise<T> by;
  T sum_before;
};

// Where the rows of a block lie, counted from the first: those between them do not count. For blocks that go across.
template <typename T>
struct Near {
  int span;            // from the first to the last; 0: too many, or of two maps
  bool whole;          // kLanes neighbours
  Integers<T> place;   // of each row
  Integers<T> row[2];  // of each place, kLanes where there is none; undefined of whole blocks
  Integers<T> target;  // places_of_targets
};

// Where a line has the target of each row, target_of(row); the row itself, of class 0, if it has none (−1).
template <typename T, typename TargetOf>
Integers<T> places_of_targets(const TargetOf& target_of) {
  alignas(MTKD_VEC_BYTES) std::decay_t<decltype(Integers<T>{}[0])> places[kLanes<T>];
  for (int r = 0; r < kLanes<T>; ++r) places[r] = std::max<int64_t>(target_of(r), 0) * kLanes<T> + r;
  Integers<T> x;
  __builtin_memcpy(&x, places, sizeof(x));
  return x;
}

template <typename T>
struct Block {
  int rows = 0;
  int64_t classes;                             // of a row
  int64_t n[kLanes<T>];                        // which rows
  int64_t outer[kLanes<T>], inner[kLanes<T>];  // where they are: a division a row, 20 cycles, not one a tensor
  int64_t target[kLanes<T>];                   // −1: none
  bool some_apart = false;                     // the divergence leaves the targets out of its sums
  int64_t apart[kLanes<T>];                    // the target, if so, else −1
  Lanes<T> scale;                              // row weight / items, times the upstream in the backward
  bool skips_zero_weights = false;             // a teacher of weight 0 is not read
  Near<T> near;

  States<T> student_state, teacher_state[kMaxTeachers];
  Raised<T> student_raised;
  Lanes<T> student_reference, teacher_reference[kMaxTeachers];  // what sums and exponentials are relative to, by now
  StudentNumbers<T> student;
  TeacherNumbers<T> teacher[kMaxTeachers];

  void add(const KDArgs<T>& args, int64_t row) {
    classes = args.classes;
    n[rows] = row;
    outer[rows] = row < args.inner ? 0 : row / args.inner;
    inner[rows] = row < args.inner ? row : row % args.inner;
    target[rows] = args.target ? args.target[row] : -1;
    some_apart = args.divergence == Divergence::dkd;
    apart[rows] = some_apart ? target[rows] : -1;
    ++rows;
  }

  // A register of rows from `row` on, all of the first map and all of which count: in wide registers what add() does.
  void add_neighbours(const KDArgs<T>& args, int64_t row) {
    classes = args.classes;
    some_apart = args.divergence == Divergence::dkd;
    rows = kLanes<T>;
    for (int r = 0; r < kLanes<T>; ++r) {
      n[r] = inner[r] = row + r;
      outer[r] = 0;
    }
    if (args.target)
      std::copy_n(args.target + row, kLanes<T>, target);
    else
      std::fill_n(target, kLanes<T>, -1);
    for (int r = 0; r < kLanes<T>; ++r) apart[r] = some_apart ? target[r] : -1;
  }

  void find_near() {
    near.target = places_of_targets<T>([&](int r) { return r < rows ? target[r] : -1; });
    near.span = 0;
    near.whole = false;
    const int64_t span = n[rows - 1] - n[0] + 1;
    if (span > 2 * kLanes<T> || outer[rows - 1] != outer[0]) return;
    near.span = static_cast<int>(span);
    near.whole = span == kLanes<T> && rows == span;
    for (int i = 0; i < kLanes<T>; ++i) near.place[i] = i;
    if (near.whole) return;
    for (int i = 0; i < kLanes<T>; ++i) near.row[0][i] = near.row[1][i] = kLanes<T>;
    for (int r = 0; r < rows; ++r) {
      const int at = static_cast<int>(n[r] - n[0]);
      near.place[r] = at;
      near.row[at / kLanes<T>][at % kLanes<T>] = r;
    }
  }

  template <typename Tensor>
  int64_t start(const Tensor& x, int row) const {
    return outer[row] * x.outer_stride + inner[row] * x.inner_stride;
  }
  bool reads(int k, int row) const { return !(skips_zero_weights && teacher[k].weight[row] == 0); }
  template <typename Reads>
  bool all_read(Reads reads) const {
    for (int row = 0; row < rows; ++row)
      if (!reads(row)) return false;
    return true;
  }
  bool reads_some(int k) const {
    if (!skips_zero_weights) return true;
    for (int row = 0; row < rows; ++row)
      if (reads(k, row)) return true;
    return false;
  }
  bool apart_in(int row, int64_t begin, int64_t count) const {
    return apart[row] >= begin && apart[row] < begin + count;
  }
};

// What a line of a tensor's tile adds to its states, a part in each lane.
template <typename T>
struct LineSums {
  Vec<T> max = splat(-infinity<T>()), sum{}, sum1{}, dot1{}, cross{};

  void operator+=(const LineSums& more) {
    max = larger_of(max, more.max);
    sum += more.sum;
    sum1 += more.sum1;
    dot1 += more.dot1;
    cross += more.cross;
  }
};

// What the exponentials of a teacher and of the student weigh in the student's gradient; at a target that stands apart
// it is `at_target` less.
template <typename T>
struct GradientShare {
  Vec<T> of_teacher, of_student, at_target;
};

// A number that a row of weight 0 does not want, and what it wants instead. Along, such a row is passed over as a
// whole.
template <typename T>
Vec<T> if_used(T, Vec<T> x, Vec<T> = Vec<T>{}) {
  return x;
}
template <typename T>
Vec<T> if_used(Vec<T> weight, Vec<T> x, Vec<T> otherwise = Vec<T>{}) {
  return weight == 0 ? otherwise : x;
}
