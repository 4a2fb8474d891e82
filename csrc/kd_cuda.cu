// The op `kd` on CUDA devices: which kernel a shape takes, and its launch.
//
//   classes <= 256     lanes of a warp share a row, eight columns each in registers          kd_resident, LaneGroup
//   classes <= 6144    a block shares a row, 8 or 16 columns a thread in registers           kd_resident, BlockGroup
//                      (elementwise divergences: 8, classes <= 4096)
//   classes <= 262144  a block shares a row in shared memory, its sums in registers, or a    kd_resident, SharedTile
//                      cluster of 2 to 16 does (sm_90 and later); less where shared memory
//                      is small, 16384 without clusters
//   else               a block streams over a row (forward), blocks share its columns
//                      (backward)                                                            kd_streaming, kd_backward
//
// Rows that are pixels of planes, of a student [B, C, H, W]: neighbouring threads have neighbouring pixels. Other
// tensors of the call may lie as they like.
//
//   classes <= 256     a warp has 32 pixels, at most 32 classes of each in registers; 12      kd_resident, PixelGroup
//                      warps share those of more, 16 each, or 8 warps, 32 each
//   else               warps share the classes of 32 pixels                                   kd_streaming, kd_backward
//
// Where no gradient is asked for, rows stream rather than stay in shared memory, unless a second sweep would follow.
#include <algorithm>

#include "kd_backward.cuh"
#include "kd_pixels.cuh"
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

// Blocks, or clusters of them.
int64_t at_most_grid(int64_t groups, int cluster = 1) {
  const int64_t most = device::max_clusters(cluster);
  return groups < most ? groups : most;
}

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

// Pixels: classes a thread has in registers, and the threads that have registers for them.
constexpr int kPixelThreads = 64;  // of a block whose warps each have pixels of their own
constexpr int kPixelColumns = 4 * kChunk;
constexpr int most_pixel_threads(int columns) { return columns <= 2 * kChunk ? 384 : 256; }  // 168 or 255 registers

bool along_pixels(const KDArgs<float>& args) {
  return args.inner > 1 && args.classes > 1 && lies_in_planes(args.student);
}

struct PixelShape {
  int columns;  // classes a thread
  int warps;    // that share a pixel
};

// One warp, twelve of two chunks a thread, or eight of four; none that could: 0.
PixelShape pixel_shape(int64_t classes) {
  const auto share = [&](int most) { return static_cast<int>(ceil_div(classes, most)); };
  const auto fits = [&](int most) { return share(most) <= most_pixel_threads(most) / kWarp; };
  const int most = share(kPixelColumns) == 1 || !fits(2 * kChunk) ? kPixelColumns : 2 * kChunk;
  if (!fits(most)) return {0, 0};
  return {static_cast<int>(ceil_div(ceil_div(classes, share(most)), kChunk)) * kChunk, share(most)};
}

// A block of `threads`, or of fewer where they all have pixels of their own and need too much shared memory.
template <typename Bytes>
LaunchShape shape_of_pixels(const KDArgs<float>& args, int warps, int threads, int device, const Bytes& bytes) {
  while (warps == 1 && threads > kWarp && bytes(threads) > device::shared_memory_limit(device)) threads /= 2;
  return {at_most_grid(ceil_div(args.rows, threads / warps)), threads, static_cast<int>(bytes(threads))};
}

template <int columns>
struct ColumnsOf {
  static constexpr int value = columns;
};

template <typename Launch>
auto with_columns(int columns, const Launch& launch) {
  switch (columns) {
    case kChunk:
      return launch(ColumnsOf<kChunk>{});
    case 2 * kChunk:
      return launch(ColumnsOf<2 * kChunk>{});
    case 3 * kChunk:
      return launch(ColumnsOf<3 * kChunk>{});
    default:
      return launch(ColumnsOf<kPixelColumns>{});
  }
}

template <int N>
LaunchShape shape_of_pixels(const KDArgs<float>& args, int warps, int device) {
  return shape_of_pixels(args, warps, warps == 1 ? kPixelThreads : warps * kWarp, device, [&](int threads) {
    return PixelGroup::scratch_bytes(warps) + summary_bytes(threads / warps * args.teachers) +
           PixelTile<N, false>::shared_bytes(args, threads);
  });
}

