// The op `kd`, row by row, in one instruction set (see instruction_sets.h). The story is at the end: forward_row.
//
// Per row the forward makes one sweep over the columns in tiles: the student's tile stays in L1 while the K teachers
// pass by, one exponential per element (two where τ is not 1, 2 or 4 and a weight rule or the hard label wants T = 1).
// The gradient is a second sweep over rows that are in cache by then. It takes the exponentials of the first where a
// row is a single tile, and else computes them again: one more per element, nothing kept.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "tile.h"

constexpr double kLog2E = 1.4426950408889634074;

// How e^{x} follows from e^{x/τ}: its τ-th power for τ = 1, 2, 4, its own exponential for other τ.
enum class AtOne { unused, same, square, fourth, own };

template <typename T>
AtOne at_one(T temperature, bool used) {
  if (!used) return AtOne::unused;
  if (temperature == 1) return AtOne::same;
  if (temperature == 2) return AtOne::square;
  return temperature == 4 ? AtOne::fourth : AtOne::own;
}

template <typename T, AtOne kAtOne>
inline Vec<T> exp_at_one(Vec<T> e, Vec<T> x) {
  if constexpr (kAtOne == AtOne::same) return e;
  if constexpr (kAtOne == AtOne::square) return e * e;
  if constexpr (kAtOne == AtOne::fourth) return (e * e) * (e * e);
  return exp2_of<T>(x * T(kLog2E));
}

// What a row's sweeps need to know.
template <typename T>
struct Sweep {
  T inv_t;    // 1/τ
  T to_exp2;  // log2(e)/τ
  AtOne student_at_one, teacher_at_one;
  bool entropy;

  Sweep(const KDArgs<T>& args, bool hard, bool teacher_weights, bool entropy)
      : inv_t(1 / args.temperature),
        to_exp2(static_cast<T>(kLog2E / args.temperature)),
        student_at_one(at_one(args.temperature, hard)),
        teacher_at_one(at_one(args.temperature, teacher_weights)),
        entropy(entropy) {}
};

template <typename T>
T tile_max(const T* x, int count) {
  Vec<T> max = splat(-infinity<T>());
  for (int i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load(x + i);
    max = v > max ? v : max;
  }
  return max_of<T>(max);
}

// x − max, with 0 for a maximum of −inf (nothing but −inf so far).
template <typename T>
inline T finite_or_zero(T max) {
  return max == -infinity<T>() ? T(0) : max;
}

// The columns that this tensor is asked for next, fetched towards L2 while these are worked on: the K + 1 rows are too
// many short streams for the hardware to foresee.
struct Ahead {
  const char* from;
  int bytes;  // an element

  void prefetch(int i) const { __builtin_prefetch(from + static_cast<int64_t>(i) * bytes, 0, 2); }
};

// ---------------------------------------------------------------- forward: states

// Absorbs a tile of the student, whose state has been raised to the tile's maximum, and keeps e^{(s−max)/τ}.
template <typename T, AtOne kAtOne>
void absorb_student(SoftmaxState<T>& state, const T* s, int count, T to_exp2, Ahead ahead, T* exps) {
  const T max = finite_or_zero(state.max);
  Vec<T> sum{}, sum1{}, total{};
  int i = 0;
  for (; i < count; i += kLanes<T>) {
    ahead.prefetch(i);
    const Vec<T> x = load(s + i) - max;
    const Vec<T> e = exp2_of<T>(x * to_exp2);
    store(exps + i, e);
    sum += e;
    if constexpr (kAtOne != AtOne::unused) {
      sum1 += exp_at_one<T, kAtOne>(e, x);
      if (i + kLanes<T> <= count) total += x;
    }
  }
  state.sum += sum_of<T>(sum);
  if constexpr (kAtOne != AtOne::unused) {
    state.sum1 += sum_of<T>(sum1);
    state.total += sum_of<T>(total);
    for (i = count / kLanes<T> * kLanes<T>; i < count; ++i) state.total += s[i] - max;  // not the padding
    state.count += count;
  }
}

