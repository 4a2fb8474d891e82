// The op `relation` on CUDA devices. The B³ part is float32: where two large D nearly cancel, as in tight clusters far
// from one another, the rest of D brings the digits back. B² parts are float64. Every sum has one order.
#include "device.h"
#include "relation.h"

namespace mtkd_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Of one number a thread, in shared memory [threads]; every thread has the sum.
MTKD_DEVICE double sum_of_block(double x) {
  double* all = reinterpret_cast<double*>(device::shared_memory());
  const int thread = device::thread_index();
  device::sync_block();  // whoever still reads an earlier sum
  all[thread] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    device::sync_block();
    if (thread < half) all[thread] += all[thread + half];
  }
  device::sync_block();
  return all[0];
}

// ---------- the planes: a block a row

// ‖x_i − x_j‖² from the Gram matrix; from the points themselves where that would lose more than half the digits.
MTKD_DEVICE double squared_distance(const RelationPlanes& p, int64_t i, int64_t j) {
  const double both = device::load(p.gram + i * p.count + i) + device::load(p.gram + j * p.count + j);
  const double squared = both - 2 * device::load(p.gram + i * p.count + j);
  if (squared > 1e-8 * both) return squared;
  double sum = 0;
  for (int64_t d = 0; d < p.width; ++d) {
    const double difference = device::load(p.x + i * p.width + d) - device::load(p.x + j * p.width + d);
    sum += difference * difference;
  }
  return sum;
}

// √max(D, nearest); NaN stays NaN.
MTKD_DEVICE double distance_of(double squared, double nearest) { return sqrt(squared < nearest ? nearest : squared); }

MTKD_KERNEL(kThreads, 2) relation_planes(MTKD_PARAM(RelationPlanes) args) {
  const int64_t plane = args.pitch * args.pitch;
  float* planes = static_cast<float*>(args.planes);
  const double nearest = device::load(args.nearest);
  for (int64_t i = device::block_index(); i < args.pitch; i += device::grid_blocks()) {
    double total = 0;
    for (int64_t j = device::thread_index(); j < args.pitch; j += kThreads) {
      const bool pair = i < args.count && j < args.count && i != j;
      const double squared = pair ? squared_distance(args, i, j) : 0.0;
      const double inverse = squared > 0 ? sqrt(0.5 / squared) : squared;  // 0 stays 0, NaN stays NaN
      const float rounded = static_cast<float>(squared);
      float* at = planes + i * args.pitch + j;
      device::store(at, rounded);
      device::store(at + plane, static_cast<float>(squared - rounded));
      device::store(at + 2 * plane, static_cast<float>(inverse));
      if (pair) total += distance_of(squared, nearest);
    }
    total = sum_of_block(total);
    if (device::thread_index() == 0 && i < args.count) device::store(args.distances + i, total);
  }
}

// ---------- angles: a block a tile of pairs i < j, its warps sharing out the third points k
//
// A thread has 4 rows i and one column j of the tile; all that it adds up stays in its registers until the warps' sums
// meet. A pair and a k: 62 float32 operations, 26 without a gradient; B³/2 of them. Bytes: of a row k, 6 planes of 16 +
// 8 numbers for 128 pairs: 2.25·B³ in all, of which the L1 keeps none and the L2 all.

constexpr int kRows = 4, kKept = 16;  // third points whose sum is kept in float32 before it is added in float64
constexpr int kPairs = kRelationTile * kRelationTileColumns;
static_assert(kPairs == kRows * kWarp, "a warp covers the tile");

// What is known of two points: D, what is left of it, and r.
struct Edge {
  float squared, rest, inverse;
};

MTKD_DEVICE Edge edge_at(const float* planes, int64_t plane, int64_t at) {
  return {device::load(planes + at), device::load(planes + plane + at), device::load(planes + 2 * plane + at)};
}

MTKD_DEVICE void edges_at(const float* planes, int64_t plane, int64_t at, Edge (&edges)[kRows]) {
  const auto load = [&](int64_t from) { return device::load(reinterpret_cast<const Words*>(planes + from)); };
  const Words squared = load(at), rest = load(at + plane), inverse = load(at + 2 * plane);
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    edges[u] = {device::word_as_float(squared.word[u]), device::word_as_float(rest.word[u]),
                device::word_as_float(inverse.word[u])};
  }
}

