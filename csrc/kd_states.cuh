// How the states of row_stats.h take several columns at once and merge across lanes. Columns are exponentiated relative
// to state.max, so one column costs one exponential. A state adds columns of which none is larger; before it absorbs
// others its maximum is raised, once for all of them.
#pragma once

#include "chunk.cuh"
#include "group.cuh"

namespace mtkd_fast {

// What a kernel is compiled for. The elementwise divergences are one kind: they differ in a formula of one class,
// chosen at run time.
enum class Kind : int { forward_kl, reverse_kl, dkd, elementwise };

constexpr Kind kind_of(Divergence divergence) {
  if (is_elementwise(divergence)) return Kind::elementwise;
  if (divergence == Divergence::dkd) return Kind::dkd;
  return divergence == Divergence::reverse_kl ? Kind::reverse_kl : Kind::forward_kl;
}

// e^{d} from e^{d/τ}: free at τ = 1, one or two multiplications at τ = 2 and 4, an exponential of its own elsewhere.
enum class AtOne : int { same, squared, squared_twice, own };

// What the numbers of a call have in common.
struct Terms {
  float inv_t;         // 1/τ
  float log2e_t;       // log2(e)/τ: e^{d/τ} = 2^{d·log2e_t}
  float equal_weight;  // 1/K
  AtOne at_one;
  bool teacher_sum1;   // Σ e^{t−max} is wanted (cross-entropies, entropies)
  bool teacher_dot1;   // Σ e^{t−max}(t−max) is wanted (entropies)
  bool student_sum1;   // Σ e^{s−max} is wanted (hard label)
  bool student_total;  // Σ (s−max) is wanted (label smoothing)
};

MTKD_DEVICE Terms terms_of(const KDArgs<float>& args, WeightRule rule) {
  Terms terms;
  const float t = args.temperature;
  terms.inv_t = 1.0f / t;
  terms.log2e_t = device::kLog2E / t;
  terms.equal_weight = 1.0f / args.teachers;
  terms.at_one = t == 1 ? AtOne::same : t == 2 ? AtOne::squared : t == 4 ? AtOne::squared_twice : AtOne::own;
  terms.teacher_sum1 = rule == WeightRule::confidence || rule == WeightRule::entropy;
  terms.teacher_dot1 = rule == WeightRule::entropy;
  terms.student_sum1 = args.ce_weight != 0;
  terms.student_total = terms.student_sum1 && args.label_smoothing > 0;
  return terms;
}

// e1[i] = e^{dx[i]}, given e[i] = e^{dx[i]/τ}.
MTKD_DEVICE void exponentials_at_one(const float* e, const float* dx, AtOne how, float (&e1)[kChunk]) {
  if (how == AtOne::own) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e1[i] = device::exp2(dx[i] * device::kLog2E);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) e1[i] = e[i];
  const int squarings = how == AtOne::same ? 0 : how == AtOne::squared ? 1 : 2;
#pragma unroll 1
  for (int times = 0; times < squarings; ++times) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e1[i] *= e1[i];
  }
}

// In pairs, so that additions do not wait for each other.
MTKD_DEVICE float sum_of_chunk(const float* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Σ x·y, in two chains.
MTKD_DEVICE float dot_of_chunk(const float* x, const float* y) {
  float even = x[0] * y[0], odd = x[1] * y[1];
#pragma unroll
  for (int i = 2; i < kChunk; i += 2) {
    even += x[i] * y[i];
    odd += x[i + 1] * y[i + 1];
  }
  return even + odd;
}

// Σ e^{dx}.
MTKD_DEVICE float sum_at_one(const float* e, const float* dx, AtOne how) {
  if (how == AtOne::same) return sum_of_chunk(e);
  if (how == AtOne::squared) return dot_of_chunk(e, e);
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    x[i] = how == AtOne::squared_twice ? e[i] * e[i] : device::exp2(dx[i] * device::kLog2E);
  }
  return how == AtOne::squared_twice ? dot_of_chunk(x, x) : sum_of_chunk(x);
}

