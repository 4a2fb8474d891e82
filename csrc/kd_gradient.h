// The second sweep over the columns: gradients of one row of a block. It takes the exponentials that the first has
// kept, or computes them again from rows that are in cache by then. Included once per instruction set.

// How a tile's exponentials come to be relative to the row's maximum, which was found later.
template <typename T>
T catch_up(T max_then, T max, T inv_t) {
  return max_then == max ? T(1) : exp_of((max_then - max) * inv_t);
}

// share = Σ_k factor_k·e_k from kept exponentials (forward KL).
template <typename T>
void share_of_kept(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep, int64_t begin,
                   int count, Scratch<T>& scratch) {
  const T* exps[kMaxTeachers];
  T factor[kMaxTeachers];
  int used = 0;
  for (int k = 0; k < args.teachers; ++k) {
    if (block.teacher[k].weight[row] == 0) continue;
    const T max = offset_of(block.teacher_state[k].max[row]);
    factor[used] = block.teacher[k].factor[row] * catch_up(scratch.teacher_max_at(k, row, begin), max, sweep.inv_t);
    exps[used++] = scratch.teacher_exps(k, row, begin);
  }
  constexpr int kL = kLanes<T>;
  for (int i = 0; i < count; i += 4 * kL) {
    Vec<T> a{}, b{}, c{}, d{};
    for (int k = 0; k < used; ++k) {
      const T* e = exps[k] + i;
      a += factor[k] * load(e);
      b += factor[k] * load(e + kL);
      c += factor[k] * load(e + 2 * kL);
      d += factor[k] * load(e + 3 * kL);
    }
    T* share = scratch.share.values + i;
    store(share, a), store(share + kL, b), store(share + 2 * kL, c), store(share + 3 * kL, d);
  }
}

// share += factor·e^{(t−max)/τ} (forward KL), or weight·log p (reverse KL, where −inf counts as 0: see
// mean_divergence).
template <typename T>
void add_share(const Vectors<T>& tile, const KDArgs<T>& args, const Block<T>& block, int row, int k,
               const Sweep<T>& sweep, T* share) {
  const TeacherNumbers<T>& teacher = block.teacher[k];
  const T max = offset_of(block.teacher_state[k].max[row]);
  if (args.divergence != Divergence::reverse_kl) {
    const T factor = teacher.factor[row];
    for_each_vector(tile, false,
                    [&](int i, Vec<T> x, auto) { store(share + i, load(share + i) + factor * sweep.exp(x - max)); });
  } else {
    const T weight = teacher.weight[row], log_sum = teacher.log_sum[row];
    for_each_vector(tile, false, [&](int i, Vec<T> x, auto) {
      const Vec<T> scaled = (x - max) * sweep.inv_t;
      const Vec<T> log_p = scaled == -infinity<T>() ? Vec<T>{} : scaled - log_sum;
      store(share + i, load(share + i) + weight * log_p);
    });
  }
}

// The teachers' share of the student's gradient, in scratch.share.
template <typename T>
void share_of_teachers(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep, int64_t begin,
                       int count, Scratch<T>& scratch) {
  if (scratch.keeps()) return share_of_kept(args, block, row, sweep, begin, count, scratch);
  const bool elementwise = is_elementwise(args.divergence);
  if (elementwise) student_tile(args, block, row, sweep, begin, count, scratch);
  T* share = scratch.share.values;
  for (int i = 0; i < count; i += kLanes<T>) store(share + i, Vec<T>{});
  for (int k = 0; k < args.teachers; ++k) {
    if (block.teacher[k].weight[row] == 0) continue;
    if (elementwise) {
      add_elements(args, block, row, k, sweep, begin, count, scratch);
      continue;
    }
    const T* t = read_classes(args.teacher[k], block, row, begin, count, scratch.widened(0));
    add_share(Vectors<T>(t, count), args, block, row, k, sweep, share);
  }
}

template <typename T, AtOne kAtOne>
void student_gradient(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep, int64_t begin,
                      int count, Scratch<T>& scratch) {
  const StudentNumbers<T>& g = block.student;
  const T soft = g.soft[row], hard = g.hard[row], constant = g.constant[row], mean = g.mean_divergence[row],
          total_weight = g.total_weight[row], log_sum = g.log_sum[row];
  const T* share = scratch.share.values;
  T* out = scratch.out.values;
  const bool reverse = args.divergence == Divergence::reverse_kl;
  auto put = [&](int i, Vec<T> x, Vec<T> e, Vec<T> log_q) {
    Vec<T> gradient = reverse ? soft * e * (total_weight * log_q - load(share + i) - mean) : soft * e - load(share + i);
    if constexpr (kAtOne != AtOne::unused) gradient += hard * exp_at_one<T, kAtOne>(e, x) + constant;
    store(out + i, gradient);
  };
  const T max = offset_of(block.student_state.max[row]);
  const bool needs_logits = reverse || kAtOne == AtOne::own;
  if (scratch.keeps() && !needs_logits) {
    const T* exps = scratch.student_exps(row, begin);
    const T late = catch_up(scratch.student_max_at(row, begin), max, sweep.inv_t);
    for (int i = 0; i < count; i += kLanes<T>) put(i, Vec<T>{}, load(exps + i) * late, Vec<T>{});
    return;
  }
  const T* s = read_classes(args.student, block, row, begin, count, scratch.widened(0));
  for_each_vector(Vectors<T>(s, count), false, [&](int i, Vec<T> x, auto) {
    x -= max;
    const Vec<T> scaled = x * sweep.inv_t;
    const Vec<T> log_q = scaled == -infinity<T>() ? Vec<T>{} : scaled - log_sum;
    put(i, x, sweep.exp(x), log_q);
  });
}

