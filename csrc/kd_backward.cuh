// Strategy B, backward: every gradient from the logits and row_stats, column by column. A block takes a stretch of a
// row; the numbers of its teachers lie in shared memory. K + 1 reads and one write for each gradient wanted.
#pragma once

#include "kd_elementwise.cuh"
#include "kd_row.cuh"

namespace mtkd_fast {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardChunks = 4;  // chunks of a thread in a stretch
constexpr int kStretch = kBackwardThreads * kBackwardChunks * kChunk;

struct BackwardArgs : KDBackward<float> {
  int64_t stretches;  // of a row
  int group_width;    // warps that share pixels
  bool teachers_want;
};

struct TeacherTerms {  // 9 words: a stride over all banks
  float weight;        // w_k; 0: not read, its gradient is 0
  float max;
  float inv_sum;  // 1/Σ e^{(t−max)/τ}; DKD without another class: 0
  float log_sum;
  float divergence;
  float share_of_q;
  float slope;  // G of elementwise.h; DKD: q_y − p_y
  float less;   // ∂D/∂t = (of the class − p·less)/τ: D of the KLs, D − G, β NCKD + v
  float pull;   // DKD: v, the gradient at the target
};

// A row without a target has no hard term and no label.
MTKD_DEVICE Row backward_row(const BackwardArgs& args, int64_t index) {
  Row row{index, row_position(index, args.inner), false, 1.0f, 0.0f, -1, true};
  if (index >= args.rows) return row;
  row.scale = device::load(args.row_stats + RowStats{args.teachers}.scale() * args.rows + index);
  row.counts = row.scale != 0;
  if (row.counts && args.target != nullptr) {
    row.label = device::load(args.target + index);
    row.label_in_range = row.label >= 0 && row.label < args.classes;
  }
  return row;
}

MTKD_DEVICE float upstream_of(const float* upstream, int64_t stride, int64_t row) {
  return upstream == nullptr ? 1.0f : device::load(upstream + row * stride);
}

// Those of one row, between those of the other rows of the block.
struct TermsOfTeachers {
  TeacherTerms* first;
  int rows;

  MTKD_DEVICE TeacherTerms& operator[](int k) const { return first[k * rows]; }
};

template <Kind kind, typename Group>
struct BackwardRow {
  const BackwardArgs& args;
  const Terms& terms;
  const Group& group;
  const TermsOfTeachers teachers;  // shared
  const Row row;

  MTKD_DEVICE float stat(int i) const { return device::load(args.row_stats + i * args.rows + row.index); }

  // What follows for DKD from the log-odds of the target, in teacher k and in the student.
  MTKD_DEVICE void set_target_apart(int k, float student_max, float student_sum, TeacherTerms& t) const {
    const float at_label = label_logit(input_row(args.teacher[k], row.position), row);
    const float student_at_label = label_logit(input_row(args.student, row.position), row);
    const float odds = log_odds(at_label, t.max, t.log_sum, terms.inv_t);
    const float odds_s = log_odds(student_at_label, student_max, log_of(student_sum), terms.inv_t);
    t.slope = sigmoid(odds_s) - sigmoid(odds);
    t.pull = pull_on_target(odds, odds_s);
    t.less = t.divergence - binary_kl(odds, odds_s) + t.pull;
    if (t.log_sum == -infinity<float>()) t.inv_sum = 0;
  }

  // What the columns need of the teachers: read by one thread each, summed by all in the same order.
  MTKD_DEVICE void load_terms() const {
    const RowStats stats{args.teachers};
    for (int k = group.rank(); k < args.teachers; k += group.size()) {
      TeacherTerms t{};
      if (args.kd_scale != 0) {
        const int64_t at = k * args.weights_teacher_stride + row.index * args.weights_row_stride;
        t.weight = device::load(args.weights + at);
        const float sum = stat(stats.teacher_sum(k));
        t.max = stat(stats.teacher_max(k));
        t.inv_sum = 1.0f / sum;
        t.log_sum = log_of(sum);
        t.divergence = t.less = stat(stats.divergence(k));
        if (kind == Kind::elementwise) t.less -= t.slope = stat(stats.slope(k));
        if constexpr (kind == Kind::dkd) {
          if (t.weight != 0) set_target_apart(k, stat(stats.student_max()), stat(stats.student_sum()), t);
        }
        t.share_of_q = share_of_q<kind>(sum, t.slope, args.beta);
      }
      teachers[k] = t;
    }
  }
  MTKD_DEVICE Mixture mixture_of_teachers() const {
    Mixture mixture;
    for (int k = 0; k < args.teachers; ++k) {
      const float w = teachers[k].weight;
      if (w == 0) continue;
      mixture.loss += w * teachers[k].divergence;
      mixture.of_q += w * teachers[k].share_of_q;
      mixture.at_target += w * teachers[k].slope;
      mixture.used = true;
    }
    return mixture;
  }

