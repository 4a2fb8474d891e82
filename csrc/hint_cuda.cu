// The op `hint` on CUDA devices. Forward: a warp, or a block where samples are large, takes one sample of one pair: 2
// reads, and the same again for the cosine of a sample of extreme norm. Backward: a block takes a stretch of one: 2
// reads and a write. Fused: as the forward, and the gradient with it: 2 reads and a write, of which the cosine's reads
// come twice. A pair of weight 0 is not read.
#include "chunk.cuh"
#include "group.cuh"
#include "hint.h"
#include "pair_weights.cuh"

namespace mtkd_fast {
namespace {

#include "distance_sums.h"

constexpr int kThreads = 256;
constexpr int kChunksAtOnce = 2;
constexpr int kElementsOfWarp = 2048;  // up to here a warp takes a sample alone
constexpr int kStretch = kThreads * kChunksAtOnce * kChunk;

struct HintKernelArgs : HintArgs<float> {
  int64_t stretches;  // of the largest sample; backward only
};

MTKD_DEVICE InputRow feature_row(const void* data, int64_t stride, DType dtype, int64_t sample) {
  return input_row(Logits{data, stride, 0, 1, dtype}, {sample, 0});
}

// One chunk of both sides; 0 beyond the last element, which adds 0 to every sum.
struct PairChunk {
  float f[kChunk], g[kChunk];

