// The passes of attention.h, sample by sample, in one instruction set (see instruction_sets.h).

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "halves.h"
//
#include "tile.h"
//
#include "distance_sums.h"
//
#include "attention_map.h"

template <typename T>
T sum_of_squares(const T* x, int64_t count, T scale) {
  Vec<T> lanes{};
  T total = 0;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const Vec<T> scaled = scale * load(x + i);
    lanes += scaled * scaled;
  }
  for (; i < count; ++i) total += (scale * x[i]) * (scale * x[i]);
  return total + sum_of<T>(lanes);
}

template <typename T>
void add_squares(const T* x, int count, T* to) {
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(to + i) + load(x + i) * load(x + i));
  for (; i < count; ++i) to[i] += x[i] * x[i];
}

template <typename T>
void multiply(const T* x, const T* factors, int count, T* to) {
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(x + i) * load(factors + i));
  for (; i < count; ++i) to[i] = x[i] * factors[i];
}

template <typename T>
void multiply(const T* x, T factor, int count, T* to) {
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(x + i) * factor);
  for (; i < count; ++i) to[i] = x[i] * factor;
}

// One sample of a map, its elements in the order in which they lie.
template <typename T>
struct SampleMap {
  const FeatureMap<T>& map;
  int64_t sample;
  Tile<T>&tile, &sums;  // scratch

  int64_t elements() const { return map.channels * map.positions; }
  T* of_positions() const { return map.of_positions + sample * map.positions; }

  const T* read(int64_t begin, int count) const {
    return read_tile(Logits{map.data, 0, 0, 1, map.dtype}, sample * elements(), begin, count, tile.values);
  }
  void write_gradient(int64_t begin, int count, const T* values) const {
    write_tile(map.gradient, map.dtype, sample * elements() + begin, count, values);
  }

  // Channels first: elements of the channels that are taken together, every one of them a row of equal positions.
  int64_t row() const { return channels_together(map.positions, kTileColumns, 1) * map.positions; }
  int count_in_row(int64_t at, int count) const { return static_cast<int>(std::min<int64_t>(count, elements() - at)); }
};

template <typename T>
void write_energies_of_rows(const SampleMap<T>& x) {
  const int64_t row = x.row(), positions = x.map.positions;
  for (int64_t begin = 0; begin < row; begin += kTileColumns) {
    const int count = tile_count(row, begin);
    T* sums = x.sums.values;
    std::fill(sums, sums + count, T(0));
    for (int64_t at = begin; at < x.elements(); at += row) {
      const int here = x.count_in_row(at, count);
      add_squares(x.read(at, here), here, sums);
    }
    for (int64_t channels = row / positions; channels > 1;) {  // the latter half of them is added to the former
      const int64_t half = channels / 2;
      channels -= half;
      for (int64_t i = 0; i < half * positions; ++i) sums[i] += sums[i + channels * positions];
    }
    std::copy(sums, sums + std::min<int64_t>(count, positions), x.of_positions() + begin);
  }
}

template <typename T>
void write_gradient_of_rows(const SampleMap<T>& x, T twice_weight) {
  const int64_t row = x.row(), positions = x.map.positions;
  alignas(64) T out[kTileColumns];
  for (int64_t begin = 0; begin < row; begin += kTileColumns) {
    const int count = tile_count(row, begin);
    T* factors = x.sums.values;
    for (int i = 0; i < count; ++i) {
      factors[i] = i < positions ? twice_weight * x.of_positions()[begin + i] : factors[i - positions];
    }
    for (int64_t at = begin; at < x.elements(); at += row) {
      const int here = x.count_in_row(at, count);
      multiply(x.read(at, here), factors, here, out);
      x.write_gradient(at, here, out);
    }
  }
}

// Channels last: a position's channels lie side by side.
template <typename T>
void write_energies_of_positions(const SampleMap<T>& x) {
  const int64_t channels = x.map.channels;
  for (int64_t p = 0; p < x.map.positions; ++p) {
    T energy = 0;
    for (int64_t begin = 0; begin < channels; begin += kTileColumns) {
      const int count = tile_count(channels, begin);
      energy += sum_of_squares(x.read(p * channels + begin, count), count, T(1));
    }
    x.of_positions()[p] = energy;
  }
}

