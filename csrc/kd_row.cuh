// One row of the op `kd`, apart from the passes over its columns: what it is worth, what its teachers weigh, its loss,
// its numbers for row_stats, and the gradient of one column.
#pragma once

#include "kd_dkd.cuh"

namespace mtkd_fast {

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
MTKD_DEVICE float known_weight(const KDForward<float>& args, const Terms& terms, int k, const Row& row) {
  if (args.rule != WeightRule::given) return terms.equal_weight;
  return row.counts ? given_weight(args, k, row.index) : 0.0f;
}

MTKD_DEVICE bool reads_student(const KDArgs<float>& args, const Row& row) {
  return row.counts && (args.kd_scale != 0 || args.ce_weight != 0);
}
MTKD_DEVICE bool reads_teacher(const KDForward<float>& args, const Row& row, float known_weight) {
  const bool skipped = args.rule == WeightRule::given && args.skip_zero_weights && known_weight == 0;
  return row.counts && args.kd_scale != 0 && !skipped;
}

// Whether a cross-entropy or a divergence wants the logit of the label.
template <Kind kind>
MTKD_DEVICE bool wants_label_of_student(const KDArgs<float>& args, const Row& row) {
  return row.counts && (args.ce_weight != 0 || (kind == Kind::dkd && args.kd_scale != 0));
}
template <Kind kind>
MTKD_DEVICE bool wants_label_of_teachers(WeightRule rule) {
  return kind == Kind::dkd || rule == WeightRule::confidence;
}

// What a row keeps of a teacher until the weights are known, in shared memory.
struct TeacherSummary {
  float divergence;
  float slope;  // G of elementwise.h; DKD: q_y − p_y
  float max;
  float sum;
  float signal;  // what a computed weight comes from: cross-entropy or entropy
};

// The summaries of one row. Those of the other rows of a block lie between them, so that lanes with rows of their own
// touch neighbours: 5 words each, all banks.
struct Summaries {
  TeacherSummary* first;
  int rows;

  MTKD_DEVICE TeacherSummary& operator[](int k) const { return first[k * rows]; }
};

// Behind the group's scratch.
template <typename Group>
MTKD_DEVICE TeacherSummary* summaries_of(const Group& group, char* shared) {
  return reinterpret_cast<TeacherSummary*>(shared + group.scratch_bytes());
}

// All but the divergence and the slope.
template <Kind kind, bool may_be_computed = true>
MTKD_DEVICE TeacherSummary summarise(const TeacherState& t, float label_logit, WeightRule rule) {
  TeacherSummary summary{0.0f, 0.0f, t.max, t.sum, 0.0f};
  if constexpr (!may_be_computed) return summary;
  const bool apart = kind == Kind::dkd;
  if (rule == WeightRule::confidence) {
    summary.signal =
        apart ? cross_entropy_apart(label_logit, t.max, t.sum1) : cross_entropy(t.sum1, t.max, label_logit);
  }
  if (rule == WeightRule::entropy) summary.signal = apart ? entropy_apart(label_logit, t) : entropy(t.sum1, t.dot1);
  return summary;
}

// The divergence, where it follows from sums, and DKD's slope. `at_label`: the logits of teacher and student.
struct LabelLogits {
  float teacher, student;
};

template <Kind kind>
MTKD_DEVICE void set_divergence(TeacherSummary& t, float cross, const SoftmaxState<float>& student, float log_s,
                                LabelLogits at_label, float beta, const Terms& terms) {
  const float log_t = log_of(t.sum);
  t.divergence = kind == Kind::reverse_kl ? kl_from_sums(cross, student.sum, log_s, t.sum, log_t, terms.inv_t)
                                          : kl_from_sums(cross, t.sum, log_t, student.sum, log_s, terms.inv_t);
  if constexpr (kind == Kind::dkd) {
    const float odds = log_odds(at_label.teacher, t.max, log_t, terms.inv_t);
    const float odds_s = log_odds(at_label.student, student.max, log_s, terms.inv_t);
    t.divergence = decoupled(binary_kl(odds, odds_s), kl_of_others(t.sum, t.divergence), beta);
    t.slope = sigmoid(odds_s) - sigmoid(odds);
  }
}

// What q weighs in ∂D_k/∂s.
template <Kind kind>
MTKD_DEVICE float share_of_q(float teacher_sum, float slope, float beta) {
  if (kind == Kind::elementwise) return -slope;
  if (kind == Kind::dkd) return (teacher_sum == 0 ? 0.0f : beta) - slope;
  return 1.0f;
}

// A row's teachers taken together.
struct Mixture {
  float loss = 0;       // Σ w_k D_k
  float of_q = 0;       // Σ w_k share_of_q: W = Σ w_k for the KLs
  float at_target = 0;  // DKD: Σ w_k (q_y − p_y)
  bool used = false;    // some w_k is not 0
  // Σ w_k x_k = plain·Σ x_k − by_signal·Σ v_k x_k, where v_k is relative_exp(CE_k, max) or H_k
  float plain = 1;
  float by_signal = 0;
};

// Weights, divergences and their sums, the lanes of a warp sharing the teachers. Writes the teachers' row_stats, if
// asked and wanted.
template <Kind kind>
MTKD_DEVICE Mixture mix(const KDForward<float>& args, const Terms& terms, const Row& row, const Summaries& teachers,
                        int lane, int lanes, bool write) {
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
    float w = known_weight(args, terms, k, row);
    if (computed) {
      const float value = args.rule == WeightRule::confidence ? relative_exp(t.signal, max) : t.signal;
      w = mixture.by_signal == 0 ? mixture.plain : (1 - value / sum) / (n - 1);
    }
    if (w != 0) {
      mixture.loss += w * t.divergence;
      mixture.of_q += w * share_of_q<kind>(t.sum, t.slope, args.beta);
      mixture.at_target += w * t.slope;
      mixture.used = true;
    }
    if (!write || !args.keep_stats) continue;
    const bool read = row.counts && args.kd_scale != 0;
    auto put = [&](int i, float x) { device::store(args.row_stats + i * args.rows + row.index, read ? x : 0.0f); };
    put(stats.divergence(k), t.divergence);
    put(stats.weight(k), w);
    if (kind == Kind::elementwise) put(stats.slope(k), t.slope);
    put(stats.teacher_max(k), t.max);
    put(stats.teacher_sum(k), t.sum);
    put(stats.teacher_ce(k), args.rule == WeightRule::confidence ? t.signal : 0.0f);
    put(stats.teacher_entropy(k), args.rule == WeightRule::entropy ? t.signal : 0.0f);
  }
  mixture.loss = sum_lanes(mixture.loss, lanes);
  mixture.of_q = sum_lanes(mixture.of_q, lanes);
  if (kind == Kind::dkd) mixture.at_target = sum_lanes(mixture.at_target, lanes);
  mixture.used = any_lane(mixture.used, lanes);
  return mixture;
}

