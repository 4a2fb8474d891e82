// The op `mixture`, a block of rows at a time, in one instruction set (see instruction_sets.h).
//
// The first sweep over a row makes the states of its softmaxes and keeps their exponentials. The second goes through
// all teachers a few registers at a time, so that a mixture lives in registers. Long rows take two exponentials an
// element: to fetch one from a cache that the logits stream through takes longer than to compute it again. Every row of
// a block is through one step before any takes the next: what a step of a row waits for is then long there.

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
#include "halves.h"
//
#include "tile.h"
//
#include "tile_end.h"

constexpr int kBlockRows = 8;              // at most
constexpr int64_t kBlockBytes = 32 << 10;  // of a block's exponentials, which share L1 with the logits
constexpr int64_t kRowBytes = 64 << 10;    // of a long row's exponentials: more would drive the logits out of L2

// Whether every lane of a comparison is true.
template <typename Mask>
inline bool all_of(Mask x) {
#if MTKD_VEC_BYTES == 64
  if constexpr (sizeof(x[0]) == 4) return _mm512_movepi32_mask((__m512i)x) == 0xFFFF;
  return _mm512_movepi64_mask((__m512i)x) == 0xFF;
#elif MTKD_VEC_BYTES == 32
  return _mm256_movemask_epi8((__m256i)x) == -1;
#else
  return !any_of(x == 0);
#endif
}

template <typename T>
inline Vec<T> vector_at(const Vectors<T>& tile, int i) {
  return i < tile.whole ? load(tile.values + i) : tile.last;
}

// One softmax of a row.
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
  T* exps;              // e^{(t−max)/τ} of a row, or of a tile, in whole vectors, 0 past the columns
  T* tile_max;          // the maximum that the exponentials of a tile are relative to
  T* widened;           // a tile's logits, if they are of another dtype

  // Of the tile at hand:
  Vectors<T> tile;  // its logits
  const T* tile_exps;
  T to_max;        // from its exponentials to those relative to max
  Vec<T> partial;  // of the dot product

  void set_state(T row_max, T row_sum) {
    max = row_max, sum = row_sum, offset = offset_of(row_max), to_p = 1 / row_sum, share = weight * to_p;
  }
};

// A row: its teachers, those of a weight other than 0 first, and, in the divergence, the student.
template <typename T>
struct Row {
  int64_t n;
  Member<T> student;
  Member<T>* member;
  int used, members;
  T total_weight;
  int64_t tile_at;  // of which tile the teachers' logits are at hand
};

// A block of rows, and a thread's memory for it.
template <typename T>
class Rows {
 public:
  const T inv_t;
  const TemperedExp<T> exp;
  const bool one_tile, keeps;  // keeps: the exponentials of a row; else of a tile
  alignas(64) T out[kTileColumns];

  explicit Rows(const MixtureArgs<T>& args)
      : inv_t(1 / args.temperature),
        exp(args.temperature),
        one_tile(args.classes <= kTileColumns),
        keeps(one_tile || (args.teachers + 1) * args.classes * int64_t{sizeof(T)} <= kRowBytes),
        args_(args),
        uniform_(T(1) / args.teachers),
        tile_pitch_(pitch_of(std::min<int64_t>(args.classes, kTileColumns))),
        pitch_(keeps ? pitch_of(args.classes) : tile_pitch_),
        capacity_(capacity(args, pitch_)),
        members_(new Member<T>[capacity_ * args.teachers]) {
    const int64_t tiles = (args.classes + kTileColumns - 1) / kTileColumns, tiles_pitch = pitch_of(tiles);
    const size_t bytes = capacity_ * (args.teachers + 1) * (pitch_ + tile_pitch_ + tiles_pitch) * sizeof(T);
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
    T* at = memory_.get();
    const auto give = [&](Member<T>& x) {
      x.exps = std::exchange(at, at + pitch_);
      x.widened = std::exchange(at, at + tile_pitch_);
      x.tile_max = std::exchange(at, at + tiles_pitch);
    };
    for (int64_t r = 0; r < capacity_; ++r) {
      rows_[r].member = members_.get() + r * args.teachers;
      give(rows_[r].student);
      for (int k = 0; k < args.teachers; ++k) give(rows_[r].member[k]);
    }
  }

