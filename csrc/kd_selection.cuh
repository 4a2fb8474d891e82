// Which kernel of the op `kd` a shape takes on a CUDA device, and how it is laid out there. Units are [rows, classes]
// tensors that pass through memory for a loss and its gradient.
//
//   classes            a row lies in                              kernel                       units    because of
//   up to 256          lanes of a warp, 8 columns in registers    kd_resident, LaneGroup       K + 2    (1)
//   up to 1024         a warp: logits in shared memory, sums of   kd_resident, SharedTile      K + 2    (2)
//                      32 columns in registers
//   up to n · 8192     n blocks, of as few warps as have sums     kd_resident, SharedTile      K + 2    (3)
//                      of 64 columns in registers, two or more
//                      to a multiprocessor
//   up to n · 16384    n blocks, one to a multiprocessor          kd_resident, SharedTile      K + 2    (3)
//   else               memory                                     kd_streaming, kd_backward    2K + 3   (4)
//
// (1) A merge is 5 shuffles a field and no barrier; many rows a block. (2) The same of a whole warp, twelve to a
// multiprocessor, each with its next rows on their way. DKD has registers for eight, of 64 columns. (3) n is 1, or 2,
// 4, 8 or 16 blocks of a cluster (sm_90 and later). More than one block to a multiprocessor are tried first, for all n,
// so that one reads while another begins, merges or ends; 65536 registers hold two sums of 16384 columns, or one and
// the exponentials of a teacher. Less where shared memory is small, and 7 columns less for class counts that are no
// multiple of 8. (4) Two sweeps. Where no gradient is asked for, rows that would take a cluster stream too, K + 1 units
// either way, unless an elementwise divergence would sweep twice.
//
// Rows that are pixels of planes, of a student [B, C, H, W]: neighbouring threads have neighbouring pixels, so that 32
// lanes touch whole sectors. Other tensors of the call may lie as they like.
//
//   classes            32 pixels lie in                           kernel                       units
//   up to 32           a warp, all classes in registers           kd_resident, PixelGroup      K + 2
//   up to 256          12 warps of 16 classes, or 8 of 32         kd_resident, PixelGroup      K + 2
//   else               memory                                     kd_streaming, kd_backward    2K + 3
//
// These lines follow from counts of bytes, registers and shared memory (tests/test_cuda_codegen.py holds the
// registers), not from measurements: none of them has been timed on a device.
#pragma once

#include <algorithm>

#include "kd_pixels.cuh"
#include "kd_resident.cuh"

