// The op `hint` on raw pointers: K pairs of features, the distance of each sample, and its gradient.
#pragma once

#include <cstdint>

#include "distances.h"
#include "kd.h"
#include "pair_weights.h"

namespace mtkd_fast {

// One pair: [samples, elements] each, dense within a sample, in the same element order.
struct FeaturePair {
  const void* student;
  const void* teacher;
  int64_t student_stride, teacher_stride;  // from sample to sample, in elements
  int64_t elements;
  DType student_dtype, teacher_dtype;
  void* gradient;  // [samples, elements], stride `elements`, the student's dtype; backward and fused only
};

template <typename acc_t>
struct HintArgs {
  int64_t samples;
  int pairs;
  FeaturePair pair[kMaxTeachers];
  PairWeights<acc_t> weights;
  Distance distance;
  acc_t* kept;  // [kept_numbers(distance), pairs, samples]: see Kept. Forward writes it, backward reads it.
};

// The forward that writes gradients too, for an upstream of 1: of Σ scale·weight·distance, where a pair has
// room for it. `kept` is the distances alone, [pairs, samples].
template <typename acc_t>
struct HintFused : HintArgs<acc_t> {
  acc_t scale;
};

// Forward: kept; a pair of weight 0 is not read, its numbers are 0.
// Backward: gradient = weight·∂distance/∂student, 0 where the weight is 0 (and the pair is not read).
void hint_forward_cpu(const HintArgs<float>&, int64_t begin, int64_t end);  // over pairs·samples, pair-major
void hint_forward_cpu(const HintArgs<double>&, int64_t begin, int64_t end);
void hint_backward_cpu(const HintArgs<float>&, int64_t begin, int64_t end);
void hint_backward_cpu(const HintArgs<double>&, int64_t begin, int64_t end);
void hint_fused_cpu(const HintFused<float>&, int64_t begin, int64_t end);
void hint_fused_cpu(const HintFused<double>&, int64_t begin, int64_t end);
const char* hint_forward_cuda(const HintArgs<float>&, int device, void* stream);
const char* hint_fused_cuda(const HintFused<float>&, int device, void* stream);
const char* hint_backward_cuda(const HintArgs<float>&, int device, void* stream);

}  // namespace mtkd_fast
