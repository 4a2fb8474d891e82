// The sweeps of the divergences that are sums over the classes (elementwise.h), over one row of a block, whose K + 1
// rows are in cache since the first sweep. Included once per instruction set.
//
// An exponential an element and sweep, and for each teacher's element a logarithm (tvd: none) in the second and in the
// third. What the rows cost in memory is what they cost a KL: K + 1 reads, one write.

// log q and q of a tile, where the first sweep had s − max and its exponentials.
template <typename T>
void student_tile(const KDArgs<T>& args, const Block<T>& block, int row, const Sweep<T>& sweep, int64_t begin,
                  int count, Scratch<T>& scratch) {
  const T max = offset_of(block.student_state.max[row]), to_q = 1 / block.student_state.sum[row],
          log_sum = block.student.log_sum[row];
  T *log_q = scratch.shifted(row), *q = scratch.student_exps(row, begin);
  const T* s = read_tile(args.student, block.start(args.student, row), begin, count, scratch.widened(row));
  for_each_vector(Vectors<T>(s, count), false, [&](int i, Vec<T> x, auto) {
    x -= max;
    store(log_q + i, x * sweep.inv_t - log_sum);
    store(q + i, to_q * sweep.exp(x));
  });
}

// Calls step(at, p, element) for every vector of the tile that student_tile has prepared.
template <Divergence kDivergence, typename T, typename Step>
inline void for_each_element(const KDArgs<T>& args, const Block<T>& block, int row, int k, const Sweep<T>& sweep,
                             int64_t begin, int count, Scratch<T>& scratch, Step step) {
  const T max = offset_of(block.teacher_state[k].max[row]), to_p = 1 / block.teacher_state[k].sum[row],
          log_sum = block.teacher[k].log_sum[row];
  const T *log_q = scratch.shifted(row), *q = scratch.student_exps(row, begin);
  const Logits& teacher = args.teacher[k];
  const T* t = read_tile(teacher, block.start(teacher, row), begin, count, scratch.widened(row));
  for_each_vector(Vectors<T>(t, count), false, [&](int i, Vec<T> x, auto) {
    x -= max;
    const Vec<T> p = to_p * sweep.exp(x), log_p = x * sweep.inv_t - log_sum;
    step(i, p, element<kDivergence>(p, log_p, load(q + i), load(log_q + i), args.beta));
  });
}

// Second sweep: D and G of every teacher that is read.
template <Divergence kDivergence, typename T>
void sum_elements(const KDArgs<T>& args, Block<T>& block, int row, const Sweep<T>& sweep, Scratch<T>& scratch) {
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    student_tile(args, block, row, sweep, begin, count, scratch);
    for (int k = 0; k < args.teachers; ++k) {
      if (!block.reads(k, row)) continue;
      Vec<T> divergence{}, slope{};
      for_each_element<kDivergence>(args, block, row, k, sweep, begin, count, scratch,
                                    [&](int, Vec<T>, const Element<Vec<T>>& of) {
                                      divergence += of.of_student + of.of_teacher;
                                      slope += of.of_student;
                                    });
      block.teacher[k].divergence[row] += sum_of<T>(divergence);
      block.teacher[k].slope[row] += sum_of<T>(slope);
    }
  }
}

template <typename T>
void sum_elements(const KDArgs<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  block.student.log_sum = log_of(block.student_state.sum.all());
  for (int k = 0; k < args.teachers; ++k) {
    block.teacher[k].log_sum = log_of(block.teacher_state[k].sum.all());
    block.teacher[k].divergence = block.teacher[k].slope = Vec<T>{};
  }
  with_elementwise(args.divergence, [&](auto kind) {
    for (int row = 0; row < block.rows; ++row) sum_elements<decltype(kind)::value>(args, block, row, sweep, scratch);
  });
}

// Third sweep: share += factor·of_student.
template <typename T>
void add_elements(const KDArgs<T>& args, const Block<T>& block, int row, int k, const Sweep<T>& sweep, int64_t begin,
                  int count, Scratch<T>& scratch) {
  const T factor = block.teacher[k].factor[row];
  T* share = scratch.share.values;
  with_elementwise(args.divergence, [&](auto kind) {
    for_each_element<decltype(kind)::value>(
        args, block, row, k, sweep, begin, count, scratch,
        [&](int i, Vec<T>, const Element<Vec<T>>& of) { store(share + i, load(share + i) + factor * of.of_student); });
  });
}

// The gradient in teacher k, (of_teacher − p·(D − G))·scale.
template <typename T>
void teacher_elements(const KDArgs<T>& args, const Block<T>& block, int row, int k, const Sweep<T>& sweep,
                      int64_t begin, int count, T scale, Scratch<T>& scratch) {
  const T rest = block.teacher[k].divergence[row] - block.teacher[k].slope[row];
  with_elementwise(args.divergence, [&](auto kind) {
    for_each_element<decltype(kind)::value>(args, block, row, k, sweep, begin, count, scratch,
                                            [&](int i, Vec<T> p, const Element<Vec<T>>& of) {
                                              store(scratch.out.values + i, scale * (of.of_teacher - p * rest));
                                            });
  });
}
