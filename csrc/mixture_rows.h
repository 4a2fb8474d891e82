// The op `mixture`, row by row, in one instruction set (see instruction_sets.h).
//
// The first sweep over a row makes the states of its softmaxes. The second goes through all teachers a register at a
// time, so that a mixture lives in a register; its exponentials are computed again, since they are cheaper than keeping
// K rows of them.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "bundle.h"
//
#include "vec_math.h"
//
#include "row_formulas.h"
//
#include "tile.h"

// x, 0 from lane `count` on: what lies beyond the last class.
template <typename T>
inline Vec<T> first_lanes(Vec<T> x, int count) {
  if (count >= kLanes<T>) return x;
  Integers<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < count ? x : Vec<T>{};
}

template <typename T>
inline Vec<T> vector_at(const Vectors<T>& tile, int i) {
  return i < tile.whole ? load(tile.values + i) : tile.last;
}

// One softmax of a row, and its columns of the current tile.
template <typename T>
struct Member {
  const Logits* logits;
  int64_t start;        // of the row
  int k;                // which teacher
  T max, sum;           // max −inf without a finite logit
  T offset;             // what is subtracted from its logits
  T to_p;               // 1/sum
  T weight = 0, share;  // share = weight/sum
  T dot;                // Σ_c p·(what the op asks for), not yet divided by sum
  Vectors<T> tile;
  Vec<T> e, partial;  // e^{(t−max)/τ} of this register; the dot product within the tile

  void set_state(T row_max, T row_sum) {
    max = row_max, sum = row_sum, offset = offset_of(row_max), to_p = 1 / row_sum, share = weight * to_p;
  }
  Vec<T> exponential(int i, const TemperedExp<T>& exp) const { return exp(vector_at(tile, i) - offset); }
};

// What a thread keeps: the members of a row, those of a weight other than 0 first, and tiles of other dtypes widened.
template <typename T>
class Row {
 public:
  Member<T> student, member[kMaxTeachers];
  int used = 0, members = 0;
  T total_weight = 0;
  alignas(64) T out[kTileColumns];

  explicit Row(const MixtureArgs<T>& args)
      : inv_t(1 / args.temperature),
        exp(args.temperature),
        args_(args),
        pitch_(args.classes < kTileColumns ? args.classes : kTileColumns),
        widened_(new T[(args.teachers + 1) * pitch_]) {}

  void start(int64_t row) {
    outer_ = row / args_.inner, inner_ = row % args_.inner;
    used = members = 0;
    total_weight = 0;
    for (int k = 0; k < args_.teachers; ++k)
      if (const T w = weight(k, row); w != 0) add(k, w), total_weight += w;
    used = members;
    for (int k = 0; k < args_.teachers && !args_.skip_zero_weights; ++k)
      if (weight(k, row) == 0) add(k, 0);
  }

  T weight(int k, int64_t row) const {
    return args_.weights ? args_.weights[k * args_.weights_teacher_stride + row * args_.weights_row_stride]
                         : T(1) / args_.teachers;
  }

  void place(Member<T>& x, const Logits& logits) const {
    x.logits = &logits;
    x.start = outer_ * logits.outer_stride + inner_ * logits.inner_stride;
  }