// e·ratio, and +inf for a ratio of +inf even if e underflowed to 0.
template <typename T>
inline Vec<T> infinite_or_product(Vec<T> e, Vec<T> ratio) {
  return ratio == infinity<T>() ? ratio : e * ratio;
}

// Absorbs a tile of a teacher and the cross sum with the student's tile, both raised to the tile's maxima.
template <typename T, Divergence kDivergence, AtOne kAtOne, bool kEntropy>
void absorb_teacher(SoftmaxState<T>& state, T& cross, const T* t, const T* s, const T* student_exps, T student_max,
                    int count, T to_exp2, Ahead ahead, T* exps) {
  const T max = finite_or_zero(state.max), max_s = finite_or_zero(student_max);
  const Vec<T> zero{};
  Vec<T> sum{}, sum1{}, dot1{}, crossed{};
  for (int i = 0; i < count; i += kLanes<T>) {
    ahead.prefetch(i);
    const Vec<T> x_t = load(t + i), x_s = load(s + i);
    const Vec<T> dt = x_t - max, ds = x_s - max_s;
    const Vec<T> e = exp2_of<T>(dt * to_exp2);
    store(exps + i, e);
    sum += e;
    // cross_term of row_stats.h, a vector at a time
    if constexpr (kDivergence == Divergence::forward_kl) {
      crossed += x_t == -infinity<T>() ? zero : infinite_or_product<T>(e, dt - ds);
    } else {
      crossed += x_s == -infinity<T>() ? zero : infinite_or_product<T>(load(student_exps + i), ds - dt);
    }
    if constexpr (kAtOne != AtOne::unused) {
      const Vec<T> e1 = exp_at_one<T, kAtOne>(e, dt);
      sum1 += e1;
      if constexpr (kEntropy) dot1 += x_t == -infinity<T>() ? zero : e1 * dt;
    }
  }
  state.sum += sum_of<T>(sum);
  cross += sum_of<T>(crossed);
  if constexpr (kAtOne != AtOne::unused) state.sum1 += sum_of<T>(sum1);
  if constexpr (kEntropy) state.dot1 += sum_of<T>(dot1);
}

template <typename T>
using AbsorbStudent = void (*)(SoftmaxState<T>&, const T*, int, T, Ahead, T*);
template <typename T>
using AbsorbTeacher = void (*)(SoftmaxState<T>&, T&, const T*, const T*, const T*, T, int, T, Ahead, T*);

