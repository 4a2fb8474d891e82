// Strategy A: a row stays on chip, so one pass gives its loss and its gradient. Memory sees K + 1 reads and one write,
// or no write where no gradient is asked for; what a row takes on chip does not depend on K.
//
// With x_k the teacher's p (forward KL) or log p (reverse KL), the gradient needs Σ w_k x_k. Known weights: one sum.
// Computed ones, which only the last teacher settles: Σ x_k and Σ v_k x_k, v_k = e^{CE_k − M} with a running maximum M,
// or H_k.
#pragma once

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
// stands as 0: its divergence is +inf already, or its column weighs nothing.
template <Divergence kind, int N>
MTKD_DEVICE void teacher_values(const float (&dx)[N], const float (&e)[N], float local_max,
                                const TeacherSummary& teacher, const Terms& terms, float (&x)[N]) {
  const float shift = local_max == -infinity<float>() ? 0.0f : local_max - teacher.max;
  const float factor = device::exp2(shift * terms.log2e_t) / teacher.sum;
  const float log_sum = log_of(teacher.sum);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kind == Divergence::forward_kl) {
      x[i] = e[i] * factor;
    } else {
      x[i] = dx[i] == -infinity<float>() ? 0.0f : (dx[i] + shift) * terms.inv_t - log_sum;
    }
  }
}

template <Divergence kind, bool two_sums, typename Group, typename Tile>
struct ResidentRow {
  static constexpr int kWidth = Tile::kWidth;
  static constexpr bool kAhead = Tile::kDepth > 1;  // else the next teacher takes the place of this one

  const KDForward<float>& args;
  const Terms& terms;
  Group& group;
  Tile& tile;
  TeacherSummary* summaries;  // [K] of this row, shared
  const Row row;

  MTKD_DEVICE bool reads_student() const { return row.counts && (args.kd_scale != 0 || args.ce_weight != 0); }
  MTKD_DEVICE InputRow student_logits() const { return input_row(args.student, row.position); }
  MTKD_DEVICE InputRow teacher_logits(int k) const { return input_row(args.teacher[k], row.position); }

  MTKD_DEVICE Wanted wanted_teacher(int k) const {
    if (k >= args.teachers) return {};
    return {teacher_logits(k), reads_teacher(args, row, known_weight(args, k, row))};
  }

  MTKD_DEVICE SoftmaxState<float> absorb_student_row() {
    SoftmaxState<float> state;
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth];
      int valid[Tile::kChunks];
      tile.student(j, x);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) {
        const int64_t left = args.classes - tile.chunk(j, c) * kChunk;
        valid[c] = left > kChunk ? kChunk : static_cast<int>(left);
      }
      absorb_student(state, x, valid, terms);
    }
    group.merge(state, MergeStudent{terms});
    return state;
  }

  MTKD_DEVICE void student_piece(int j, float max, float (&ds)[kWidth], float (&es)[kWidth]) const {
    float x[kWidth];
    tile.student(j, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      ds[i] = shifted(x[i], max);
      es[i] = kind == Divergence::reverse_kl ? device::exp2(ds[i] * terms.log2e_t) : 0.0f;
    }
  }

  // One teacher: its state into the summary, its columns into the sums, and a later teacher on its way.
  MTKD_DEVICE void absorb_teacher_row(int k, const SoftmaxState<float>& student, float& largest_signal) {
    const float weight = known_weight(args, k, row);
    const bool reads = reads_teacher(args, row, weight);
    if (!group.any(reads)) {
      if (group.rank() == 0) summaries[k] = TeacherSummary{0.0f, 0.0f, 0.0f, 0.0f};
      tile.fetch_teacher(k + Tile::kDepth, wanted_teacher(k + Tile::kDepth));
      return;
    }
    tile.teacher_arrives(k, args.teacher[k].dtype, reads);
    if (kAhead) tile.fetch_teacher(k + Tile::kDepth, wanted_teacher(k + Tile::kDepth));
    const bool needs_label = reads && args.rule == WeightRule::confidence;
    const float at_label = needs_label ? label_logit(teacher_logits(k), row) : 0.0f;

    TeacherState state;
    float dx[kWidth], e[kWidth];
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth], ds[kWidth], es[kWidth];
      tile.teacher(j, x);
      student_piece(j, student.max, ds, es);
      absorb_teacher<kind>(state, x, ds, es, terms, dx, e);
    }
    const float local_max = state.max;
    group.merge(state, MergeTeacher<kind>{terms});
    const TeacherSummary summary = summarise<kind>(state, student, at_label, terms, args.rule);
    if (group.rank() == 0) summaries[k] = reads ? summary : TeacherSummary{0.0f, 0.0f, 0.0f, 0.0f};

    const bool adds = args.gradient.data != nullptr && reads && (two_sums || weight != 0);
    const Share share = share_of<two_sums>(args.rule, weight, summary.signal, largest_signal);
    const Wanted next = kAhead ? Wanted{} : wanted_teacher(k + 1);
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth];
      if (adds) {
        if (kAhead) {  // one piece, whose exponentials are still here
          teacher_values<kind>(dx, e, local_max, summary, terms, x);
        } else {
          tile.teacher(j, x);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            dx[i] = shifted(x[i], summary.max);
            e[i] = device::exp2(dx[i] * terms.log2e_t);
          }
          teacher_values<kind>(dx, e, summary.max, summary, terms, x);
        }
        tile.accumulate(j, x, share.first, share.fade, share.second);
      }
      tile.fetch_piece(j, next);
    }
  }

  MTKD_DEVICE void write_gradient(const SoftmaxState<float>& student, const Mixture& mixture) const {
    const OutputRow out = output_row(args.gradient, row.position);
    const StudentGradient g = student_gradient(args, row, row.scale, student.max, student.sum, student.sum1, mixture);
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth], mean[kWidth];
      tile.student(j, x);
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
    tile.fetch_student({student_logits(), reads_student()});
