// Fewer long rows than threads: the columns of each row are shared out, and the states of the parts merge by the
// algebra of row_stats.h. A part is a row of its own to everything else here. Included once per instruction set.

template <typename T, typename Args>
struct ColumnPart {
  Args args;  // of these columns
  int64_t begin;
  Block<T> block;
  std::optional<Scratch<T>> scratch;

  // Row n, its target counted from `begin`, −1 if it lies elsewhere.
  void start(int64_t n) {
    block.rows = 0;
    block.add(args, n);
    for (int64_t* column : {&block.target[0], &block.apart[0]}) {
      const int64_t place = *column - begin;
      *column = *column >= 0 && place >= 0 && place < args.classes ? place : -1;
    }
  }

  // What is known of the whole row.
  void adopt(const Block<T>& row) {
    block.scale = row.scale;
    block.student_state = row.student_state;
    block.student = row.student;
    block.skips_zero_weights = row.skips_zero_weights;
    for (int k = 0; k < args.teachers; ++k) {
      block.teacher_state[k] = row.teacher_state[k];
      block.teacher[k] = row.teacher[k];
    }
  }
};

template <typename Tensor>
void move_to_column(Tensor& x, int64_t column) {
  const int64_t bytes = column * x.class_stride * element_bytes(x.dtype);
  if (x.data) x.data = reinterpret_cast<decltype(x.data)>(reinterpret_cast<uintptr_t>(x.data) + bytes);
}
template <typename T>
void move_gradients(KDForward<T>& args, int64_t column) {
  move_to_column(args.gradient, column);
}
template <typename T>
void move_gradients(KDBackward<T>& args, int64_t column) {
  for (int k = 0; k < args.teachers; ++k) {
    Gradient of_teacher = args.gradient_of_teacher(k);
    move_to_column(of_teacher, column);
    args.teacher_gradient[k] = of_teacher.data;
  }
  move_to_column(args.student_gradient, column);
}

// `count` parts of whole tiles each, but for the last.
template <typename T, typename Args>
std::vector<ColumnPart<T, Args>> column_parts(const Args& args, int count, Exps exps, bool streams) {
  const int64_t tiles = (args.classes + kTileColumns - 1) / kTileColumns;
  std::vector<ColumnPart<T, Args>> parts(count);
  for (int i = 0; i < count; ++i) {
    ColumnPart<T, Args>& part = parts[i];
    part.begin = tiles * i / count * kTileColumns;
    const int64_t end = std::min(args.classes, tiles * (i + 1) / count * kTileColumns);
    part.args = args;
    part.args.classes = end - part.begin;
    move_to_column(part.args.student, part.begin);
    for (int k = 0; k < args.teachers; ++k) move_to_column(part.args.teacher[k], part.begin);
    move_gradients(part.args, part.begin);
    part.scratch.emplace(part.args, 1, exps, Behind<T>(), streams);
  }
  return parts;
}

template <typename T>
void add_raised(States<T>& to, const States<T>& part, const Raise<T>& by, T columns) {
  SoftmaxState<T> state{part.max[0], part.sum[0], part.sum1[0], part.dot1[0], part.total[0], columns};
  raise(state, to.max[0], by);
  to.sum = to.sum.all() + state.sum;
  to.sum1 = to.sum1.all() + state.sum1;
  to.dot1 = to.dot1.all() + state.dot1;
  to.total = to.total.all() + state.total;
  to.label = to.label.all() + part.label[0];  // 0 in all parts but one
}

// The states of a row from those of its parts: all are raised to the largest maxima and summed.
template <typename T, typename Parts>
void merge_parts(const KDForward<T>& args, const Sweep<T>& sweep, Parts& parts, Block<T>& row) {
  const auto largest = [&](auto state_of) {
    T max = -infinity<T>();
    for (auto& part : parts) max = larger(max, T(state_of(part.block).max[0]));
    return splat(max);
  };
  row.student_state.clear();
  row.student_state.max = largest([](Block<T>& b) -> States<T>& { return b.student_state; });
  for (int k = 0; k < args.teachers; ++k) {
    row.teacher_state[k].clear();
    if (args.kd_scale != 0 && row.reads(k, 0))
      row.teacher_state[k].max = largest([k](Block<T>& b) -> States<T>& { return b.teacher_state[k]; });
  }
  for (auto& part : parts) {
    const T columns = static_cast<T>(part.args.classes);
    const States<T>& student = part.block.student_state;
    const Raise<T> by_s(student.max[0], row.student_state.max[0], sweep.inv_t);
    add_raised(row.student_state, student, by_s, columns - (part.block.apart[0] >= 0 ? T(1) : T(0)));
    for (int k = 0; k < args.teachers; ++k) {
      if (args.kd_scale == 0 || !row.reads(k, 0)) continue;
      const States<T>& teacher = part.block.teacher_state[k];
      States<T>& whole = row.teacher_state[k];
      const Raise<T> by_t(teacher.max[0], whole.max[0], sweep.inv_t);
      add_raised(whole, teacher, by_t, columns);
      const T cross = expectation_of(args.divergence) == Expectation::student
                          ? raise_cross(teacher.cross[0], student.sum[0], by_s, by_t)
                          : raise_cross(teacher.cross[0], teacher.sum[0], by_t, by_s);
      whole.cross = whole.cross.all() + cross;
    }
  }
}