  // The first sweep.
  void find_state(Member<T>& x) {
    T max = -infinity<T>(), sum = 0;
    for (int64_t begin = 0; begin < args_.classes; begin += kTileColumns) {
      const int count = tile_count(args_.classes, begin);
      read(x, begin, count);
      const uintptr_t ahead = ahead_of(x, begin);
      const int bytes = element_bytes(x.logits->dtype);
      Vec<T> high = splat(-infinity<T>()), total{};
      for (int i = 0; i < count; i += kLanes<T>) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<int64_t>(i) * bytes), 0, 2);
        const Vec<T> v = vector_at(x.tile, i);
        high = v > high ? v : high;
      }
      const T to = larger(max, max_of<T>(high));
      sum *= Raise<T>(max, to, inv_t).factor;
      max = to;
      x.offset = offset_of(max);
      for (int i = 0; i < count; i += kLanes<T>) total += x.exponential(i, exp);
      sum += sum_of<T>(total);
    }
    x.set_state(max, sum);
  }

  void read(Member<T>& x, int64_t begin, int count) {
    T* widened = widened_.get() + (&x == &student ? args_.teachers : x.k) * pitch_;
    x.tile.fill(read_tile(*x.logits, x.start, begin, count, widened), count);
  }
  // For the second sweep: rows of one tile are there from the first.
  void read_again(Member<T>& x, int64_t begin, int count) {
    if (args_.classes > kTileColumns) read(x, begin, count);
  }

  // Σ w_k p_k of a register; leaves every member's exponential.
  Vec<T> mix(int i) {
    Vec<T> mixture{};
    for (int m = 0; m < used; ++m) {
      Member<T>& x = member[m];
      x.e = x.exponential(i, exp);
      mixture += x.share * x.e;
    }
    for (int m = used; m < members; ++m) member[m].e = member[m].exponential(i, exp);
    return mixture;
  }

  // log Σ_k w_k p_k of a register, whatever underflows: −inf where no teacher in use allows the class, NaN where the
  // mixture is negative.
  Vec<T> log_mixture(int i) const {
    Vec<T> largest = splat(-infinity<T>()), sum{};
    for (int m = 0; m < used; ++m) {
      const Vec<T> log_p = log_probability(member[m], i);
      largest = log_p > largest ? log_p : largest;
    }
    const Vec<T> offset = offset_of(largest);
    for (int m = 0; m < used; ++m) sum += member[m].weight * exp_of(log_probability(member[m], i) - offset);
    const auto tiny = sum < kSafeMixture<T>;  // log_of takes normal numbers
    const Vec<T> result = log_of(tiny ? sum * T(0x1p64) : sum) - (tiny ? splat(T(64 * kLn2)) : Vec<T>{}) + offset;
    return sum < 0 ? splat(std::numeric_limits<T>::quiet_NaN()) : result;
  }

  const T inv_t;
  const TemperedExp<T> exp;

 private:
  void add(int k, T w) {
    Member<T>& x = member[members++];
    x.k = k, x.weight = w, x.dot = 0;
    place(x, args_.teacher[k]);
  }
  // Two tiles, or two short rows, on: fetched towards L2 while this one is worked on, since the K + 1 rows are too many
  // short streams for the hardware to foresee. An address, maybe past the tensor: fetching from there does no harm.
  uintptr_t ahead_of(const Member<T>& x, int64_t begin) const {
    const int64_t on = args_.classes <= kTileColumns ? 2 * x.logits->inner_stride : begin + 2 * kTileColumns;
    return reinterpret_cast<uintptr_t>(x.logits->data) + (x.start + on) * element_bytes(x.logits->dtype);
  }
  Vec<T> log_probability(const Member<T>& x, int i) const {
    return (vector_at(x.tile, i) - x.offset) * inv_t - log_of(x.sum);
  }

  const MixtureArgs<T>& args_;
  int64_t outer_, inner_;
  const int64_t pitch_;
  std::unique_ptr<T[]> widened_;
};

// A dot product, tile by tile: few numbers to a partial sum.
template <typename T>
void start_partials(Row<T>& row) {
  for (int m = 0; m < row.members; ++m) row.member[m].partial = Vec<T>{};
}
template <typename T>
void add_partials(Row<T>& row) {
  for (int m = 0; m < row.members; ++m) row.member[m].dot += sum_of<T>(row.member[m].partial);
}

// ------------------------------------------------------------------------------------------------------- probabilities

template <typename T>
void forward_row(const MixtureForward<T>& args, int64_t n, Row<T>& row) {
  row.start(n);
  for (int k = 0; k < 2 * args.teachers; ++k) args.row_stats[k * args.rows + n] = 0;
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    row.find_state(x);
    args.row_stats[x.k * args.rows + n] = x.max;
    args.row_stats[(args.teachers + x.k) * args.rows + n] = x.sum;
  }
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    for (int m = 0; m < row.members; ++m) row.read_again(row.member[m], begin, count);
    for (int i = 0; i < count; i += kLanes<T>) store(row.out + i, row.mix(i));
    write_tile(args.probabilities, kNative<T>, n * args.classes + begin, count, row.out);
  }
}

template <typename T>
void mixture_forward(const MixtureForward<T>& args, int64_t begin, int64_t end) {
  Row<T> row(args);
  for (int64_t n = begin; n < end; ++n) forward_row(args, n, row);
}

template <typename T>
void write_teacher_gradient(const MixtureBackward<T>& args, int64_t n, Member<T>& x, Row<T>& row) {
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    row.read(x, begin, count);
    row.read(row.student, begin, count);
    const T share = x.share * row.inv_t;
    for (int i = 0; i < count; i += kLanes<T>)
      store(row.out + i, share * x.exponential(i, row.exp) * (vector_at(row.student.tile, i) - x.dot));
    write_tile(args.teacher_gradient[x.k], x.logits->dtype, n * args.classes + begin, count, row.out);
  }
}