template <typename T>
AbsorbStudent<T> student_absorber(AtOne at_one) {
  constexpr AbsorbStudent<T> kTable[] = {absorb_student<T, AtOne::unused>, absorb_student<T, AtOne::same>,
                                         absorb_student<T, AtOne::square>, absorb_student<T, AtOne::fourth>,
                                         absorb_student<T, AtOne::own>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T, Divergence kDivergence, bool kEntropy>
AbsorbTeacher<T> teacher_absorber(AtOne at_one) {
  constexpr AbsorbTeacher<T> kTable[] = {
      absorb_teacher<T, kDivergence, AtOne::unused, kEntropy>, absorb_teacher<T, kDivergence, AtOne::same, kEntropy>,
      absorb_teacher<T, kDivergence, AtOne::square, kEntropy>, absorb_teacher<T, kDivergence, AtOne::fourth, kEntropy>,
      absorb_teacher<T, kDivergence, AtOne::own, kEntropy>};
  return kTable[static_cast<int>(at_one)];
}

template <typename T>
AbsorbTeacher<T> teacher_absorber(Divergence divergence, AtOne at_one, bool entropy) {
  if (divergence == Divergence::forward_kl)
    return entropy ? teacher_absorber<T, Divergence::forward_kl, true>(at_one)
                   : teacher_absorber<T, Divergence::forward_kl, false>(at_one);
  return entropy ? teacher_absorber<T, Divergence::reverse_kl, true>(at_one)
                 : teacher_absorber<T, Divergence::reverse_kl, false>(at_one);
}

// ---------------------------------------------------------------- backward: gradients

// The gradient of one row in the student is, for every column c, with e = e^{(s−max)/τ}, e1 = e^{s−max}:
//   soft·e·(...) + hard·e1 + constant, and −label at the target; (...) is 1 less the teachers' share (forward KL), or
//   W log q − Σ w_k log p_k − Σ w_k D_k (reverse KL).
template <typename T>
struct StudentGradient {
  T soft, hard, constant, label;
  T total_weight;     // W = Σ w_k
  T log_sum;          // log Σ e^{(s−max)/τ}
  T mean_divergence;  // Σ w_k D_k, NaN if not finite: reverse KL has no gradient where it is infinite
  bool reads_student;
};

// A teacher's part: p = e^{(t−max)/τ}/sum enters with `factor`.
template <typename T>
struct TeacherPart {
  T max, sum, factor, log_sum, weight;
};

// `exps`: the student's, from the first sweep, or null.
template <typename T, AtOne kAtOne>
void student_gradient(const T* s, const T* exps, int count, T max, const Sweep<T>& sweep, const StudentGradient<T>& g,
                      Divergence divergence, const T* teachers_sum, T* out) {
  max = finite_or_zero(max);
  for (int i = 0; i < count; i += kLanes<T>) {
    const Vec<T> x_s = load(s + i), x = x_s - max;
    const Vec<T> e = exps ? load(exps + i) : exp2_of<T>(x * sweep.to_exp2);
    Vec<T> soft;
    if (divergence == Divergence::forward_kl) {
      soft = g.soft * e - load(teachers_sum + i);
    } else {
      const Vec<T> log_q = x_s == -infinity<T>() ? Vec<T>{} : g.total_weight * (x * sweep.inv_t - g.log_sum);
      soft = g.soft * e * (log_q - load(teachers_sum + i) - g.mean_divergence);
    }
    if constexpr (kAtOne != AtOne::unused) soft += g.hard * exp_at_one<T, kAtOne>(e, x) + g.constant;
    store(out + i, soft);
  }
}

template <typename T>
void student_gradient(AtOne at_one, const T* s, const T* exps, int count, T max, const Sweep<T>& sweep,
                      const StudentGradient<T>& g, Divergence divergence, const T* teachers_sum, T* out) {
  switch (at_one) {
    case AtOne::unused:
      return student_gradient<T, AtOne::unused>(s, exps, count, max, sweep, g, divergence, teachers_sum, out);
    case AtOne::same:
      return student_gradient<T, AtOne::same>(s, exps, count, max, sweep, g, divergence, teachers_sum, out);
    case AtOne::square:
      return student_gradient<T, AtOne::square>(s, exps, count, max, sweep, g, divergence, teachers_sum, out);
    case AtOne::fourth:
      return student_gradient<T, AtOne::fourth>(s, exps, count, max, sweep, g, divergence, teachers_sum, out);
    case AtOne::own:
      return student_gradient<T, AtOne::own>(s, exps, count, max, sweep, g, divergence, teachers_sum, out);
  }
}

// sum += factor·e^{(t−max)/τ} (forward KL), or weight·log p (reverse KL, where −inf counts as 0: see mean_divergence).
template <typename T>
void add_teacher(const T* t, const T* exps, int count, const TeacherPart<T>& part, const Sweep<T>& sweep,
                 Divergence divergence, T* sum) {
  const T max = finite_or_zero(part.max);
  if (divergence == Divergence::forward_kl && exps) {
    for (int i = 0; i < count; i += kLanes<T>) store(sum + i, load(sum + i) + part.factor * load(exps + i));
  } else if (divergence == Divergence::forward_kl) {
    for (int i = 0; i < count; i += kLanes<T>)
      store(sum + i, load(sum + i) + part.factor * exp2_of<T>((load(t + i) - max) * sweep.to_exp2));
  } else {
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> x = load(t + i);
      const Vec<T> log_p = x == -infinity<T>() ? Vec<T>{} : (x - max) * sweep.inv_t - part.log_sum;
      store(sum + i, load(sum + i) + part.weight * log_p);
    }
  }
}

// The gradient in a teacher: forward KL p·(log p − log q − D)/τ, reverse KL (p − q)/τ, times the row's factor.
template <typename T>
void teacher_gradient(const T* t, const T* s, int count, const TeacherPart<T>& part, T max_s, T sum_s, T log_sum_s, T d,
                      T factor, const Sweep<T>& sweep, Divergence divergence, T* out) {
  const T max = finite_or_zero(part.max);
  max_s = finite_or_zero(max_s);
  const T to_p = 1 / part.sum, to_q = 1 / sum_s, scale = factor * sweep.inv_t;
  for (int i = 0; i < count; i += kLanes<T>) {
    const Vec<T> x_t = load(t + i), dt = x_t - max, ds = load(s + i) - max_s;
    const Vec<T> p = to_p * exp2_of<T>(dt * sweep.to_exp2);
    if (divergence == Divergence::forward_kl) {
      const Vec<T> ratio = (dt - ds) * sweep.inv_t - (part.log_sum - log_sum_s) - d;
      store(out + i, scale * (x_t == -infinity<T>() ? Vec<T>{} : p * ratio));
    } else {
      store(out + i, scale * (p - to_q * exp2_of<T>(ds * sweep.to_exp2)));
    }
  }
}

// ---------------------------------------------------------------- one row

template <typename T>
struct Row {
  int64_t n;        // which row
  int64_t student;  // where it starts, in elements
  int64_t teacher[kMaxTeachers];
  int64_t target;

  Row(const KDArgs<T>& args, int64_t n) : n(n), target(args.target ? args.target[n] : -1) {
    const int64_t outer = n / args.inner, inner = n % args.inner;  // once a row: a division costs 20 cycles
    student = outer * args.student.outer_stride + inner * args.student.inner_stride;
    for (int k = 0; k < args.teachers; ++k)
      teacher[k] = outer * args.teacher[k].outer_stride + inner * args.teacher[k].inner_stride;
  }
};

// What the first sweep leaves behind.
template <typename T>
struct RowState {
  SoftmaxState<T> student;
  SoftmaxState<T> teacher[kMaxTeachers];
  T cross[kMaxTeachers];
  T weight[kMaxTeachers];
  T divergence[kMaxTeachers];
};

template <typename T>
struct Tiles {
  Tile<T> student, teacher, exps, sum, out;
  std::vector<Tile<T>> teacher_exps;  // one a teacher where the gradient takes them from the first sweep, else one
  bool keeps_exps;
  const T* student_tile = nullptr;  // the last one read: the whole row, where it keeps the exponentials

  Tiles(int teachers, bool keeps_exps) : teacher_exps(keeps_exps ? teachers : 1), keeps_exps(keeps_exps) {}
  T* exps_of(int k) { return teacher_exps[keeps_exps ? k : 0].values; }
};

template <typename T>
void raise_to(SoftmaxState<T>& state, T max, T inv_t, Raise<T>* by) {
  if (!(max > state.max)) return;
  *by = Raise<T>(state.max, max, inv_t);
  raise(state, max, *by);
}

// The next tile of the row, or at its end the first of the next row.
template <typename T>
Ahead ahead_of(const KDArgs<T>& args, const Logits& x, int64_t row, int64_t n, int64_t begin) {
  const int bytes = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
  const bool same_row = begin + kTileColumns < args.classes;
  const int64_t at = same_row ? row + begin + kTileColumns : row + (n + 1 < args.rows ? x.inner_stride : 0);
  return {static_cast<const char*>(x.data) + at * bytes, bytes};
}

// One sweep over the columns: every state of the row. Teachers with reads[k] false are left empty.
template <typename T>
void sweep_row(const KDForward<T>& args, const Row<T>& row, const Sweep<T>& sweep, const bool* reads,
               RowState<T>& state, Tiles<T>& tiles) {
  const AbsorbStudent<T> absorb_s = student_absorber<T>(sweep.student_at_one);
  const AbsorbTeacher<T> absorb_t = teacher_absorber<T>(args.divergence, sweep.teacher_at_one, sweep.entropy);
  const bool forward = args.divergence == Divergence::forward_kl;
  state.student = {};
  for (int k = 0; k < args.teachers; ++k) state.teacher[k] = {}, state.cross[k] = 0;

  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    const T* s = read_tile(args.student, row.student, begin, count, tiles.student.values);
    tiles.student_tile = s;
    Raise<T> raise_s;
    const T sum_before = state.student.sum;
    raise_to(state.student, tile_max(s, count), sweep.inv_t, &raise_s);
    absorb_s(state.student, s, count, sweep.to_exp2, ahead_of(args, args.student, row.student, row.n, begin),
             tiles.exps.values);

    for (int k = 0; k < args.teachers; ++k) {
      if (!reads[k]) continue;
      SoftmaxState<T>& teacher = state.teacher[k];
      const T* t = read_tile(args.teacher[k], row.teacher[k], begin, count, tiles.teacher.values);
      Raise<T> raise_t;
      const T teacher_sum_before = teacher.sum;
      raise_to(teacher, tile_max(t, count), sweep.inv_t, &raise_t);
      state.cross[k] = forward ? raise_cross(state.cross[k], teacher_sum_before, raise_t, raise_s)
                               : raise_cross(state.cross[k], sum_before, raise_s, raise_t);
      absorb_t(teacher, state.cross[k], t, s, tiles.exps.values, state.student.max, count, sweep.to_exp2,
               ahead_of(args, args.teacher[k], row.teacher[k], row.n, begin), tiles.exps_of(k));
    }
  }
}