// Σ cross_term. Where no logit is −inf it is finite, and no column wants a look of its own: in long rows, of which few
// chunks have columns that are not there.
template <bool long_row>
MTKD_DEVICE float cross_of_chunk(const float* e, const float* dx, const float* dy) {
  if (long_row) {
    float ratio[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) ratio[i] = dx[i] - dy[i];
    const float cross = dot_of_chunk(e, ratio);
    if (isfinite(cross)) return cross;
  }
  float cross = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) cross += cross_term(dx[i], e[i], dx[i], dy[i]);
  return cross;
}

template <int N>
MTKD_DEVICE float largest(const float (&x)[N], float start) {
  float even = start, odd = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) (i % 2 == 0 ? even : odd) = fmaxf(i % 2 == 0 ? even : odd, x[i]);
  return fmaxf(even, odd);  // passes over NaN, as `larger` does
}

// A maximum raised by nothing.
MTKD_DEVICE Raise<float> unraised() {
  Raise<float> by(0.0f, 0.0f, 1.0f);
  return by;
}

// Which columns of a chunk a state absorbs.
struct Columns {
  int begin, end;  // the classes; none where begin >= end
  int apart;       // but for the target's, where DKD sets it apart; elsewhere −1
};

// Of a row with classes from `lead` on, which is less than a chunk, up to `end`.
template <Kind kind>
MTKD_DEVICE Columns columns_of(int64_t chunk, int64_t end, int64_t label, int lead = 0) {
  const int64_t first = chunk * kChunk, left = end - first;
  const bool apart = kind == Kind::dkd && label >= first && label < first + kChunk;
  return {chunk > 0 ? 0 : lead, left > kChunk ? kChunk : static_cast<int>(left),
          apart ? static_cast<int>(label - first) : -1};
}

// The logit of a target that stands apart counts as −inf. `x` points at eight registers.
template <Kind kind>
MTKD_DEVICE void set_apart(const Columns& columns, float* x) {
  if constexpr (kind == Kind::dkd) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = i == columns.apart ? -infinity<float>() : x[i];
  }
}

// ------------------------------------------------------------------------------------------------------------- student

// What `columns` leave out is −inf in x, and does not count in `total`.
template <int N>
MTKD_DEVICE void add_student(SoftmaxState<float>& state, const float (&x)[N], const Columns (&columns)[N / kChunk],
                             const Terms& terms) {
#pragma unroll
  for (int c = 0; c < N / kChunk; ++c) {
    float dx[kChunk], e[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dx[i] = shifted(x[c * kChunk + i], state.max);
      e[i] = device::exp2(dx[i] * terms.log2e_t);
    }
    state.sum += sum_of_chunk(e);
    if (terms.student_sum1) state.sum1 += sum_at_one(e, dx, terms.at_one);
    if (terms.student_total) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const bool counts = i >= columns[c].begin && i < columns[c].end && i != columns[c].apart;
        state.total += counts ? dx[i] : 0.0f;
      }
      const int count = columns[c].end - columns[c].begin - (columns[c].apart >= 0 ? 1 : 0);
      state.count += count > 0 ? static_cast<float>(count) : 0.0f;
    }
  }
}

// Returns how the maximum rose.
template <int N>
MTKD_DEVICE Raise<float> absorb_student(SoftmaxState<float>& state, const float (&x)[N],
                                        const Columns (&columns)[N / kChunk], const Terms& terms) {
  const float max = largest(x, state.max);
  Raise<float> by = unraised();
  if (max > state.max) {
    if (state.max != -infinity<float>()) {
      by = Raise<float>(state.max, max, terms.inv_t);
      raise(state, max, by);
    }
    state.max = max;
  }
  add_student(state, x, columns, terms);
  return by;
}

struct MergeStudent {
  const Terms& terms;

