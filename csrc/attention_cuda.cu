// The distance "attention" on CUDA devices: a read of every map forward, a read of one side and a write backward. A
// sample of weight 0 is not read.
#include "attention.h"
#include "chunk.cuh"
#include "distances.h"
#include "group.cuh"
#include "pair_weights.cuh"

namespace mtkd_fast {
namespace {

#include "distance_sums.h"
//
#include "attention_map.h"

constexpr int kThreads = 256;
constexpr int kTile = kThreads * kChunk;  // of a row of channels that are taken together
constexpr int kAtOnce = 4;                // chunks of a thread in flight
constexpr int kRowsOfBlock = 8;           // of a gradient

struct MapsKernelArgs : AttentionMaps<float> {
  int64_t parts;  // of the sample that has most, one a block
};

MTKD_HD int64_t parts_of(int64_t all, int64_t each) { return (all + each - 1) / each; }
MTKD_HD int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels first: elements of the channels that are taken together, every one of them a row of equal positions.
MTKD_HD int64_t row_of(const FeatureMap<float>& map) {
  return channels_together(map.positions, kTile, kChunk) * map.positions;
}

// Channels last: as many lanes as a position has chunks share it, and a block takes kAtOnce positions a group of them.
MTKD_HD int lanes_of(const FeatureMap<float>& map) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kChunk < map.channels) lanes *= 2;
  return lanes;
}
MTKD_HD int64_t positions_of_block(const FeatureMap<float>& map) { return kThreads / lanes_of(map) * kAtOnce; }

MTKD_DEVICE InputRow elements_from(const FeatureMap<float>& map, int64_t first) {
  return input_row(Logits{map.data, 1, 0, 1, map.dtype}, {first, 0});
}

MTKD_DEVICE float sum_of_squares(const RawChunk& raw, DType dtype, int64_t left, float* to) {
  float x[kChunk], total = 0;
  decode(raw, dtype, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float square = i < left ? x[i] * x[i] : 0.0f;
    if (to != nullptr) to[i] += square;
    total += square;
  }
  return total;
}

// A tile of the rows: every thread keeps to its eight columns, which the block then folds into positions.
MTKD_DEVICE void energies_of_rows(const FeatureMap<float>& map, int64_t sample, int64_t tile) {
  const int64_t elements = map.channels * map.positions, row = row_of(map), begin = tile * kTile;
  if (begin >= row) return;
  const int64_t count = lesser(row - begin, kTile), mine = device::thread_index() * kChunk;
  float sums[kChunk] = {};
  for (int64_t at = begin; at < elements; at += kAtOnce * row) {
    RawChunk raw[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t here = at + u * row, limit = lesser(count, elements - here);
      raw[u] = mine < limit ? load_chunk(elements_from(map, sample * elements + here), device::thread_index(), limit)
                            : empty_chunk(map.dtype);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      sum_of_squares(raw[u], map.dtype, lesser(count, elements - at - u * row) - mine, sums);
    }
  }
  float* columns = reinterpret_cast<float*>(device::shared_memory());
#pragma unroll
  for (int i = 0; i < kChunk; ++i) columns[mine + i] = sums[i];
  device::sync_block();
  for (int64_t channels = row / map.positions; channels > 1;) {  // the latter half of them is added to the former
    const int64_t half = channels / 2;
    channels -= half;
    for (int64_t i = device::thread_index(); i < half * map.positions; i += kThreads) {
      columns[i] += columns[i + channels * map.positions];
    }
    device::sync_block();
  }
  for (int64_t p = device::thread_index(); p < lesser(count, map.positions); p += kThreads) {
    device::store(map.of_positions + sample * map.positions + begin + p, columns[p]);
  }
  device::sync_block();
}

MTKD_DEVICE void energies_of_positions(const FeatureMap<float>& map, int64_t sample, int64_t part) {
  const LaneGroup group(lanes_of(map), nullptr);
  const int groups = kThreads / group.size();
  const int64_t first = part * positions_of_block(map) + group.index_in_block();
  const int64_t chunks = parts_of(map.channels, kChunk);
  float sums[kAtOnce] = {};
  for (int64_t chunk = group.rank(); chunk < chunks; chunk += group.size()) {
    RawChunk raw[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t p = first + u * groups;
      const InputRow row = elements_from(map, (sample * map.positions + p) * map.channels);
      raw[u] = p < map.positions ? load_chunk(row, chunk, map.channels) : empty_chunk(map.dtype);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      sums[u] += sum_of_squares(raw[u], map.dtype, map.channels - chunk * kChunk, nullptr);
    }
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t p = first + u * groups;
    const float energy = sum_lanes(sums[u], group.size());
    if (group.rank() == 0 && p < map.positions) device::store(map.of_positions + sample * map.positions + p, energy);
  }
}