namespace mtkd_fast {

enum class Strategy { registers, pixels, shared_memory, streaming, streaming_pixels };

// Where a row of shared memory lies: in so many blocks of so many threads, with room for so many rows as they come.
struct Placement {
  int blocks = 0;  // none: it fits nowhere
  bool is_short = false;
  int threads = 0;
  int places = 0;
};

struct Selection {
  Strategy strategy;
  Placement at;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t at_most_grid(int64_t blocks) { return std::min(blocks, device::max_blocks()); }

inline bool has_two_sums(WeightRule rule) { return rule == WeightRule::confidence || rule == WeightRule::entropy; }

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
const char* with_kernel(Divergence divergence, WeightRule rule, const Launch& launch) {
  return with_kind(divergence, [&](auto kind) {
    return has_two_sums(rule) ? launch(kind, Sums<true>{}) : launch(kind, Sums<false>{});
  });
}

// ------------------------------------------------------------------------------------------------------ in registers

constexpr int kLaneThreads = 128;
constexpr int kLaneColumns = kWarp * kChunk;
// 2, 4, ... up to a warp: the lanes that share a row.
inline int lane_width(int64_t classes) {
  int width = 1;
  while (width * kChunk < classes) width *= 2;
  return width;
}

inline LaunchShape lane_shape(const ResidentArgs& args, int threads) {
  const int rows_in_block = threads / args.group_width;
  const int64_t shared_bytes =
      summary_bytes(rows_in_block * args.teachers) + RegisterTile<false>::shared_bytes(args, threads);
  return {at_most_grid(ceil_div(args.rows, rows_in_block)), threads, static_cast<int>(shared_bytes)};
}

inline bool fits_in_registers(const KDArgs<float>& args) { return args.classes <= kLaneColumns; }

// ------------------------------------------------------------------------------------------------------------ pixels

// Pixels: classes a thread has in registers, and the threads that have registers for them.
constexpr int kPixelThreads = 64;  // of a block whose warps each have pixels of their own
constexpr int kPixelColumns = 4 * kChunk;
constexpr int most_pixel_threads(int columns) { return columns <= 2 * kChunk ? 384 : 256; }  // 168 or 255 registers

inline bool along_pixels(const KDArgs<float>& args) {
  return args.inner > 1 && args.classes > 1 && lies_in_planes(args.student);
}

struct PixelShape {
  int columns;  // classes a thread
  int warps;    // that share a pixel
};

// One warp, twelve of two chunks a thread, or eight of four; none that could: 0.
inline PixelShape pixel_shape(int64_t classes) {
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

inline bool pixels_fit_in_registers(const KDArgs<float>& args, int device) {
  const PixelShape shape = pixel_shape(args.classes);
  return shape.columns > 0 && with_columns(shape.columns, [&](auto columns) {
           const LaunchShape launch = shape_of_pixels<decltype(columns)::value>(args, shape.warps, device);
           return launch.shared_bytes <= device::shared_memory_limit(device);
         });
}

// -------------------------------------------------------------------------------------------------- in shared memory

// Columns of a thread, whose sums are registers, and the threads that a multiprocessor has registers for, 255 or 168 a
// thread. Beside one sum they hold the exponentials of a teacher too. What a warp does once a teacher costs as much as
// three chunks: so few warps have a row, with many columns a thread. Of 32 columns, which make a warp's row, there are
// registers for twelve warps, not eight; but DKD's target wants more.
struct Layout {
  int columns, threads;
  bool keeps_exponentials;
};
constexpr Layout layout_of(Kind kind, bool two_sums, bool is_short) {
  const bool keeps = kind == Kind::forward_kl && !two_sums;
  return is_short && kind != Kind::dkd ? Layout{32, 384, keeps} : Layout{64, 256, keeps};
}
constexpr int kShortRow = kWarp * 32;  // columns

template <Kind kind, bool two, typename Group, bool is_short>
constexpr auto in_shared_memory = kd_resident<
    kind, two, Group,
    SharedTile<layout_of(kind, two, is_short).columns, two, layout_of(kind, two, is_short).keeps_exponentials>,
    layout_of(kind, two, is_short).threads>;

// Calls launch(the kernel) for a row that lies in so many blocks.
template <typename Launch>
const char* with_shared_kernel(const KDArgs<float>& args, WeightRule rule, Placement at, const Launch& launch) {
  return with_kernel(args.divergence, rule, [&](auto kind, auto sums) {
    constexpr Kind of = decltype(kind)::value;
    constexpr bool two = decltype(sums)::value;
    if (at.blocks > 1) return launch(in_shared_memory<of, two, ClusterGroup, false>);
    if (at.is_short) return launch(in_shared_memory<of, two, BlockGroup, true>);
    return launch(in_shared_memory<of, two, BlockGroup, false>);
  });
}

inline int64_t shared_bytes(const KDArgs<float>& args, Placement at) {
  const int scratch = at.blocks > 1 ? ClusterGroup::scratch_bytes() : BlockGroup::scratch_bytes();
  return scratch + summary_bytes(args.teachers) + shared_tile_bytes(args, at.blocks, at.places);
}

inline LaunchShape shared_tile_shape(const KDArgs<float>& args, Placement at) {
  return {0, at.threads, static_cast<int>(shared_bytes(args, at)), at.blocks};
}

// As many blocks as run side by side, so that each goes on from row to row.
template <typename Args>
LaunchShape resident_shape(void (*kernel)(Args), const KDArgs<float>& args, Placement at, int device) {
  LaunchShape shape = shared_tile_shape(args, at);
  const int64_t most = std::max<int64_t>(1, device::side_by_side(kernel, shape, device));
  shape.blocks = std::min(args.rows, most) * at.blocks;
  return shape;
}

inline bool has_room_for_cluster(const KDArgs<float>& args, WeightRule rule, Placement at, int device) {
  int64_t clusters = 0;
  with_shared_kernel(args, rule, at, [&](auto kernel) -> const char* {
    clusters = device::side_by_side(kernel, shared_tile_shape(args, at), device);
    return nullptr;
  });
  return clusters > 0;
}

// Of as few warps as hold the row, but at least so many; of as many as there are registers for beside the other blocks
// of the multiprocessor: `beside` or more in all, each with room for `places` or more.
inline Placement placement_in(Placement at, int beside, int places, const KDArgs<float>& args, WeightRule rule,
                              int device) {
  const Layout layout = layout_of(kind_of(args.divergence), has_two_sums(rule), at.is_short);
  const int64_t columns = chunks_of_block(args.classes, at.blocks) * kChunk;
  const int64_t threads = std::max<int64_t>(at.threads, ceil_div(ceil_div(columns, layout.columns), kWarp) * kWarp);
  if (threads > layout.threads) return {};
  const int most = layout.threads / static_cast<int>(threads);
  at.threads = layout.threads / most / kWarp * kWarp;
  const device::SharedMemory memory = device::shared_memory(device);
  for (int share = most; share >= beside; --share) {
    for (at.places = kMostPlaces; at.places >= places; --at.places) {
      if (shared_bytes(args, at) <= memory.of_block(share)) return at;
    }
  }
  return {};
}

// In turn: two places, so that one row is on its way while another is worked on, and two blocks a multiprocessor or
// more, so that one reads while another begins a row, ends it or waits for its cluster; one block; one place. Each with
// the fewest blocks, a power of two.
inline Placement placement_of(const KDArgs<float>& args, WeightRule rule, int device) {
  for (const int places : {2, 1}) {
    for (const int beside : {2, 1}) {
      for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
        const bool is_short = blocks == 1 && columns_of_row(args.classes) <= kShortRow;
        const Placement at = placement_in({blocks, is_short}, beside, places, args, rule, device);
        if (at.blocks == 1 || (at.blocks > 1 && has_room_for_cluster(args, rule, at, device))) return at;
      }
    }
  }
  return {};
}

// ------------------------------------------------------------------------------------------------------------- which

// What a forward takes: with a gradient, everything that stays on chip; without one, what would be read twice.
inline Selection selection_of(const KDForward<float>& args, int device) {
  const bool writes = args.gradient.data != nullptr;
  if (along_pixels(args)) {
    if (pixels_fit_in_registers(args, device)) return {Strategy::pixels, {}};
    if (!writes) return {Strategy::streaming_pixels, {}};
  }
  if (fits_in_registers(args)) return {Strategy::registers, {}};
  const Placement at = placement_of(args, args.rule, device);
  const bool stays = writes || at.blocks == 1 || (at.blocks > 1 && is_elementwise(args.divergence));
  return stays ? Selection{Strategy::shared_memory, at} : Selection{Strategy::streaming, {}};
}

// Whether there is a kernel that writes the gradient in the forward.
inline bool stays_on_chip(const KDArgs<float>& args, WeightRule rule, int device) {
  if (along_pixels(args)) return pixels_fit_in_registers(args, device);
  return fits_in_registers(args) || placement_of(args, rule, device).blocks > 0;
}

}  // namespace mtkd_fast
