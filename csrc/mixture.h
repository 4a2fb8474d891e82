// The op `mixture` on raw pointers: the weighted mean of K softmaxes, its gradient, and its divergence from a student.
#pragma once

#include <cstdint>

#include "kd.h"

namespace mtkd_fast {

// Below this a mixture may have lost terms to underflow, and its logarithm is taken by sums of logarithms.
template <typename acc_t>
constexpr acc_t kSafeMixture = sizeof(acc_t) == sizeof(float) ? acc_t(0x1p-80) : acc_t(0x1p-900);

// Rows as in kd.h. weights: element (k, row) at k·teacher_stride + row·row_stride, or null for 1/K.
template <typename acc_t>
struct MixtureArgs {
  int64_t rows, inner, classes;  // inner >= 1
  int teachers;
  Logits teacher[kMaxTeachers];
  const acc_t* weights;
  int64_t weights_teacher_stride, weights_row_stride;
  bool skip_zero_weights;  // a teacher of weight 0 is not read
  acc_t temperature;
};

// pbar = Σ_k w_k p_k, and the states that its backward starts from. A teacher that is not read has a state of 0.
template <typename acc_t>
struct MixtureForward : MixtureArgs<acc_t> {
  acc_t* probabilities;  // [rows, classes] contiguous
  acc_t* row_stats;      // [2K, rows]: max, then Σ e^{(t−max)/τ}
};

// dots = <G, p_k>, the gradient of w_k; gradient of teacher k: w_k p_k ⊙ (G − <G, p_k>)/τ. K + 1 reads; a teacher's
// gradient takes another read of it and of G, which are in cache then, and a write.
template <typename acc_t>
struct MixtureBackward : MixtureArgs<acc_t> {
  const acc_t* row_stats;
  Logits upstream;                       // G, acc_t
  acc_t* dots;                           // [K, rows]; 0 for a teacher that is not read
  void* teacher_gradient[kMaxTeachers];  // [rows, classes] contiguous, each teacher's dtype, or null
};

// KL(pbar‖q). Its row_stats are those of kd.h, RowStats, with ∂KL/∂w_k in place of D_k and a scale of 1, so that
// kd_rescale and kd_backward finish the gradients. The value takes a second sweep over the columns anyway; the gradient
// of a float32 or float64 student for an upstream of 1 is written in it, one write instead of K + 2 passes.
template <typename acc_t>
struct MixtureDivergence : MixtureArgs<acc_t> {
  Logits student;
  acc_t* divergence;  // [rows]
  acc_t* row_stats;   // [6K + 5, rows]
  void* gradient;     // [rows, classes] contiguous, the student's dtype, or null
};

void mixture_forward_cpu(const MixtureForward<float>&, int64_t begin, int64_t end);
void mixture_forward_cpu(const MixtureForward<double>&, int64_t begin, int64_t end);
void mixture_backward_cpu(const MixtureBackward<float>&, int64_t begin, int64_t end);
void mixture_backward_cpu(const MixtureBackward<double>&, int64_t begin, int64_t end);
void mixture_divergence_cpu(const MixtureDivergence<float>&, int64_t begin, int64_t end);
void mixture_divergence_cpu(const MixtureDivergence<double>&, int64_t begin, int64_t end);
const char* mixture_forward_cuda(const MixtureForward<float>&, int device, void* stream);
const char* mixture_backward_cuda(const MixtureBackward<float>&, int device, void* stream);
const char* mixture_divergence_cuda(const MixtureDivergence<float>&, int device, void* stream);

}  // namespace mtkd_fast
