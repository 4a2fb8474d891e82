// The second sweep over the columns: gradients of a block, a line at a time. It takes the exponentials that the first
// has kept, or computes them again, in registers, from rows that are in cache by then. Included once per instruction
// set.

// What the exponentials of a line's tile are relative to. Across, a line is one tile.
template <typename T>
T reference_at(const Lanes<T>& of_block, Along<T> at, int tensor, int64_t begin, Scratch<T>& scratch) {
  return scratch.one_tile() ? of_block[at.line] : scratch.reference(tensor, begin);
}
template <typename T>
Vec<T> reference_at(const Lanes<T>& of_block, Across<T>, int, int64_t, Scratch<T>&) {
  return of_block.all();
}

// How they come to be relative to the row's maximum, which was found later, or in another part of the row.
template <typename T>
T catch_up(T reference, T max, T inv_t) {
  return reference == max ? T(1) : exp_of(splat((reference - max) * inv_t))[0];
}
template <typename T>
T catch_up(Vec<T>, Vec<T>, T) {
  return 1;
}

// Where no forward has chosen other references.
template <typename T>
void refer_to_maxima(const KDArgs<T>& args, Block<T>& block, Scratch<T>& scratch) {
  const auto refer = [&](int tensor, const Lanes<T>& max, Lanes<T>& reference) {
    reference = max.all();
    for (int64_t begin = 0; !scratch.one_tile() && begin < args.classes; begin += kTileColumns)
      scratch.reference(tensor, begin) = max[0];
  };
  refer(0, block.student_state.max, block.student_reference);
  for (int k = 0; k < args.teachers; ++k) refer(k + 1, block.teacher_state[k].max, block.teacher_reference[k]);
}

// What comes next of a line that is read again. A row of several tiles goes backwards, then on to the next row.
template <typename T, typename At>
Ahead ahead_of_line(const KDArgs<T>& args, const Logits& x, const Block<T>& block, At at, int64_t begin,
                    const Scratch<T>& scratch) {
  const int64_t start = block.start(x, at.line);
  if (scratch.one_tile() || x.class_stride != 1) return ahead_of(args, x, begin, scratch.across()).of_row(start);
  const int64_t on = begin > 0 ? begin - kTileColumns : x.inner_stride;
  return Ahead{reinterpret_cast<uintptr_t>(x.data), element_bytes(x.dtype)}.of_row(start + on);
}

// A line's tile of one tensor: its exponentials, if they have been kept, else the logits that they are of.
template <typename T, typename Number>
struct Source {
  const T* numbers;
  Number less;  // what the exponentials are relative to
  Ahead ahead;  // the logits that come next

  // Of the registers at number i, of `count` numbers.
  template <int N>
  MTKD_INLINE Bundle<T, N> load(int i, int count) const {
    if constexpr (N > 1) return load_bundle<N>(numbers + i);
    return Bundle<T, N>{load_part(numbers + i, std::min(kLanes<T>, count - i))};
  }
};

template <bool kKept, typename T, typename At, typename Number, typename Reads>
Source<T, Number> source_of(const KDArgs<T>& args, const Logits& x, const Block<T>& block, At at, Number reference,
                            int64_t begin, int count, Scratch<T>& scratch, T* exps, Reads reads) {
  if (kKept) return {exps, offset_of(reference), Ahead{}};
  return {read_line(x, block, at, begin, count, exps, reads), offset_of(reference),
          ahead_of_line(args, x, block, at, begin, scratch)};
}

// The teachers that weigh in a line's gradient.
template <typename T, typename Number>
struct UsedTeacher {
  Source<T, Number> of;
  Number factor, weight;
};

template <bool kKept, typename T, typename At, typename Number>
int used_teachers(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin, int count,
                  Scratch<T>& scratch, UsedTeacher<T, Number>* teachers) {
  int used = 0;
  for (int k = 0; k < args.teachers; ++k) {
    const Number weight = at.of(block.teacher[k].weight);
    if (!any_of(weight != 0)) continue;
    const Number reference = reference_at(block.teacher_reference[k], at, k + 1, begin, scratch);
    const auto raise = catch_up<T>(reference, at.of(block.teacher_state[k].max), sweep.inv_t);
    const auto weighs = [&](int row) { return block.teacher[k].weight[row] != 0; };
    teachers[used++] = {source_of<kKept>(args, args.teacher[k], block, at, reference, begin, count, scratch,
                                         scratch.teacher_exps(k, at.line, begin), weighs),
                        at.of(block.teacher[k].factor) * raise, weight};
  }
  return used;
}