  MTKD_DEVICE void zero_chunk(int64_t chunk) const {
    const float zeros[kChunk] = {};
    if (args.student_gradient.data != nullptr) {
      const OutputRow out = output_row(args.student_gradient, row.position);
      store_chunk(out, chunk, args.classes, zeros);
    }
    for (int k = 0; args.teachers_want && k < args.teachers; ++k) zero_teacher_chunk(k, chunk);
  }
  MTKD_DEVICE void zero_teacher_chunk(int k, int64_t chunk) const {
    const float zeros[kChunk] = {};
    if (args.teacher_gradient[k] == nullptr) return;
    const OutputRow out = output_row(args.gradient_of_teacher(k), row.position);
    store_chunk(out, chunk, args.classes, zeros);
  }

  // x: the teacher's logits. Adds w_k·x_k to `mean`, as StudentGradient wants it, and writes the gradient of teacher k,
  // if wanted.
  MTKD_DEVICE void teacher_chunk(int k, int64_t chunk, const StudentGradient& g, const float (&s)[kChunk],
                                 const float (&x)[kChunk], float (&mean)[kChunk]) const {
    const TeacherTerms t = teachers[k];
    const bool wanted = args.teachers_want && args.teacher_gradient[k] != nullptr;
    const float factor = g.row_scale * g.kd * t.weight;
    float gradient[kChunk];
    if constexpr (kind == Kind::elementwise) {
      const Softmax student{g.max, g.inv_sum, g.log_sum}, teacher{t.max, t.inv_sum, t.log_sum};
      auto p_of = [&](int i) { return probability(x[i], teacher, terms); };
      auto q_of = [&](int i) { return probability(s[i], student, terms); };
      for_each_element<kChunk>(args.divergence, args.beta, p_of, q_of, [&](int i, float p, const Element<float>& of) {
        mean[i] += t.weight * of.of_student;
        gradient[i] = factor * (of.of_teacher - p * t.less);
      });
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float dx = shifted(x[i], t.max);
        const float scaled = dx * terms.inv_t;
        const float log_p = scaled == -infinity<float>() ? 0.0f : scaled - t.log_sum;
        const float p = device::exp2(dx * terms.log2e_t) * t.inv_sum;
        mean[i] += kind == Kind::reverse_kl ? t.weight * log_p : t.weight * p;
        if (!wanted) continue;
        const float ds = shifted(s[i], g.max);
        if (kind == Kind::reverse_kl) {
          gradient[i] = factor * (p - device::exp2(ds * terms.log2e_t) * g.inv_sum);
          continue;
        }
        const float log_ratio = log_p - (ds * terms.inv_t - g.log_sum);
        if (kind == Kind::forward_kl) {
          gradient[i] = factor * (p == 0 ? 0.0f : p * (log_ratio - t.less));
        } else {
          const float of_others = args.beta == 0 ? 0.0f : args.beta * log_ratio;
          const bool apart = chunk * kChunk + i == g.label;
          gradient[i] = factor * (apart ? t.pull : p == 0 ? 0.0f : p * (of_others - t.less));
        }
      }
    }
    if (!wanted) return;
    const OutputRow out = output_row(args.gradient_of_teacher(k), row.position);
    store_chunk(out, chunk, args.classes, gradient);
  }

  MTKD_DEVICE int next_used(int k) const {
    while (k < args.teachers && teachers[k].weight == 0) {
      ++k;
    }
    return k;
  }

  MTKD_DEVICE RawChunk load_teacher(int k, int64_t chunk) const {
    return load_chunk(input_row(args.teacher[k], row.position), chunk, args.classes);
  }