template <typename T>
void student_gradient(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep, int64_t begin,
                      int count, Scratch<T>& scratch) {
  switch (sweep.student_at_one) {
    case AtOne::unused:
      return student_gradient<T, AtOne::unused>(args, block, row, sweep, begin, count, scratch);
    case AtOne::same:
      return student_gradient<T, AtOne::same>(args, block, row, sweep, begin, count, scratch);
    case AtOne::square:
      return student_gradient<T, AtOne::square>(args, block, row, sweep, begin, count, scratch);
    case AtOne::fourth:
      return student_gradient<T, AtOne::fourth>(args, block, row, sweep, begin, count, scratch);
    case AtOne::own:
      return student_gradient<T, AtOne::own>(args, block, row, sweep, begin, count, scratch);
  }
}

template <typename T>
void write_student_gradient(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep,
                            Scratch<T>& scratch, const Gradient& gradient) {
  const int64_t to = block.start(gradient, row);
  const bool hard = args.ce_weight != 0, apart = args.divergence == Divergence::dkd;
  if (!hard && block.student.used[row] == 0) return zero_row<T>(gradient, to, args.classes);
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    share_of_teachers(args, block, row, sweep, begin, count, scratch);
    student_gradient(args, block, row, sweep, begin, count, scratch);
    const int64_t label = block.target[row] - begin;
    if ((hard || apart) && label >= 0 && label < count) scratch.out.values[label] -= block.student.label[row];
    if (scratch.streams)
      stream_tile(static_cast<T*>(gradient.data) + to + begin, count, scratch.out.values);
    else
      write_tile(gradient, to, begin, count, scratch.out.values);
  }
}

// The gradient in teacher k, times the row's factor: forward KL p·(log p − log q − D)/τ, reverse KL (p − q)/τ; dkd, of
// dkd.h, p̂·(β(log p̂ − log q̂) − (β NCKD + v))/τ and at the target v/τ; the others as in elementwise.h.
template <typename T>
void write_teacher_gradient(const KDBackward<T>& args, const Block<T>& block, int row, int k, const Sweep<T>& sweep,
                            Scratch<T>& scratch) {
  const Logits &teacher = args.teacher[k], &student = args.student;
  const TeacherNumbers<T>& numbers = block.teacher[k];
  const Gradient out = args.gradient_of_teacher(k);
  const int64_t to = block.start(out, row);
  if (numbers.weight[row] == 0) return zero_row<T>(out, to, args.classes);

  const T max_t = offset_of(block.teacher_state[k].max[row]), max_s = offset_of(block.student_state.max[row]);
  const T sum_t = block.teacher_state[k].sum[row];
  const bool apart = args.divergence == Divergence::dkd, nothing = apart && sum_t == 0;
  const T to_p = nothing ? T(0) : 1 / sum_t, to_q = 1 / block.student_state.sum[row];
  const T log_sums = numbers.log_sum[row] - block.student.log_sum[row], d = numbers.divergence[row];
  const T scale = block.scale[row] * args.kd_scale * numbers.weight[row] * sweep.inv_t;
  T per_ratio = 1, less = d, pull = 0;
  if (apart) {
    const T odds = numbers.odds[row], odds_s = block.student.odds[row];
    pull = pull_on_target(odds, odds_s);
    per_ratio = args.beta;
    less = d - binary_kl(odds, odds_s) + pull;
  }
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    if (is_elementwise(args.divergence)) {
      student_tile(args, block, row, sweep, begin, count, scratch);
      teacher_elements(args, block, row, k, sweep, begin, count, scale, scratch);
      write_tile(out, to, begin, count, scratch.out.values);
      continue;
    }
    const T* s = read_classes(student, block, row, begin, count, scratch.widened(0));
    const Vectors<T> tile_s(s, count);
    for_each_vector(tile_s, false, [&](int i, Vec<T> x, auto) { store(scratch.share.values + i, x - max_s); });
    const T* t = read_classes(teacher, block, row, begin, count, scratch.widened(0));
    for_each_vector(Vectors<T>(t, count), false, [&](int i, Vec<T> x_t, auto) {
      const Vec<T> dt = x_t - max_t, ds = load(scratch.share.values + i), p = to_p * sweep.exp(dt);
      Vec<T> gradient;
      if (args.divergence != Divergence::reverse_kl)
        gradient = p == 0 ? Vec<T>{}
                          : p * ((per_ratio == 0 ? Vec<T>{} : per_ratio * ((dt - ds) * sweep.inv_t - log_sums)) - less);
      else
        gradient = p - to_q * sweep.exp(ds);
      store(scratch.out.values + i, scale * gradient);
    });
    if (block.apart_in(row, begin, count)) scratch.out.values[block.apart[row] - begin] = scale * pull;
    write_tile(out, to, begin, count, scratch.out.values);
  }
}