// The gradient of a tile from its exponentials (forward KL and dkd), `count` numbers to `to`: four registers pass by
// the teachers at a time.
template <typename T, AtOne kAtOne, bool kKept, typename At>
void gradient_of_exps(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin,
                      int count, Scratch<T>& scratch, T* to) {
  using Number = decltype(at.of(block.scale));
  constexpr int kL = kLanes<T>;
  const StudentNumbers<T>& g = block.student;
  UsedTeacher<T, Number> teachers[kMaxTeachers];
  const int n_teachers = used_teachers<kKept>(args, block, at, sweep, begin, count, scratch, teachers);
  const Number reference = reference_at(block.student_reference, at, 0, begin, scratch),
               max = at.of(block.student_state.max), soft = at.of(g.soft) * catch_up<T>(reference, max, sweep.inv_t),
               hard = at.of(g.hard) * catch_up<T>(reference, max, T(1)), constant = at.of(g.constant),
               used = at.of(g.used);
  const Source<T, Number> student = source_of<kKept>(args, args.student, block, at, reference, begin, count, scratch,
                                                     scratch.student_exps(at.line, begin), kEveryRow);
  Source<T, Number> logits = student;
  if (kKept && kAtOne == AtOne::own) {
    if (scratch.one_tile())
      logits = {scratch.shifted(at.line), Number{}, Ahead{}};
    else
      logits.numbers = read_line(args.student, block, at, begin, count, scratch.widened(0), kEveryRow);
  }
  const TemperedExp<T> exp = sweep.exp;

  const auto exps_of = [&]<int N>(const Source<T, Number>& of, int i, Bundle<T, N>) MTKD_ALWAYS_INLINE {
    const Bundle<T, N> x = of.template load<N>(i, count);
    if constexpr (kKept) return x;
    of.ahead.template prefetch<N>(i);
    return exp(x - of.less);
  };
  const auto gradient = [&]<int N>(int i, Bundle<T, N> share) MTKD_ALWAYS_INLINE {
    for (int k = 0; k < n_teachers; ++k) {
      const UsedTeacher<T, Number>& t = teachers[k];
      const auto add = [&](Vec<T> share, Vec<T> e) { return if_used<T>(t.weight, share + e * t.factor, share); };
      share = each(add, share, exps_of(t.of, i, share));
    }
    const Bundle<T, N> e = exps_of(student, i, share), soft_part = e * soft - share;
    if constexpr (kAtOne == AtOne::unused) return each([&](Vec<T> x) { return if_used<T>(used, x); }, soft_part);
    const Bundle<T, N> x = kAtOne == AtOne::own ? logits.template load<N>(i, count) - logits.less : e;
    return soft_part + exp_at_one<kAtOne>(e, x) * hard + constant;
  };
  int i = 0;
  for (; i + 4 * kL <= count; i += 4 * kL) store(to + i, gradient(i, Bundle<T, 4>{}));
  for (; i < count; i += kL) store_part(to + i, gradient(i, Bundle<T, 1>{}).of[0], std::min(kL, count - i));
}

// share += weight·log p, where −inf counts as 0: see mean_divergence.
template <typename T, typename At>
void add_share(const Vectors<T>& tile, const Block<T>& block, At at, int k, T inv_t, Ahead ahead, T* share) {
  const TeacherNumbers<T>& teacher = block.teacher[k];
  const auto max = offset_of(at.of(block.teacher_state[k].max)), weight = at.of(teacher.weight),
             log_sum = at.of(teacher.log_sum);
  const auto weighted = [=](Vec<T> scaled) {
    const Vec<T> log_p = scaled == -infinity<T>() ? Vec<T>{} : scaled - log_sum;
    return if_used<T>(weight, weight * log_p);
  };
  for_each_vector(tile, false, [=](int i, auto x, auto) {
    ahead.prefetch<x.size>(i);
    store(share + i, load_bundle<x.size>(share + i) + each(weighted, (x - max) * inv_t));
  });
}