template <typename T>
void write_gradient_of_positions(const SampleMap<T>& x, T twice_weight) {
  const int64_t channels = x.map.channels;
  alignas(64) T out[kTileColumns];
  for (int64_t p = 0; p < x.map.positions; ++p) {
    for (int64_t begin = 0; begin < channels; begin += kTileColumns) {
      const int count = tile_count(channels, begin);
      multiply(x.read(p * channels + begin, count), twice_weight * x.of_positions()[p], count, out);
      x.write_gradient(p * channels + begin, count, out);
    }
  }
}

template <typename T>
MapNorm<T> map_norm(const T* energies, int64_t positions) {
  T scale = 1, sum = sum_of_squares(energies, positions, scale);
  scale = scale_for(sum);
  if (scale != T(1)) sum = sum_of_squares(energies, positions, scale);
  return {sum, scale};
}

template <typename T>
MapSums<T> map_sums(const T* a, const T* b, MapNorm<T> of_a, MapNorm<T> of_b, int64_t positions) {
  MapSums<Vec<T>> lanes;
  MapSums<T> total;
  int64_t i = 0;
  for (; i + kLanes<T> <= positions; i += kLanes<T>) lanes.add(load(a + i) / of_a.divisor, load(b + i) / of_b.divisor);
  for (; i < positions; ++i) total.add(a[i] / of_a.divisor, b[i] / of_b.divisor);
  total.absorb(lanes, SumOfLanes<T>());
  return total;
}

template <typename T>
void replace_by_slopes(T* a, T* b, const MapSlopes<T>& slopes, int64_t positions) {
  int64_t i = 0;
  for (; i + kLanes<T> <= positions; i += kLanes<T>) {
    Vec<T> at_a = load(a + i), at_b = load(b + i);
    slopes.replace(at_a, at_b);
    store(a + i, at_a);
    store(b + i, at_b);
  }
  for (; i < positions; ++i) slopes.replace(a[i], b[i]);
}

template <typename T>
void energy_of_sample(const AttentionMaps<T>& args, int64_t i, Tile<T>& tile, Tile<T>& sums) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  if (args.weights(pair, sample) == 0) return;
  const SampleMap<T> x{args.map[pair], sample, tile, sums};
  x.map.channels_last ? write_energies_of_positions(x) : write_energies_of_rows(x);
}

template <typename T>
T distance_of_sample(const AttentionPairs<T>& args, int64_t i) {
  const int64_t pair = i / args.samples, sample = i % args.samples, positions = args.pair[pair].positions;
  T* a = args.pair[pair].student + sample * positions;
  T* b = args.pair[pair].teacher + sample * positions;
  if (args.weights(pair, sample) == 0) {
    std::fill(a, a + positions, T(0));
    std::fill(b, b + positions, T(0));
    return 0;
  }
  const MapNorm<T> a_norm = map_norm(a, positions), b_norm = map_norm(b, positions);
  const MapSums<T> sums = map_sums(a, b, a_norm, b_norm, positions);
  replace_by_slopes(a, b, MapSlopes<T>(a_norm, b_norm, sums, positions), positions);
  return sums.dd / static_cast<T>(positions);
}

template <typename T>
void gradient_of_sample(const AttentionMaps<T>& args, int64_t i, Tile<T>& tile, Tile<T>& factors) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  const SampleMap<T> x{args.map[pair], sample, tile, factors};
  if (!x.map.gradient) return;
  const T weight = args.weights(pair, sample);
  if (weight == 0) {
    const int64_t bytes = x.elements() * element_bytes(x.map.dtype);
    __builtin_memset(static_cast<char*>(x.map.gradient) + sample * bytes, 0, bytes);
  } else {
    x.map.channels_last ? write_gradient_of_positions(x, 2 * weight) : write_gradient_of_rows(x, 2 * weight);
  }
}

// [begin, end) over pairs·samples, pair-major.
template <typename T>
void attention_energy(const AttentionMaps<T>& args, int64_t begin, int64_t end) {
  Tile<T> tile, sums;
  for (int64_t i = begin; i < end; ++i) energy_of_sample(args, i, tile, sums);
}

template <typename T>
void attention_distance(const AttentionPairs<T>& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) args.distance[i] = distance_of_sample(args, i);
}

template <typename T>
void attention_gradient(const AttentionMaps<T>& args, int64_t begin, int64_t end) {
  Tile<T> tile, factors;
  for (int64_t i = begin; i < end; ++i) gradient_of_sample(args, i, tile, factors);
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
