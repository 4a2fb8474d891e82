// The op `hint`, sample by sample, in one instruction set (see instruction_sets.h).

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "tile.h"

template <typename T>
T pair_weight(const HintArgs<T>& args, int64_t pair, int64_t sample) {
  return args.weights ? args.weights[pair * args.weights_pair_stride + sample * args.weights_sample_stride] : T(1);
}

template <typename T>
T squared_distance(const FeaturePair& pair, int64_t sample, Tile<T>& tile_f, Tile<T>& tile_g) {
  const Logits student{pair.student, 0, 0, 1, pair.student_dtype}, teacher{pair.teacher, 0, 0, 1, pair.teacher_dtype};
  T total = 0;
  for (int64_t begin = 0; begin < pair.elements; begin += kTileColumns) {
    const int count = tile_count(pair.elements, begin);
    const T* f = read_tile(student, sample * pair.student_stride, begin, count, tile_f.values);
    const T* g = read_tile(teacher, sample * pair.teacher_stride, begin, count, tile_g.values);
    Vec<T> sum{};
    int i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) {
      const Vec<T> difference = load(f + i) - load(g + i);
      sum += difference * difference;
    }
    for (; i < count; ++i) total += (f[i] - g[i]) * (f[i] - g[i]);
    total += sum_of<T>(sum);
  }
  return total;
}

template <typename T>
void write_feature_gradient(const FeaturePair& pair, int64_t sample, T weight, Tile<T>& tile_f, Tile<T>& tile_g) {
  const Logits student{pair.student, 0, 0, 1, pair.student_dtype}, teacher{pair.teacher, 0, 0, 1, pair.teacher_dtype};
  const T factor = 2 * weight / static_cast<T>(pair.elements);
  alignas(64) T out[kTileColumns];
  for (int64_t begin = 0; begin < pair.elements; begin += kTileColumns) {
    const int count = tile_count(pair.elements, begin);
    if (weight == 0) {
      for (int i = 0; i < count; ++i) out[i] = 0;
    } else {
      const T* f = read_tile(student, sample * pair.student_stride, begin, count, tile_f.values);
      const T* g = read_tile(teacher, sample * pair.teacher_stride, begin, count, tile_g.values);
      for (int i = 0; i < count; ++i) out[i] = factor * (f[i] - g[i]);
    }
    write_tile(pair.gradient, pair.student_dtype, sample * pair.elements + begin, count, out);
  }
}

// [begin, end) over pairs·samples, pair-major.
template <typename T>
void hint_forward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> f, g;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / args.samples, sample = i % args.samples;
    const FeaturePair& p = args.pair[pair];
    const bool reads = pair_weight(args, pair, sample) != 0;
    args.distance[i] = reads ? squared_distance(p, sample, f, g) / static_cast<T>(p.elements) : T(0);
  }
}

template <typename T>
void hint_backward(const HintArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> f, g;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / args.samples, sample = i % args.samples;
    if (args.pair[pair].gradient)
      write_feature_gradient(args.pair[pair], sample, pair_weight(args, pair, sample), f, g);
  }
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
