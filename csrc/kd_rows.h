// The op `kd` in one instruction set (see instruction_sets.h), a block of rows at a time.
//
// The forward sweeps over the columns in tiles, finishes the block's numbers, and, if a gradient is asked for, sweeps
// again over what is in cache by then. The backward (strategy B) starts from the numbers the forward has kept.

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
#include "elementwise.h"
//
#include "dkd.h"
//
#include "halves.h"
//
#include "half_pairs.h"
//
#include "tile.h"
//
#include "kd_block.h"
//
#include "kd_behind.h"
//
#include "kd_scratch.h"
//
#include "kd_lines.h"
//
#include "kd_sweep.h"
//
#include "kd_elementwise.h"
//
#include "kd_dkd.h"
//
#include "kd_finish.h"
//
#include "kd_gradient.h"

// Row n of a gradient, if that is wanted.
template <typename T>
void zero_row(const KDArgs<T>& args, const Gradient& gradient, int64_t n) {
  if (gradient.data == nullptr) return;
  zero_row<T>(gradient, row_start(gradient, n, args.inner), args.classes);
}

template <typename T>
bool row_counts(const KDArgs<T>& args, int64_t n) {
  return !(args.row_weights && args.row_weights[n] == 0) && !(args.target && args.target[n] == args.ignore_index);
}

// Whether the register of rows from n on can be added at once.
template <typename T>
bool neighbours_count(const KDArgs<T>& args, int64_t n, int64_t end) {
  if (n + kLanes<T> > std::min(end, args.inner)) return false;
  bool all = true;
  for (int r = 0; args.target && r < kLanes<T>; ++r) all &= args.target[n + r] != args.ignore_index;
  for (int r = 0; args.row_weights && r < kLanes<T>; ++r) all &= args.row_weights[n + r] != 0;
  return all;
}

template <typename T>
void skip_row(const KDForward<T>& args, int64_t n) {
  for (int i = 0; i < RowStats{args.teachers}.size(args.divergence); ++i) args.row_stats[i * args.rows + n] = 0;
  args.row_loss[n] = 0;
  zero_row<T>(args, args.gradient, n);
}

// The weight of teacher k in row n, as far as it is known before the teachers are read.
template <typename T>
T first_weight(const KDForward<T>& args, int k, int64_t n) {
  if (args.kd_scale == 0) return 0;
  if (args.rule != WeightRule::given) return T(1) / args.teachers;
  return args.weights[k * args.weights_teacher_stride + n * args.weights_row_stride];
}

// The same in rows number_of(0), number_of(1), …
template <typename T, typename NumberOf>
void set_first_weights(const KDForward<T>& args, int k, int rows, NumberOf number_of, Lanes<T>& weight) {
  weight = splat(first_weight(args, k, number_of(0)));
  for (int r = 1; args.rule == WeightRule::given && r < rows; ++r) weight[r] = first_weight(args, k, number_of(r));
}

template <typename T>
void start_teachers(const KDForward<T>& args, Block<T>& block) {
  block.skips_zero_weights = args.rule == WeightRule::given && args.skip_zero_weights;
  for (int k = 0; k < args.teachers; ++k) {
    block.teacher_state[k].clear();
    block.teacher[k].clear();
    set_first_weights(args, k, block.rows, [&](int row) { return block.n[row]; }, block.teacher[k].weight);
  }
}

template <typename T>
void write_stats(const KDForward<T>& args, const Block<T>& block, int row) {
  const RowStats at{args.teachers};
  T* out = args.row_stats + block.n[row];
  const int64_t rows = args.rows;
  for (int k = 0; k < args.teachers; ++k) {
    const TeacherNumbers<T>& teacher = block.teacher[k];
    const bool read = args.kd_scale != 0 && block.reads(k, row);
    out[at.divergence(k) * rows] = teacher.divergence[row];
    out[at.weight(k) * rows] = teacher.weight[row];
    if (is_elementwise(args.divergence)) out[at.slope(k) * rows] = teacher.slope[row];
    out[at.teacher_max(k) * rows] = read ? block.teacher_state[k].max[row] : T(0);
    out[at.teacher_sum(k) * rows] = read ? block.teacher_state[k].sum[row] : T(0);
    out[at.teacher_ce(k) * rows] = args.rule == WeightRule::confidence ? teacher.signal[row] : T(0);
    out[at.teacher_entropy(k) * rows] = args.rule == WeightRule::entropy ? teacher.signal[row] : T(0);
  }
  out[at.student_max() * rows] = block.student_state.max[row];
  out[at.student_sum() * rows] = block.student_state.sum[row];
  out[at.student_sum1() * rows] = block.student_state.sum1[row];
  out[at.student_ce() * rows] = args.ce_weight != 0 ? block.student.cross_entropy[row] : T(0);
}