// The second sweep: the student's gradient, already scaled.
template <typename T>
void write_student_gradient(const KDArgs<T>& args, const Row<T>& row, const Sweep<T>& sweep, T max,
                            const StudentGradient<T>& g, const TeacherPart<T>* parts, Tiles<T>& tiles, void* gradient) {
  const int64_t to = row.n * args.classes;
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    T* sum = tiles.sum.values;
    T* out = tiles.out.values;
    for (int i = 0; i < padded(count, kLanes<T>); ++i) sum[i] = 0, out[i] = g.constant;
    for (int k = 0; k < args.teachers; ++k) {
      if (parts[k].weight == 0) continue;
      const T* exps = tiles.keeps_exps && args.divergence == Divergence::forward_kl ? tiles.exps_of(k) : nullptr;
      const T* t = exps ? nullptr : read_tile(args.teacher[k], row.teacher[k], begin, count, tiles.teacher.values);
      add_teacher(t, exps, count, parts[k], sweep, args.divergence, sum);
    }
    if (g.reads_student) {
      const T* s = tiles.keeps_exps ? tiles.student_tile
                                    : read_tile(args.student, row.student, begin, count, tiles.student.values);
      student_gradient(sweep.student_at_one, s, tiles.keeps_exps ? tiles.exps.values : nullptr, count, max, sweep, g,
                       args.divergence, sum, out);
    }
    if (row.target >= begin && row.target < begin + count) out[row.target - begin] -= g.label;
    write_tile(gradient, args.student.dtype, to + begin, count, out);
  }
}

