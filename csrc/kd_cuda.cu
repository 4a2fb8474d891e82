// The op `kd` on CUDA devices: which kernel a shape takes, and its launch.
//
//   classes <= 256     lanes of a warp share a row, eight columns each in registers          kd_resident, LaneGroup
//   classes <= 6144    a block shares a row, 8 or 16 columns a thread in registers           kd_resident, BlockGroup
//                      (elementwise divergences: 8, classes <= 4096)
//   what fits          a block shares a row in shared memory                                 kd_resident, SharedTile
//   else               a block streams over a row (forward), blocks share its columns
//                      (backward)                                                            kd_streaming, kd_backward
//
// Where no gradient is asked for, rows stream rather than stay in shared memory, unless a second sweep would follow.
#include "kd_backward.cuh"
#include "kd_rescale.cuh"
#include "kd_resident.cuh"
#include "kd_streaming.cuh"
#include "kd_variants.h"

namespace mtkd_fast {
namespace {

constexpr int kLaneThreads = 128;
constexpr int kLaneColumns = kWarp * kChunk;
constexpr int kTileThreads = 512;  // 128 registers a thread
constexpr int kNarrowColumns = kTileThreads * kChunk;
constexpr int kWideTileThreads = 384;  // 168 registers a thread
constexpr int kWideColumns = kWideTileThreads * 2 * kChunk;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t at_most_grid(int64_t blocks) { return blocks < device::max_blocks() ? blocks : device::max_blocks(); }

bool has_two_sums(WeightRule rule) { return rule == WeightRule::confidence || rule == WeightRule::entropy; }

// Null, or why there is no kernel for it.
const char* refused(const KDArgs<float>& args) {
  bool allowed = args.student.dtype != DType::f64;
  for (int k = 0; k < args.teachers; ++k) allowed = allowed && args.teacher[k].dtype != DType::f64;
  return allowed ? nullptr : "float64 logits have no CUDA kernel";
}

// Calls launch(Of<kind>, Sums<two_sums>) for the run-time values.
template <Kind kind>
struct Of {
  static constexpr Kind value = kind;
};
template <bool two>
struct Sums {
  static constexpr bool value = two;
};

template <typename Launch>
const char* with_kind(Divergence divergence, const Launch& launch) {
  switch (kind_of(divergence)) {
    case Kind::forward_kl:
      return launch(Of<Kind::forward_kl>{});
    case Kind::reverse_kl:
      return launch(Of<Kind::reverse_kl>{});
    case Kind::dkd:
      return launch(Of<Kind::dkd>{});
    default:
      return launch(Of<Kind::elementwise>{});
  }
}

template <typename Launch>
const char* with_kernel(const KDForward<float>& args, const Launch& launch) {
  return with_kind(args.divergence, [&](auto kind) {
    return has_two_sums(args.rule) ? launch(kind, Sums<true>{}) : launch(kind, Sums<false>{});
  });
}

// 2, 4, ... up to a warp: the lanes that share a row.
int lane_width(int64_t classes) {
  int width = 1;
  while (width * kChunk < classes) width *= 2;
  return width;
}

LaunchShape lane_shape(const ResidentArgs& args, int threads) {
  const int rows_in_block = threads / args.group_width;
  const int64_t shared_bytes =
      summary_bytes(rows_in_block * args.teachers) + RegisterTile<kChunk, false>::shared_bytes(args, threads);
  return {at_most_grid(ceil_div(args.rows, rows_in_block)), threads, static_cast<int>(shared_bytes)};
}

// Many teachers of a few classes: as many rows as their summaries leave room for.
const char* forward_by_lanes(const ResidentArgs& args, int device, void* stream) {
  LaunchShape shape = lane_shape(args, kLaneThreads);
  const int limit = device::shared_memory_limit(device);
  while (shape.threads > kWarp && shape.shared_bytes > limit) shape = lane_shape(args, shape.threads / 2);
  return with_kernel(args, [&](auto kind, auto sums) {
    constexpr bool two = decltype(sums)::value;
    return device::launch(kd_resident<decltype(kind)::value, two, LaneGroup, RegisterTile<kChunk, two>, kLaneThreads>,
                          shape, stream, args);
  });
}

template <int N>
LaunchShape block_shape(const KDArgs<float>& args) {
  const int threads = static_cast<int>(ceil_div(ceil_div(args.classes, N), kWarp)) * kWarp;
  const int64_t shared_bytes =
      BlockGroup::scratch_bytes() + summary_bytes(args.teachers) + RegisterTile<N, false>::shared_bytes(args, threads);
  return {at_most_grid(args.rows), threads, static_cast<int>(shared_bytes)};
}

constexpr const char* kTooWide = "the rows have too many classes for registers";

// Two chunks a thread leave an elementwise divergence no registers for its logarithms.
constexpr bool has_registers(Kind kind, int columns) { return columns == kChunk || kind != Kind::elementwise; }

template <int N, int max_threads>
const char* forward_by_blocks(const ResidentArgs& args, void* stream) {
  return with_kernel(args, [&](auto kind, auto sums) -> const char* {
    constexpr bool two = decltype(sums)::value;
    if constexpr (has_registers(decltype(kind)::value, N)) {
      return device::launch(kd_resident<decltype(kind)::value, two, BlockGroup, RegisterTile<N, two>, max_threads>,
                            block_shape<N>(args), stream, args);
    } else {
      return kTooWide;
    }
  });
}

bool fits_in_registers(const KDArgs<float>& args, int device) {
  if (args.classes <= kNarrowColumns) return true;
  const int limit = device::shared_memory_limit(device);
  return args.classes <= kWideColumns && !is_elementwise(args.divergence) &&
         block_shape<2 * kChunk>(args).shared_bytes <= limit;
}

int64_t shared_tile_bytes(const KDArgs<float>& args, WeightRule rule) {
  const int64_t tile = has_two_sums(rule) ? SharedTile<true>::shared_bytes(args, kTileThreads)
                                          : SharedTile<false>::shared_bytes(args, kTileThreads);
  return BlockGroup::scratch_bytes() + summary_bytes(args.teachers) + tile;
}

}  // namespace

bool kd_fits_on_chip(const KDArgs<float>& args, WeightRule rule, int device) {
  if (refused(args) != nullptr) return false;
  return fits_in_registers(args, device) || shared_tile_bytes(args, rule) <= device::shared_memory_limit(device);
}

const char* kd_forward_in_registers(const KDForward<float>& args, int device, void* stream) {
  const ResidentArgs resident{args, lane_width(args.classes), any_wide(args)};
  if (args.classes <= kLaneColumns) return forward_by_lanes(resident, device, stream);
  if (args.classes <= kNarrowColumns) return forward_by_blocks<kChunk, kTileThreads>(resident, stream);
  if (args.classes <= kWideColumns) return forward_by_blocks<2 * kChunk, kWideTileThreads>(resident, stream);
  return kTooWide;
}

const char* kd_forward_in_shared_memory(const KDForward<float>& args, int device, void* stream) {
  const ResidentArgs resident{args, kWarp, any_wide(args)};
  const int64_t bytes = shared_tile_bytes(args, args.rule);
  if (bytes > device::shared_memory_limit(device)) return "the rows have too many classes for shared memory";
  const LaunchShape shape{at_most_grid(args.rows), kTileThreads, static_cast<int>(bytes)};
  return with_kernel(args, [&](auto kind, auto sums) {
    constexpr bool two = decltype(sums)::value;
    return device::launch(kd_resident<decltype(kind)::value, two, BlockGroup, SharedTile<two>, kTileThreads>, shape,
                          stream, resident);
  });
}

const char* kd_forward_streaming(const KDForward<float>& args, int device, void* stream) {
  if (args.gradient.data != nullptr) return "the gradient of rows that do not fit on chip is written by the backward";
  const StreamingArgs streaming{args, stream_fields(args.rule)};
  const int64_t fixed_bytes = BlockGroup::scratch_bytes() + summary_bytes(args.teachers);
  const int64_t limit = device::shared_memory_limit(device);
  int threads = kStreamThreads;
  while (threads > kWarp && fixed_bytes + threads * stream_state_bytes(streaming) > limit) threads /= 2;
  const int64_t bytes = fixed_bytes + threads * stream_state_bytes(streaming);
  if (bytes > limit) return "the teachers' states do not fit in shared memory";
  const LaunchShape shape{at_most_grid(args.rows), threads, static_cast<int>(bytes)};
  return with_kind(args.divergence, [&](auto kind) {
    return device::launch(kd_streaming<decltype(kind)::value>, shape, stream, streaming);
  });
}

const char* kd_forward_cuda(const KDForward<float>& args, int device, void* stream) {
  if (const char* error = refused(args)) return error;
  if (args.rows == 0) return nullptr;
  if (fits_in_registers(args, device)) return kd_forward_in_registers(args, device, stream);
  const bool spares_a_sweep =
      is_elementwise(args.divergence) && shared_tile_bytes(args, args.rule) <= device::shared_memory_limit(device);
  return args.gradient.data != nullptr || spares_a_sweep ? kd_forward_in_shared_memory(args, device, stream)
                                                         : kd_forward_streaming(args, device, stream);
}

const char* kd_backward_cuda(const KDBackward<float>& args, int, void* stream) {
  if (const char* error = refused(args)) return error;
  if (args.rows == 0) return nullptr;
  BackwardArgs backward{args, ceil_div(args.classes, kStretch), false};
  for (int k = 0; k < args.teachers; ++k) backward.teachers_want |= args.teacher_gradient[k] != nullptr;
  const int shared_bytes = args.teachers * static_cast<int>(sizeof(TeacherTerms));
  const LaunchShape shape{at_most_grid(args.rows * backward.stretches), kBackwardThreads, shared_bytes};
  return with_kind(args.divergence, [&](auto kind) {
    return device::launch(kd_backward<decltype(kind)::value>, shape, stream, backward);
  });
}

const char* kd_rescale_cuda(const KDRescale<float>& args, int device, void* stream) {
  if (args.gradient.dtype == DType::f64) return "a float64 gradient has no CUDA kernel";
  if (args.rows == 0) return nullptr;
  const RescaleArgs rescale{args, ceil_div(args.classes, kStretch)};
  const int64_t blocks = args.rows * rescale.stretches;
  const int64_t resident = 8 * device::multiprocessors(device);
  const LaunchShape shape{blocks < resident ? blocks : resident, kBackwardThreads, 0};
  return device::launch(kd_rescale, shape, stream, rescale);
}

}  // namespace mtkd_fast