// Shared memory: kTile floats.
MTKD_KERNEL(kThreads, 2)
attention_energy(MTKD_PARAM(MapsKernelArgs) args) {
  const int64_t all = args.pairs * args.samples * args.parts;
  for (int64_t i = device::block_index(); i < all; i += device::grid_blocks()) {
    const int64_t part = i % args.parts, sample = i / args.parts % args.samples;
    const int k = static_cast<int>(i / args.parts / args.samples);
    if (weight_of(args.weights, k, sample) == 0) continue;
    if (args.map[k].channels_last) {
      energies_of_positions(args.map[k], sample, part);
    } else {
      energies_of_rows(args.map[k], sample, part);
    }
  }
}

// Chunks of kAtOnce stretches of a map, loaded before any is stored: `chunk` of the `limit[u]` elements from
// `first[u]`.
MTKD_DEVICE void write_gradient(const FeatureMap<float>& map, const int64_t* first, const int64_t* limit, int64_t chunk,
                                bool read, const float (*factors)[kChunk], int factors_step) {
  RawChunk raw[kAtOnce];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    raw[u] = read && chunk * kChunk < limit[u] ? load_chunk(elements_from(map, first[u]), chunk, limit[u]) : RawChunk{};
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (chunk * kChunk >= limit[u]) continue;
    float x[kChunk];
    decode(raw[u], map.dtype, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] *= factors[u * factors_step][i];
    store_chunk(output_row(map.gradient, first[u], 1, map.dtype), chunk, limit[u], x);
  }
}

// Eight columns a thread of a tile of kRowsOfBlock rows.
MTKD_DEVICE void gradient_of_rows(const FeatureMap<float>& map, int64_t sample, int64_t part, float twice_weight) {
  const int64_t elements = map.channels * map.positions, row = row_of(map), tiles = parts_of(row, kTile);
  const int64_t begin = part % tiles * kTile, count = lesser(row - begin, kTile);
  const int64_t mine = device::thread_index() * kChunk;
  const bool read = twice_weight != 0;
  float factors[1][kChunk] = {};
  int64_t p = (begin + mine) % map.positions;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (read && mine + i < count) {
      factors[0][i] = twice_weight * device::load(map.of_positions + sample * map.positions + p);
    }
    p = p + 1 < map.positions ? p + 1 : 0;
  }
  int64_t at = part / tiles * kRowsOfBlock * row + begin;
  for (int rows = 0; rows < kRowsOfBlock; rows += kAtOnce) {
    int64_t first[kAtOnce], limit[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u, at += row) {
      first[u] = sample * elements + at;
      limit[u] = lesser(count, elements - at);
    }
    write_gradient(map, first, limit, device::thread_index(), read, factors, 0);
  }
}

MTKD_DEVICE void gradient_of_positions(const FeatureMap<float>& map, int64_t sample, int64_t part, float twice_weight) {
  const LaneGroup group(lanes_of(map), nullptr);
  const bool read = twice_weight != 0;
  int64_t first[kAtOnce], limit[kAtOnce];
  float factors[kAtOnce][kChunk];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t p = part * positions_of_block(map) + group.index_in_block() + u * (kThreads / group.size());
    const int64_t at = sample * map.positions + p;
    first[u] = at * map.channels;
    limit[u] = p < map.positions ? map.channels : 0;
    const float factor = read && p < map.positions ? twice_weight * device::load(map.of_positions + at) : 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) factors[u][i] = factor;
  }
  for (int64_t chunk = group.rank(); chunk * kChunk < map.channels; chunk += group.size()) {
    write_gradient(map, first, limit, chunk, read, factors, 1);
  }
}

MTKD_KERNEL(kThreads, 2)
attention_gradient(MTKD_PARAM(MapsKernelArgs) args) {
  const int64_t all = args.pairs * args.samples * args.parts;
  for (int64_t i = device::block_index(); i < all; i += device::grid_blocks()) {
    const int64_t part = i % args.parts, sample = i / args.parts % args.samples;
    const int k = static_cast<int>(i / args.parts / args.samples);
    if (args.map[k].gradient == nullptr) continue;
    const float twice_weight = 2 * weight_of(args.weights, k, sample);
    if (args.map[k].channels_last) {
      gradient_of_positions(args.map[k], sample, part, twice_weight);
    } else {
      gradient_of_rows(args.map[k], sample, part, twice_weight);
    }
  }
}

struct SquareSums {
  float a = 0, b = 0;

  template <typename Reduce>
  MTKD_DEVICE void absorb(const SquareSums& x, const Reduce& reduce) {
    a += reduce(x.a);
    b += reduce(x.b);
  }
};

// What this thread writes at the end, and no other.
MTKD_DEVICE float load_energy(const float* p) {
  return device::word_as_float(device::load_own(reinterpret_cast<const uint32_t*>(p)));
}

