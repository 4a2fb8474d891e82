// The op `mutual` in one instruction set (see instruction_sets.h), a row of all M students at a time.
//
// The forward sweeps over the columns in tiles: every student's tile is exponentiated once, then all pairs are summed
// while the tiles are in cache. If gradients are asked for, a second sweep finds the exponentials there too, or, in
// rows of several tiles, computes them again from logits in cache. The backward starts from the numbers kept.

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

constexpr int64_t kTilesBytes = 64 << 10;  // of all students' tiles, which pairs read M − 1 times

// The students in one row, and a thread's memory for them.
template <typename T>
class Students {
 public:
  const int count, columns;  // columns: of a tile
  const T inv_t;             // 1/τ
  const TemperedExp<T> exp;
  alignas(64) T max[kMaxTeachers] = {};  // the states of row_stats.h
  alignas(64) T sum[kMaxTeachers] = {};  // Σ e^{(z−max)/τ}
  alignas(64) T log_sum[kMaxTeachers] = {};
  Raise<T> raise[kMaxTeachers];                      // by the tile at hand
  bool learns[kMaxTeachers], teaches[kMaxTeachers];  // some a_ij, some a_ji is not 0
  Tile<T> widened, out;

  explicit Students(const MutualArgs<T>& args)
      : count(args.students),
        columns(columns_of(args.students)),
        inv_t(1 / args.temperature),
        exp(args.temperature),
        pitch_(columns + kLanes<T>),  // rows of exactly 4 KB would all map to the same sets of the cache
        pairs_(int64_t{count} * count) {
    const size_t bytes = (2 * count * pitch_ + 3 * pairs_) * sizeof(T);
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < count; ++j) weight(i, j) = i == j ? T(0) : given_weight(args, i, j);
    }
    for (int i = 0; i < count; ++i) {
      learns[i] = teaches[i] = false;
      for (int j = 0; j < count; ++j) {
        learns[i] = learns[i] || weight(i, j) != 0;
        teaches[i] = teaches[i] || weight(j, i) != 0;
      }
    }
  }

  bool reads(int i) const { return learns[i] || teaches[i]; }
  bool paired(int i, int j) { return weight(i, j) != 0 || weight(j, i) != 0; }

  T* shifted(int i) { return memory_.get() + i * pitch_; }           // z − max of the tile
  T* exps(int i) { return memory_.get() + (count + i) * pitch_; }    // e^{(z−max)/τ}
  T& weight(int i, int j) { return numbers(0)[i * count + j]; }      // a_ij
  T& cross(int i, int j) { return numbers(1)[i * count + j]; }       // Σ e_i·((z_i−max) − (z_j−max))
  T& divergence(int i, int j) { return numbers(2)[i * count + j]; }  // D_ij = KL(p_j ‖ p_i)

 private:
  static int columns_of(int count) {
    const int64_t fit = kTilesBytes / (2 * count * static_cast<int64_t>(sizeof(T)));
    return static_cast<int>(std::clamp<int64_t>(fit / 128 * 128, 128, kTileColumns));
  }
  static T given_weight(const MutualArgs<T>& args, int i, int j) {
    return args.pair_weights ? args.pair_weights[i * args.students + j] : T(1) / (args.students - 1);
  }
  T* numbers(int block) { return memory_.get() + 2 * count * pitch_ + block * pairs_; }

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  const int64_t pitch_, pairs_;
  std::unique_ptr<T, Free> memory_;
};

template <typename T>
struct Extremes {  // NaN is not seen
  T low, high;
};

template <typename T>
Extremes<T> extremes(const Vectors<T>& x) {
  Vec<T> high = splat(-infinity<T>()), low = splat(infinity<T>());
  for (int i = 0; i < x.whole; i += kLanes<T>) {
    const Vec<T> v = load(x.values + i);
    high = v > high ? v : high;
    low = v < low ? v : low;
  }
  if (x.rest) {
    const Vec<T> v = first_lanes<T>(x.last, x.rest, splat(infinity<T>()));
    high = x.last > high ? x.last : high;
    low = v < low ? v : low;
  }
  return {-max_of<T>(-low), max_of<T>(high)};
}

