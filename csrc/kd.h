// The op `kd` on raw pointers: what every backend is handed, and the launchers it must provide.
//
// A row of logits is found by two leading strides, so that logits[:, :-1] of a [B, L, C] tensor is read in place:
// row n of a tensor starts at (n / inner)·outer_stride + (n % inner)·inner_stride. All offsets are 64-bit.
#pragma once

#include <cstdint>
#include <functional>

#include "divergences.h"
#include "row_stats.h"
#include "weights.h"

namespace mtkd_fast {

constexpr int kMaxTeachers = 64;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct Logits {
  const void* data;  // [rows, classes], strides in elements
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t class_stride;  // 1, or of pixels, which have an inner_stride of 1, another; else read element by element
  DType dtype;
};

// What is written: the gradient of some logits, dense, its dimensions in the order in which the student's lie in
// memory.
struct Gradient {
  void* data;  // [rows, classes], rows found as those of the logits; null: not wanted
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t class_stride;
  DType dtype;  // that of the logits
};

// Pixels as rows: their classes are planes of neighbours.
template <typename Tensor>
bool lies_in_planes(const Tensor& x) {
  return x.inner_stride == 1 && x.class_stride != 1;
}

// acc_t: float, or double when any logits are float64.
template <typename acc_t>
struct KDArgs {
  int64_t rows, inner, classes;  // inner >= 1
  int teachers;
  Logits student;
  Logits teacher[kMaxTeachers];
  const int64_t* target;     // [rows] or null
  const acc_t* row_weights;  // [rows] or null: 0 means that the row is neither read nor counted
  int64_t ignore_index;
  Divergence divergence;
  acc_t beta;  // of the divergence, 0 if it takes none
  acc_t temperature;
  acc_t kd_scale;   // 0: no teacher is read
  acc_t ce_weight;  // 0: no hard term
  acc_t label_smoothing;
};

// One number per row and teacher, all in one [size(), rows] buffer of acc_t; element (i, row) at i·rows + row.
// Forward writes what it computes (0 for what it does not read or compute); backward reads it.
struct RowStats {
  int teachers;
  MTKD_HD int divergence(int k) const { return k; }
  MTKD_HD int weight(int k) const { return teachers + k; }
  MTKD_HD int teacher_max(int k) const { return 2 * teachers + k; }
  MTKD_HD int teacher_sum(int k) const { return 3 * teachers + k; }  // Σ e^{(t−max)/τ}
  MTKD_HD int teacher_ce(int k) const { return 4 * teachers + k; }
  MTKD_HD int teacher_entropy(int k) const { return 5 * teachers + k; }
  MTKD_HD int student_max() const { return 6 * teachers; }
  MTKD_HD int student_sum() const { return 6 * teachers + 1; }   // Σ e^{(s−max)/τ}
  MTKD_HD int student_sum1() const { return 6 * teachers + 2; }  // Σ e^{s−max}, only for the hard term
  MTKD_HD int student_ce() const { return 6 * teachers + 3; }
  MTKD_HD int scale() const {
    return 6 * teachers + 4;
  }  // row weight / items; 0: the row does not count; NaN: its label is out of range
  // G of elementwise.h, last, and only for the divergences that have one
  MTKD_HD int slope(int k) const { return 6 * teachers + 5 + k; }
  MTKD_HD int size(Divergence divergence) const { return slope(is_elementwise(divergence) ? teachers : 0); }
};

// Forward: row_loss = row_weight·(kd_scale·Σ_k w_k D_k + ce_weight·CE), not divided by items.
// The gradient, if asked for, is that of Σ_rows row_loss/items: what an upstream of 1 needs.
template <typename acc_t>
struct KDForward : KDArgs<acc_t> {
  WeightRule rule;
  const acc_t* weights;  // rule given: element (k, row) at k·teacher_stride + row·row_stride
  int64_t weights_teacher_stride, weights_row_stride;
  bool skip_zero_weights;  // rule given: a teacher of weight 0 is not read
  const acc_t* items;      // one number on the device, or null for 1
  acc_t* row_loss;         // [rows]
  acc_t* row_stats;        // [RowStats::size, rows]
  bool keep_stats;         // false: of row_stats only the scale is read later
  Gradient gradient;
};

// Backward (strategy B): f = scale·upstream (0 where scale is 0), then for each row
//   student: f·(kd_scale·Σ_k w_k ∂D_k/∂s + ce_weight·∂CE/∂s)        teacher k: f·kd_scale·w_k·∂D_k/∂t_k
// Weights come separately from row_stats: multi_teacher_divergence hands its upstream [K, ...] in their place.
template <typename acc_t>
struct KDBackward : KDArgs<acc_t> {
  const acc_t* weights;
  int64_t weights_teacher_stride, weights_row_stride;
  const acc_t* upstream;  // element row at row·upstream_stride (0: one number), or null for 1
  int64_t upstream_stride;
  const acc_t* row_stats;                // [RowStats::size, rows], from the forward
  Gradient student_gradient;             // its strides are those of every gradient, wanted or not
  void* teacher_gradient[kMaxTeachers];  // in each teacher's dtype, or null
  MTKD_HD Gradient gradient_of_teacher(int k) const {
    const Gradient& like = student_gradient;
    return {teacher_gradient[k], like.outer_stride, like.inner_stride, like.class_stride, this->teacher[k].dtype};
  }
};

// gradient *= upstream, rows of scale 0 stay 0. `out` has the strides of `gradient` and may be the same. An upstream of
// exactly 1 in every row needs no work then.
template <typename acc_t>
struct KDRescale {
  int64_t rows, inner, classes;
  Gradient gradient;
  void* out;
  const acc_t* upstream;
  int64_t upstream_stride;
  const acc_t* scale;  // [rows]
};

// CPU: what a thread may keep of a register of pixels, whatever it has to do; more only of many pixels (kd_scratch.h).
constexpr int64_t kAcrossBytes = 128 << 10;

// CPU: rows [begin, end), the instruction set chosen once at run time (see kd_cpu.cpp).
void kd_forward_cpu(const KDForward<float>&, int64_t begin, int64_t end);
void kd_forward_cpu(const KDForward<double>&, int64_t begin, int64_t end);
void kd_backward_cpu(const KDBackward<float>&, int64_t begin, int64_t end);
void kd_backward_cpu(const KDBackward<double>&, int64_t begin, int64_t end);
void kd_rescale_cpu(const KDRescale<float>&, int64_t begin, int64_t end);
void kd_rescale_cpu(const KDRescale<double>&, int64_t begin, int64_t end);

// CPU, fewer long rows than threads: all rows, the columns of each in `parts`. in_parallel(n, body) calls body(0) to
// body(n − 1), side by side.
using InParallel = std::function<void(int, const std::function<void(int)>&)>;
void kd_forward_columns_cpu(const KDForward<float>&, int parts, const InParallel& in_parallel);
void kd_forward_columns_cpu(const KDForward<double>&, int parts, const InParallel& in_parallel);
void kd_backward_columns_cpu(const KDBackward<float>&, int parts, const InParallel& in_parallel);
void kd_backward_columns_cpu(const KDBackward<double>&, int parts, const InParallel& in_parallel);

// CUDA, float accumulation: every row, on `stream` (a cudaStream_t). Null, or what went wrong.
bool kd_fits_on_chip(const KDArgs<float>&, WeightRule, int device);
const char* kd_forward_cuda(const KDForward<float>&, int device, void* stream);
const char* kd_backward_cuda(const KDBackward<float>&, int device, void* stream);
const char* kd_rescale_cuda(const KDRescale<float>&, int device, void* stream);

}  // namespace mtkd_fast