// The teachers' share of the student's gradient, in scratch.share.
template <typename T, typename At>
void share_of_teachers(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin,
                       int count, Scratch<T>& scratch) {
  const bool elementwise = is_elementwise(args.divergence);
  if (elementwise) student_tile(args, block, at, sweep, begin, count, scratch);
  T* share = scratch.share.values;
  for (int i = 0; i < count; i += kLanes<T>) store(share + i, Vec<T>{});
  for (int k = 0; k < args.teachers; ++k) {
    const auto used = [&](int row) { return block.teacher[k].weight[row] != 0; };
    if (!any_of(at.of(block.teacher[k].weight) != 0)) continue;
    if (elementwise) {
      add_elements(args, block, at, k, sweep, begin, count, scratch);
      continue;
    }
    const T* t = read_line(args.teacher[k], block, at, begin, count, scratch.widened(0), used);
    const Ahead ahead = ahead_of_line(args, args.teacher[k], block, at, begin, scratch);
    add_share(Vectors<T>(t, count), block, at, k, sweep.inv_t, ahead, share);
  }
}

// The gradient of a tile from the logits (reverse KL and the sums over the classes), `count` numbers to `to`.
template <typename T, AtOne kAtOne, typename At>
void gradient_of_logits(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin,
                        int count, Scratch<T>& scratch, T* to) {
  share_of_teachers(args, block, at, sweep, begin, count, scratch);
  const StudentNumbers<T>& g = block.student;
  const auto soft = at.of(g.soft), hard = at.of(g.hard), constant = at.of(g.constant), mean = at.of(g.mean_divergence),
             total_weight = at.of(g.total_weight), log_sum = at.of(g.log_sum), used = at.of(g.used);
  const auto max = offset_of(at.of(block.student_state.max));
  const T* share = scratch.share.values;
  const bool reverse = args.divergence == Divergence::reverse_kl;
  const Ahead ahead = ahead_of_line(args, args.student, block, at, begin, scratch);
  const TemperedExp<T> exp = sweep.exp;
  const T inv_t = sweep.inv_t;
  const T* s = read_line(args.student, block, at, begin, count, scratch.widened(0), kEveryRow);
  const auto soft_part = [=](Vec<T> x, Vec<T> e, Vec<T> share) -> Vec<T> {
    if (!reverse) return soft * e - share;
    const Vec<T> scaled = x * inv_t, log_q = scaled == -infinity<T>() ? Vec<T>{} : scaled - log_sum;
    return soft * e * (total_weight * log_q - share - mean);
  };
  for_each_vector(Vectors<T>(s, count), false, [=](int i, auto x, auto) {
    ahead.prefetch<x.size>(i);
    const auto shifted = x - max, e = exp(shifted);
    auto gradient = each(soft_part, shifted, e, load_bundle<x.size>(share + i));
    if constexpr (kAtOne == AtOne::unused)
      gradient = each([=](Vec<T> x) { return if_used<T>(used, x); }, gradient);
    else
      gradient = gradient + exp_at_one<kAtOne>(e, shifted) * hard + constant;
    if (x.size > 1)
      store(to + i, gradient);
    else
      store_part(to + i, gradient.of[0], std::min(kLanes<T>, count - i));
  });
}

template <typename T, AtOne kAtOne, typename At>
void student_gradient(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin,
                      int count, Scratch<T>& scratch, T* to) {
  if (!weighs_exps(args.divergence))
    return gradient_of_logits<T, kAtOne>(args, block, at, sweep, begin, count, scratch, to);
  if (scratch.keeps(begin)) return gradient_of_exps<T, kAtOne, true>(args, block, at, sweep, begin, count, scratch, to);
  gradient_of_exps<T, kAtOne, false>(args, block, at, sweep, begin, count, scratch, to);
}

template <typename T, typename At>
void student_gradient(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin,
                      int count, Scratch<T>& scratch, T* to) {
  with_constant(sweep.student_at_one,
                [&](auto at_one) { student_gradient<T, at_one()>(args, block, at, sweep, begin, count, scratch, to); });
}

template <typename T>
void zero_line(const KDArgs<T>& args, const Block<T>& block, Along<T> at, const Gradient& gradient) {
  zero_row<T>(gradient, block.start(gradient, at.line), args.classes);
}
template <typename T>
void zero_line(const KDArgs<T>& args, const Block<T>& block, Across<T>, const Gradient& gradient) {
  for (int row = 0; row < block.rows; ++row) zero_line(args, block, Along<T>{row}, gradient);
}

