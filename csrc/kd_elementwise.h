// The sweeps of the divergences that are sums over the classes (elementwise.h), over one line of a block, whose
// K + 1 rows are in cache since the first sweep. Included once per instruction set.
//
// An exponential an element and sweep, and for each teacher's element a logarithm (tvd: none) in the second and in the
// third. What the rows cost in memory is what they cost a KL: K + 1 reads, one write.

// log q and q of a tile, where the first sweep had s − max and its exponentials.
template <typename T, typename At>
void student_tile(const KDArgs<T>& args, const Block<T>& block, At at, const Sweep<T>& sweep, int64_t begin, int count,
                  Scratch<T>& scratch) {
  const auto max = offset_of(at.of(block.student_state.max)), sum = at.of(block.student_state.sum),
             log_sum = at.of(block.student.log_sum);
  const auto to_q = T(1) / sum;
  T *log_q = scratch.shifted(at.line), *q = scratch.student_exps(at.line, begin);
  const T* s = read_line(args.student, block, at, begin, count, scratch.widened(0), kEveryRow);
  for_each_vector(Vectors<T>(s, count), false, [&](int i, auto x, auto) {
    const auto shifted = x - max;
    store(log_q + i, shifted * sweep.inv_t - log_sum);
    store(q + i, sweep.exp(shifted) * to_q);
  });
}

// Calls step(at, p, element) for every vector of the tile that student_tile has prepared.
template <Divergence kDivergence, typename T, typename At, typename Reads, typename Step>
inline void for_each_element(const KDArgs<T>& args, const Block<T>& block, At at, int k, const Sweep<T>& sweep,
                             int64_t begin, int count, Scratch<T>& scratch, Reads reads, Step step) {
  const auto max = offset_of(at.of(block.teacher_state[k].max)), sum = at.of(block.teacher_state[k].sum),
             log_sum = at.of(block.teacher[k].log_sum);
  const auto to_p = T(1) / sum;
  const T *log_q = scratch.shifted(at.line), *q = scratch.student_exps(at.line, begin);
  const T* t = read_line(args.teacher[k], block, at, begin, count, scratch.widened(0), reads);
  for_each_vector(Vectors<T>(t, count), false, [&](int i, auto x, auto) {
    const auto shifted = x - max, p = sweep.exp(shifted) * to_p, log_p = shifted * sweep.inv_t - log_sum;
    for (int v = 0; v < x.size; ++v, i += kLanes<T>)
      step(i, p.of[v], element<kDivergence>(p.of[v], log_p.of[v], load(q + i), load(log_q + i), args.beta));
  });
}

// Second sweep: D and G of every teacher that is read.
template <Divergence kDivergence, typename T, typename At>
void sum_elements(const KDArgs<T>& args, Block<T>& block, At at, const Sweep<T>& sweep, Scratch<T>& scratch) {
  for (int64_t begin = 0; begin < scratch.line(); begin += kTileColumns) {
    const int count = tile_count(scratch.line(), begin);
    student_tile(args, block, at, sweep, begin, count, scratch);
    for (int k = 0; k < args.teachers; ++k) {
      if (!reads_line(block, at, k)) continue;
      Vec<T> divergence{}, slope{};
      const auto reads = [&](int row) { return block.reads(k, row); };
      for_each_element<kDivergence>(args, block, at, k, sweep, begin, count, scratch, reads,
                                    [&](int, Vec<T>, const Element<Vec<T>>& of) {
                                      divergence += of.of_student + of.of_teacher;
                                      slope += of.of_student;
                                    });
      at.add(block.teacher[k].divergence, divergence);
      at.add(block.teacher[k].slope, slope);
    }
  }
}

template <typename T>
void sum_elements(const KDArgs<T>& args, Block<T>& block, const Sweep<T>& sweep, Scratch<T>& scratch) {
  for (int k = 0; k < args.teachers; ++k) block.teacher[k].divergence = block.teacher[k].slope = Vec<T>{};
  with_elementwise(args.divergence, [&](auto kind) {
    for_all_lines(block, scratch.across(),
                  [&](auto at) { sum_elements<decltype(kind)::value>(args, block, at, sweep, scratch); });
  });
  for (int k = 0; block.skips_zero_weights && k < args.teachers; ++k) {
    TeacherNumbers<T>& teacher = block.teacher[k];
    const Vec<T> weight = teacher.weight.all();
    teacher.divergence = weight == 0 ? Vec<T>{} : teacher.divergence.all();
    teacher.slope = weight == 0 ? Vec<T>{} : teacher.slope.all();
  }
}

// Third sweep: share += factor·of_student.
template <typename T, typename At>
void add_elements(const KDArgs<T>& args, const Block<T>& block, At at, int k, const Sweep<T>& sweep, int64_t begin,
                  int count, Scratch<T>& scratch) {
  const auto factor = at.of(block.teacher[k].factor), weight = at.of(block.teacher[k].weight);
  const auto used = [&](int row) { return block.teacher[k].weight[row] != 0; };
  T* share = scratch.share.values;
  with_elementwise(args.divergence, [&](auto kind) {
    for_each_element<decltype(kind)::value>(args, block, at, k, sweep, begin, count, scratch, used,
                                            [&](int i, Vec<T>, const Element<Vec<T>>& of) {
                                              const Vec<T> more = if_used<T>(weight, factor * of.of_student);
                                              store(share + i, load(share + i) + more);
                                            });
  });
}

// The gradient in teacher k, (of_teacher − p·(D − G))·scale, in scratch.out.
template <typename T, typename At>
void teacher_elements(const KDBackward<T>& args, const Block<T>& block, At at, int k, const Sweep<T>& sweep,
                      int64_t begin, int count, Scratch<T>& scratch) {
  const TeacherNumbers<T>& teacher = block.teacher[k];
  const auto weight = at.of(teacher.weight), rest = at.of(teacher.divergence) - at.of(teacher.slope),
             scale = at.of(block.scale) * args.kd_scale * weight * sweep.inv_t;
  const auto used = [&](int row) { return block.teacher[k].weight[row] != 0; };
  with_elementwise(args.divergence, [&](auto kind) {
    for_each_element<decltype(kind)::value>(
        args, block, at, k, sweep, begin, count, scratch, used, [&](int i, Vec<T> p, const Element<Vec<T>>& of) {
          store(scratch.out.values + i, if_used<T>(weight, scale * (of.of_teacher - p * rest)));
        });
  });
}
