// A weight on the device.
#pragma once

#include "device.h"
#include "pair_weights.h"

namespace mtkd_fast {

MTKD_DEVICE float weight_of(const PairWeights<float>& weights, int pair, int64_t sample) {
  if (weights.data == nullptr) return 1.0f;
  return device::load(weights.data + pair * weights.pair_stride + sample * weights.sample_stride);
}

}  // namespace mtkd_fast
