// The forward of a whole block of short rows in its plain case: forward KL, every logit finite, kLanes rows that follow
// each other and all count. What else a block may be is asked before it or after, not on the way. A row's numbers are,
// bit for bit, those of forward_block, which takes the blocks that are found not to be plain. Included once per
// instruction set.

constexpr int kFewClasses = 32;  // are searched for the targets sooner than gathered from, 20 cycles

// Calls step(i, which rows have their target there) for the classes of a line.
template <typename T, typename Step>
MTKD_INLINE void search_targets(int classes, Integers<T> targets, Step step) {
  Integers<T> place{};
  for (int r = 0; r < kLanes<T>; ++r) place[r] = r;
#pragma GCC unroll 4
  for (int c = 0; c < classes; ++c, place += kLanes<T>) step(c * kLanes<T>, targets == place);
}

// The number of each row that stands in its target's class.
template <typename T>
Vec<T> at_targets(const T* line, int classes, Integers<T> targets) {
  if (classes > kFewClasses) return gather(line, targets);
  Vec<T> x{};
  search_targets<T>(classes, targets, [&](int i, Integers<T> here) { x = here != 0 ? load(line + i) : x; });
  return x;
}

template <typename T>
void subtract_at_targets(T* line, int classes, Integers<T> targets, Vec<T> less) {
  if (classes > kFewClasses) return scatter(line, targets, Vec<T>(gather(line, targets) - less));
  search_targets<T>(classes, targets, [&](int i, Integers<T> here) {
    const Vec<T> x = load(line + i);
    store(line + i, here != 0 ? x - less : x);
  });
}

// Whether a block of a tensor can be taken as it lies.
template <typename T, typename Tensor>
bool lies_plain(const Tensor& x, int64_t classes) {
  if (lies_in_planes(x)) return true;
  return x.class_stride == 1 && (x.dtype == kNative<T> || goes_by_pairs<T>(x) || x.inner_stride == classes);
}

// Whether the op has a plain case.
template <typename T>
bool has_plain_case(const KDForward<T>& args) {
  if (args.divergence != Divergence::forward_kl || args.kd_scale == 0 || args.keep_stats) return false;
  if (args.classes > kShortRow || !lies_plain<T>(args.student, args.classes)) return false;
  for (int k = 0; k < args.teachers; ++k)
    if (!lies_plain<T>(args.teacher[k], args.classes)) return false;
  return args.gradient.data == nullptr || lies_plain<T>(args.gradient, args.classes);
}

// The line of the rows from n on.
template <typename T>
void read_block(const Logits& x, int64_t n, int classes, T* to) {
  const int64_t start = n * x.inner_stride, pitch = x.inner_stride;
  if (lies_in_planes(x)) return read_planes(x, start, classes, to);
  if constexpr (std::is_same_v<T, float>)
    if (goes_by_pairs<T>(x)) {
      const uint16_t* const first = static_cast<const uint16_t*>(x.data) + start;
      return read_squares<ByPairs>([=](int r) { return first + r * pitch; }, true, classes, to);
    }
  alignas(64) T widened[kLanes<T> * kShortRow];
  const T* const first = read_tile(x, start, 0, kLanes<T> * classes, widened);
  read_squares<Singly<T>>([=](int r) { return first + r * pitch; }, true, classes, to);
}

template <typename T>
void write_block(const Gradient& to, int64_t n, int classes, bool streams, const T* from) {
  const int64_t start = n * to.inner_stride, pitch = to.inner_stride;
  if (lies_in_planes(to)) return write_planes(to, start, classes, from);
  if constexpr (std::is_same_v<T, float>)
    if (goes_by_pairs<T>(to)) {
      if (streams) return write_piece<ByPairs>(to, start, kLanes<T>, classes, streams, from);
      uint16_t* const first = static_cast<uint16_t*>(to.data) + start;
      return write_squares<ByPairs>([=](int r) { return first + r * pitch; }, kLanes<T>, classes, from);
    }
  if (streams || to.dtype != kNative<T>) return write_piece<Singly<T>>(to, start, kLanes<T>, classes, streams, from);
  T* const first = static_cast<T*>(to.data) + start;
  write_squares<Singly<T>>([=](int r) { return first + r * pitch; }, kLanes<T>, classes, from);
}

template <typename T, AtOne kAtOne>
void absorb_line(const Vectors<T>& s, const Sweep<T>& sweep, States<T>& states, const Ahead& ahead, T* shifted,
                 T* exps) {
  const Vec<T> max = largest(s);
  const LineSums<T> sums = student_sums<T, kAtOne>(s, max, sweep.exp, ahead, shifted, exps);
  states.max = max;
  states.sum = sums.sum;
  states.sum1 = sums.sum1;
}

template <typename T, AtOne kAtOne, bool kEntropy>
void absorb_line(const Vectors<T>& t, const Sweep<T>& sweep, States<T>& states, const Ahead& ahead,
                 const T* student_shifted, T* exps) {
  const Vec<T> max = largest(t);
  const LineSums<T> sums = teacher_sums<T, Expectation::teacher, kAtOne, kEntropy>(t, max, student_shifted, nullptr,
                                                                                   sweep.exp, ahead, false, exps);
  states.max = max;
  states.sum = sums.sum;
  states.sum1 = sums.sum1;
  states.cross = sums.cross;
  if constexpr (kEntropy) states.dot1 = sums.dot1;
}

