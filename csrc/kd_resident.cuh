// Strategy A: a row stays on chip, so one pass gives its loss and its gradient. Memory sees K + 1 reads and one write,
// or no write where no gradient is asked for; what a row takes on chip does not depend on K.
//
// With x_k the teacher's p (forward KL, DKD), log p (reverse KL) or of_student (elementwise), the gradient needs Σ w_k
// x_k. Known weights: one sum. Computed ones, which only the last teacher settles: Σ x_k and Σ v_k x_k, v_k = e^{CE_k −
// M} with a running maximum M, or H_k.
//
// x_k needs the sums of the teacher's whole row: a second pass over the tile. It is also where an elementwise
// divergence is summed.
#pragma once

#include "kd_elementwise.cuh"
#include "kd_tiles.cuh"

namespace mtkd_fast {

// How one teacher enters the sums: plain += first·x, by_signal = fade·by_signal + second·x.
struct Share {
  float first, fade, second;
};

template <bool two_sums>
MTKD_DEVICE Share share_of(WeightRule rule, float known_weight, float signal, float& largest_signal) {
  if (!two_sums) return {known_weight, 1.0f, 0.0f};
  if (rule == WeightRule::entropy) return {1.0f, 1.0f, signal};
  const float max = larger(largest_signal, signal);
  const Share share{1.0f, relative_exp(largest_signal, max), relative_exp(signal, max)};
  largest_signal = max;
  return share;
}

// e = e^{(t−local)/τ} and dx = t − local of a piece -> x = p or log p, given the row's maximum and sum. A log p of −inf
// stands as 0: its divergence is +inf already, or its column weighs nothing. Without a class beside a target that
// stands apart, p is 0.
template <Kind kind, int N>
MTKD_DEVICE void teacher_values(const float (&dx)[N], const float (&e)[N], float local_max,
                                const TeacherSummary& teacher, const Terms& terms, float (&x)[N]) {
  const float shift = local_max == -infinity<float>() ? 0.0f : local_max - teacher.max;
  const bool nothing = kind == Kind::dkd && teacher.sum == 0;
  const float factor = nothing ? 0.0f : device::exp2(shift * terms.log2e_t) / teacher.sum;
  const float log_sum = log_of(teacher.sum);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kind == Kind::reverse_kl) {
      x[i] = dx[i] == -infinity<float>() ? 0.0f : (dx[i] + shift) * terms.inv_t - log_sum;
    } else {
      x[i] = e[i] * factor;
    }
  }
}

template <Kind kind, bool two_sums, typename Group, typename Tile>
struct ResidentRow {
  static constexpr int kWidth = Tile::kWidth;
  static constexpr bool kAhead = Tile::kDepth > 1;  // else the next teacher takes the place of this one

  const KDForward<float>& args;
  const Terms& terms;
  Group& group;
  Tile& tile;
  const Summaries summaries;  // shared
  const Row row;

  MTKD_DEVICE bool reads_student() const { return row.counts && (args.kd_scale != 0 || args.ce_weight != 0); }
  MTKD_DEVICE InputRow student_logits() const { return input_row(args.student, row.position); }
  MTKD_DEVICE InputRow teacher_logits(int k) const { return input_row(args.teacher[k], row.position); }

  MTKD_DEVICE Wanted wanted(const Logits& logits, bool reads) const {
    const int64_t first = row.position.inner - device::thread_index() % kWarp;
    const bool in_line = logits.inner_stride == 1 && first >= 0 && first + kWarp <= args.inner;
    return {input_row(logits, row.position), reads, in_line};
  }
  MTKD_DEVICE Wanted wanted_teacher(int k) const {
    if (k >= args.teachers) return {};
    return wanted(args.teacher[k], reads_teacher(args, row, known_weight(args, k, row)));
  }

  MTKD_DEVICE Columns columns(int j, int c) const {
    return columns_of<kind>(tile.chunk(j, c), args.classes, row.label);
  }
  MTKD_DEVICE void student_of(int j, float (&x)[kWidth]) const {
    tile.student(j, x);
#pragma unroll
    for (int c = 0; c < Tile::kChunks; ++c) set_apart<kind>(columns(j, c), x + c * kChunk);
  }
  MTKD_DEVICE void teacher_of(int j, float (&x)[kWidth]) const {
    tile.teacher(j, x);
#pragma unroll
    for (int c = 0; c < Tile::kChunks; ++c) set_apart<kind>(columns(j, c), x + c * kChunk);
  }