// (1 − ε)·(−log q[y]) + ε·mean(−log q) at temperature 1; 0 without a hard term.
template <Kind kind>
MTKD_DEVICE float student_cross_entropy(const KDArgs<float>& args, const Row& row, const SoftmaxState<float>& s,
                                        float label_logit) {
  if (args.ce_weight == 0 || !row.counts) return 0.0f;
  const float smoothing = args.label_smoothing;
  const bool apart = kind == Kind::dkd;
  float ce = 0;
  if (smoothing < 1) {
    ce += (1 - smoothing) *
          (apart ? cross_entropy_apart(label_logit, s.max, s.sum1) : cross_entropy(s.sum1, s.max, label_logit));
  }
  if (smoothing > 0) {
    ce += smoothing *
          (apart ? uniform_cross_entropy_apart(label_logit, s, args.classes) : log_of(s.sum1) - s.total / args.classes);
  }
  return ce;
}

// row_loss and the student's row_stats, by one thread. `ce`: student_cross_entropy.
MTKD_DEVICE void write_row(const KDForward<float>& args, const Row& row, const SoftmaxState<float>& s, float ce,
                           const Mixture& mixture) {
  const RowStats stats{args.teachers};
  const bool hard = args.ce_weight != 0 && row.counts;
  const bool reads_student = row.counts && (args.kd_scale != 0 || hard);
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
// teacher's p (forward KL, DKD), log p (reverse KL) or of_student (elementwise). All but reverse KL:
// kd·(of_q·q + of_mean·mean).
struct StudentGradient {
  float row_scale;  // of every gradient of the row; NaN for a label out of range
  float scale;      // of the student's; NaN also for a reverse KL that is not finite
  float kd;         // kd_scale/τ, 0 where no teacher counts
  float of_q;
  float of_mean;
  float loss;  // Σ w_k D_k, which reverse KL subtracts
  float max;
  float inv_sum;  // 1/Σ e^{(s−max)/τ}
  float log_sum;
  float ce;  // ce_weight, or 0
  float inv_sum1;
  float label_value;  // 1 − ε
  float other_value;  // ε/C
  int64_t label;
  // Of the target itself, where it stands apart
  float at_target;             // Σ w_k (q_y − p_y)
  float probability_at_label;  // at temperature 1
  // Forward KL and the elementwise divergences: what multiplies a column's e^{(s−max)/τ}, its mean and its e^{s−max},
  // the same for all columns, and what the label's has less
  float by_e, by_mean, by_e1, constant, at_label;
};

template <Kind kind>
MTKD_DEVICE StudentGradient student_gradient(const KDArgs<float>& args, const Row& row, float scale,
                                             const SoftmaxState<float>& s, float label_logit, const Mixture& mixture) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  StudentGradient g{};
  const bool undefined = kind == Kind::reverse_kl && args.kd_scale != 0 && !isfinite(mixture.loss);
  g.row_scale = row.label_in_range ? scale : kNaN;
  g.scale = undefined ? kNaN : g.row_scale;
  g.kd = args.kd_scale != 0 && mixture.used ? args.kd_scale / args.temperature : 0.0f;
  g.of_q = mixture.of_q;
  g.of_mean = kind == Kind::elementwise ? 1.0f : kind == Kind::dkd ? -args.beta : -1.0f;
  g.loss = mixture.loss;
  g.max = s.max;
  g.inv_sum = 1.0f / s.sum;
  g.log_sum = log_of(s.sum);
  g.ce = args.ce_weight;
  g.inv_sum1 = args.ce_weight != 0 ? 1.0f / s.sum1 : 0.0f;
  g.label_value = 1 - args.label_smoothing;
  g.other_value = args.label_smoothing / args.classes;
  g.label = row.label;
  g.by_e = g.scale * g.kd * g.of_q * g.inv_sum;
  g.by_mean = g.scale * g.kd * g.of_mean;
  g.by_e1 = g.scale * g.ce * g.inv_sum1;
  g.constant = -(g.scale * (g.ce * g.other_value));
  g.at_label = g.scale * (g.ce * g.label_value);
  if constexpr (kind == Kind::dkd) {
    if (s.sum == 0) g.inv_sum = g.of_q == 0 ? 0.0f : kNaN;  // a student without another class
    g.at_target = mixture.at_target;
    if (args.ce_weight != 0) {
      const float odds = odds_at_one(label_logit, s.max, s.sum1);
      g.inv_sum1 = s.sum1 == 0 ? 0.0f : sigmoid(-odds) / s.sum1;
      g.probability_at_label = sigmoid(odds);
    }
  }
  return g;
}