// Keeps what has become of kLanes rows from n on.
template <typename T>
void settle_neighbours(const KDForward<T>& args, Block<T>& block, int64_t n, Vec<T> loss) {
  const Vec<T> weight = args.row_weights ? load(args.row_weights + n) : splat(T(1));
  block.scale = args.items ? weight / *args.items : weight;
  store(args.row_loss + n, weight * loss);
  store(args.row_stats + RowStats{args.teachers}.scale() * args.rows + n, block.scale.all());
}

// Of the block's rows.
template <typename T>
void settle_block(const KDForward<T>& args, Block<T>& block, const Lanes<T>& loss) {
  T* const scales = args.row_stats + RowStats{args.teachers}.scale() * args.rows;
  if (block.rows == kLanes<T> && block.n[kLanes<T> - 1] - block.n[0] == kLanes<T> - 1) {
    settle_neighbours(args, block, block.n[0], loss.all());
  } else {
    for (int row = 0; row < block.rows; ++row) {
      const int64_t n = block.n[row];
      const T weight = args.row_weights ? args.row_weights[n] : T(1);
      args.row_loss[n] = weight * loss[row];
      scales[n] = block.scale[row] = args.items ? weight / *args.items : weight;
    }
  }
  for (int row = 0; args.keep_stats && row < block.rows; ++row) write_stats(args, block, row);
}

// The gradient and the losses, where a block of rows that are not short will be written to, and the targets to come.
template <typename T>
MTKD_INLINE void touch_outputs(const KDForward<T>& args, const Block<T>& block) {
  const int bytes = element_bytes(args.gradient.dtype);
  const auto* const gradient = static_cast<const char*>(args.gradient.data);
  for (int row = 0; gradient && args.gradient.class_stride == 1 && row < block.rows; ++row)
    touch_pages(gradient + block.start(args.gradient, row) * bytes, args.classes * bytes);
  __builtin_prefetch(args.row_loss + block.n[0]);
  __builtin_prefetch(args.row_stats + RowStats{args.teachers}.scale() * args.rows + block.n[0]);
  const int64_t next = block.n[block.rows - 1] + 1;
  if (args.target && next < args.rows) __builtin_prefetch(args.target + next);
}

template <typename T>
void forward_block(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block, Scratch<T>& scratch) {
  if (scratch.across())
    block.find_near();
  else
    touch_outputs(args, block);
  scratch.start(block.n[0]);
  start_teachers(args, block);
  sweep_block(args, block, sweep, scratch);
  Lanes<T> loss;
  loss = finish_block(args, sweep, block, [&] { sum_elements(args, block, sweep, scratch); });
  settle_block(args, block, loss);
  if (args.gradient.data == nullptr) return;
  gradient_factors(args, sweep, block);
  write_student_gradient(args, block, sweep, scratch, args.gradient);
}

#include "kd_short.h"

template <typename T>
Sweep<T> forward_sweep(const KDForward<T>& args) {
  const bool soft = args.kd_scale != 0;
  const bool teacher_weights = soft && (args.rule == WeightRule::confidence || args.rule == WeightRule::entropy);
  return Sweep<T>(args, args.ce_weight != 0, teacher_weights, soft && args.rule == WeightRule::entropy);
}

template <typename T>
void forward_rows(const KDForward<T>& args, Scratch<T>& scratch, int64_t begin, int64_t end) {
  const Sweep<T> sweep = forward_sweep(args);
  bool plain = scratch.across() && has_plain_case(args);  // until a block is not: masked classes are so in every row
  Block<T> block;
  const auto finish = [&] {
    if (block.rows > 0) forward_block(args, sweep, block, scratch);
    block.rows = 0;
  };
  for (int64_t n = begin; n < end; ++n) {
    if (scratch.across() && block.rows == 0 && neighbours_count(args, n, end)) {
      plain = plain && plain_block(args, sweep, block, n, scratch);
      if (!plain) {
        block.add_neighbours(args, n);
        finish();
      }
      n += kLanes<T> - 1;
      continue;
    }
    if (!row_counts(args, n)) {
      skip_row(args, n);
      continue;
    }
    if (!scratch.has_room(block, n, args.inner)) finish();
    block.add(args, n);
    // Before the next row, which may not count, is written behind it; a full block, so that its neighbours join at
    // once.
    if (!scratch.one_tile() || block.rows == kLanes<T>) finish();
  }
  finish();
}