  MTKD_DEVICE SoftmaxState<float> absorb_student_row() {
    SoftmaxState<float> state;
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth];
      Columns absorbed[Tile::kChunks];
      student_of(j, x);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) absorbed[c] = columns(j, c);
      absorb_student(state, x, absorbed, terms);
    }
    group.merge(state, MergeStudent{terms});
    return state;
  }

  MTKD_DEVICE void student_piece(int j, float max, float (&ds)[kWidth], float (&es)[kWidth]) const {
    float x[kWidth];
    student_of(j, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      ds[i] = shifted(x[i], max);
      es[i] = kind == Kind::reverse_kl ? device::exp2(ds[i] * terms.log2e_t) : 0.0f;
    }
  }

  // x of one piece. kAhead: there is one, whose exponentials, relative to the thread's own maximum, are still here.
  MTKD_DEVICE void value_of_piece(int j, float local_max, const TeacherSummary& teacher, float (&dx)[kWidth],
                                  float (&e)[kWidth], float (&x)[kWidth]) const {
    if constexpr (kAhead) {
      teacher_values<kind>(dx, e, local_max, teacher, terms, x);
    } else {
      teacher_of(j, x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        dx[i] = shifted(x[i], teacher.max);
        e[i] = device::exp2(dx[i] * terms.log2e_t);
      }
      teacher_values<kind>(dx, e, teacher.max, teacher, terms, x);
    }
  }
  // The same for an elementwise divergence, and its part of D and G.
  MTKD_DEVICE void elements_of_piece(int j, const Softmax& student, const Softmax& teacher, ElementSums& sums,
                                     float (&x)[kWidth]) const {
    float s[kWidth], t[kWidth];
    tile.student(j, s);
    tile.teacher(j, t);
    auto p = [&](int i) { return probability(t[i], teacher, terms); };
    auto q = [&](int i) { return probability(s[i], student, terms); };
    for_each_element<kWidth>(args.divergence, args.beta, p, q, [&](int i, float, const Element<float>& of) {
      sums.add(of);
      x[i] = of.of_student;
    });
  }

  // First pass: the state of the thread's columns. Leaves dx and e of its last piece.
  MTKD_DEVICE TeacherState state_of_teacher(float student_max, float (&dx)[kWidth], float (&e)[kWidth]) const {
    TeacherState state;
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth], ds[kWidth], es[kWidth];
      teacher_of(j, x);
      student_piece(j, student_max, ds, es);
      absorb_teacher<kind>(state, x, ds, es, terms, dx, e);
    }
    return state;
  }

  // One teacher: its state into the summary, its columns into the sums, and a later teacher on its way.
  MTKD_DEVICE void absorb_teacher_row(int k, const SoftmaxState<float>& student, float student_at_label,
                                      float& largest_signal) {
    const float weight = known_weight(args, k, row);
    const bool reads = reads_teacher(args, row, weight);
    if (!group.any(reads)) {
      if (group.leads()) summaries[k] = TeacherSummary{};
      tile.fetch_teacher(k + Tile::kDepth, wanted_teacher(k + Tile::kDepth));
      return;
    }
    tile.teacher_arrives(k, args.teacher[k].dtype, reads);
    if (kAhead) tile.fetch_teacher(k + Tile::kDepth, wanted_teacher(k + Tile::kDepth));
    // Where weights are known, one thread of a block needs it: the one that finishes the summary.
    const bool needs_label = reads && wants_label_of_teachers<kind>(args.rule) && (two_sums || group.leads());
    const float at_label = needs_label ? label_logit(teacher_logits(k), row) : 0.0f;

    float dx[kWidth], e[kWidth];
    TeacherState state = state_of_teacher(student.max, dx, e);
    const float local_max = state.max;
    group.merge(state, MergeTeacher<kind>{terms});
    TeacherSummary summary = summarise<kind>(state, at_label, args.rule);

    const bool adds = args.gradient.data != nullptr && reads && (two_sums || weight != 0);
    const Share share = share_of<two_sums>(args.rule, weight, summary.signal, largest_signal);
    const Wanted next = kAhead ? Wanted{} : wanted_teacher(k + 1);
    const Softmax p = softmax_of(state.max, state.sum), q = softmax_of(student.max, student.sum);
    ElementSums sums;
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth];
      if constexpr (kind == Kind::elementwise) {
        elements_of_piece(j, q, p, sums, x);
      } else if (adds) {
        value_of_piece(j, local_max, summary, dx, e, x);
      }
      if (adds) tile.accumulate(j, x, share.first, share.fade, share.second);
      tile.fetch_piece(j, next);
    }
    if constexpr (kind == Kind::elementwise) group.merge(sums, AddLanes{});
    if (!group.leads()) return;
    if constexpr (kind == Kind::elementwise) {
      summary.divergence = sums.divergence;
      summary.slope = sums.slope;
    } else {
      set_divergence<kind>(summary, state.cross, student, {at_label, student_at_label}, args.beta, terms);
    }
    summaries[k] = reads ? summary : TeacherSummary{};
  }

  MTKD_DEVICE void write_gradient(const SoftmaxState<float>& student, float at_label, const Mixture& mixture) const {
    const OutputRow out = output_row(args.gradient, row.position);
    const StudentGradient g = student_gradient<kind>(args, row, row.scale, student, at_label, mixture);
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth], mean[kWidth];
      student_of(j, x);
      tile.mean(j, mixture.plain, mixture.by_signal, mean);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) {
        const int64_t chunk = tile.chunk(j, c);
        gradient_of_chunk<kind>(g, terms, chunk * kChunk, x + c * kChunk, mean + c * kChunk);
        if (!row.counts) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) x[c * kChunk + i] = 0;
        }
        if (chunk * kChunk < args.classes) store_chunk(out, chunk, args.classes, x + c * kChunk);
      }
    }
  }

  MTKD_DEVICE void forward() {
    tile.fetch_student(wanted(args.student, reads_student()));
#pragma unroll 1
    for (int k = 0; k < Tile::kDepth; ++k) tile.fetch_teacher(k, wanted_teacher(k));
    // One thread finishes the row; one of a block, the summaries. DKD's gradient of the hard label is everyone's.
    const bool finishes = kind == Kind::dkd ? group.leads() || args.ce_weight != 0 : group.rank() == 0;
    const bool needs_label = wants_label_of_student<kind>(args, row) && finishes;
    const float at_label = needs_label ? label_logit(student_logits(), row) : 0.0f;
    tile.student_arrives(args.student.dtype, reads_student());
    const SoftmaxState<float> student = absorb_student_row();
    const float ce = group.rank() == 0 ? student_cross_entropy<kind>(args, row, student, at_label) : 0.0f;

    tile.clear();
    float largest_signal = -infinity<float>();
    for (int k = 0; k < args.teachers; ++k) absorb_teacher_row(k, student, at_label, largest_signal);
    group.sync();  // the summaries are there
    const bool exists = row.index < args.rows;
    const int lane = group.rank() % group.lanes();
    const bool writes = exists && group.rank() < group.lanes();
    const Mixture mixture = mix<kind>(args, row, summaries, lane, group.lanes(), writes);
    if (!exists) return;
    if (group.rank() == 0) write_row(args, row, student, ce, mixture);
    if (args.gradient.data != nullptr) write_gradient(student, at_label, mixture);
  }
};