  MTKD_DEVICE PairChunk(const RawChunk& student, DType student_dtype, const RawChunk& teacher, DType teacher_dtype,
                        int64_t left) {
    decode(student, student_dtype, f);
    decode(teacher, teacher_dtype, g);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      f[i] = i < left ? f[i] : 0.0f;
      g[i] = i < left ? g[i] : 0.0f;
    }
  }
};

// Calls step(c, PairChunk) for the chunks of a sample that are the thread's.
template <typename Group, typename Step>
MTKD_DEVICE void each_chunk(const Group& group, const FeaturePair& pair, int64_t sample, const Step& step) {
  const InputRow student = feature_row(pair.student, pair.student_stride, pair.student_dtype, sample);
  const InputRow teacher = feature_row(pair.teacher, pair.teacher_stride, pair.teacher_dtype, sample);
  const int64_t chunks = (pair.elements + kChunk - 1) / kChunk;
  for (int64_t c = group.rank(); c < chunks; c += kChunksAtOnce * group.size()) {
    RawChunk f[kChunksAtOnce], g[kChunksAtOnce];
#pragma unroll
    for (int u = 0; u < kChunksAtOnce; ++u) {
      const int64_t chunk = c + u * group.size();
      f[u] = chunk < chunks ? load_chunk(student, chunk, pair.elements) : empty_chunk(student.dtype);
      g[u] = chunk < chunks ? load_chunk(teacher, chunk, pair.elements) : empty_chunk(teacher.dtype);
    }
#pragma unroll
    for (int u = 0; u < kChunksAtOnce; ++u) {
      const int64_t chunk = c + u * group.size();
      step(chunk, PairChunk(f[u], student.dtype, g[u], teacher.dtype, pair.elements - chunk * kChunk));
    }
  }
}

template <Distance kDistance>
MTKD_DEVICE void add_chunk(DistanceSums<kDistance, float>& total, const PairChunk& x, FeatureScales<float> scales) {
  DistanceSums<kDistance, float> sums;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sums.add(x.f[i], x.g[i], scales);
  total.absorb(sums, [](float sum) { return sum; });
}

template <Distance kDistance, typename Group>
MTKD_DEVICE DistanceSums<kDistance, float> distance_sums(Group& group, const FeaturePair& pair, int64_t sample,
                                                         FeatureScales<float> scales) {
  DistanceSums<kDistance, float> total;
  each_chunk(group, pair, sample, [&](int64_t, const PairChunk& x) { add_chunk(total, x, scales); });
  group.merge(total, AddLanes{});
  return total;
}

// Every lane of a warp takes every step, but for the second sweep, which all threads of a group take or leave together.
template <Distance kDistance, typename Group>
MTKD_DEVICE Kept<float> sample_distance(Group& group, const FeaturePair& pair, int64_t sample) {
  FeatureScales<float> scales;
  DistanceSums<kDistance, float> sums = distance_sums<kDistance>(group, pair, sample, scales);
  if (other_scales(sums, scales)) sums = distance_sums<kDistance>(group, pair, sample, scales);
  return finish(sums, scales, pair.elements);
}

template <Distance kDistance>
MTKD_DEVICE void write_chunk(const DistanceGradient<kDistance, float>& gradient, const OutputRow& out, int64_t c,
                             int64_t elements, const PairChunk& x) {
  float out_chunk[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) out_chunk[i] = gradient(x.f[i], x.g[i]);
  if (c * kChunk < elements) store_chunk(out, c, elements, out_chunk);
}

// The same, and weight·∂distance/∂f.
template <Distance kDistance, typename Group>
MTKD_DEVICE float distance_and_gradient(Group& group, const FeaturePair& pair, int64_t sample, float weight) {
  const OutputRow out = output_row(pair.gradient, sample, pair.elements, pair.student_dtype);
  if constexpr (kept_numbers(kDistance) > 1) {
    const Kept<float> kept = sample_distance<kDistance>(group, pair, sample);
    const DistanceGradient<kDistance, float> gradient(weight, kept, pair.elements);
    each_chunk(group, pair, sample,
               [&](int64_t c, const PairChunk& x) { write_chunk(gradient, out, c, pair.elements, x); });
    return kept.distance;
  } else {
    const DistanceGradient<kDistance, float> gradient(weight, Kept<float>{}, pair.elements);
    const FeatureScales<float> scales;
    DistanceSums<kDistance, float> sums;
    each_chunk(group, pair, sample, [&](int64_t c, const PairChunk& x) {
      add_chunk(sums, x, scales);
      write_chunk(gradient, out, c, pair.elements, x);
    });
    group.merge(sums, AddLanes{});
    return finish(sums, scales, pair.elements).distance;
  }
}

template <typename Group>
MTKD_DEVICE void write_zeros(const Group& group, const FeaturePair& pair, int64_t sample) {
  const OutputRow out = output_row(pair.gradient, sample, pair.elements, pair.student_dtype);
  const float zeros[kChunk] = {};
  for (int64_t c = group.rank(); c * kChunk < pair.elements; c += group.size()) {
    store_chunk(out, c, pair.elements, zeros);
  }
}

MTKD_DEVICE float* kept_number(const HintArgs<float>& args, int number, int64_t i) {
  return args.kept + number * args.pairs * args.samples + i;
}

// Calls step(group, i, pair, sample) for the samples of all pairs, one a group, i their number.
template <typename Group, typename Step>
MTKD_DEVICE void each_sample(const HintArgs<float>& args, const Step& step) {
  Group group(kWarp, device::shared_memory());
  const int groups_in_block = device::block_threads() / group.size();
  const int64_t all = args.pairs * args.samples;
  for (int64_t i = device::block_index() * groups_in_block + group.index_in_block(); i < all;
       i += device::grid_blocks() * groups_in_block) {
    step(group, i, static_cast<int>(i / args.samples), i % args.samples);
  }
}

// Shared memory: the group's scratch.
template <Distance kDistance, typename Group>
MTKD_KERNEL(kThreads, 2)
hint_forward(MTKD_PARAM(HintKernelArgs) args) {
  each_sample<Group>(args, [&](Group& group, int64_t i, int pair, int64_t sample) {
    Kept<float> kept{};
    if (weight_of(args.weights, pair, sample) != 0) kept = sample_distance<kDistance>(group, args.pair[pair], sample);
    if (group.rank() == 0) {
      device::store(kept_number(args, 0, i), kept.distance);
      if constexpr (kept_numbers(kDistance) > 1) {
        device::store(kept_number(args, 1, i), kept.f_norm);
        device::store(kept_number(args, 2, i), kept.g_norm);
      }
    }
  });
}

// Shared memory: the group's scratch.
template <Distance kDistance, typename Group>
MTKD_KERNEL(kThreads, 2)
hint_fused(MTKD_PARAM(HintFused<float>) args) {
  each_sample<Group>(args, [&](Group& group, int64_t i, int k, int64_t sample) {
    const FeaturePair& pair = args.pair[k];
    const float weight = weight_of(args.weights, k, sample);
    float distance = 0;
    if (pair.gradient == nullptr) {
      if (weight != 0) distance = sample_distance<kDistance>(group, pair, sample).distance;
    } else if (weight != 0) {
      distance = distance_and_gradient<kDistance>(group, pair, sample, weight * args.scale);
    } else {
      write_zeros(group, pair, sample);
    }
    if (group.rank() == 0) device::store(kept_number(args, 0, i), distance);
  });
}

template <Distance kDistance>
MTKD_DEVICE DistanceGradient<kDistance, float> gradient_of(const HintKernelArgs& args, int k, int64_t sample,
                                                           float weight) {
  const int64_t i = k * args.samples + sample;
  Kept<float> kept{};
  if constexpr (kept_numbers(kDistance) > 1) {
    kept = {device::load(kept_number(args, 0, i)), device::load(kept_number(args, 1, i)),
            device::load(kept_number(args, 2, i))};
  }
  return {weight, kept, args.pair[k].elements};
}

template <Distance kDistance>
MTKD_DEVICE void backward_stretch(const HintKernelArgs& args, const FeaturePair& pair, int k, int64_t sample,
                                  int64_t stretch) {
  const float weight = weight_of(args.weights, k, sample);
  const DistanceGradient<kDistance, float> gradient = gradient_of<kDistance>(args, k, sample, weight);
  const InputRow student = feature_row(pair.student, pair.student_stride, pair.student_dtype, sample);
  const InputRow teacher = feature_row(pair.teacher, pair.teacher_stride, pair.teacher_dtype, sample);
  const OutputRow out = output_row(pair.gradient, sample, pair.elements, pair.student_dtype);
  const int64_t chunks = (pair.elements + kChunk - 1) / kChunk;
  const int64_t end = (stretch + 1) * (kStretch / kChunk);
  const float zeros[kChunk] = {};
  for (int64_t c = stretch * (kStretch / kChunk) + device::thread_index(); c < end && c < chunks; c += kThreads) {
    if (weight != 0) {
      const RawChunk f = load_chunk(student, c, pair.elements), g = load_chunk(teacher, c, pair.elements);
      write_chunk(gradient, out, c, pair.elements,
                  PairChunk(f, student.dtype, g, teacher.dtype, pair.elements - c * kChunk));
    } else {
      store_chunk(out, c, pair.elements, zeros);
    }
  }
}

template <Distance kDistance>
MTKD_KERNEL(kThreads, 2)
hint_backward(MTKD_PARAM(HintKernelArgs) args) {
  const int64_t all = args.pairs * args.samples * args.stretches;
  for (int64_t i = device::block_index(); i < all; i += device::grid_blocks()) {
    const int64_t stretch = i % args.stretches, at = i / args.stretches;
    const int k = static_cast<int>(at / args.samples);
    if (args.pair[k].gradient == nullptr) continue;
    backward_stretch<kDistance>(args, args.pair[k], k, at % args.samples, stretch);
  }
}

int64_t largest_sample(const HintArgs<float>& args) {
  int64_t elements = 0;
  for (int k = 0; k < args.pairs; ++k) {
    elements = args.pair[k].elements > elements ? args.pair[k].elements : elements;
  }
  return elements;
}

const char* only_float(const HintArgs<float>& args) {
  for (int k = 0; k < args.pairs; ++k) {
    if (args.pair[k].student_dtype == DType::f64 || args.pair[k].teacher_dtype == DType::f64) {
      return "float64 features have no CUDA kernel";
    }
  }
  return nullptr;
}

int64_t grid_for(int64_t blocks) { return blocks < device::max_blocks() ? blocks : device::max_blocks(); }

// A warp for each sample of each pair, or a block.
LaunchShape shape_of_samples(const HintArgs<float>& args, bool by_warps) {
  const int64_t all = args.pairs * args.samples;
  constexpr int kWarps = kThreads / kWarp;
  if (by_warps) return {grid_for((all + kWarps - 1) / kWarps), kThreads, 0};
  return {grid_for(all), kThreads, BlockGroup::scratch_bytes()};
}

}  // namespace

