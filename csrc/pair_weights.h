// How much sample n of pair k of features counts: element (k, n) at k·pair_stride + n·sample_stride, or null for ones.
#pragma once

#include <cstdint>

namespace mtkd_fast {

template <typename acc_t>
struct PairWeights {
  const acc_t* data;
  int64_t pair_stride, sample_stride;

  int64_t at(int64_t pair, int64_t sample) const { return pair * pair_stride + sample * sample_stride; }
  acc_t operator()(int64_t pair, int64_t sample) const { return data ? data[at(pair, sample)] : acc_t(1); }
};

}  // namespace mtkd_fast