bool pixels_fit_in_registers(const KDArgs<float>& args, int device) {
  const PixelShape shape = pixel_shape(args.classes);
  return shape.columns > 0 && with_columns(shape.columns, [&](auto columns) {
           const LaunchShape launch = shape_of_pixels<decltype(columns)::value>(args, shape.warps, device);
           return launch.shared_bytes <= device::shared_memory_limit(device);
         });
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

// Rows in shared memory, whose sums are registers: 32 of 512 threads, or 64, or twice as many, of 256.
constexpr int kBlockColumns = 16384;
constexpr int columns_of_thread(Kind kind, bool two_sums) { return two_sums || kind == Kind::elementwise ? 64 : 32; }
constexpr int most_threads(Kind kind, bool two_sums) { return kBlockColumns / columns_of_thread(kind, two_sums); }

template <Kind kind, bool two, typename Group>
constexpr auto in_shared_memory =
    kd_resident<kind, two, Group, SharedTile<columns_of_thread(kind, two), two>, most_threads(kind, two)>;

using AnyTile = SharedTile<kBlockColumns, false>;  // what does not depend on those numbers

// Where such a row lies: in so many blocks of so many threads, with room for so many teachers.
struct Placement {
  int blocks = 0;  // none: it fits nowhere
  int threads = 0;
  int slots = 0;
};

int64_t shared_tile_bytes(const KDArgs<float>& args, Placement at) {
  const int scratch = at.blocks > 1 ? ClusterGroup::scratch_bytes() : BlockGroup::scratch_bytes();
  return scratch + summary_bytes(args.teachers) + AnyTile::shared_bytes(args, at.blocks, at.slots);
}

LaunchShape shared_tile_shape(const KDArgs<float>& args, Placement at) {
  const int bytes = static_cast<int>(shared_tile_bytes(args, at));
  return {at_most_grid(args.rows, at.blocks) * at.blocks, at.threads, bytes, at.blocks};
}

bool has_room_for_cluster(const KDArgs<float>& args, WeightRule rule, Placement at, int device) {
  LaunchShape shape = shared_tile_shape(args, at);
  shape.blocks = at.blocks;  // one cluster, whatever rows there are
  bool has_room = false;
  with_kind(args.divergence, [&](auto kind) -> const char* {
    constexpr Kind of = decltype(kind)::value;
    has_room = has_two_sums(rule)
                   ? device::has_room_for_cluster(in_shared_memory<of, true, ClusterGroup>, shape, device)
                   : device::has_room_for_cluster(in_shared_memory<of, false, ClusterGroup>, shape, device);
    return nullptr;
  });
  return has_room;
}

// With as many slots as fit, if one does. Of half the threads two blocks share a multiprocessor.
Placement placement_in(int blocks, bool half, const KDArgs<float>& args, WeightRule rule, int device) {
  const int threads = most_threads(kind_of(args.divergence), has_two_sums(rule)) / (half ? 2 : 1);
  if (AnyTile::chunks_of_block(args.classes, blocks) * kChunk > kBlockColumns / (half ? 2 : 1)) return {};
  const int limit = half ? device::shared_memory_of_two(device) : device::shared_memory_limit(device);
  for (int slots = std::min(args.teachers, AnyTile::kMostSlots); slots > 0; --slots) {
    const Placement at{blocks, threads, slots};
    if (shared_tile_bytes(args, at) <= limit) return at;
  }
  return {};
}

// In turn: two blocks a multiprocessor, so that one reads while the other begins a row, ends it or waits for its
// cluster, and two slots, so that a teacher is on its way while another is worked on; one block; one slot. Each with
// the fewest blocks, a power of two.
Placement placement_of(const KDArgs<float>& args, WeightRule rule, int device) {
  for (int slots = std::min(args.teachers, 2); slots > 0; --slots) {
    for (const bool half : {true, false}) {
      for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
        const Placement at = placement_in(blocks, half, args, rule, device);
        if (at.slots >= slots && (blocks == 1 || has_room_for_cluster(args, rule, at, device))) return at;
      }
    }
  }
  return {};
}

}  // namespace