// x + y − z of squared sides: what may cancel first, then the smaller of x and y. A few ulp of √(x·y), the cosine's
// denominator; fmaxf passes NaN over, the rest does not.
MTKD_DEVICE float numerator(float x, float y, float z, float rest) { return ((fmaxf(x, y) - z) + fminf(x, y)) + rest; }

// Of a triangle's corner: r·r of the two sides that meet there, and the cosine.
struct Corner {
  float q, c;
};

MTKD_DEVICE Corner corner(const Edge& x, const Edge& y, const Edge& opposite, float rest) {
  const float q = x.inverse * y.inverse;
  return {q, numerator(x.squared, y.squared, opposite.squared, rest) * q};
}

// Huber′; NaN stays NaN.
MTKD_DEVICE float clipped(float e) {
  const float above = e > 1.0f ? 1.0f : e;
  return above < -1.0f ? -1.0f : above;
}
MTKD_DEVICE double clipped(double e) {
  const double above = e > 1.0 ? 1.0 : e;
  return above < -1.0 ? -1.0 : above;
}

struct Sums {
  float loss = 0, pull = 0;
};

// The triangle on the pair p with the sides a and b to a third point, of the student and of the teacher.
template <bool kPull>
MTKD_DEVICE void add_triangle(const Edge& p, const Edge& a, const Edge& b, const Edge& p_t, const Edge& a_t,
                              const Edge& b_t, Sums& sums) {
  const Corner k = corner(a, b, p, (a.rest + b.rest) - p.rest);
  const float e = k.c - corner(a_t, b_t, p_t, (a_t.rest + b_t.rest) - p_t.rest).c, h = clipped(e);
  sums.loss += h * (e - 0.5f * h);
  if constexpr (kPull) {
    const float difference = a.rest - b.rest, difference_t = a_t.rest - b_t.rest, own = p.inverse * p.inverse;
    const Corner i = corner(p, a, b, p.rest + difference), j = corner(p, b, a, p.rest - difference);
    const float e_i = i.c - corner(p_t, a_t, b_t, p_t.rest + difference_t).c;
    const float e_j = j.c - corner(p_t, b_t, a_t, p_t.rest - difference_t).c;
    sums.pull += clipped(e_i) * (i.q - i.c * own) - h * k.q;
    sums.pull += clipped(e_j) * (j.q - j.c * own);
  }
}

// The cosine of a corner with itself; NaN stays NaN.
MTKD_DEVICE double apart(float inverse) { return inverse > 0 ? 1.0 : inverse; }