// shifted(i) and exps(i) of a tile, relative to `max`; both 0 in what the last vector holds past the row. Returns the
// sum of the exponentials.
template <typename T>
T exponentiate(Students<T>& students, int i, const Vectors<T>& x, T max) {
  const T offset = offset_of(max);
  T *shifted = students.shifted(i), *exps = students.exps(i);
  Vec<T> sum{};
  const auto put = [&](int at, Vec<T> z, int count) {
    const Vec<T> d = z - offset, e = students.exp(d);
    store(shifted + at, first_lanes<T>(d, count));
    store(exps + at, e);
    sum += e;
  };
  for (int at = 0; at < x.whole; at += kLanes<T>) put(at, load(x.values + at), kLanes<T>);
  if (x.rest) put(x.whole, x.last, x.rest);
  return sum_of<T>(sum);
}

template <typename T>
Vectors<T> tile_of(const MutualArgs<T>& args, Students<T>& students, int i, int64_t n, int64_t begin, int count) {
  const Logits& z = args.student[i];
  const int64_t start = args.inner == args.rows ? n * z.inner_stride : row_start(z, n, args.inner);
  Vectors<T> x;
  fill(x, read_tile(z, start, begin, count, students.widened.values), count);
  return x;
}

// What a tile adds to cross(i, j) and cross(j, i). With care where a logit may be −inf: see cross_term.
template <typename T, bool kCareful>
void cross_sums(Students<T>& students, int i, int j, int count) {
  const T *di = students.shifted(i), *dj = students.shifted(j), *ei = students.exps(i), *ej = students.exps(j);
  Vec<T> of_i[2] = {}, of_j[2] = {};  // two of each: one alone would wait for its last addition
  const auto step = [&](int c, int chain) {
    const Vec<T> a = load(di + c), b = load(dj + c), ratio = a - b, e = load(ei + c), f = load(ej + c);
    if constexpr (kCareful) {
      of_i[chain] += a == -infinity<T>() ? Vec<T>{} : ratio == infinity<T>() ? ratio : e * ratio;
      of_j[chain] += b == -infinity<T>() ? Vec<T>{} : ratio == -infinity<T>() ? -ratio : -f * ratio;
    } else {
      of_i[chain] += e * ratio;
      of_j[chain] -= f * ratio;
    }
  };
  int c = 0;
  for (; c + kLanes<T> < count; c += 2 * kLanes<T>) step(c, 0), step(c + kLanes<T>, 1);
  if (c < count) step(c, 0);
  students.cross(i, j) += sum_of<T>(of_i[0] + of_i[1]);
  students.cross(j, i) += sum_of<T>(of_j[0] + of_j[1]);
}

// One tile of every student, and of every pair.
template <typename T>
void absorb(const MutualArgs<T>& args, Students<T>& students, int64_t n, int64_t begin, int count) {
  Raise<T>* const raise = students.raise;
  T sum_before[kMaxTeachers];
  bool careful[kMaxTeachers];
  for (int i = 0; i < students.count; ++i) {
    if (!students.reads(i)) continue;
    const Vectors<T> x = tile_of(args, students, i, n, begin, count);
    const Extremes<T> found = extremes(x);
    const T max = larger(students.max[i], found.high);
    raise[i] = Raise<T>(students.max[i], max, students.inv_t);
    careful[i] = found.low == -infinity<T>();
    sum_before[i] = students.sum[i];
    students.sum[i] = students.sum[i] * raise[i].factor + exponentiate(students, i, x, max);
    students.max[i] = max;
  }
  for (int i = 0; i < students.count; ++i) {
    for (int j = i + 1; j < students.count; ++j) {
      if (!students.paired(i, j)) continue;
      T &ij = students.cross(i, j), &ji = students.cross(j, i);
      if (begin == 0) {
        ij = ji = 0;
      } else {
        ij = raise_cross(ij, sum_before[i], raise[i], raise[j]);
        ji = raise_cross(ji, sum_before[j], raise[j], raise[i]);
      }
      if (careful[i] || careful[j])
        cross_sums<T, true>(students, i, j, count);
      else
        cross_sums<T, false>(students, i, j, count);
    }
  }
}

template <typename T>
void take_logarithms(Students<T>& students) {
  for (int i = 0; i < students.count; i += kLanes<T>) store(students.log_sum + i, log_of(load(students.sum + i)));
}