// Where a tile of the gradient may be put together at once, null if it must be moved or converted.
template <typename T>
T* in_place(const Gradient& gradient, const Block<T>& block, Along<T> at, int64_t begin) {
  if (gradient.class_stride != 1 || gradient.dtype != kNative<T>) return nullptr;
  return static_cast<T*>(gradient.data) + block.start(gradient, at.line) + begin;
}
template <typename T>
T* in_place(const Gradient&, const Block<T>&, Across<T>, int64_t) {
  return nullptr;
}

template <typename T, typename At>
void student_gradient_with_label(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep,
                                 int64_t begin, int count, Scratch<T>& scratch, T* to) {
  student_gradient(args, block, at, sweep, begin, count, scratch, to);
  if (args.ce_weight != 0 || args.divergence == Divergence::dkd)
    subtract_at_targets(block, at, begin, count, block.student.label, to);
}

// A block of short rows that lie in one piece.
template <typename T>
void write_one_piece(const KDArgs<T>& args, const Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch,
                     const Gradient& gradient) {
  const int classes = static_cast<int>(args.classes);
  const int64_t start = block.start(gradient, 0);
  T* const line = scratch.out.values;
  student_gradient_with_label(args, block, Across<T>(), sweep, 0, classes * kLanes<T>, scratch, line);
  if constexpr (std::is_same_v<T, float>)
    if (goes_by_pairs<T>(gradient))
      return write_piece<ByPairs>(gradient, start, block.rows, classes, scratch.streams, line);
  write_piece<Singly<T>>(gradient, start, block.rows, classes, scratch.streams, line);
}

// Whether a block of short rows, all or some of which have a gradient, is better written as one piece.
template <typename T>
bool goes_as_one_piece(const KDArgs<T>& args, const Block<T>& block, const Scratch<T>& scratch,
                       const Gradient& gradient) {
  if (!scratch.across() || args.classes > kShortRow || !is_one_piece(gradient, block)) return false;
  return scratch.streams || (gradient.dtype != kNative<T> && !goes_by_pairs<T>(gradient));
}

template <typename T>
void write_student_gradient(const KDArgs<T>& args, const Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch,
                            const Gradient& gradient) {
  const bool hard = args.ce_weight != 0;
  if (goes_as_one_piece(args, block, scratch, gradient) && (hard || any_of(block.student.used.all() != 0)))
    return write_one_piece(args, block, sweep, scratch, gradient);
  for_all_lines(block, scratch.across(), [&](auto at) {
    if (!hard && !any_of(at.of(block.student.used) != 0)) return zero_line(args, block, at, gradient);
    // Backwards: the end of a long row is still in the nearest caches.
    for (int64_t begin = (scratch.line() - 1) / kTileColumns * kTileColumns; begin >= 0; begin -= kTileColumns) {
      const int count = tile_count(scratch.line(), begin);
      const bool streams = scratch.streams && !scratch.across();
      T* const there = streams ? nullptr : in_place(gradient, block, at, begin);
      T* const to = there ? there : scratch.out.values;
      student_gradient_with_label(args, block, at, sweep, begin, count, scratch, to);
      if (streams)
        stream_tile(gradient.data, gradient.dtype, block.start(gradient, at.line) + begin, count, to);
      else if (!there)
        write_line(gradient, block, at, begin, count, to);
    }
  });
}

// What the gradient in teacher k is made of, beside its columns.
template <typename Number>
struct TeacherFactors {
  Number weight, scale;  // scale: row's factor·kd_scale·w/τ
  Number to_p, to_q, max_t, max_s, log_sums;
  Number per_ratio, less;  // p·(per_ratio·(log p − log q) − less)
};