bool kd_fits_on_chip(const KDArgs<float>& args, WeightRule rule, int device) {
  if (refused(args) != nullptr) return false;
  if (along_pixels(args)) return pixels_fit_in_registers(args, device);
  return fits_in_registers(args, device) || placement_of(args, rule, device).blocks > 0;
}

const char* kd_forward_in_registers(const KDForward<float>& args, int device, void* stream) {
  const ResidentArgs resident{args, lane_width(args.classes), any_wide(args), 0, 0};
  if (args.classes <= kLaneColumns) return forward_by_lanes(resident, device, stream);
  if (args.classes <= kNarrowColumns) return forward_by_blocks<kChunk, kTileThreads>(resident, stream);
  if (args.classes <= kWideColumns) return forward_by_blocks<2 * kChunk, kWideTileThreads>(resident, stream);
  return kTooWide;
}

const char* kd_forward_of_pixels(const KDForward<float>& args, int device, void* stream) {
  if (!pixels_fit_in_registers(args, device)) return kTooWide;
  const PixelShape pixels = pixel_shape(args.classes);
  const ResidentArgs resident{args, pixels.warps, any_wide(args), 0, 0};
  return with_columns(pixels.columns, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    return with_kernel(args, [&](auto kind, auto sums) {
      constexpr bool two = decltype(sums)::value;
      return device::launch(
          kd_resident<decltype(kind)::value, two, PixelGroup, PixelTile<N, two>, most_pixel_threads(N)>,
          shape_of_pixels<N>(args, pixels.warps, device), stream, resident);
    });
  });
}

template <typename Group>
const char* forward_in_shared_memory(const KDForward<float>& args, Placement at, void* stream) {
  const ResidentArgs resident{args, kWarp, any_wide(args), at.slots, widest_teacher(args)};
  const LaunchShape shape = shared_tile_shape(args, at);
  return with_kernel(args, [&](auto kind, auto sums) {
    return device::launch(in_shared_memory<decltype(kind)::value, decltype(sums)::value, Group>, shape, stream,
                          resident);
  });
}

const char* forward_in_shared_memory(const KDForward<float>& args, Placement at, void* stream) {
  if (at.blocks == 0) return "the rows have too many classes for shared memory";
  return at.blocks > 1 ? forward_in_shared_memory<ClusterGroup>(args, at, stream)
                       : forward_in_shared_memory<BlockGroup>(args, at, stream);
}

const char* kd_forward_in_shared_memory(const KDForward<float>& args, int device, void* stream) {
  return forward_in_shared_memory(args, placement_in(1, false, args, args.rule, device), stream);
}

const char* kd_forward_by_clusters(const KDForward<float>& args, int blocks, int device, void* stream) {
  const Placement at = placement_in(blocks, false, args, args.rule, device);
  if (blocks < 2 || (at.blocks > 0 && !has_room_for_cluster(args, args.rule, at, device))) {
    return "the device has no clusters of so many blocks";
  }
  return forward_in_shared_memory(args, at, stream);
}

const char* kd_forward_streaming(const KDForward<float>& args, int device, void* stream) {
  if (args.gradient.data != nullptr) return "the gradient of rows that do not fit on chip is written by the backward";
  const StreamingArgs streaming{args, stream_fields(args.rule), 0};
  const int64_t fixed_bytes = BlockGroup::scratch_bytes() + summary_bytes(args.teachers);
  const int64_t limit = device::shared_memory_limit(device);
  int threads = kStreamThreads;
  while (threads > kWarp && fixed_bytes + threads * stream_state_bytes(streaming) > limit) threads /= 2;
  const int64_t bytes = fixed_bytes + threads * stream_state_bytes(streaming);
  if (bytes > limit) return "the teachers' states do not fit in shared memory";
  const LaunchShape shape{at_most_grid(args.rows), threads, static_cast<int>(bytes)};
  return with_kind(args.divergence, [&](auto kind) {
    return device::launch(kd_streaming<decltype(kind)::value, BlockGroup>, shape, stream, streaming);
  });
}

