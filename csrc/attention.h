// The distance "attention" of the op `hint` on raw pointers, in three passes: the energies A = Σ_c f² of the positions
// of every map, one side of the pairs at a time; from the energies of both sides the distance and its slopes in A, in
// their place; and the gradient 2·f·slope, again one side at a time. A sample of weight 0 is not read.
#pragma once

#include <cstdint>

#include "kd.h"
#include "pair_weights.h"

namespace mtkd_fast {

template <typename acc_t>
struct FeatureMap {
  const void* data;     // [samples, channels, positions] or, channels last, [samples, positions, channels]
  void* gradient;       // the same; null where none is wanted
  acc_t* of_positions;  // [samples, positions]: the energies (written), the slopes (read)
  int64_t channels, positions;
  DType dtype;
  bool channels_last;
};

template <typename acc_t>
struct AttentionMaps {
  int64_t samples;
  int pairs;
  FeatureMap<acc_t> map[kMaxTeachers];
  PairWeights<acc_t> weights;
};

// Energies on the way in, slopes on the way out, [samples, positions]. The distance and the slopes of a sample of
// weight 0 are 0.
template <typename acc_t>
struct EnergyPair {
  acc_t *student, *teacher;
  int64_t positions;
};

template <typename acc_t>
struct AttentionPairs {
  int64_t samples;
  int pairs;
  EnergyPair<acc_t> pair[kMaxTeachers];
  PairWeights<acc_t> weights;
  acc_t* distance;  // [pairs, samples]
};

// Over pairs·samples, pair-major.
void attention_energy_cpu(const AttentionMaps<float>&, int64_t begin, int64_t end);
void attention_energy_cpu(const AttentionMaps<double>&, int64_t begin, int64_t end);
void attention_distance_cpu(const AttentionPairs<float>&, int64_t begin, int64_t end);
void attention_distance_cpu(const AttentionPairs<double>&, int64_t begin, int64_t end);
void attention_gradient_cpu(const AttentionMaps<float>&, int64_t begin, int64_t end);
void attention_gradient_cpu(const AttentionMaps<double>&, int64_t begin, int64_t end);
const char* attention_energy_cuda(const AttentionMaps<float>&, int device, void* stream);
const char* attention_distance_cuda(const AttentionPairs<float>&, int device, void* stream);
const char* attention_gradient_cuda(const AttentionMaps<float>&, int device, void* stream);

// Channels first, channels that lie one after the other are taken together as one row of at most `most` elements: short
// rows fill wide registers, and start where wide loads can. `multiple`: of how many elements a row should be, a power
// of two; a row of its own channel alone need not be.
MTKD_HD int64_t channels_together(int64_t positions, int64_t most, int64_t multiple) {
  int64_t least = 1;
  while (least * positions % multiple != 0) least *= 2;
  return least * positions > most ? 1 : most / (least * positions) * least;
}

}  // namespace mtkd_fast