template <typename T, typename At>
auto teacher_factors(const KDArgs<T>& args, const Block<T>& block, At at, int k, const Sweep<T>& sweep) {
  using Number = decltype(at.of(block.scale));
  const TeacherNumbers<T>& numbers = block.teacher[k];
  const Number sum_t = at.of(block.teacher_state[k].sum), sum_s = at.of(block.student_state.sum),
               d = at.of(numbers.divergence), one = number<Number>(1);
  TeacherFactors<Number> f;
  f.weight = at.of(numbers.weight);
  f.scale = at.of(block.scale) * args.kd_scale * f.weight * sweep.inv_t;
  f.max_t = offset_of(at.of(block.teacher_state[k].max));
  f.max_s = offset_of(at.of(block.student_state.max));
  f.to_p = one / sum_t;
  f.to_q = one / sum_s;
  f.log_sums = at.of(numbers.log_sum) - at.of(block.student.log_sum);
  f.per_ratio = one;
  f.less = d;
  if (args.divergence == Divergence::dkd) {
    const Number odds = at.of(numbers.odds), odds_s = at.of(block.student.odds);
    f.to_p = sum_t == 0 ? Number{} : f.to_p;
    f.per_ratio = number<Number>(args.beta);
    f.less = d - binary_kl(odds, odds_s) + pull_on_target(odds, odds_s);
  }
  return f;
}

// The gradient in teacher k, times the row's factor: forward KL p·(log p − log q − D)/τ, reverse KL (p − q)/τ; dkd, of
// dkd.h, p̂·(β(log p̂ − log q̂) − (β NCKD + v))/τ and at the target v/τ; the others as in elementwise.h.
template <typename T, typename At, typename Number>
void teacher_gradient(const KDBackward<T>& args, const Block<T>& block, At at, int k, const TeacherFactors<Number>& f,
                      const Sweep<T>& sweep, int64_t begin, int count, Scratch<T>& scratch) {
  const auto used = [&](int row) { return block.teacher[k].weight[row] != 0; };
  T *out = scratch.out.values, *ds_of = scratch.share.values;
  if (is_elementwise(args.divergence)) {
    student_tile(args, block, at, sweep, begin, count, scratch);
    return teacher_elements(args, block, at, k, sweep, begin, count, scratch);
  }
  const T* s = read_line(args.student, block, at, begin, count, scratch.widened(0), used);
  for_each_vector(Vectors<T>(s, count), false, [&](int i, auto x, auto) { store(ds_of + i, x - f.max_s); });
  const T* t = read_line(args.teacher[k], block, at, begin, count, scratch.widened(0), used);
  const auto put = [&](int i, Vec<T> dt, Vec<T> p) {
    const Vec<T> ds = load(ds_of + i);
    Vec<T> gradient;
    if (args.divergence == Divergence::reverse_kl) {
      gradient = p - f.to_q * sweep.exp(ds);
    } else {
      const Vec<T> ratio = args.divergence == Divergence::dkd && args.beta == 0
                               ? Vec<T>{}
                               : f.per_ratio * ((dt - ds) * sweep.inv_t - f.log_sums);
      gradient = p == 0 ? Vec<T>{} : p * (ratio - f.less);
    }
    store(out + i, if_used<T>(f.weight, f.scale * gradient));
  };
  for_each_vector(Vectors<T>(t, count), false, [&](int i, auto x, auto) {
    const auto dt = x - f.max_t, p = sweep.exp(dt) * f.to_p;
    for (int v = 0; v < x.size; ++v) put(i + v * kLanes<T>, dt.of[v], p.of[v]);
  });
  for_each_place(block, at, block.apart, begin, count, [&](int row, int64_t place) {
    if (used(row))
      out[place] = block.scale[row] * args.kd_scale * block.teacher[k].weight[row] * sweep.inv_t *
                   pull_on_target(block.teacher[k].odds[row], block.student.odds[row]);
  });
}

template <typename T>
void write_teacher_gradient(const KDBackward<T>& args, const Block<T>& block, int k, const Sweep<T>& sweep,
                            Scratch<T>& scratch) {
  const Gradient gradient = args.gradient_of_teacher(k);
  for_all_lines(block, scratch.across(), [&](auto at) {
    if (!any_of(at.of(block.teacher[k].weight) != 0)) return zero_line(args, block, at, gradient);
    const auto factors = teacher_factors(args, block, at, k, sweep);
    for (int64_t begin = 0; begin < scratch.line(); begin += kTileColumns) {
      const int count = tile_count(scratch.line(), begin);
      teacher_gradient(args, block, at, k, factors, sweep, begin, count, scratch);
      write_line(gradient, block, at, begin, count, scratch.out.values);
    }
  });
}