// The factors of a row's gradient, from its statistics; f = row weight/items · upstream.
template <typename T>
struct GradientFactors {
  StudentGradient<T> student;
  TeacherPart<T> part[kMaxTeachers];
};

template <typename T>
struct RowNumbers {  // of one row: from RowState in the forward, from row_stats in the backward
  T student_max, student_sum, student_sum1;
  T teacher_max[kMaxTeachers], teacher_sum[kMaxTeachers], weight[kMaxTeachers], divergence[kMaxTeachers];
};

// `logs`: reverse KL and the teachers' own gradients need log Σ.
template <typename T>
void gradient_factors(const KDArgs<T>& args, const RowNumbers<T>& row, T f, const Sweep<T>& sweep, bool logs,
                      GradientFactors<T>& out) {
  const T per_logit = f * args.kd_scale * sweep.inv_t;
  T total_weight = 0, mean_divergence = 0,
    soft = 0;  // soft: summed as the teachers' factors are, so that C = 1 gives 0
  bool kd = false;
  for (int k = 0; k < args.teachers; ++k) {
    const T w = args.kd_scale == 0 ? T(0) : row.weight[k];
    out.part[k] = {row.teacher_max[k], row.teacher_sum[k], w == 0 ? T(0) : per_logit * w / row.teacher_sum[k],
                   logs ? log_of(row.teacher_sum[k]) : T(0), w};
    if (w == 0) continue;
    kd = true;
    total_weight += w;
    soft += per_logit * w;
    mean_divergence += w * row.divergence[k];
  }
  StudentGradient<T>& g = out.student;
  const bool forward = args.divergence == Divergence::forward_kl, hard = args.ce_weight != 0;
  g.soft = !kd ? T(0) : (forward ? soft : per_logit) / row.student_sum;
  g.hard = hard ? f * args.ce_weight / row.student_sum1 : T(0);
  g.constant = hard ? -f * args.ce_weight * args.label_smoothing / args.classes : T(0);
  g.label = hard ? f * args.ce_weight * (1 - args.label_smoothing) : T(0);
  g.total_weight = total_weight;
  g.log_sum = logs ? log_of(row.student_sum) : T(0);
  g.mean_divergence = mean_divergence - mean_divergence == 0 ? mean_divergence : std::numeric_limits<T>::quiet_NaN();
  g.reads_student = kd || hard;
}