  // Calls body with rows [begin, end), a block of them at a time.
  template <typename Body>
  void for_each_block(int64_t begin, int64_t end, Body body) {
    for (int64_t n = begin; n < end; n += capacity_) {
      const int64_t count = std::min(capacity_, end - n);
      for (int64_t r = 0; r < count; ++r) start(rows_[r], n + r);
      body(rows_, rows_ + count);
    }
  }

  T weight(int k, int64_t n) const {
    return args_.weights ? args_.weights[k * args_.weights_teacher_stride + n * args_.weights_row_stride] : uniform_;
  }

  void place(Member<T>& x, const Logits& logits, int64_t n) const {
    x.logits = &logits;
    x.start = args_.inner == args_.rows ? n * logits.inner_stride : row_start(logits, n, args_.inner);
  }

  // The first sweep, in two steps where rows are short.
  void find_states(Row<T>* first, Row<T>* last, bool student) {
    for_each_softmax(first, last, student, [&](Member<T>& x) {
      if (!one_tile) return find_state(x);
      read(x, 0);
      x.max = largest(x, 0);
    });
    if (!one_tile) return;
    for_each_softmax(first, last, student, [&](Member<T>& x) {
      x.offset = offset_of(x.max);
      x.set_state(x.max, exponentiate(x, x.exps));
    });
  }

  void read(Member<T>& x, int64_t begin) const {
    const int count = tile_count(args_.classes, begin);
    fill(x.tile, read_tile(*x.logits, x.start, begin, count, x.widened), count);
  }

  // For the second sweep: a tile's exponentials, of the student its logits too.
  void start_tile(Row<T>& row, int64_t begin, bool student) const {
    row.tile_at = one_tile ? begin : -1;
    if (!keeps) read_teachers(row, begin);
    if (student && !one_tile) read(row.student, begin);
    if (student) start_tile(row.student, begin);
    for (int m = 0; m < row.members; ++m) start_tile(row.member[m], begin);
  }

  // The logits of the teachers' tile.
  void read_teachers(Row<T>& row, int64_t begin) const {
    for (int m = 0; m < row.members && row.tile_at != begin; ++m) read(row.member[m], begin);
    row.tile_at = begin;
  }

  // Leaves the exponentials of a tile, and returns their sum.
  T exponentiate(const Member<T>& x, T* exps) const {
    Vec<T> sum{};
    const auto put = [&](int i, Vec<T> v) {
      const Vec<T> e = exp(v - x.offset);
      store(exps + i, e);
      sum += e;
    };
    for (int i = 0; i < x.tile.whole; i += kLanes<T>) put(i, load(x.tile.values + i));
    if (x.tile.rest) put(x.tile.whole, x.tile.last);
    return sum_of<T>(sum);
  }

  // log Σ_k w_k p_k of a register, whatever underflows: −inf where no teacher in use allows the class, NaN where the
  // mixture is negative.
  Vec<T> log_mixture(const Row<T>& row, int i) const {
    Vec<T> largest = splat(-infinity<T>()), sum{};
    for (int m = 0; m < row.used; ++m) {
      const Vec<T> log_p = log_probability(row.member[m], i);
      largest = log_p > largest ? log_p : largest;
    }
    const Vec<T> offset = offset_of(largest);
    for (int m = 0; m < row.used; ++m) sum += row.member[m].weight * exp_of(log_probability(row.member[m], i) - offset);
    const auto tiny = sum < kSafeMixture<T>;  // log_of takes normal numbers
    const Vec<T> result = log_of(tiny ? sum * T(0x1p64) : sum) - (tiny ? splat(T(64 * kLn2)) : Vec<T>{}) + offset;
    return sum < 0 ? splat(std::numeric_limits<T>::quiet_NaN()) : result;
  }