// Every D_ij; the row's Σ a_ij D_ij.
template <typename T>
T finish(Students<T>& students) {
  take_logarithms(students);
  T loss = 0;
  for (int i = 0; i < students.count; ++i) {
    for (int j = 0; j < students.count; ++j) {
      T& d = students.divergence(i, j);
      d = 0;
      if (students.weight(i, j) == 0) continue;
      d = kl_from_sums(students.cross(j, i), students.sum[j], students.log_sum[j], students.sum[i], students.log_sum[i],
                       students.inv_t);
      loss += students.weight(i, j) * d;
    }
  }
  return loss;
}

// ------------------------------------------------------------------------------------------------------------ gradient

// What the gradient of student i is made of; `factor` is scale·upstream/τ.
template <typename T>
class Learner {
 public:
  Learner(Students<T>& students, int i, bool detach_peers, T factor)
      : own_(students.exps(i)),
        shifted_(students.shifted(i)),
        per_e_(factor / students.sum[i]),
        to_peers_(!detach_peers && students.teaches[i]) {
    T learnt = 0;
    for (int j = 0; j < students.count; ++j) {
      const T learns = students.weight(i, j), taught = students.weight(j, i);
      if (learns != 0) peer_[peers_++] = {students.exps(j), learns * factor / students.sum[j]};
      learnt += learns;
      if (!to_peers_ || taught == 0) continue;
      pupil_[pupils_++] = {students.shifted(j), taught * students.inv_t};
      constant_ += taught * (students.log_sum[j] - students.log_sum[i] - students.divergence(j, i));
    }
    own_share_ = learnt * per_e_;
  }

  // Some vectors of it, from everybody's shifted() and exps() of a tile.
  template <int kCount>
  void gradient(int at, Vec<T> (&g)[kCount]) const {
    constexpr int kL = kLanes<T>;
    Vec<T> shares[kCount] = {};  // of all peers, before they meet what they are to cancel
    for (int p = 0; p < peers_; ++p) {
#pragma GCC unroll 4
      for (int u = 0; u < kCount; ++u) shares[u] += peer_[p].factor * load(peer_[p].numbers + at + u * kL);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kCount; ++u) g[u] = peers_ > 0 ? own_share_ * load(own_ + at + u * kL) - shares[u] : Vec<T>{};
    if (to_peers_) add_what_it_teaches(at, g);
  }

 private:
  struct Part {
    const T* numbers;  // of another student's tile
    T factor;
  };

  template <int kCount>
  void add_what_it_teaches(int at, Vec<T> (&g)[kCount]) const {
    constexpr int kL = kLanes<T>;
    Vec<T> log_ratio[kCount] = {};
    for (int p = 0; p < pupils_; ++p)
      for (int u = 0; u < kCount; ++u)
        log_ratio[u] += pupil_[p].factor * (load(shifted_ + at + u * kL) - load(pupil_[p].numbers + at + u * kL));
    for (int u = 0; u < kCount; ++u) {
      const Vec<T> e = load(own_ + at + u * kL);
      g[u] += e == 0 ? Vec<T>{} : per_e_ * e * (log_ratio[u] + constant_);
    }
  }

  const T *own_, *shifted_;
  const T per_e_;
  const bool to_peers_;
  T own_share_ = 0;
  T constant_ = 0;  // what does not depend on the column of Σ_j a_ji (log p_i − log p_j) − E_i
  int peers_ = 0, pupils_ = 0;
  Part peer_[kMaxTeachers], pupil_[kMaxTeachers];
};

template <typename T>
void zero_gradients(const MutualArgs<T>& args, int64_t n) {
  for (int i = 0; i < args.students; ++i)
    if (args.gradient[i]) zero_row<T>(args.student[i], args.gradient[i], n, args.classes);
}

// All gradients together are what leaves the caches before it is read.
template <typename T>
bool streams(const MutualArgs<T>& args, int i) {
  return streams_gradient<T>(args.student[i].dtype, args.rows * args.students, args.classes);
}