// Shared memory: [warps, pairs] of doubles, twice with a gradient.
template <bool kPull>
MTKD_KERNEL(kThreads, 2)
relation_angle(MTKD_PARAM(RelationAngle) args) {
  double* shared = reinterpret_cast<double*>(device::shared_memory());
  const float *student = static_cast<const float*>(args.student), *teacher = static_cast<const float*>(args.teacher);
  const int64_t plane = args.pitch * args.pitch, columns = args.pitch / kRelationTileColumns;
  const int64_t tiles = args.pitch / kRelationTile * columns;
  const int thread = device::thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int row_in_tile = lane % (kRelationTile / kRows) * kRows, column_in_tile = lane / (kRelationTile / kRows);
  for (int64_t tile = device::block_index(); tile < tiles; tile += device::grid_blocks()) {
    const int64_t first_i = tile / columns * kRelationTile, first_j = tile % columns * kRelationTileColumns;
    if (first_j + kRelationTileColumns <= first_i) {  // its mirror image does the work
      if (thread == 0) device::store(args.loss + tile, 0.0);
      continue;
    }
    const int64_t i = first_i + row_in_tile, j = first_j + column_in_tile;
    Edge p[kRows], p_t[kRows];
    edges_at(student, plane, j * args.pitch + i, p);
    edges_at(teacher, plane, j * args.pitch + i, p_t);
    double loss[kRows] = {}, pull[kRows] = {};
    for (int64_t begin = warp; begin < args.pitch; begin += kWarps * kKept) {
      Sums kept[kRows];
      const int64_t end = begin + kWarps * kKept;
      for (int64_t k = begin; k < end && k < args.pitch; k += kWarps) {
        Edge a[kRows], a_t[kRows];
        edges_at(student, plane, k * args.pitch + i, a);
        edges_at(teacher, plane, k * args.pitch + i, a_t);
        const Edge b = edge_at(student, plane, k * args.pitch + j), b_t = edge_at(teacher, plane, k * args.pitch + j);
#pragma unroll
        for (int u = 0; u < kRows; ++u) add_triangle<kPull>(p[u], a[u], b, p_t[u], a_t[u], b_t, kept[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) loss[u] += kept[u].loss, pull[u] += kept[u].pull;
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int pair = column_in_tile * kRelationTile + row_in_tile + u;
      shared[warp * kPairs + pair] = loss[u];
      if constexpr (kPull) shared[(kWarps + warp) * kPairs + pair] = pull[u];
    }
    device::sync_block();

    double of_pair = 0;
    if (thread < kPairs) {
      const int64_t row = first_i + thread % kRelationTile, column = first_j + thread / kRelationTile;
      double sum = 0, pull_sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        sum += shared[w * kPairs + thread];
        if constexpr (kPull) pull_sum += shared[(kWarps + w) * kPairs + thread];
      }
      if (row < column && column < args.count) {
        const int64_t inverse = 2 * plane + row * args.pitch + column;
        const double e = apart(device::load(student + inverse)) - apart(device::load(teacher + inverse));
        of_pair = sum + 0.5 * e * e;
        if constexpr (kPull) {
          device::store(args.pull + row * args.count + column, pull_sum);
          device::store(args.pull + column * args.count + row, pull_sum);
        }
      } else if (kPull && row == column && row < args.count) {
        device::store(args.pull + row * args.count + row, 0.0);
      }
    }
    of_pair = sum_of_block(of_pair);  // its barriers also keep the next tile from what is still being read
    if (thread == 0) device::store(args.loss + tile, of_pair);
    device::sync_block();
  }
}

// ---------- distances: a block a row

MTKD_DEVICE double squared_at(const float* planes, int64_t plane, int64_t at) {
  return static_cast<double>(device::load(planes + at)) + device::load(planes + plane + at);
}

MTKD_KERNEL(kThreads, 2) relation_distance(MTKD_PARAM(RelationDistance) args) {
  const float *student = static_cast<const float*>(args.student), *teacher = static_cast<const float*>(args.teacher);
  const int64_t plane = args.pitch * args.pitch;
  const double nearest = device::load(args.student_nearest), nearest_t = device::load(args.teacher_nearest);
  const double mean = device::load(args.student_mean), mean_t = device::load(args.teacher_mean);
  const double drag = args.pull ? device::load(args.drag) : 0.0;
  for (int64_t i = device::block_index(); i < args.count; i += device::grid_blocks()) {
    double loss = 0, weighted = 0;
    for (int64_t j = device::thread_index(); j < args.count; j += kThreads) {
      const double squared = squared_at(student, plane, i * args.pitch + j), d = distance_of(squared, nearest);
      const double d_t = distance_of(squared_at(teacher, plane, i * args.pitch + j), nearest_t);
      const double e = d / mean - d_t / mean_t, h = clipped(e);
      if (args.pull) {
        device::store(args.pull + i * args.count + j, i == j || squared < nearest ? 0.0 : (h - drag) / d);
      } else if (i != j && !(squared < 0)) {
        loss += h * (e - 0.5 * h);
        weighted += h * d;
      }
    }
    if (args.pull) continue;
    loss = sum_of_block(loss);
    weighted = sum_of_block(weighted);
    if (device::thread_index() != 0) continue;
    device::store(args.loss + i, loss);
    device::store(args.weighted + i, weighted);
  }
}

constexpr int kScratch = kThreads * sizeof(double);

int64_t grid_for(int64_t blocks) { return blocks < device::max_blocks() ? blocks : device::max_blocks(); }

}  // namespace

const char* relation_planes_cuda(const RelationPlanes& args, int, void* stream) {
  return device::launch(relation_planes, {grid_for(args.pitch), kThreads, kScratch}, stream, args);
}

const char* relation_angle_cuda(const RelationAngle& args, int, void* stream) {
  constexpr int kSums = kWarps * kPairs * sizeof(double);
  const int64_t blocks = grid_for(relation_angle_parts(args.count, /*on_cpu=*/false));
  return args.pull ? device::launch(relation_angle<true>, {blocks, kThreads, 2 * kSums}, stream, args)
                   : device::launch(relation_angle<false>, {blocks, kThreads, kSums}, stream, args);
}

const char* relation_distance_cuda(const RelationDistance& args, int, void* stream) {
  return device::launch(relation_distance, {grid_for(args.count), kThreads, kScratch}, stream, args);
}

}  // namespace mtkd_fast
