// The op `hint`, sample by sample, in one instruction set (see instruction_sets.h).

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "tile.h"
//
#include "distance_sums.h"

// A sample of a pair, read a tile of both sides at a time.
template <typename T>
struct SamplePair {
  const FeaturePair& pair;
  int64_t sample;
  Tile<T>&f_tile, &g_tile;

  int count(int64_t begin) const { return tile_count(pair.elements, begin); }
  const T* f(int64_t begin) const {
    const Logits student{pair.student, 0, 0, 1, pair.student_dtype};
    return read_tile(student, sample * pair.student_stride, begin, count(begin), f_tile.values);
  }
  const T* g(int64_t begin) const {
    const Logits teacher{pair.teacher, 0, 0, 1, pair.teacher_dtype};
    return read_tile(teacher, sample * pair.teacher_stride, begin, count(begin), g_tile.values);
  }
};

template <Distance kDistance, typename T>
DistanceSums<kDistance, T> distance_sums(const SamplePair<T>& x, FeatureScales<T> scales) {
  DistanceSums<kDistance, T> total;
  for (int64_t begin = 0; begin < x.pair.elements; begin += kTileColumns) {
    const int count = x.count(begin);
    const T *f = x.f(begin), *g = x.g(begin);
    DistanceSums<kDistance, Vec<T>> sums;
    int i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) sums.add(load(f + i), load(g + i), scales);
    for (; i < count; ++i) total.add(f[i], g[i], scales);
    total.absorb(sums, SumOfLanes<T>());
  }
  return total;
}

template <Distance kDistance, typename T>
Kept<T> sample_distance(const SamplePair<T>& x) {
  FeatureScales<T> scales;
  DistanceSums<kDistance, T> sums = distance_sums<kDistance>(x, scales);
  if (other_scales(sums, scales)) sums = distance_sums<kDistance>(x, scales);
  return finish(sums, scales, x.pair.elements);
}

template <Distance kDistance, typename T>
void write_feature_gradient(const SamplePair<T>& x, const DistanceGradient<kDistance, T>& gradient) {
  alignas(64) T out[kTileColumns];
  for (int64_t begin = 0; begin < x.pair.elements; begin += kTileColumns) {
    const int count = x.count(begin);
    const T *f = x.f(begin), *g = x.g(begin);
    int i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(out + i, gradient(load(f + i), load(g + i)));
    for (; i < count; ++i) out[i] = gradient(f[i], g[i]);
    write_tile(x.pair.gradient, x.pair.student_dtype, x.sample * x.pair.elements + begin, count, out);
  }
}

inline void write_zeros(const FeaturePair& pair, int64_t sample) {
  const int64_t bytes = pair.elements * element_bytes(pair.student_dtype);
  __builtin_memset(static_cast<char*>(pair.gradient) + sample * bytes, 0, bytes);
}

template <typename T>
T* kept_number(const HintArgs<T>& args, int number, int64_t i) {
  return args.kept + number * args.pairs * args.samples + i;
}

template <Distance kDistance, typename T>
void forward_sample(const HintArgs<T>& args, int64_t i, Tile<T>& f, Tile<T>& g) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  Kept<T> kept{};
  if (args.weights(pair, sample) != 0) kept = sample_distance<kDistance>(SamplePair<T>{args.pair[pair], sample, f, g});
  *kept_number(args, 0, i) = kept.distance;
  if constexpr (kept_numbers(kDistance) > 1) {
    *kept_number(args, 1, i) = kept.f_norm;
    *kept_number(args, 2, i) = kept.g_norm;
  }
}

template <Distance kDistance, typename T>
void backward_sample(const HintArgs<T>& args, int64_t i, Tile<T>& f, Tile<T>& g) {
  const int64_t pair = i / args.samples, sample = i % args.samples;
  const FeaturePair& p = args.pair[pair];
  if (!p.gradient) return;
  const T weight = args.weights(pair, sample);
  if (weight == 0) return write_zeros(p, sample);
  Kept<T> kept{};
  if constexpr (kept_numbers(kDistance) > 1)
    kept = {*kept_number(args, 0, i), *kept_number(args, 1, i), *kept_number(args, 2, i)};
  write_feature_gradient(SamplePair<T>{p, sample, f, g}, DistanceGradient<kDistance, T>(weight, kept, p.elements));
}

// [begin, end) over pairs·samples, pair-major.
template <typename T>
void hint_forward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> f, g;
  with_distance(args.distance, [&](auto distance) {
    for (int64_t i = begin; i < end; ++i) forward_sample<decltype(distance)::value>(args, i, f, g);
  });
}

template <typename T>
void hint_backward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> f, g;
  with_distance(args.distance, [&](auto distance) {
    for (int64_t i = begin; i < end; ++i) backward_sample<decltype(distance)::value>(args, i, f, g);
  });
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