template <typename T>
void absorb_block(const KDForward<T>& args, Block<T>& block, const Sweep<T>& sweep, int64_t n, Integers<T> targets,
                  Scratch<T>& scratch) {
  const int classes = static_cast<int>(args.classes);
  T *const to = scratch.widened(0), *const shifted = scratch.shifted(0);
  Vectors<T> line(to, classes * kLanes<T>);
  const auto start = [&](const Logits& x) {
    read_block(x, n, classes, to);
    return ahead_of(args, x, 0, true).of_row(n * x.inner_stride);
  };
  States<T>& student = block.student_state;
  const Ahead ahead = start(args.student);
  with_constant(sweep.student_at_one, [&](auto at_one) {
    absorb_line<T, at_one()>(line, sweep, student, ahead, shifted, scratch.student_exps(0, 0));
  });
  student.label = at_targets(to, classes, targets);
  if (sweep.totals) add_total(student.total, block, Across<T>(), 0, line, shifted);
  for (int k = 0; k < args.teachers; ++k) {
    States<T>& states = block.teacher_state[k];
    const Ahead ahead = start(args.teacher[k]);
    T* const exps = scratch.teacher_exps(k, 0, 0);
    with_constant(sweep.teacher_at_one, [&](auto at_one) {
      if (sweep.entropy) return absorb_line<T, at_one(), true>(line, sweep, states, ahead, shifted, exps);
      absorb_line<T, at_one(), false>(line, sweep, states, ahead, shifted, exps);
    });
    states.label = at_targets(to, classes, targets);
  }
}

template <typename T, AtOne kAtOne>
void gradient_of_line(const KDForward<T>& args, const Block<T>& block, Scratch<T>& scratch, T* to) {
  const StudentNumbers<T>& g = block.student;
  const int numbers = static_cast<int>(args.classes) * kLanes<T>;
  const T *const student = scratch.student_exps(0, 0), *const shifted = scratch.shifted(0);
  const T* const teachers = scratch.teacher_exps(0, 0, 0);
  const int64_t pitch = scratch.teacher_exps(1, 0, 0) - teachers;
  const Vec<T> soft = g.soft.all(), hard = g.hard.all(), constant = g.constant.all();
  const auto gradient = [&]<int N>(int i, Bundle<T, N> share) MTKD_ALWAYS_INLINE {
    const T* exps = teachers + i;
    for (int k = 0; k < args.teachers; ++k, exps += pitch)
      share = share + load_bundle<N>(exps) * block.teacher[k].factor.all();
    const Bundle<T, N> e = load_bundle<N>(student + i), soft_part = e * soft - share;
    if constexpr (kAtOne == AtOne::unused) return soft_part;
    return soft_part + exp_at_one<kAtOne>(e, load_bundle<N>(shifted + i)) * hard + constant;
  };
  int i = 0;
  for (; i + 4 * kLanes<T> <= numbers; i += 4 * kLanes<T>) store(to + i, gradient(i, Bundle<T, 4>{}));
  for (; i < numbers; i += kLanes<T>) store(to + i, gradient(i, Bundle<T, 1>{}));
}

// Sets the weights that are known; false if a teacher is not to be read in some row.
template <typename T>
bool start_plain(const KDForward<T>& args, Block<T>& block, int64_t n) {
  const bool skips = args.rule == WeightRule::given && args.skip_zero_weights;
  for (int k = 0; k < args.teachers; ++k) {
    Lanes<T>& weight = block.teacher[k].weight;
    set_first_weights(args, k, kLanes<T>, [=](int r) { return n + r; }, weight);
    if (skips && any_of(weight.all() == 0)) return false;
  }
  block.skips_zero_weights = block.some_apart = false;
  return true;
}

// Where some logit is not finite, a cross sum is not either.
template <typename T>
bool finite_crosses(const Block<T>& block, int teachers) {
  Vec<T> zero{};
  for (int k = 0; k < teachers; ++k) zero += block.teacher_state[k].cross.all() - block.teacher_state[k].cross.all();
  return !any_of(zero != 0);
}

// The block that begins with row n; false if it is not plain.
template <typename T>
bool plain_block(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block, int64_t n, Scratch<T>& scratch) {
  if (!start_plain(args, block, n)) return false;
  const Integers<T> targets = places_of_targets<T>([&](int r) { return args.target ? args.target[n + r] : -1; });
  const int classes = static_cast<int>(args.classes);
  absorb_block(args, block, sweep, n, targets, scratch);
  if (!finite_crosses(block, args.teachers)) return false;
  settle_neighbours(args, block, n, finish_block(args, sweep, block, [] {}));
  if (args.gradient.data == nullptr) return true;
  gradient_factors(args, sweep, block);
  T* const out = scratch.out.values;
  with_constant(sweep.student_at_one, [&](auto at_one) { gradient_of_line<T, at_one()>(args, block, scratch, out); });
  if (args.ce_weight != 0) subtract_at_targets(out, classes, targets, block.student.label.all());
  write_block(args.gradient, n, classes, scratch.streams, out);
  return true;
}