#pragma unroll 1
    for (int k = 0; k < Tile::kDepth; ++k) tile.fetch_teacher(k, wanted_teacher(k));
    const bool hard = row.counts && args.ce_weight != 0;
    const float at_label = hard ? label_logit(student_logits(), row) : 0.0f;
    tile.student_arrives(args.student.dtype, reads_student());
    const SoftmaxState<float> student = absorb_student_row();

    tile.clear();
    float largest_signal = -infinity<float>();
    for (int k = 0; k < args.teachers; ++k) absorb_teacher_row(k, student, largest_signal);
    group.sync();  // the summaries are there
    const bool exists = row.index < args.rows;
    const int lane = group.rank() % group.lanes();
    const Mixture mixture = mix(args, row, summaries, lane, group.lanes(), exists && group.rank() < group.lanes());
    if (!exists) return;
    if (group.rank() == 0) write_row(args, row, student, at_label, mixture);
    if (args.gradient.data != nullptr) write_gradient(student, mixture);
  }
};

// Shared memory: the group's scratch, [rows of the block][K] summaries, the tile.
template <typename Group>
MTKD_DEVICE TeacherSummary* summaries_of(char* shared) {
  return reinterpret_cast<TeacherSummary*>(shared + Group::scratch_bytes());
}

struct ResidentArgs : KDForward<float> {
  int group_width;  // lanes a row, where lanes share one
  bool wide;        // some logits are floats
};

template <Divergence kind, bool two_sums, typename Group, typename Tile, int max_threads>
MTKD_KERNEL(max_threads, 1)
kd_resident(MTKD_PARAM(ResidentArgs) args) {
  Group group(args.group_width, device::shared_memory());
  const int rows_in_block = device::block_threads() / group.size();
  TeacherSummary* summaries = summaries_of<Group>(device::shared_memory());
  Tile tile(args, args.wide, group.rank(), group.size(),
            reinterpret_cast<char*>(summaries + rows_in_block * args.teachers));
  const Terms terms = terms_of(args, args.rule);

  // Lanes of one warp walk on together: a row beyond the last one does not count.
  const int first_of_warp = group.index_in_block() / group.groups_in_warp() * group.groups_in_warp();
  const int64_t step = device::grid_blocks() * rows_in_block;
  for (int64_t base = device::block_index() * rows_in_block; base + first_of_warp < args.rows; base += step) {
    const int64_t index = base + group.index_in_block();
    ResidentRow<kind, two_sums, Group, Tile> row{args,
                                                 terms,
                                                 group,
                                                 tile,
                                                 summaries + group.index_in_block() * args.teachers,
                                                 read_row(args, args.items, index)};
    row.forward();
    group.sync();  // the summaries have been read
  }
}

}  // namespace mtkd_fast