// ---------------------------------------------------------------- the two passes

template <typename T>
bool row_counts(const KDArgs<T>& args, int64_t n) {
  return !(args.row_weights && args.row_weights[n] == 0) && !(args.target && args.target[n] == args.ignore_index);
}

template <typename T>
void write_stats(const KDForward<T>& args, int64_t n, const RowNumbers<T>& row, const T* ce, const T* h, T student_ce,
                 T scale) {
  const RowStats at{args.teachers};
  T* out = args.row_stats + n;
  const int64_t rows = args.rows;
  out[at.scale() * rows] = scale;
  if (!args.keep_stats) return;
  for (int k = 0; k < args.teachers; ++k) {
    out[at.divergence(k) * rows] = row.divergence[k];
    out[at.weight(k) * rows] = row.weight[k];
    out[at.teacher_max(k) * rows] = row.teacher_max[k];
    out[at.teacher_sum(k) * rows] = row.teacher_sum[k];
    out[at.teacher_ce(k) * rows] = ce ? ce[k] : T(0);
    out[at.teacher_entropy(k) * rows] = h ? h[k] : T(0);
  }
  out[at.student_max() * rows] = row.student_max;
  out[at.student_sum() * rows] = row.student_sum;
  out[at.student_sum1() * rows] = row.student_sum1;
  out[at.student_ce() * rows] = student_ce;
}

template <typename T>
void zero_row(const Logits& like, void* gradient, int64_t n, int64_t classes) {
  const T zeros[kTileColumns] = {};
  for (int64_t begin = 0; begin < classes; begin += kTileColumns)
    write_tile(gradient, like.dtype, n * classes + begin, tile_count(classes, begin), zeros);
}

template <typename T>
void skip_row(const KDForward<T>& args, int64_t n) {
  for (int i = 0; i < RowStats{args.teachers}.size(); ++i) args.row_stats[i * args.rows + n] = 0;
  args.row_loss[n] = 0;
  if (args.gradient) zero_row<T>(args.student, args.gradient, n, args.classes);
}

// −log q[y] at temperature 1, smoothed as in torch.nn.functional.cross_entropy.
template <typename T>
T smoothed_cross_entropy(const SoftmaxState<T>& s, T label_logit, T smoothing, int64_t classes) {
  const T uniform = log_of(s.sum1) - s.total / static_cast<T>(classes);
  if (smoothing == 0) return cross_entropy(s.sum1, s.max, label_logit);
  if (smoothing == 1) return uniform;
  return (1 - smoothing) * cross_entropy(s.sum1, s.max, label_logit) + smoothing * uniform;
}

