// Strategy A: a row stays on chip, so one pass gives its loss and its gradient. Memory sees K + 1 reads and one write, or no
// write where no gradient is asked for; what a row takes on chip does not depend on K.
//
// With x_k the teacher's p (forward KL) or log p (reverse KL), the gradient needs Σ w_k x_k. Known weights: one sum. Computed
// ones, which only the last teacher settles: Σ x_k and Σ v_k x_k, v_k = e^{CE_k − M} with a running maximum M, or H_k.
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
MTKD_DEVICE void teacher_values(const float (&dx)[N], const float (&e)[N], float local_max, const TeacherSummary& teacher,
                                const Terms& terms, float (&x)[N]) {
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

  const KDForward<float>& args;
  const Terms& terms;
  Group& group;
  Tile& tile;
  TeacherSummary* summaries;  // [K] of this row, shared
  const Row row;

  MTKD_DEVICE Wanted student_row() const {
    const bool reads = row.counts && (args.kd_scale != 0 || args.ce_weight != 0);
    return {input_row(args.student, reads ? row.index : 0, args.inner), reads};
  }

  struct NextTeacher {
    Wanted logits;
    float known_weight;
  };
  MTKD_DEVICE NextTeacher next_teacher(int k) const {
    if (k >= args.teachers) return {{input_row(args.teacher[0], 0, args.inner), false}, 0.0f};
    const float weight = known_weight(args, k, row);
    const bool reads = reads_teacher(args, row, weight);
    return {{input_row(args.teacher[k], reads ? row.index : 0, args.inner), reads}, weight};
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

  // One teacher: its state into the summary, its columns into the sums, and the next teacher on its way.
  MTKD_DEVICE void absorb_teacher_row(int k, const NextTeacher& now, const NextTeacher& next,
                                      const SoftmaxState<float>& student, float& largest_signal) {
    const bool reads = now.logits.reads;
    if (!group.any(reads)) {
      if (group.rank() == 0) summaries[k] = TeacherSummary{0.0f, 0.0f, 0.0f, 0.0f};
      tile.fetch_teacher(next.logits);
      return;
    }
    tile.teacher_arrives(now.logits);
    if (Tile::kAhead) tile.fetch_teacher(next.logits);
    const float at_label = label_logit(now.logits.row, row, reads && args.rule == WeightRule::confidence);

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

    const bool adds = args.gradient != nullptr && reads && (two_sums || now.known_weight != 0);
    const Share share = share_of<two_sums>(args.rule, now.known_weight, summary.signal, largest_signal);
    for (int j = 0; j < tile.pieces(); ++j) {
      float x[kWidth];
      if (adds) {
        if (Tile::kAhead) {  // one piece, whose exponentials are still here
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
      tile.fetch_piece(j, next.logits);
    }
  }

  MTKD_DEVICE void write_gradient(const SoftmaxState<float>& student, const Mixture& mixture) const {
    const OutputRow out = output_row(args.gradient, row.index, args.classes, args.student.dtype);
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
    const Wanted student_logits = student_row();
    tile.fetch_student(student_logits);
    NextTeacher now = next_teacher(0);
    tile.fetch_teacher(now.logits);
    tile.student_arrives(student_logits);
    const float at_label = label_logit(student_logits.row, row, row.counts && args.ce_weight != 0);
    const SoftmaxState<float> student = absorb_student_row();

    tile.clear();
    float largest_signal = -infinity<float>();
    for (int k = 0; k < args.teachers; ++k) {
      const NextTeacher next = next_teacher(k + 1);
      absorb_teacher_row(k, now, next, student, largest_signal);
      now = next;
    }
    group.sync();  // the summaries are there
    const bool exists = row.index < args.rows;
    const int lane = group.rank() % group.lanes();
    const Mixture mixture = mix(args, row, summaries, lane, group.lanes(), exists && group.rank() < group.lanes());
    if (!exists) return;
    if (group.rank() == 0) write_row(args, row, student, at_label, mixture);
    if (args.gradient != nullptr) write_gradient(student, mixture);
  }
};

// Shared memory: the group's scratch, [rows of the block][K] summaries, the tile.
template <typename Group>
MTKD_DEVICE TeacherSummary* summaries_of(char* shared) {
  return reinterpret_cast<TeacherSummary*>(shared + Group::scratch_bytes());
}

struct ResidentArgs : KDForward<float> {
  int group_width;  // lanes a row, where lanes share one
};

template <Divergence kind, bool two_sums, typename Group, typename Tile, int max_threads>
MTKD_KERNEL(max_threads, 1) kd_resident(MTKD_PARAM(ResidentArgs) args) {
  Group group(args.group_width, device::shared_memory());
  const int rows_in_block = device::block_threads() / group.size();
  TeacherSummary* summaries = summaries_of<Group>(device::shared_memory());
  Tile tile(args, group.rank(), group.size(), reinterpret_cast<char*>(summaries + rows_in_block * args.teachers));
  const Terms terms = terms_of(args, args.rule);

  // Lanes of one warp walk on together: a row beyond the last one does not count.
  const int first_of_warp = group.index_in_block() / group.groups_in_warp() * group.groups_in_warp();
  const int64_t step = device::grid_blocks() * rows_in_block;
  for (int64_t base = device::block_index() * rows_in_block; base + first_of_warp < args.rows; base += step) {
    const int64_t index = base + group.index_in_block();
    ResidentRow<kind, two_sums, Group, Tile> row{
        args, terms, group, tile, summaries + group.index_in_block() * args.teachers, read_row(args, args.items, index)};
    row.forward();
    group.sync();  // the summaries have been read
  }
}

}  // namespace mtkd_fast
