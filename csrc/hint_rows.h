// The op `hint`, sample by sample, in one instruction set (see instruction_sets.h).
//
// A sweep over a sample takes the sums of its distance, or writes its gradient, or both at once where the gradient does
// not wait for the sums: 2 reads and a write. The cosine's waits; its second sweep finds the sample in cache.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "halves.h"
//
#include "tile.h"
//
#include "distance_sums.h"

constexpr int kChains = 4;  // partial sums side by side: a single one would wait for its last addition

// Where the vectors of a gradient go: nowhere, to memory, or to memory past the caches.
enum class Writes { nothing, stores, streams };

template <Writes kWrites, typename T>
inline void write_vector(T* to, Vec<T> x) {
  if constexpr (kWrites == Writes::stores) store(to, x);
  if constexpr (kWrites == Writes::streams) stream(to, x);
}

// One tile of both sides, f and g: adds to `total`, writes ∂/∂f to `out`.
template <Distance kDistance, bool kSums, Writes kWrites, typename T>
void sweep_tile(const T* f, const T* g, int count, FeatureScales<T> scales, DistanceSums<kDistance, T>& total,
                const DistanceGradient<kDistance, T>& gradient, T* out) {
  constexpr int kL = kLanes<T>;
  DistanceSums<kDistance, Vec<T>> sums[kChains];
  const auto step = [&](int i, int chain) {
    const Vec<T> a = load(f + i), b = load(g + i);
    if constexpr (kSums) sums[chain].add(a, b, scales);
    if constexpr (kWrites != Writes::nothing) write_vector<kWrites>(out + i, gradient(a, b));
  };
  int i = 0;
  for (; i + kChains * kL <= count; i += kChains * kL) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(i + chain * kL, chain);
  }
  for (; i + kL <= count; i += kL) step(i, 0);
  if (const int rest = count - i; rest > 0) {  // padded with zeros, which add nothing
    const Vec<T> a = load_part(f + i, rest), b = load_part(g + i, rest);
    if constexpr (kSums) sums[1].add(a, b, scales);
    if constexpr (kWrites != Writes::nothing) store_part(out + i, gradient(a, b), rest);
  }
  if constexpr (kSums) {
    for (int chain = 1; chain < kChains; ++chain) sums[0].absorb(sums[chain], [](Vec<T> x) { return x; });
    total.absorb(sums[0], SumOfLanes<T>());
  }
}

// The tiles of a thread that others dtypes are widened to, and a gradient's on its way to one.
template <typename T>
struct FeatureTiles {
  Tile<T> f, g, out;
  Tile<uint16_t> half;
};

// A sample of a pair, read a tile of both sides at a time.
template <typename T>
struct SamplePair {
  const FeaturePair& pair;
  int64_t sample;
  bool streams;  // the gradient goes past the caches
  FeatureTiles<T>& tiles;

  template <Distance kDistance, bool kSums, Writes kWrites>
  void sweep(FeatureScales<T> scales, DistanceSums<kDistance, T>& total,
             const DistanceGradient<kDistance, T>& gradient) const {
    for (int64_t begin = 0; begin < pair.elements; begin += kTileColumns) {
      const int count = tile_count(pair.elements, begin);
      const T* f = read(pair.student, pair.student_dtype, pair.student_stride, begin, count, tiles.f);
      const T* g = read(pair.teacher, pair.teacher_dtype, pair.teacher_stride, begin, count, tiles.g);
      if constexpr (kWrites == Writes::nothing)
        sweep_tile<kDistance, kSums, kWrites>(f, g, count, scales, total, gradient, static_cast<T*>(nullptr));
      else if (T* const out = place(begin); !out)
        sweep_tile<kDistance, kSums, Writes::stores>(f, g, count, scales, total, gradient, tiles.out.values),
            convert(begin, count);
      else if (streams && reinterpret_cast<uintptr_t>(out) % MTKD_VEC_BYTES == 0)
        sweep_tile<kDistance, kSums, Writes::streams>(f, g, count, scales, total, gradient, out);
      else
        sweep_tile<kDistance, kSums, Writes::stores>(f, g, count, scales, total, gradient, out);
    }
  }

  void write_zeros() const {
    const int64_t bytes = pair.elements * element_bytes(pair.student_dtype);
    __builtin_memset(static_cast<char*>(pair.gradient) + sample * bytes, 0, bytes);
  }

 private:
  const T* read(const void* data, DType dtype, int64_t stride, int64_t begin, int count, Tile<T>& tile) const {
    return read_tile(Logits{data, 0, 0, 1, dtype}, sample * stride, begin, count, tile.values);
  }
  // Where a tile of the gradient stands, if nothing is converted on the way there.
  T* place(int64_t begin) const {
    if (pair.student_dtype != kNative<T>) return nullptr;
    return static_cast<T*>(pair.gradient) + sample * pair.elements + begin;
  }
  void convert(int64_t begin, int count) const {
    const int64_t at = sample * pair.elements + begin;
    uint16_t* to = static_cast<uint16_t*>(pair.gradient) + at;
    if (!streams || element_bytes(pair.student_dtype) != 2 || reinterpret_cast<uintptr_t>(to) % MTKD_VEC_BYTES != 0)
      return write_tile(pair.gradient, pair.student_dtype, at, count, tiles.out.values);
    write_tile(tiles.half.values, pair.student_dtype, 0, count, tiles.out.values);
    constexpr int kHalves = MTKD_VEC_BYTES / 2;
    int i = 0;
    for (; i + kHalves <= count; i += kHalves)
      stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(tiles.half.values + i)));
    for (; i < count; ++i) to[i] = tiles.half.values[i];
  }
};