MTKD_DEVICE SquareSums squares_of_maps(BlockGroup& group, const float* a, const float* b, int64_t positions,
                                       FeatureScales<float> scales) {
  SquareSums sums;
  for (int64_t p = group.rank(); p < positions; p += group.size()) {
    const float of_a = scales.f * load_energy(a + p), of_b = scales.g * load_energy(b + p);
    sums.a += of_a * of_a;
    sums.b += of_b * of_b;
  }
  group.merge(sums, AddLanes{});
  return sums;
}

MTKD_DEVICE float distance_of_maps(BlockGroup& group, float* a, float* b, int64_t positions) {
  FeatureScales<float> scales;
  SquareSums squares = squares_of_maps(group, a, b, positions, scales);
  scales = {scale_for(squares.a), scale_for(squares.b)};
  if (scales.f != 1 || scales.g != 1) squares = squares_of_maps(group, a, b, positions, scales);
  const MapNorm<float> of_a(squares.a, scales.f), of_b(squares.b, scales.g);

  MapSums<float> sums;
  for (int64_t p = group.rank(); p < positions; p += group.size()) {
    sums.add(load_energy(a + p) / of_a.divisor, load_energy(b + p) / of_b.divisor);
  }
  group.merge(sums, AddLanes{});
  const MapSlopes<float> slopes(of_a, of_b, sums, positions);
  for (int64_t p = group.rank(); p < positions; p += group.size()) {
    float at_a = load_energy(a + p), at_b = load_energy(b + p);
    slopes.replace(at_a, at_b);
    device::store(a + p, at_a);
    device::store(b + p, at_b);
  }
  return sums.dd / static_cast<float>(positions);
}

// A block takes a sample of a pair. Shared memory: the group's scratch.
MTKD_KERNEL(kThreads, 2)
attention_distance(MTKD_PARAM(AttentionPairs<float>) args) {
  BlockGroup group(kWarp, device::shared_memory());
  const int64_t all = args.pairs * args.samples;
  for (int64_t i = device::block_index(); i < all; i += device::grid_blocks()) {
    const int k = static_cast<int>(i / args.samples);
    const int64_t sample = i % args.samples, positions = args.pair[k].positions;
    float *a = args.pair[k].student + sample * positions, *b = args.pair[k].teacher + sample * positions;
    float distance = 0;
    if (weight_of(args.weights, k, sample) != 0) {
      distance = distance_of_maps(group, a, b, positions);
    } else {
      for (int64_t p = group.rank(); p < positions; p += group.size()) {
        device::store(a + p, 0.0f);
        device::store(b + p, 0.0f);
      }
    }
    if (group.rank() == 0) device::store(args.distance + i, distance);
  }
}

int64_t grid_for(int64_t blocks) { return blocks < device::max_blocks() ? blocks : device::max_blocks(); }

// `rows`: of the channels taken together, that a block takes a tile of.
const char* launch_on_maps(void (*kernel)(MTKD_PARAM(MapsKernelArgs)), const AttentionMaps<float>& args, int64_t rows,
                           int shared_bytes, void* stream) {
  MapsKernelArgs kernel_args{args, 0};
  for (int k = 0; k < args.pairs; ++k) {
    const FeatureMap<float>& map = args.map[k];
    if (map.dtype == DType::f64) return "float64 features have no CUDA kernel";
    const int64_t row = row_of(map), all_rows = parts_of(map.channels * map.positions, row);
    const int64_t parts = map.channels_last ? parts_of(map.positions, positions_of_block(map))
                                            : parts_of(row, kTile) * parts_of(all_rows, rows > 0 ? rows : all_rows);
    kernel_args.parts = parts > kernel_args.parts ? parts : kernel_args.parts;
  }
  const int64_t all = args.pairs * args.samples * kernel_args.parts;
  if (all == 0) return nullptr;
  return device::launch(kernel, {grid_for(all), kThreads, shared_bytes}, stream, kernel_args);
}

}  // namespace

const char* attention_energy_cuda(const AttentionMaps<float>& args, int, void* stream) {
  return launch_on_maps(attention_energy, args, 0, kTile * sizeof(float), stream);
}

const char* attention_gradient_cuda(const AttentionMaps<float>& args, int, void* stream) {
  return launch_on_maps(attention_gradient, args, kRowsOfBlock, 0, stream);
}

const char* attention_distance_cuda(const AttentionPairs<float>& args, int, void* stream) {
  const int64_t all = args.pairs * args.samples;
  if (all == 0) return nullptr;
  return device::launch(attention_distance, {grid_for(all), kThreads, BlockGroup::scratch_bytes()}, stream, args);
}

}  // namespace mtkd_fast