  MTKD_DEVICE void operator()(SoftmaxState<float>& state, int width) const {
    const float max = max_lanes(state.max, width);
    raise(state, max, Raise<float>(state.max, max, terms.inv_t));
    state.sum = sum_lanes(state.sum, width);
    if (terms.student_sum1) state.sum1 = sum_lanes(state.sum1, width);
    if (terms.student_total) {
      state.total = sum_lanes(state.total, width);
      state.count = sum_lanes(state.count, width);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- teacher

// One teacher against the student. `cross` is that of the divergence's own direction: forward KL and DKD the teacher's
// expectation, reverse KL the student's, whose share of Σ e^{(s−max)/τ} over the same columns is `student_sum`. The
// elementwise divergences need neither.
struct TeacherState {
  float max = -infinity<float>();
  float sum = 0;
  float sum1 = 0;
  float dot1 = 0;
  float cross = 0;
  float student_sum = 0;
};

template <Kind kind>
MTKD_DEVICE void raise_teacher(TeacherState& state, float max, const Terms& terms) {
  const Raise<float> by(state.max, max, terms.inv_t);
  if (kind == Kind::reverse_kl) {
    state.cross = raise_cross(state.cross, state.student_sum, unraised(), by);
  } else if (kind != Kind::elementwise) {
    state.cross = raise_cross(state.cross, state.sum, by, unraised());
  }
  state.dot1 = by.factor1 * (state.dot1 + by.shift * state.sum1);
  state.sum *= by.factor;
  state.sum1 *= by.factor1;
  state.max = max;
}

// ds[i]: the student's logits less its maximum; es[i]: e^{ds/τ}, used by reverse KL. Leaves e^{dx/τ} of the teacher
// relative to state.max.
template <Kind kind, bool long_row, int N>
MTKD_DEVICE void add_teacher(TeacherState& state, const float (&x)[N], const float (&ds)[N], const float (&es)[N],
                             const Terms& terms, float (&e)[N]) {
#pragma unroll
  for (int c = 0; c < N; c += kChunk) {
    float dx[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dx[i] = shifted(x[c + i], state.max);
      e[c + i] = device::exp2(dx[i] * terms.log2e_t);
    }
    state.sum += sum_of_chunk(e + c);
    if (kind == Kind::reverse_kl) {
      state.student_sum += sum_of_chunk(es + c);
      state.cross += cross_of_chunk<long_row>(es + c, ds + c, dx);
    } else if (kind != Kind::elementwise) {
      state.cross += cross_of_chunk<long_row>(e + c, dx, ds + c);
    }
    if (terms.teacher_dot1) {
      float e1[kChunk];
      exponentials_at_one(e + c, dx, terms.at_one, e1);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        state.sum1 += e1[i];
        state.dot1 += dx[i] == -infinity<float>() ? 0.0f : e1[i] * dx[i];
      }
    } else if (terms.teacher_sum1) {
      state.sum1 += sum_at_one(e + c, dx, terms.at_one);
    }
  }
}

template <Kind kind, bool long_row, int N>
MTKD_DEVICE void absorb_teacher(TeacherState& state, const float (&x)[N], const float (&ds)[N], const float (&es)[N],
                                const Terms& terms, float (&e)[N]) {
  const float max = largest(x, state.max);
  if (max > state.max) {
    if (state.max != -infinity<float>()) raise_teacher<kind>(state, max, terms);
    state.max = max;
  }
  add_teacher<kind, long_row>(state, x, ds, es, terms, e);
}

template <Kind kind>
struct MergeTeacher {
  const Terms& terms;

  MTKD_DEVICE void operator()(TeacherState& state, int width) const {
    raise_teacher<kind>(state, max_lanes(state.max, width), terms);
    state.sum = sum_lanes(state.sum, width);
    if (kind != Kind::elementwise) state.cross = sum_lanes(state.cross, width);
    if (kind == Kind::reverse_kl) state.student_sum = sum_lanes(state.student_sum, width);
    if (terms.teacher_sum1) state.sum1 = sum_lanes(state.sum1, width);
    if (terms.teacher_dot1) state.dot1 = sum_lanes(state.dot1, width);
  }
};

}  // namespace mtkd_fast