const char* hint_forward_cuda(const HintArgs<float>& args, int, void* stream) {
  if (const char* error = only_float(args)) return error;
  if (args.pairs * args.samples == 0) return nullptr;
  const bool by_warps = largest_sample(args) <= kElementsOfWarp;
  const LaunchShape shape = shape_of_samples(args, by_warps);
  return with_distance(args.distance, [&](auto distance) {
    constexpr Distance kDistance = decltype(distance)::value;
    const HintKernelArgs kernel_args{args, 0};
    return by_warps ? device::launch(hint_forward<kDistance, LaneGroup>, shape, stream, kernel_args)
                    : device::launch(hint_forward<kDistance, BlockGroup>, shape, stream, kernel_args);
  });
}

const char* hint_fused_cuda(const HintFused<float>& args, int, void* stream) {
  if (const char* error = only_float(args)) return error;
  if (args.pairs * args.samples == 0) return nullptr;
  const bool by_warps = largest_sample(args) <= kElementsOfWarp;
  const LaunchShape shape = shape_of_samples(args, by_warps);
  return with_distance(args.distance, [&](auto distance) {
    constexpr Distance kDistance = decltype(distance)::value;
    return by_warps ? device::launch(hint_fused<kDistance, LaneGroup>, shape, stream, args)
                    : device::launch(hint_fused<kDistance, BlockGroup>, shape, stream, args);
  });
}

const char* hint_backward_cuda(const HintArgs<float>& args, int, void* stream) {
  if (const char* error = only_float(args)) return error;
  const HintKernelArgs kernel_args{args, (largest_sample(args) + kStretch - 1) / kStretch};
  const int64_t all = args.pairs * args.samples * kernel_args.stretches;
  if (all == 0) return nullptr;
  return with_distance(args.distance, [&](auto distance) {
    return device::launch(hint_backward<decltype(distance)::value>, {grid_for(all), kThreads, 0}, stream, kernel_args);
  });
}

}  // namespace mtkd_fast