// Row n of every gradient. `in_cache`: the row is one tile, whose exponentials are those of the last sweep.
template <typename T>
void write_gradients(const MutualArgs<T>& args, Students<T>& students, int64_t n, T factor, bool in_cache) {
  const auto has_gradient = [&](int i) { return students.learns[i] || (!args.detach_peers && students.teaches[i]); };
  for (int i = 0; i < students.count; ++i)
    if (args.gradient[i] && !has_gradient(i)) zero_row<T>(args.student[i], args.gradient[i], n, args.classes);
  for (int64_t begin = 0; begin < args.classes; begin += students.columns) {
    const int count = static_cast<int>(std::min<int64_t>(students.columns, args.classes - begin));
    for (int i = 0; i < students.count && !in_cache; ++i)
      if (students.reads(i)) exponentiate(students, i, tile_of(args, students, i, n, begin, count), students.max[i]);
    for (int i = 0; i < students.count; ++i) {
      if (!args.gradient[i] || !has_gradient(i)) continue;
      const Learner<T> learner(students, i, args.detach_peers, factor);
      Output<T> output(args.gradient[i], args.student[i].dtype, args.classes, streams(args, i), students.out.values);
      T* out = output.begin(n, begin);
      for_each_group<T>(count, [&](int at, auto vectors, int left) {
        Vec<T> g[vectors];
        learner.gradient(at, g);
        put(out + at, g, left);
      });
      output.end(count);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- rows

template <typename T>
void skip_row(const MutualForward<T>& args, int64_t n) {
  for (int i = 0; i < MutualStats{args.students}.size(); ++i) args.row_stats[i * args.rows + n] = 0;
  args.row_loss[n] = 0;
  zero_gradients(args, n);
}

template <typename T>
void write_stats(const MutualForward<T>& args, Students<T>& students, int64_t n, T scale) {
  const MutualStats at{args.students};
  T* out = args.row_stats + n;
  out[at.scale() * args.rows] = scale;
  if (!args.keep_stats) return;
  for (int i = 0; i < args.students; ++i) {
    for (int j = 0; j < args.students; ++j) out[at.divergence(i, j) * args.rows] = students.divergence(i, j);
    out[at.max(i) * args.rows] = students.reads(i) ? students.max[i] : T(0);
    out[at.sum(i) * args.rows] = students.sum[i];
  }
}

template <typename T>
void mutual_forward(const MutualForward<T>& args, int64_t begin, int64_t end) {
  Students<T> students(args);
  const bool gradients = std::any_of(args.gradient, args.gradient + args.students, [](void* p) { return p; });
  for (int64_t n = begin; n < end; ++n) {
    const T row_weight = args.row_weights ? args.row_weights[n] : T(1);
    if (row_weight == 0) {
      skip_row(args, n);
      continue;
    }
    std::fill_n(students.max, students.count, -infinity<T>());
    std::fill_n(students.sum, students.count, T(0));
    for (int64_t at = 0; at < args.classes; at += students.columns)
      absorb(args, students, n, at, static_cast<int>(std::min<int64_t>(students.columns, args.classes - at)));
    args.row_loss[n] = row_weight * args.scale * finish(students);
    const T scale = args.items ? row_weight / *args.items : row_weight;
    write_stats(args, students, n, scale);
    if (gradients)
      write_gradients(args, students, n, scale * args.scale * students.inv_t, args.classes <= students.columns);
  }
  stream_fence();
}

template <typename T>
void mutual_backward(const MutualBackward<T>& args, int64_t begin, int64_t end) {
  const MutualStats at{args.students};
  Students<T> students(args);
  for (int64_t n = begin; n < end; ++n) {
    const T* in = args.row_stats + n;
    const T scale = in[at.scale() * args.rows];
    if (scale == 0) {
      zero_gradients(args, n);
      continue;
    }
    for (int i = 0; i < args.students; ++i) {
      for (int j = 0; j < args.students; ++j) students.divergence(i, j) = in[at.divergence(i, j) * args.rows];
      students.max[i] = in[at.max(i) * args.rows];
      students.sum[i] = in[at.sum(i) * args.rows];
    }
    take_logarithms(students);
    const T upstream = args.upstream ? args.upstream[n * args.upstream_stride] : T(1);
    write_gradients(args, students, n, scale * upstream * args.scale * students.inv_t, /*in_cache=*/false);
  }
  stream_fence();
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