template <typename T>
void forward_row(const KDForward<T>& args, int64_t n, const Sweep<T>& sweep, RowState<T>& state, Tiles<T>& tiles) {
  if (!row_counts(args, n)) return skip_row(args, n);
  const Row<T> row(args, n);
  const bool soft = args.kd_scale != 0, hard = args.ce_weight != 0;

  bool reads[kMaxTeachers];
  RowNumbers<T> numbers;
  for (int k = 0; k < args.teachers; ++k) {
    if (args.rule == WeightRule::given)
      numbers.weight[k] = args.weights[k * args.weights_teacher_stride + n * args.weights_row_stride];
    else
      numbers.weight[k] = T(1) / args.teachers;
    reads[k] = soft && !(args.rule == WeightRule::given && args.skip_zero_weights && numbers.weight[k] == 0);
  }
  sweep_row(args, row, sweep, reads, state, tiles);

  T ce[kMaxTeachers], h[kMaxTeachers];
  numbers.student_max = state.student.max;
  numbers.student_sum = state.student.sum;
  numbers.student_sum1 = state.student.sum1;
  const T log_s = log_of(state.student.sum);
  for (int k = 0; k < args.teachers; ++k) {
    const SoftmaxState<T>& teacher = state.teacher[k];
    numbers.teacher_max[k] = reads[k] ? teacher.max : T(0);
    numbers.teacher_sum[k] = teacher.sum;
    const bool forward = args.divergence == Divergence::forward_kl;
    const T s = state.student.sum, t = teacher.sum, log_t = log_of(t);
    numbers.divergence[k] = !reads[k] ? T(0)
                            : forward ? kl_from_sums(state.cross[k], t, log_t, s, log_s, sweep.inv_t)
                                      : kl_from_sums(state.cross[k], s, log_s, t, log_t, sweep.inv_t);
    if (soft && args.rule == WeightRule::confidence) {
      const Logits& logits = args.teacher[k];
      const T label = widen_one<T>(logits.data, logits.dtype, row.teacher[k] + row.target * logits.class_stride);
      ce[k] = cross_entropy(teacher.sum1, teacher.max, label);
    }
    if (soft && args.rule == WeightRule::entropy) h[k] = entropy(teacher.sum1, teacher.dot1);
  }
  const bool confidence = soft && args.rule == WeightRule::confidence,
             by_entropy = soft && args.rule == WeightRule::entropy;
  if (confidence) confidence_weights(ce, numbers.weight, args.teachers, 1);
  if (by_entropy) entropy_weights(h, numbers.weight, args.teachers, 1);

  T loss = 0, student_ce = 0;
  for (int k = 0; k < args.teachers; ++k) {
    if (!soft) numbers.weight[k] = 0;
    if (numbers.weight[k] != 0) loss += args.kd_scale * numbers.weight[k] * numbers.divergence[k];
  }
  if (hard) {
    const T label =
        widen_one<T>(args.student.data, args.student.dtype, row.student + row.target * args.student.class_stride);
    student_ce = smoothed_cross_entropy(state.student, label, args.label_smoothing, args.classes);
    loss += args.ce_weight * student_ce;
  }
  const T row_weight = args.row_weights ? args.row_weights[n] : T(1);
  const T scale = args.items ? row_weight / *args.items : row_weight;
  args.row_loss[n] = row_weight * loss;
  write_stats(args, n, numbers, confidence ? ce : nullptr, by_entropy ? h : nullptr, student_ce, scale);

  if (args.gradient) {
    GradientFactors<T> factors;
    gradient_factors(args, numbers, scale, sweep, /*logs=*/args.divergence == Divergence::reverse_kl, factors);
    write_student_gradient(args, row, sweep, numbers.student_max, factors.student, factors.part, tiles, args.gradient);
  }
}

template <typename T>
void forward_rows(const KDForward<T>& args, int64_t begin, int64_t end) {
  const bool soft = args.kd_scale != 0;
  const bool teacher_weights = soft && (args.rule == WeightRule::confidence || args.rule == WeightRule::entropy);
  const Sweep<T> sweep(args, args.ce_weight != 0, teacher_weights, soft && args.rule == WeightRule::entropy);
  RowState<T> state;
  Tiles<T> tiles(args.teachers, args.gradient && args.classes <= kTileColumns);
  for (int64_t n = begin; n < end; ++n) forward_row(args, n, sweep, state, tiles);
}