 private:
  static int64_t pitch_of(int64_t columns) {  // whole vectors, an odd number of them: no power of two
    constexpr int64_t kL = 16;
    return (columns + kL - 1) / kL / 2 * 2 * kL + kL;
  }
  static int64_t capacity(const MixtureArgs<T>& args, int64_t pitch) {
    const int64_t row_bytes = (args.teachers + 1) * pitch * static_cast<int64_t>(sizeof(T));
    if (args.classes > kTileColumns) return 1;
    return std::clamp<int64_t>(kBlockBytes / row_bytes, 1, std::min<int64_t>(kBlockRows, args.rows));
  }

  template <typename Body>
  static void for_each_softmax(Row<T>* first, Row<T>* last, bool student, Body body) {
    for (Row<T>* row = first; row < last; ++row) {
      if (student && row->members > 0) body(row->student);
      for (int m = 0; m < row->members; ++m) body(row->member[m]);
    }
  }

  // Of a row of several tiles.
  void find_state(Member<T>& x) const {
    T max = -infinity<T>(), sum = 0;
    for (int64_t begin = 0; begin < args_.classes; begin += kTileColumns) {
      read(x, begin);
      const T to = larger(max, largest(x, begin));
      sum *= Raise<T>(max, to, inv_t).factor;
      max = x.tile_max[begin / kTileColumns] = to;
      x.offset = offset_of(max);
      sum += keeps ? exponentiate(x, x.exps + begin) : sum_of_exponentials(x);
    }
    x.set_state(max, sum);
  }

  void start_tile(Member<T>& x, int64_t begin) const {
    x.partial = Vec<T>{};
    x.to_max = 1;
    x.tile_exps = x.exps;
    if (!keeps) exponentiate(x, x.exps);
    if (one_tile || !keeps) return;
    x.tile_exps = x.exps + begin;
    const T tile_max = x.tile_max[begin / kTileColumns];
    x.to_max = tile_max == x.max ? T(1) : exp_of((tile_max - x.max) * inv_t);  // 0 for nothing but −inf so far
  }

  void start(Row<T>& row, int64_t n) {
    row.n = n;
    row.tile_at = -1;
    row.used = row.members = 0;
    row.total_weight = 0;
    for (int k = 0; k < args_.teachers; ++k)
      if (const T w = weight(k, n); w != 0) add(row, k, w), row.total_weight += w;
    row.used = row.members;
    if (args_.skip_zero_weights || row.used == args_.teachers) return;
    for (int k = 0; k < args_.teachers; ++k)
      if (weight(k, n) == 0) add(row, k, 0);
  }
  void add(Row<T>& row, int k, T w) {
    Member<T>& x = row.member[row.members++];
    x.k = k, x.weight = w, x.dot = 0;
    place(x, args_.teacher[k], row.n);
  }

  // Two tiles, or a block of short rows, on: fetched towards L2 while this one is worked on, since the K + 1 rows are
  // too many short streams for the hardware to foresee. An address, maybe past the tensor: fetching from there does no
  // harm.
  uintptr_t ahead_of(const Member<T>& x, int64_t begin) const {
    const int64_t on = one_tile ? std::max<int64_t>(2, capacity_) * x.logits->inner_stride : begin + 2 * kTileColumns;
    return reinterpret_cast<uintptr_t>(x.logits->data) + (x.start + on) * element_bytes(x.logits->dtype);
  }