// x[i], the student's logits less their maximum, and mean[i] -> the gradient, over x: linear in e, mean and e1.
MTKD_DEVICE void linear_gradient_of_chunk(const StudentGradient& g, const Terms& terms, int64_t first, float* x,
                                          const float* mean) {
  float e[kChunk], out[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    e[i] = device::exp2(x[i] * terms.log2e_t);
    out[i] = g.constant;
  }
  if (g.kd != 0) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      out[i] += g.by_e * e[i];
      out[i] += g.by_mean * mean[i];
    }
  }
  if (g.ce != 0) {
    float e1[kChunk];
    exponentials_at_one(e, x, terms.at_one, e1);
    const int64_t label = g.label - first;
    const int at = label >= 0 && label < kChunk ? static_cast<int>(label) : -1;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      out[i] += g.by_e1 * e1[i];
      if (i == at) out[i] -= g.at_label;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = out[i];
}

// Reverse KL and DKD: each column for itself.
template <Kind kind>
MTKD_DEVICE void gradient_of_columns(const StudentGradient& g, const Terms& terms, int64_t first, float* x,
                                     const float* mean) {
  float ds[kChunk], e[kChunk], out[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    ds[i] = x[i];
    e[i] = device::exp2(ds[i] * terms.log2e_t);
    out[i] = 0;
  }
  if (g.kd != 0) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float q = e[i] * g.inv_sum;
      if (kind == Kind::reverse_kl) {
        const float log_q = ds[i] * terms.inv_t - g.log_sum;
        out[i] = e[i] == 0 ? 0.0f : g.kd * q * (g.of_q * log_q - mean[i] - g.loss);
      } else {
        const bool apart = kind == Kind::dkd && first + i == g.label;
        out[i] = g.kd * (apart ? g.at_target : g.of_q * q + g.of_mean * mean[i]);
      }
    }
  }
  if (g.ce != 0) {
    float e1[kChunk];
    exponentials_at_one(e, ds, terms.at_one, e1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool at_label = first + i == g.label;
      const float wanted = g.other_value + (at_label ? g.label_value : 0.0f);
      const float probability = kind == Kind::dkd && at_label ? g.probability_at_label : e1[i] * g.inv_sum1;
      out[i] += g.ce * (probability - wanted);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = g.scale * out[i];
}

template <Kind kind>
MTKD_DEVICE void gradient_of_chunk(const StudentGradient& g, const Terms& terms, int64_t first, float* x,
                                   const float* mean) {
  if constexpr (kind == Kind::forward_kl || kind == Kind::elementwise) {
    linear_gradient_of_chunk(g, terms, first, x, mean);
  } else {
    gradient_of_columns<kind>(g, terms, first, x, mean);
  }
}

}  // namespace mtkd_fast