  // One chunk of every gradient; the next teacher is on its way while this one is summed.
  MTKD_DEVICE void backward_chunk(int64_t chunk, const StudentGradient& g) const {
    RawChunk raw = empty_chunk(DType::f32);
    int k = args.kd_scale != 0 ? next_used(0) : args.teachers;
    const bool reads_student = k < args.teachers || args.ce_weight != 0;
    float s[kChunk] = {}, mean[kChunk] = {};
    if (reads_student) {
      raw = load_chunk(input_row(args.student, row.position), chunk, args.classes);
    }
    RawChunk next = raw;
    if (k < args.teachers) next = load_teacher(k, chunk);
    const Columns columns = columns_of<kind>(chunk, args.classes, row.label);
    if (reads_student) decode(raw, args.student.dtype, s);
    set_apart<kind>(columns, s);
    if (args.teachers_want) {
      for (int j = 0; j < args.teachers; ++j) {
        if (args.kd_scale == 0 || teachers[j].weight == 0) zero_teacher_chunk(j, chunk);
      }
    }
    while (k < args.teachers) {
      const int now = k;
      float x[kChunk];
      decode(next, args.teacher[now].dtype, x);
      set_apart<kind>(columns, x);
      k = next_used(now + 1);
      if (k < args.teachers) next = load_teacher(k, chunk);
      teacher_chunk(now, chunk, g, s, x, mean);
    }
    if (args.student_gradient.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) s[i] = shifted(s[i], g.max);
    gradient_of_chunk<kind>(g, terms, chunk * kChunk, s, mean);
    store_chunk(output_row(args.student_gradient, row.position), chunk, args.classes, s);
  }

  MTKD_DEVICE void backward(int64_t stretch) const {
    const int64_t chunks = (args.classes + kChunk - 1) / kChunk;
    const int64_t first = stretch * (kStretch / kChunk) + group.rank();
    const int64_t end = stretch * (kStretch / kChunk) + kStretch / kChunk;
    const int64_t last = end < chunks ? end : chunks;
    if (row.counts) load_terms();
    if (group.any(row.counts)) group.sync();
    if (!row.counts) {
      if (row.index >= args.rows) return;
      for (int64_t chunk = first; chunk < last; chunk += group.size()) zero_chunk(chunk);
      return;
    }
    const Mixture mixture = mixture_of_teachers();
    const RowStats stats{args.teachers};
    const float factor = row.scale * upstream_of(args.upstream, args.upstream_stride, row.index);
    SoftmaxState<float> student;
    student.max = stat(stats.student_max());
    student.sum = stat(stats.student_sum());
    if (args.ce_weight != 0) student.sum1 = stat(stats.student_sum1());
    const bool needs_label = kind == Kind::dkd && args.ce_weight != 0;
    const float at_label = needs_label ? label_logit(input_row(args.student, row.position), row) : 0.0f;
    const StudentGradient g = student_gradient<kind>(args, row, factor, student, at_label, mixture);
    for (int64_t chunk = first; chunk < last; chunk += group.size()) backward_chunk(chunk, g);
  }
};

// Shared memory: [K][rows of the block] teacher terms.
template <Kind kind, typename Group>
MTKD_KERNEL(kBackwardThreads, 2)
kd_backward(MTKD_PARAM(BackwardArgs) args) {
  const Group group(args.group_width, device::shared_memory());
  const int rows_in_block = device::block_threads() / group.size();
  TeacherTerms* teachers = reinterpret_cast<TeacherTerms*>(device::shared_memory());
  const Terms terms = terms_of(args, WeightRule::given);
  const int64_t steps = (args.rows + rows_in_block - 1) / rows_in_block * args.stretches;
  for (int64_t i = device::block_index(); i < steps; i += device::grid_blocks()) {
    const int64_t step = steps - 1 - i;  // backwards: the last rows of the forward may still be in the L2 cache
    const int64_t index = step / args.stretches * rows_in_block + group.index_in_block();
    const BackwardRow<kind, Group> row{
        args, terms, group, {teachers + group.index_in_block(), rows_in_block}, backward_row(args, index)};
    row.backward(step % args.stretches);
    group.sync();  // the terms have been read
  }
}

}  // namespace mtkd_fast