// sum_elements over all parts.
template <typename T, typename Parts, typename Parallel>
void sum_elements_of_parts(const KDForward<T>& args, const Sweep<T>& sweep, Parts& parts, Block<T>& row,
                           Parallel parallel) {
  parallel(parts, [&](auto& part) {
    part.adopt(row);
    sum_elements(part.args, part.block, sweep, *part.scratch);
  });
  for (int k = 0; k < args.teachers; ++k) {
    row.teacher[k].divergence = row.teacher[k].slope = Vec<T>{};
    for (auto& part : parts) {
      row.teacher[k].divergence = row.teacher[k].divergence.all() + part.block.teacher[k].divergence[0];
      row.teacher[k].slope = row.teacher[k].slope.all() + part.block.teacher[k].slope[0];
    }
  }
}

template <typename T, typename Parts, typename Parallel>
void forward_row(const KDForward<T>& args, const Sweep<T>& sweep, int64_t n, Parts& parts, Block<T>& row,
                 Parallel parallel) {
  row.rows = 0;
  row.add(args, n);
  start_teachers(args, row);
  parallel(parts, [&](auto& part) {
    part.start(n);
    start_teachers(part.args, part.block);
    sweep_block(part.args, part.block, sweep, *part.scratch);
  });
  merge_parts(args, sweep, parts, row);
  Lanes<T> loss;
  loss = finish_block(args, sweep, row, [&] { sum_elements_of_parts(args, sweep, parts, row, parallel); });
  settle_block(args, row, loss);
  if (args.gradient.data == nullptr) return;
  gradient_factors(args, sweep, row);
  parallel(parts, [&](auto& part) {
    part.adopt(row);
    write_student_gradient(part.args, part.block, sweep, *part.scratch, part.args.gradient);
    stream_fence();
  });
}

template <typename T, typename Parts, typename Parallel>
void backward_row(const KDBackward<T>& args, const Sweep<T>& sweep, int64_t n, T scale, Parts& parts, Block<T>& row,
                  Parallel parallel) {
  row.rows = 0;
  row.add(args, n);
  read_stats(args, row, 0, scale);
  prepare_gradients(args, sweep, row);
  parallel(parts, [&](auto& part) {
    part.start(n);
    part.adopt(row);
    write_gradients(part.args, sweep, part.block, *part.scratch);
    stream_fence();
  });
}

// Calls body(part) for all parts, as many at a time as there are threads.
template <typename Parts, typename Body>
void for_each_part_of(Parts& parts, const InParallel& in_parallel, Body body) {
  in_parallel(static_cast<int>(parts.size()), [&](int i) { body(parts[i]); });
}

template <typename T>
void forward_columns(const KDForward<T>& args, int count, const InParallel& in_parallel) {
  const bool streams = streams_gradient(args, args.gradient);
  auto parts = column_parts<T>(args, count, args.gradient.data ? Exps::kept : Exps::unused, streams);
  const Sweep<T> sweep = forward_sweep(args);
  Block<T> row;
  for (int64_t n = 0; n < args.rows; ++n) {
    if (row_counts(args, n))
      forward_row(args, sweep, n, parts, row, [&](auto& of, auto body) { for_each_part_of(of, in_parallel, body); });
    else
      skip_row(args, n);
  }
}

template <typename T>
void backward_columns(const KDBackward<T>& args, int count, const InParallel& in_parallel) {
  const bool streams = streams_gradient(args, args.student_gradient);
  auto parts = column_parts<T>(args, count, Exps::computed_again, streams);
  const Sweep<T> sweep(args, args.ce_weight != 0, false, false);
  const T* scales = args.row_stats + RowStats{args.teachers}.scale() * args.rows;
  Block<T> row;
  row.skips_zero_weights = true;
  for (int64_t n = 0; n < args.rows; ++n) {
    if (scales[n] != 0)
      backward_row(args, sweep, n, scales[n], parts, row,
                   [&](auto& of, auto body) { for_each_part_of(of, in_parallel, body); });
    else
      zero_gradients(args, n);
  }
}