// The upstream takes the student's place.
template <typename T>
void backward_row(const MixtureBackward<T>& args, int64_t n, Row<T>& row) {
  row.start(n);
  row.place(row.student, args.upstream);
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    x.set_state(args.row_stats[x.k * args.rows + n], args.row_stats[(args.teachers + x.k) * args.rows + n]);
  }
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    for (int m = 0; m < row.members; ++m) row.read(row.member[m], begin, count);
    row.read(row.student, begin, count);
    start_partials(row);
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> g = first_lanes<T>(vector_at(row.student.tile, i), count - i);
      for (int m = 0; m < row.members; ++m) {
        Member<T>& x = row.member[m];
        x.partial += x.exponential(i, row.exp) * g;
      }
    }
    add_partials(row);
  }
  for (int k = 0; k < args.teachers; ++k) args.dots[k * args.rows + n] = 0;
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    x.dot *= x.to_p;
    args.dots[x.k * args.rows + n] = x.dot;
    if (m < row.used && args.teacher_gradient[x.k]) write_teacher_gradient(args, n, x, row);
  }
  for (int k = 0; k < args.teachers; ++k)
    if (args.teacher_gradient[k] && row.weight(k, n) == 0)
      zero_row<T>(args.teacher[k], args.teacher_gradient[k], n, args.classes);
}

template <typename T>
void mixture_backward(const MixtureBackward<T>& args, int64_t begin, int64_t end) {
  Row<T> row(args);
  for (int64_t n = begin; n < end; ++n) backward_row(args, n, row);
}

// ---------------------------------------------------------------------------------------------------------- divergence

// One register of the second sweep, `count` columns of it in the row: adds p_k (log pbar − log q) to every member,
// returns pbar.
template <typename T>
Vec<T> absorb(Row<T>& row, int i, int count, Vec<T> log_q) {
  const Vec<T> mixture = row.mix(i);
  const Vec<T> unsafe = mixture >= kSafeMixture<T> && log_q > -infinity<T>() ? Vec<T>{} : splat(T(1));
  if (max_of<T>(first_lanes<T>(unsafe, count)) == 0) {
    const Vec<T> ratio = first_lanes<T>(log_of(mixture) - log_q, count);
    for (int m = 0; m < row.members; ++m) row.member[m].partial += row.member[m].e * ratio;
    return mixture;
  }
  const Vec<T> ratio = row.log_mixture(i) - log_q;
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    const Vec<T> term = ratio == infinity<T>() ? ratio : x.e * ratio;  // +inf also where e has underflowed
    x.partial += vector_at(x.tile, i) == -infinity<T>() ? Vec<T>{} : term;
  }
  return mixture;
}

template <typename T>
void second_sweep(const MixtureDivergence<T>& args, int64_t n, Row<T>& row) {
  const Member<T>& s = row.student;
  const T log_sum = log_of(s.sum), of_student = row.total_weight * row.inv_t / s.sum;
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    for (int m = 0; m < row.members; ++m) row.read_again(row.member[m], begin, count);
    row.read_again(row.student, begin, count);
    start_partials(row);
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> shifted = vector_at(s.tile, i) - s.offset;
      const Vec<T> mixture = absorb(row, i, count - i, shifted * row.inv_t - log_sum);
      if (args.gradient) store(row.out + i, of_student * row.exp(shifted) - row.inv_t * mixture);
    }
    add_partials(row);
    if (args.gradient) write_tile(args.gradient, args.student.dtype, n * args.classes + begin, count, row.out);
  }
}

template <typename T>
void write_stats(const MixtureDivergence<T>& args, int64_t n, const Row<T>& row) {
  const RowStats at{args.teachers};
  T* out = args.row_stats + n;
  for (int i = 0; i < at.size(Divergence::forward_kl); ++i) out[i * args.rows] = 0;
  T divergence = 0;
  for (int m = 0; m < row.members; ++m) {
    const Member<T>& x = row.member[m];
    const T dot = x.sum == 0 || row.student.sum == 0 ? std::numeric_limits<T>::quiet_NaN() : x.dot * x.to_p;
    if (m < row.used) divergence += x.weight * dot;
    out[at.divergence(x.k) * args.rows] = dot + 1;
    out[at.weight(x.k) * args.rows] = x.weight;
    out[at.teacher_max(x.k) * args.rows] = x.max;
    out[at.teacher_sum(x.k) * args.rows] = x.sum;
  }
  out[at.student_max() * args.rows] = row.student.max;
  out[at.student_sum() * args.rows] = row.student.sum;
  out[at.scale() * args.rows] = 1;
  args.divergence[n] = divergence;
}

template <typename T>
void divergence_row(const MixtureDivergence<T>& args, int64_t n, Row<T>& row) {
  row.start(n);
  row.place(row.student, args.student);
  row.student.set_state(0, 0);
  if (row.members > 0) {
    row.find_state(row.student);
    for (int m = 0; m < row.members; ++m) row.find_state(row.member[m]);
    second_sweep(args, n, row);
  }
  write_stats(args, n, row);
  if (args.gradient && row.used == 0) zero_row<T>(args.student, args.gradient, n, args.classes);
}

template <typename T>
void mixture_divergence(const MixtureDivergence<T>& args, int64_t begin, int64_t end) {
  Row<T> row(args);
  for (int64_t n = begin; n < end; ++n) divergence_row(args, n, row);
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
