// One row of the op `kd`, apart from the passes over its columns: what it is worth, what its teachers weigh, its loss,
// its numbers for row_stats, and the gradient of one column.
#pragma once

#include "kd_states.cuh"

namespace mtkd_fast {

#include "row_formulas.h"

struct Row {
  int64_t index;
  RowPosition position;
  bool counts;  // else nothing of it is read, and everything that is written is 0
  float row_weight;
  float scale;          // row weight / items
  int64_t label;        // −1: no target
  bool label_in_range;  // true without a target
};

MTKD_DEVICE Row read_row(const KDArgs<float>& args, const float* items, int64_t index) {
  Row row{index, row_position(index, args.inner), index < args.rows, 1.0f, 0.0f, -1, true};
  if (!row.counts) return row;
  if (args.row_weights != nullptr) row.row_weight = device::load(args.row_weights + index);
  row.counts = row.row_weight != 0;
  if (args.target != nullptr) {
    row.label = device::load(args.target + index);
    row.counts = row.counts && row.label != args.ignore_index;
    row.label_in_range = row.label >= 0 && row.label < args.classes;
  }
  if (row.counts) row.scale = row.row_weight / (items == nullptr ? 1.0f : device::load(items));
  return row;
}

// The logit of the label; NaN where there is no such column.
MTKD_DEVICE float label_logit(const InputRow& logits, const Row& row) {
  if (row.label < 0 || !row.label_in_range) return std::numeric_limits<float>::quiet_NaN();
  return load_element(logits, row.label);
}

MTKD_DEVICE float given_weight(const KDForward<float>& args, int k, int64_t row) {
  return device::load(args.weights + k * args.weights_teacher_stride + row * args.weights_row_stride);
}

// The weight that teacher k is known to have before it is read: the given one, or 1/K.
MTKD_DEVICE float known_weight(const KDForward<float>& args, int k, const Row& row) {
  if (args.rule != WeightRule::given) return 1.0f / args.teachers;
  return row.counts ? given_weight(args, k, row.index) : 0.0f;
}

MTKD_DEVICE bool reads_teacher(const KDForward<float>& args, const Row& row, float known_weight) {
  const bool skipped = args.rule == WeightRule::given && args.skip_zero_weights && known_weight == 0;
  return row.counts && args.kd_scale != 0 && !skipped;
}

// What a row keeps of a teacher until the weights are known, in shared memory.
struct TeacherSummary {
  float divergence;
  float max;
  float sum;
  float signal;  // what a computed weight comes from: cross-entropy or entropy
};

template <Divergence kind>
MTKD_DEVICE TeacherSummary summarise(const TeacherState& t, const SoftmaxState<float>& student, float label_logit,
                                     const Terms& terms, WeightRule rule) {
  TeacherSummary summary{0.0f, t.max, t.sum, 0.0f};
  const float log_t = log_of(t.sum), log_s = log_of(student.sum);
  summary.divergence = kind == Divergence::forward_kl
                           ? kl_from_sums(t.cross, t.sum, log_t, student.sum, log_s, terms.inv_t)
                           : kl_from_sums(t.cross, student.sum, log_s, t.sum, log_t, terms.inv_t);
  if (rule == WeightRule::confidence) summary.signal = cross_entropy(t.sum1, t.max, label_logit);
  if (rule == WeightRule::entropy) summary.signal = entropy(t.sum1, t.dot1);
  return summary;
}

// A row's teachers taken together.
struct Mixture {
  float loss = 0;     // Σ w_k D_k
  float weight = 0;   // W = Σ w_k
  bool used = false;  // some w_k is not 0
  // Σ w_k x_k = plain·Σ x_k − by_signal·Σ v_k x_k, where v_k is relative_exp(CE_k, max) or H_k
  float plain = 1;
  float by_signal = 0;
};

// Weights, divergences and their sums, the lanes of a warp sharing the teachers. Writes the teachers' row_stats, if
// asked and wanted.
MTKD_DEVICE Mixture mix(const KDForward<float>& args, const Row& row, const TeacherSummary* teachers, int lane,
                        int lanes, bool write) {
  const int n = args.teachers;
  const bool computed = args.rule == WeightRule::confidence || args.rule == WeightRule::entropy;
  Mixture mixture;
  float max = -infinity<float>(), sum = 0;
  if (args.rule == WeightRule::confidence) {
    for (int k = lane; k < n; k += lanes) max = fmaxf(max, teachers[k].signal);
    max = max_lanes(max, lanes);
    for (int k = lane; k < n; k += lanes) sum += relative_exp(teachers[k].signal, max);
    sum = sum_lanes(sum, lanes);
  } else if (args.rule == WeightRule::entropy) {
    for (int k = lane; k < n; k += lanes) sum += teachers[k].signal;
    sum = sum_lanes(sum, lanes);
  }
  if (computed) {
    const bool equal = args.rule == WeightRule::entropy && sum == 0;
    mixture.plain = equal ? 1.0f / n : n == 1 ? sum / sum : 1.0f / (n - 1);
    mixture.by_signal = equal || n == 1 ? 0.0f : mixture.plain / sum;
  }

  const RowStats stats{n};
  for (int k = lane; k < n; k += lanes) {
    const TeacherSummary t = teachers[k];
    float w = known_weight(args, k, row);
    if (computed) {
      const float value = args.rule == WeightRule::confidence ? relative_exp(t.signal, max) : t.signal;
      w = mixture.by_signal == 0 ? mixture.plain : (1 - value / sum) / (n - 1);
    }
    if (w != 0) {
      mixture.loss += w * t.divergence;
      mixture.weight += w;
      mixture.used = true;
    }
    if (!write || !args.keep_stats) continue;
    const bool read = row.counts && args.kd_scale != 0;
    auto put = [&](int i, float x) { device::store(args.row_stats + i * args.rows + row.index, read ? x : 0.0f); };
    put(stats.divergence(k), t.divergence);
    put(stats.weight(k), w);
    put(stats.teacher_max(k), t.max);
    put(stats.teacher_sum(k), t.sum);
    put(stats.teacher_ce(k), args.rule == WeightRule::confidence ? t.signal : 0.0f);
    put(stats.teacher_entropy(k), args.rule == WeightRule::entropy ? t.signal : 0.0f);
  }
  mixture.loss = sum_lanes(mixture.loss, lanes);
  mixture.weight = sum_lanes(mixture.weight, lanes);
  mixture.used = any_lane(mixture.used, lanes);
  return mixture;
}

// (1 − ε)·(−log q[y]) + ε·mean(−log q) at temperature 1.
MTKD_DEVICE float student_cross_entropy(const KDArgs<float>& args, const SoftmaxState<float>& s, float label_logit) {
  float ce = 0;
  if (args.label_smoothing < 1) ce += (1 - args.label_smoothing) * cross_entropy(s.sum1, s.max, label_logit);
  if (args.label_smoothing > 0) ce += args.label_smoothing * (log_of(s.sum1) - s.total / args.classes);
  return ce;
}

// row_loss and the student's row_stats, by one thread.
MTKD_DEVICE void write_row(const KDForward<float>& args, const Row& row, const SoftmaxState<float>& s,
                           float label_logit, const Mixture& mixture) {
  const RowStats stats{args.teachers};
  const bool hard = args.ce_weight != 0 && row.counts;
  const bool reads_student = row.counts && (args.kd_scale != 0 || hard);
  const float ce = hard ? student_cross_entropy(args, s, label_logit) : 0.0f;
  float loss = 0;
  if (args.kd_scale != 0) loss += args.kd_scale * mixture.loss;
  if (hard) loss += args.ce_weight * ce;
  if (!row.label_in_range) loss = std::numeric_limits<float>::quiet_NaN();
  device::store(args.row_loss + row.index, row.counts ? row.row_weight * loss : 0.0f);

  auto put = [&](int i, float x) { device::store(args.row_stats + i * args.rows + row.index, x); };
  put(stats.scale(), row.scale);
  if (!args.keep_stats) return;
  put(stats.student_max(), reads_student ? s.max : 0.0f);
  put(stats.student_sum(), reads_student ? s.sum : 0.0f);
  put(stats.student_sum1(), hard ? s.sum1 : 0.0f);
  put(stats.student_ce(), ce);
}

// ------------------------------------------------------------------------------------------------------------ gradient

// What the gradient of a row in the student needs beside its columns. `mean` is Σ w_k x_k of the column, x the
// teacher's p (forward KL) or log p (reverse KL).
struct StudentGradient {
  float row_scale;  // of every gradient of the row; NaN for a label out of range
  float scale;      // of the student's; NaN also for a reverse KL that is not finite
  float kd;         // kd_scale/τ, 0 where no teacher counts
  float weight;     // W
  float loss;       // Σ w_k D_k, which reverse KL subtracts
  float max;
  float inv_sum;  // 1/Σ e^{(s−max)/τ}
  float log_sum;
  float ce;  // ce_weight, or 0
  float inv_sum1;
  float label_value;  // 1 − ε
  float other_value;  // ε/C
  int64_t label;
};

MTKD_DEVICE StudentGradient student_gradient(const KDArgs<float>& args, const Row& row, float scale, float max,
                                             float sum, float sum1, const Mixture& mixture) {
  StudentGradient g;
  const bool undefined = args.divergence == Divergence::reverse_kl && args.kd_scale != 0 && !isfinite(mixture.loss);
  g.row_scale = row.label_in_range ? scale : std::numeric_limits<float>::quiet_NaN();
  g.scale = undefined ? std::numeric_limits<float>::quiet_NaN() : g.row_scale;
  g.kd = args.kd_scale != 0 && mixture.used ? args.kd_scale / args.temperature : 0.0f;
  g.weight = mixture.weight;
  g.loss = mixture.loss;
  g.max = max;
  g.inv_sum = 1.0f / sum;
  g.log_sum = log_of(sum);
  g.ce = args.ce_weight;
  g.inv_sum1 = args.ce_weight != 0 ? 1.0f / sum1 : 0.0f;
  g.label_value = 1 - args.label_smoothing;
  g.other_value = args.label_smoothing / args.classes;
  g.label = row.label;
  return g;
}

// x[i], the student's logits, and mean[i] -> the gradient, over x.
template <Divergence kind>
MTKD_DEVICE void gradient_of_chunk(const StudentGradient& g, const Terms& terms, int64_t first, float* x,
                                   const float* mean) {
  float ds[kChunk], e[kChunk], out[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    ds[i] = shifted(x[i], g.max);
    e[i] = device::exp2(ds[i] * terms.log2e_t);
    out[i] = 0;
  }
  if (g.kd != 0) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float q = e[i] * g.inv_sum;
      if (kind == Divergence::forward_kl) {
        out[i] = g.kd * (g.weight * q - mean[i]);
      } else {
        const float log_q = ds[i] * terms.inv_t - g.log_sum;
        out[i] = e[i] == 0 ? 0.0f : g.kd * q * (g.weight * log_q - mean[i] - g.loss);
      }
    }
  }
  if (g.ce != 0) {
    float e1[kChunk];
    exponentials_at_one(e, ds, terms.at_one, e1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float wanted = g.other_value + (first + i == g.label ? g.label_value : 0.0f);
      out[i] += g.ce * (e1[i] * g.inv_sum1 - wanted);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = g.scale * out[i];
}

}  // namespace mtkd_fast