  T largest(const Member<T>& x, int64_t begin) const {
    constexpr int kL = kLanes<T>;
    const uintptr_t ahead = ahead_of(x, begin);
    const int bytes = element_bytes(x.logits->dtype);
    const auto prefetch = [&](int i) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<int64_t>(i) * bytes), 0, 2);
    };
    Vec<T> high[kGroup];
    for (auto& v : high) v = splat(-infinity<T>());
    int i = 0;
    for (; i + kGroup * kL <= x.tile.whole; i += kGroup * kL) {
#pragma GCC unroll 4
      for (int u = 0; u < kGroup; ++u) {
        prefetch(i + u * kL);
        const Vec<T> v = load(x.tile.values + i + u * kL);
        high[u] = v > high[u] ? v : high[u];
      }
    }
    for (int u = 1; u < kGroup; ++u) high[0] = high[u] > high[0] ? high[u] : high[0];
    for (; i < x.tile.whole + x.tile.rest; i += kL) {
      prefetch(i);
      const Vec<T> v = vector_at(x.tile, i);
      high[0] = v > high[0] ? v : high[0];
    }
    return max_of<T>(high[0]);
  }

  T sum_of_exponentials(const Member<T>& x) const {
    Vec<T> sum{};
    for (int i = 0; i < x.tile.whole; i += kLanes<T>) sum += exp(load(x.tile.values + i) - x.offset);
    if (x.tile.rest) sum += exp(x.tile.last - x.offset);
    return sum_of<T>(sum);
  }

  Vec<T> log_probability(const Member<T>& x, int i) const {
    return (vector_at(x.tile, i) - x.offset) * inv_t - log_of(x.sum);
  }

  const MixtureArgs<T>& args_;
  const T uniform_;
  const int64_t tile_pitch_, pitch_, capacity_;
  Row<T> rows_[kBlockRows];
  std::unique_ptr<Member<T>[]> members_;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Σ w_k p_k of `kCount` registers from column i on.
template <int kCount, typename T>
inline void mix(const Row<T>& row, int i, Vec<T> (&mixture)[kCount]) {
  for (auto& v : mixture) v = Vec<T>{};
  for (int m = 0; m < row.used; ++m) {
    const Member<T>& x = row.member[m];
    const T share = x.share * x.to_max;
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) mixture[u] += share * load(x.tile_exps + i + u * kLanes<T>);
  }
}

// ------------------------------------------------------------------------------------------------------- probabilities

// The same from the logits.
template <int kCount, typename T>
inline void mix_logits(const Row<T>& row, const TemperedExp<T>& exp, int i, Vec<T> (&mixture)[kCount]) {
  for (auto& v : mixture) v = Vec<T>{};
  for (int m = 0; m < row.used; ++m) {
    const Member<T>& x = row.member[m];
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) {
      const Vec<T> t = kCount == 1 ? vector_at(x.tile, i) : load(x.tile.values + i + u * kLanes<T>);
      mixture[u] += x.share * exp(t - x.offset);
    }
  }
}

template <typename T>
void write_probabilities(const MixtureForward<T>& args, Row<T>& row, Rows<T>& rows, Output<T>& output) {
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    if (rows.keeps)
      rows.start_tile(row, begin, /*student=*/false);
    else
      rows.read_teachers(row, begin);
    T* out = output.begin(row.n, begin);
    for_each_group<T>(count, [&](int i, auto registers, int left) {
      Vec<T> mixture[registers];
      rows.keeps ? mix(row, i, mixture) : mix_logits(row, rows.exp, i, mixture);
      put(out + i, mixture, left);
    });
    output.end(count);
  }
}

template <typename T>
void mixture_forward(const MixtureForward<T>& args, int64_t begin, int64_t end) {
  Rows<T> rows(args);
  Output<T> output(args.probabilities, kNative<T>, args.classes,
                   streams_gradient<T>(kNative<T>, args.rows, args.classes), rows.out);
  for (int i = 0; i < 2 * args.teachers; ++i) std::fill_n(args.row_stats + i * args.rows + begin, end - begin, T(0));
  rows.for_each_block(begin, end, [&](Row<T>* first, Row<T>* last) {
    rows.find_states(first, last, /*student=*/false);
    for (Row<T>* row = first; row < last; ++row) {
      for (int m = 0; m < row->members; ++m) {
        const Member<T>& x = row->member[m];
        args.row_stats[x.k * args.rows + row->n] = x.max;
        args.row_stats[(args.teachers + x.k) * args.rows + row->n] = x.sum;
      }
    }
    for (Row<T>* row = first; row < last; ++row) write_probabilities(args, *row, rows, output);
  });
  stream_fence();
}