template <Distance kDistance, typename T>
Kept<T> sample_distance(const SamplePair<T>& x) {
  const DistanceGradient<kDistance, T> none(0, Kept<T>{}, 1);
  FeatureScales<T> scales;
  DistanceSums<kDistance, T> sums;
  x.template sweep<kDistance, true, Writes::nothing>(scales, sums, none);
  if (other_scales(sums, scales)) {
    sums = {};
    x.template sweep<kDistance, true, Writes::nothing>(scales, sums, none);
  }
  return finish(sums, scales, x.pair.elements);
}

template <Distance kDistance, typename T>
void write_feature_gradient(const SamplePair<T>& x, T weight, const Kept<T>& kept) {
  DistanceSums<kDistance, T> unused;
  const DistanceGradient<kDistance, T> gradient(weight, kept, x.pair.elements);
  x.template sweep<kDistance, false, Writes::stores>(FeatureScales<T>{}, unused, gradient);
}

// The distance, and the gradient of weight·distance.
template <Distance kDistance, typename T>
T distance_and_gradient(const SamplePair<T>& x, T weight) {
  if constexpr (kept_numbers(kDistance) > 1) {
    const Kept<T> kept = sample_distance<kDistance>(x);
    write_feature_gradient<kDistance>(x, weight, kept);
    return kept.distance;
  } else {
    DistanceSums<kDistance, T> sums;
    const DistanceGradient<kDistance, T> gradient(weight, Kept<T>{}, x.pair.elements);
    x.template sweep<kDistance, true, Writes::stores>(FeatureScales<T>{}, sums, gradient);
    return finish(sums, FeatureScales<T>{}, x.pair.elements).distance;
  }
}

template <typename T>
T* kept_number(const HintArgs<T>& args, int number, int64_t i) {
  return args.kept + number * args.pairs * args.samples + i;
}

// All gradients together are more than a core's share of the last cache: they will have left it before they are read.
template <typename T>
bool streams_gradients(const HintArgs<T>& args) {
  int64_t bytes = 0;
  for (int k = 0; k < args.pairs; ++k)
    if (args.pair[k].gradient)
      bytes += args.samples * args.pair[k].elements * element_bytes(args.pair[k].student_dtype);
  return bytes >= kStreamBytes;
}

template <Distance kDistance, typename T>
void forward_sample(const HintArgs<T>& args, int64_t i, FeatureTiles<T>& tiles) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  Kept<T> kept{};
  if (args.weights(pair, sample) != 0)
    kept = sample_distance<kDistance>(SamplePair<T>{args.pair[pair], sample, false, tiles});
  *kept_number(args, 0, i) = kept.distance;
  if constexpr (kept_numbers(kDistance) > 1) {
    *kept_number(args, 1, i) = kept.f_norm;
    *kept_number(args, 2, i) = kept.g_norm;
  }
}

template <Distance kDistance, typename T>
void backward_sample(const HintArgs<T>& args, int64_t i, bool streams, FeatureTiles<T>& tiles) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  if (!args.pair[pair].gradient) return;
  const SamplePair<T> x{args.pair[pair], sample, streams, tiles};
  const T weight = args.weights(pair, sample);
  if (weight == 0) return x.write_zeros();
  Kept<T> kept{};
  if constexpr (kept_numbers(kDistance) > 1)
    kept = {*kept_number(args, 0, i), *kept_number(args, 1, i), *kept_number(args, 2, i)};
  write_feature_gradient<kDistance>(x, weight, kept);
}

template <Distance kDistance, typename T>
void fused_sample(const HintFused<T>& args, int64_t i, bool streams, FeatureTiles<T>& tiles) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  const SamplePair<T> x{args.pair[pair], sample, streams, tiles};
  const T weight = args.weights(pair, sample);
  T& distance = *kept_number(args, 0, i);
  if (weight == 0) {
    distance = 0;
    if (x.pair.gradient) x.write_zeros();
  } else if (x.pair.gradient) {
    distance = distance_and_gradient<kDistance>(x, weight * args.scale);
  } else {
    distance = sample_distance<kDistance>(x).distance;
  }
}

// [begin, end) over pairs·samples, pair-major.
template <typename T>
void hint_forward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  FeatureTiles<T> tiles;
  with_distance(args.distance, [&](auto distance) {
    for (int64_t i = begin; i < end; ++i) forward_sample<decltype(distance)::value>(args, i, tiles);
  });
}

template <typename T>
void hint_backward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  FeatureTiles<T> tiles;
  const bool streams = streams_gradients(args);
  with_distance(args.distance, [&](auto distance) {
    for (int64_t i = begin; i < end; ++i) backward_sample<decltype(distance)::value>(args, i, streams, tiles);
  });
  stream_fence();
}

template <typename T>
void hint_fused(const HintFused<T>& args, int64_t begin, int64_t end) {
  FeatureTiles<T> tiles;
  const bool streams = streams_gradients(args);
  with_distance(args.distance, [&](auto distance) {
    for (int64_t i = begin; i < end; ++i) fused_sample<decltype(distance)::value>(args, i, streams, tiles);
  });
  stream_fence();
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