// Shared memory: the group's scratch, [K][rows of the block] summaries, the tile.
MTKD_HD int64_t summary_bytes(int summaries) {  // whole Words, for the tile that follows
  const int64_t bytes = summaries * static_cast<int64_t>(sizeof(TeacherSummary));
  return (bytes + sizeof(Words) - 1) / sizeof(Words) * sizeof(Words);
}

struct ResidentArgs : KDForward<float> {
  int group_width;  // lanes a row, where lanes share one; warps, where warps share pixels
  bool wide;        // some logits are floats
};

template <Kind kind, bool two_sums, typename Group, typename Tile, int max_threads>
MTKD_KERNEL(max_threads, 1)
kd_resident(MTKD_PARAM(ResidentArgs) args) {
  Group group(args.group_width, device::shared_memory());
  const int rows_in_block = group.groups_in_block();
  TeacherSummary* summaries = summaries_of(group, device::shared_memory());
  Tile tile(args, args.wide, group.rank(), group.size(),
            reinterpret_cast<char*>(summaries) + summary_bytes(rows_in_block * args.teachers));
  const Terms terms = terms_of(args, args.rule);

  // Lanes of one warp walk on together: a row beyond the last one does not count.
  const int first_of_warp = group.index_in_block() / group.groups_in_warp() * group.groups_in_warp();
  const int64_t step = Group::places() * rows_in_block;
  for (int64_t base = Group::place() * rows_in_block; base + first_of_warp < args.rows; base += step) {
    const int64_t index = base + group.index_in_block();
    ResidentRow<kind, two_sums, Group, Tile> row{args,
                                                 terms,
                                                 group,
                                                 tile,
                                                 {summaries + group.index_in_block(), rows_in_block},
                                                 read_row(args, args.items, index)};
    row.forward();
    group.sync();  // the summaries have been read
  }
  group.leave();
}

}  // namespace mtkd_fast