// Σ e·g of a tile; leaves the exponentials.
template <typename T>
T dot_of_tile(Member<T>& x, const Vectors<T>& g, const TemperedExp<T>& exp) {
  Vec<T> dot{};
  const auto add = [&](int i, Vec<T> t, Vec<T> g) {
    const Vec<T> e = exp(t - x.offset);
    store(x.exps + i, e);
    dot += e * g;
  };
  for (int i = 0; i < g.whole; i += kLanes<T>) add(i, load(x.tile.values + i), load(g.values + i));
  if (g.rest) add(g.whole, x.tile.last, first_lanes<T>(g.last, g.rest));
  return sum_of<T>(dot);
}

template <typename T>
void write_teacher_gradient(const MixtureBackward<T>& args, Row<T>& row, Member<T>& x, Rows<T>& rows) {
  Output<T> output(args.teacher_gradient[x.k], x.logits->dtype, args.classes,
                   streams_gradient<T>(x.logits->dtype, args.rows, args.classes), rows.out);
  const T share = x.share * rows.inv_t;
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    if (!rows.one_tile) {
      rows.read(x, begin);
      rows.exponentiate(x, x.exps);
      rows.read(row.student, begin);
    }
    T* out = output.begin(row.n, begin);
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> g = vector_at(row.student.tile, i);
      store_part(out + i, share * load(x.exps + i) * (g - x.dot), std::min(count - i, kLanes<T>));
    }
    output.end(count);
  }
}

// The upstream takes the student's place.
template <typename T>
void backward_row(const MixtureBackward<T>& args, Row<T>& row, Rows<T>& rows) {
  const int64_t n = row.n;
  rows.place(row.student, args.upstream, n);
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    x.set_state(args.row_stats[x.k * args.rows + n], args.row_stats[(args.teachers + x.k) * args.rows + n]);
  }
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    rows.read(row.student, begin);
    for (int m = 0; m < row.members; ++m) {
      Member<T>& x = row.member[m];
      rows.read(x, begin);
      x.dot += dot_of_tile(x, row.student.tile, rows.exp);
    }
  }
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    x.dot *= x.to_p;
    args.dots[x.k * args.rows + n] = x.dot;
    if (m < row.used && args.teacher_gradient[x.k]) write_teacher_gradient(args, row, x, rows);
  }
  for (int k = 0; k < args.teachers; ++k)
    if (args.teacher_gradient[k] && rows.weight(k, n) == 0)
      zero_row<T>(args.teacher[k], args.teacher_gradient[k], n, args.classes);
}

template <typename T>
void mixture_backward(const MixtureBackward<T>& args, int64_t begin, int64_t end) {
  Rows<T> rows(args);
  for (int k = 0; k < args.teachers; ++k) std::fill_n(args.dots + k * args.rows + begin, end - begin, T(0));
  rows.for_each_block(begin, end, [&](Row<T>* first, Row<T>* last) {
    for (Row<T>* row = first; row < last; ++row) backward_row(args, *row, rows);
  });
  stream_fence();
}

// ---------------------------------------------------------------------------------------------------------- divergence

// With care, for a register whose mixture may have lost terms, or that holds −inf: adds p_k (log pbar − log q) to every
// member.
template <typename T>
void absorb_carefully(Row<T>& row, const Rows<T>& rows, int i, Vec<T> log_q) {
  const Vec<T> ratio = rows.log_mixture(row, i) - log_q;
  for (int m = 0; m < row.members; ++m) {
    Member<T>& x = row.member[m];
    // +inf also where an exponential underflowed
    const Vec<T> term = ratio == infinity<T>() ? ratio : x.to_max * load(x.tile_exps + i) * ratio;
    x.partial += vector_at(x.tile, i) == -infinity<T>() ? Vec<T>{} : term;
  }
}

template <typename T>
struct StudentFactors {
  T inv_t, log_sum, of_student;  // of_student·e is the student's part of the gradient
};