template <typename T>
void read_stats(const KDBackward<T>& args, int64_t n, RowNumbers<T>& row) {
  const RowStats at{args.teachers};
  const T* in = args.row_stats + n;
  const int64_t rows = args.rows;
  row.student_max = in[at.student_max() * rows];
  row.student_sum = in[at.student_sum() * rows];
  row.student_sum1 = in[at.student_sum1() * rows];
  for (int k = 0; k < args.teachers; ++k) {
    row.divergence[k] = in[at.divergence(k) * rows];
    row.teacher_max[k] = in[at.teacher_max(k) * rows];
    row.teacher_sum[k] = in[at.teacher_sum(k) * rows];
    row.weight[k] = args.weights[k * args.weights_teacher_stride + n * args.weights_row_stride];
  }
}

template <typename T>
void write_teacher_gradient(const KDBackward<T>& args, const Row<T>& row, int k, const Sweep<T>& sweep,
                            const RowNumbers<T>& numbers, const GradientFactors<T>& factors, T f, Tiles<T>& tiles) {
  const Logits& logits = args.teacher[k];
  const T weight = factors.part[k].weight;
  if (weight == 0) return zero_row<T>(logits, args.teacher_gradient[k], row.n, args.classes);
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    const T* t = read_tile(logits, row.teacher[k], begin, count, tiles.teacher.values);
    const T* s = read_tile(args.student, row.student, begin, count, tiles.student.values);
    teacher_gradient(t, s, count, factors.part[k], numbers.student_max, numbers.student_sum, factors.student.log_sum,
                     numbers.divergence[k], f * args.kd_scale * weight, sweep, args.divergence, tiles.out.values);
    write_tile(args.teacher_gradient[k], logits.dtype, row.n * args.classes + begin, count, tiles.out.values);
  }
}

template <typename T>
void backward_row(const KDBackward<T>& args, int64_t n, const Sweep<T>& sweep, Tiles<T>& tiles) {
  const T scale = args.row_stats[RowStats{args.teachers}.scale() * args.rows + n];
  if (scale == 0) {
    if (args.student_gradient) zero_row<T>(args.student, args.student_gradient, n, args.classes);
    for (int k = 0; k < args.teachers; ++k)
      if (args.teacher_gradient[k]) zero_row<T>(args.teacher[k], args.teacher_gradient[k], n, args.classes);
    return;
  }
  const T f = args.upstream ? scale * args.upstream[n * args.upstream_stride] : scale;
  const Row<T> row(args, n);
  RowNumbers<T> numbers;
  GradientFactors<T> factors;
  read_stats(args, n, numbers);
  gradient_factors(args, numbers, f, sweep, /*logs=*/true, factors);
  if (args.student_gradient)
    write_student_gradient(args, row, sweep, numbers.student_max, factors.student, factors.part, tiles,
                           args.student_gradient);
  for (int k = 0; k < args.teachers; ++k)
    if (args.teacher_gradient[k]) write_teacher_gradient(args, row, k, sweep, numbers, factors, f, tiles);
}

template <typename T>
void backward_rows(const KDBackward<T>& args, int64_t begin, int64_t end) {
  const Sweep<T> sweep(args, args.ce_weight != 0, false, false);
  Tiles<T> tiles(args.teachers, false);
  for (int64_t n = begin; n < end; ++n) backward_row(args, n, sweep, tiles);
}

template <typename T>
void rescale_rows(const KDRescale<T>& args, int64_t begin, int64_t end) {
  const Logits gradient{args.gradient, args.classes, 0, 1, args.dtype};
  Tile<T> tile;
  for (int64_t n = begin; n < end; ++n) {
    const T upstream = args.upstream[n * args.upstream_stride];
    const bool counts = args.scale[n] != 0;
    if (upstream == 1 && args.out == args.gradient) continue;
    for (int64_t at = 0; at < args.classes; at += kTileColumns) {
      const int count = tile_count(args.classes, at);
      const T* g = read_tile(gradient, n * args.classes, at, count, tile.values);
      for (int i = 0; i < count; ++i) tile.values[i] = counts ? g[i] * upstream : T(0);
      write_tile(args.out, args.dtype, n * args.classes + at, count, tile.values);
    }
  }
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