const char* kd_forward_streaming_of_pixels(const KDForward<float>& args, int device, void* stream) {
  if (args.gradient.data != nullptr) return "the gradient of rows that do not fit on chip is written by the backward";
  StreamingArgs streaming{args, stream_fields(args.rule), kStreamThreads / kWarp};
  const int limit = device::shared_memory_limit(device);
  const auto bytes = [&](int warps) {
    return PixelGroup::scratch_bytes(warps) + summary_bytes(kWarp * args.teachers) +
           warps * kWarp * stream_state_bytes(streaming);
  };
  int& warps = streaming.group_width;
  while (warps > 1 && (bytes(warps) > limit || warps * kChunk >= 2 * args.classes)) warps /= 2;
  if (bytes(warps) > limit) return "the teachers' states do not fit in shared memory";
  const LaunchShape shape{at_most_grid(ceil_div(args.rows, kWarp)), warps * kWarp, static_cast<int>(bytes(warps))};
  return with_kind(args.divergence, [&](auto kind) {
    return device::launch(kd_streaming<decltype(kind)::value, PixelGroup>, shape, stream, streaming);
  });
}

const char* kd_forward_cuda(const KDForward<float>& args, int device, void* stream) {
  if (const char* error = refused(args)) return error;
  if (args.rows == 0) return nullptr;
  if (along_pixels(args)) {
    if (pixels_fit_in_registers(args, device)) return kd_forward_of_pixels(args, device, stream);
    if (args.gradient.data == nullptr) return kd_forward_streaming_of_pixels(args, device, stream);
  }
  if (fits_in_registers(args, device)) return kd_forward_in_registers(args, device, stream);
  const bool stays = args.gradient.data != nullptr || is_elementwise(args.divergence);
  const Placement at = stays ? placement_of(args, args.rule, device) : Placement{};
  if (args.gradient.data == nullptr && at.blocks == 0) return kd_forward_streaming(args, device, stream);
  return forward_in_shared_memory(args, at, stream);
}

const char* kd_backward_cuda(const KDBackward<float>& args, int device, void* stream) {
  if (const char* error = refused(args)) return error;
  if (args.rows == 0) return nullptr;
  BackwardArgs backward{args, ceil_div(args.classes, kStretch), 1, false};
  for (int k = 0; k < args.teachers; ++k) backward.teachers_want |= args.teacher_gradient[k] != nullptr;
  const int terms_bytes = args.teachers * static_cast<int>(sizeof(TeacherTerms));
  if (!along_pixels(args)) {
    const LaunchShape shape{at_most_grid(args.rows * backward.stretches), kBackwardThreads, terms_bytes};
    return with_kind(args.divergence, [&](auto kind) {
      return device::launch(kd_backward<decltype(kind)::value, BlockGroup>, shape, stream, backward);
    });
  }
  // A warp for every two chunks, so that reading the terms of the teachers pays.
  const int64_t pairs = args.classes / (2 * kChunk);
  const int warps = pairs < 2                          ? 1
                    : pairs < kBackwardThreads / kWarp ? static_cast<int>(pairs)
                                                       : kBackwardThreads / kWarp;
  backward.group_width = warps;
  LaunchShape shape = shape_of_pixels(args, warps, warps == 1 ? kBackwardThreads : warps * kWarp, device,
                                      [&](int threads) { return threads / warps * terms_bytes; });
  shape.blocks = at_most_grid(ceil_div(args.rows, shape.threads / warps) * backward.stretches);
  return with_kind(args.divergence, [&](auto kind) {
    return device::launch(kd_backward<decltype(kind)::value, PixelGroup>, shape, stream, backward);
  });
}

const char* kd_rescale_cuda(const KDRescale<float>& args, int device, void* stream) {
  if (args.gradient.dtype == DType::f64) return "a float64 gradient has no CUDA kernel";
  if (args.rows == 0) return nullptr;
  const bool pixels = args.inner > 1 && lies_in_planes(args.gradient);
  const RescaleArgs rescale{args, ceil_div(args.classes, pixels ? kBackwardChunks * kChunk : kStretch), pixels};
  const int64_t blocks = ceil_div(args.rows, pixels ? kBackwardThreads : 1) * rescale.stretches;
  const int64_t resident = 8 * device::multiprocessors(device);
  const LaunchShape shape{blocks < resident ? blocks : resident, kBackwardThreads, 0};
  return device::launch(kd_rescale, shape, stream, rescale);
}

}  // namespace mtkd_fast