// Some registers of the second sweep, `left` columns from the first of them on in the tile: adds p_k (log pbar − log q)
// to every member, and writes the gradient.
template <int kCount, typename T>
inline void absorb(Row<T>& row, const Rows<T>& rows, int64_t begin, int i, int left, const StudentFactors<T>& student,
                   T* out) {
  constexpr int kL = kLanes<T>;
  Vec<T> mixture[kCount], log_q[kCount], ratio[kCount];
  mix(row, i, mixture);
  auto safe = mixture[0] == mixture[0] || mixture[0] != mixture[0];  // every lane
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
    const Vec<T> s = kCount == 1 ? vector_at(row.student.tile, i) : load(row.student.tile.values + i + u * kL);
    log_q[u] = (s - row.student.offset) * student.inv_t - student.log_sum;
    ratio[u] = log_of(mixture[u]) - log_q[u];
    auto here = mixture[u] >= kSafeMixture<T> && log_q[u] > -infinity<T>();
    if constexpr (kCount == 1) {
      here = here || first_lanes<T>(splat(T(1)), left) == 0;  // past the row
      ratio[u] = first_lanes<T>(ratio[u], left);
    }
    safe = safe && here;
  }
  if (all_of(safe)) {
    for (int m = 0; m < row.members; ++m) {
      Member<T>& x = row.member[m];
      Vec<T> dot{};
#pragma GCC unroll 4
      for (int u = 0; u < kCount; ++u) dot += load(x.tile_exps + i + u * kL) * ratio[u];
      x.partial += x.to_max * dot;
    }
  } else {
    rows.read_teachers(row, begin);
    for (int u = 0; u < kCount; ++u) absorb_carefully(row, rows, i + u * kL, log_q[u]);
  }
  if (!out) return;
  const T of_student = student.of_student * row.student.to_max;
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u)
    mixture[u] = of_student * load(row.student.tile_exps + i + u * kL) - student.inv_t * mixture[u];
  put(out + i, mixture, left);
}

template <typename T>
void second_sweep(const MixtureDivergence<T>& args, Row<T>& row, Rows<T>& rows, Output<T>& output) {
  const T sum = row.student.sum;
  const StudentFactors<T> student{rows.inv_t, log_of(sum), row.total_weight * rows.inv_t / sum};
  for (int64_t begin = 0; begin < args.classes; begin += kTileColumns) {
    const int count = tile_count(args.classes, begin);
    rows.start_tile(row, begin, /*student=*/true);
    T* out = args.gradient ? output.begin(row.n, begin) : nullptr;
    for_each_group<T>(
        count, [&](int i, auto registers, int left) { absorb<registers>(row, rows, begin, i, left, student, out); });
    for (int m = 0; m < row.members; ++m) row.member[m].dot += sum_of<T>(row.member[m].partial);
    if (out) output.end(count);
  }
}

// What is not written here has been set to 0.
template <typename T>
void write_stats(const MixtureDivergence<T>& args, const Row<T>& row) {
  const RowStats at{args.teachers};
  T* out = args.row_stats + row.n;
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
  args.divergence[row.n] = divergence;
}

template <typename T>
void mixture_divergence(const MixtureDivergence<T>& args, int64_t begin, int64_t end) {
  Rows<T> rows(args);
  Output<T> output(args.gradient, args.student.dtype, args.classes,
                   streams_gradient<T>(args.student.dtype, args.rows, args.classes), rows.out);
  for (int i = 0; i < RowStats{args.teachers}.size(Divergence::forward_kl); ++i)
    std::fill_n(args.row_stats + i * args.rows + begin, end - begin, T(0));
  rows.for_each_block(begin, end, [&](Row<T>* first, Row<T>* last) {
    for (Row<T>* row = first; row < last; ++row) {
      rows.place(row->student, args.student, row->n);
      row->student.set_state(0, 0);
    }
    rows.find_states(first, last, /*student=*/true);
    for (Row<T>* row = first; row < last; ++row) {
      if (row->members > 0) second_sweep(args, *row, rows, output);
      write_stats(args, *row);
      if (args.gradient && row->used == 0) zero_row<T>(args.student, args.gradient, row->n, args.classes);
    }
  });
  stream_fence();
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