template <typename T>
void read_stats(const KDBackward<T>& args, Block<T>& block, int row, T scale) {
  const RowStats at{args.teachers};
  const int64_t n = block.n[row], rows = args.rows;
  const T* in = args.row_stats + n;
  block.scale[row] = args.upstream ? scale * args.upstream[n * args.upstream_stride] : scale;
  block.student_state.max[row] = in[at.student_max() * rows];
  block.student_state.sum[row] = in[at.student_sum() * rows];
  block.student_state.sum1[row] = in[at.student_sum1() * rows];
  for (int k = 0; k < args.teachers; ++k) {
    TeacherNumbers<T>& teacher = block.teacher[k];
    teacher.divergence[row] = in[at.divergence(k) * rows];
    if (is_elementwise(args.divergence)) teacher.slope[row] = in[at.slope(k) * rows];
    teacher.weight[row] =
        args.kd_scale == 0 ? T(0) : args.weights[k * args.weights_teacher_stride + n * args.weights_row_stride];
    block.teacher_state[k].max[row] = in[at.teacher_max(k) * rows];
    block.teacher_state[k].sum[row] = in[at.teacher_sum(k) * rows];
  }
}

template <typename T>
void prepare_gradients(const KDBackward<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  for (int k = 0; k < args.teachers; ++k)
    for (int lane = block.rows; lane < kLanes<T>; ++lane) block.teacher[k].weight[lane] = 0;
  block.student.log_sum = log_of(block.student_state.sum.all());
  for (int k = 0; k < args.teachers; ++k) block.teacher[k].log_sum = log_of(block.teacher_state[k].sum.all());
  if (args.divergence == Divergence::dkd) set_targets_apart(args, sweep, block);
  gradient_factors(args, sweep, block);
}

template <typename T>
void write_gradients(const KDBackward<T>& args, const Sweep<T>& sweep, Block<T>& block, Scratch<T>& scratch) {
  if (scratch.across()) block.find_near();
  if (args.student_gradient.data) {
    refer_to_maxima(args, block, scratch);
    write_student_gradient(args, block, sweep, scratch, args.student_gradient);
  }
  for (int k = 0; k < args.teachers; ++k)
    if (args.teacher_gradient[k]) write_teacher_gradient(args, block, k, sweep, scratch);
}

template <typename T>
void zero_gradients(const KDBackward<T>& args, int64_t n) {
  zero_row<T>(args, args.student_gradient, n);
  for (int k = 0; k < args.teachers; ++k) zero_row<T>(args, args.gradient_of_teacher(k), n);
}

template <typename T>
void backward_rows(const KDBackward<T>& args, Scratch<T>& scratch, int64_t begin, int64_t end) {
  const Sweep<T> sweep(args, args.ce_weight != 0, false, false);
  Block<T> block;
  const T* scales = args.row_stats + RowStats{args.teachers}.scale() * args.rows;
  block.skips_zero_weights = true;
  const auto finish = [&] {
    if (block.rows > 0) {
      prepare_gradients(args, sweep, block);
      write_gradients(args, sweep, block, scratch);
    }
    block.rows = 0;
  };
  for (int64_t n = begin; n < end; ++n) {
    if (scales[n] == 0) {
      zero_gradients(args, n);
      continue;
    }
    if (!scratch.has_room(block, n, args.inner)) finish();
    block.add(args, n);
    read_stats(args, block, block.rows - 1, scales[n]);
  }
  finish();
}

#include "kd_columns.h"
//
#include "kd_rescale.h"

// Everything of the op on the CPU, a range of rows at a time.
template <typename T>
void forward(const KDForward<T>& args, int64_t begin, int64_t end) {
  const bool streams = streams_gradient(args, args.gradient);
  const bool gradient = args.gradient.data != nullptr;
  const Behind<T> behind = gradient ? Behind<T>(args, args.gradient, end) : Behind<T>();
  Scratch<T> scratch(args, end - begin, gradient ? Exps::kept : Exps::unused, behind, streams);
  forward_rows(args, scratch, begin, end);
  stream_fence();
}

template <typename T>
void backward(const KDBackward<T>& args, int64_t begin, int64_t end) {
  const bool streams = streams_gradient(args, args.student_gradient);
  Scratch<T> scratch(args, end - begin, Exps::computed_again, Behind<T>(), streams);
  backward_rows(args, scratch, begin, end);
  stream_fence();
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
