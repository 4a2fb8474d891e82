// The op `kd` on CUDA devices: launches, each of a kernel that kd_selection.cuh chooses or that is asked for by name.
#include "kd_backward.cuh"
#include "kd_rescale.cuh"
#include "kd_selection.cuh"
#include "kd_streaming.cuh"
#include "kd_variants.h"

namespace mtkd_fast {
namespace {

// Null, or why there is no kernel for it.
const char* refused(const KDArgs<float>& args) {
  bool allowed = args.student.dtype != DType::f64;
  for (int k = 0; k < args.teachers; ++k) allowed = allowed && args.teacher[k].dtype != DType::f64;
  return allowed ? nullptr : "float64 logits have no CUDA kernel";
}

// Many teachers of a few classes: as many rows as their summaries leave room for.
const char* forward_by_lanes(const ResidentArgs& args, int device, void* stream) {
  LaunchShape shape = lane_shape(args, kLaneThreads);
  const int limit = device::shared_memory_limit(device);
  while (shape.threads > kWarp && shape.shared_bytes > limit) shape = lane_shape(args, shape.threads / 2);
  return with_kernel(args.divergence, args.rule, [&](auto kind, auto sums) {
    constexpr bool two = decltype(sums)::value;
    return device::launch(kd_resident<decltype(kind)::value, two, LaneGroup, RegisterTile<two>, kLaneThreads>, shape,
                          stream, args);
  });
}

constexpr const char* kTooWide = "the rows have too many classes for registers";

}  // namespace

bool kd_fits_on_chip(const KDArgs<float>& args, WeightRule rule, int device) {
  return refused(args) == nullptr && stays_on_chip(args, rule, device);
}

KDPlacement kd_placement(const KDForward<float>& args, int device) {
  const Placement at = placement_of(args, args.rule, device);
  return {at.blocks, at.threads, at.places, at.blocks > 0 ? shared_bytes(args, at) : 0};
}

const char* kd_forward_in_registers(const KDForward<float>& args, int device, void* stream) {
  const ResidentArgs resident{args, lane_width(args.classes), any_wide(args)};
  return fits_in_registers(args) ? forward_by_lanes(resident, device, stream) : kTooWide;
}

const char* kd_forward_of_pixels(const KDForward<float>& args, int device, void* stream) {
  if (!pixels_fit_in_registers(args, device)) return kTooWide;
  const PixelShape pixels = pixel_shape(args.classes);
  const ResidentArgs resident{args, pixels.warps, any_wide(args)};
  return with_columns(pixels.columns, [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    return with_kernel(args.divergence, args.rule, [&](auto kind, auto sums) {
      constexpr bool two = decltype(sums)::value;
      return device::launch(
          kd_resident<decltype(kind)::value, two, PixelGroup, PixelTile<N, two>, most_pixel_threads(N)>,
          shape_of_pixels<N>(args, pixels.warps, device), stream, resident);
    });
  });
}

const char* forward_in_shared_memory(const KDForward<float>& args, Placement at, int device, void* stream) {
  if (at.blocks == 0) return "the rows have too many classes for shared memory";
  const int pitch = static_cast<int>(chunks_of_block(args.classes, at.blocks));
  const bool wide = any_wide(args);
  const int place_words = (wide ? 2 : 1) * pitch;
  const int rounds = static_cast<int>(ceil_div(pitch, at.threads));
  SharedArgs shared{{args, kWarp, wide}, at.places, place_words, at.places * place_words, pitch, rounds * kWarp};
  shared.in_step = all_in_step(args);
  shared.odd_ends = shared.in_step && args.classes % kChunk != 0;
  return with_shared_kernel(args, args.rule, at, [&](auto kernel) {
    shared.in_bulk = shared.in_step && device::has_bulk_copies(kernel, device);
    const bool by_threads = !shared.in_bulk || shared.odd_ends;
    shared.moves = by_threads && wide && any_half(args);
    return device::launch(kernel, resident_shape(kernel, args, at, device), stream, shared);
  });
}

const char* kd_forward_in_shared_memory(const KDForward<float>& args, KDShape shape, int device, void* stream) {
  const Placement wanted{shape.blocks, shape.is_short, shape.warps * kWarp};
  if (shape.is_short && shape.blocks > 1) return "a short row lies in one block";
  const Placement at = placement_in(wanted, 1, 1, args, args.rule, device);
  if (at.blocks > 1 && !has_room_for_cluster(args, args.rule, at, device)) {
    return "the device has no clusters of so many blocks";
  }
  return forward_in_shared_memory(args, at, device, stream);
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
  const Selection selection = selection_of(args, device);
  switch (selection.strategy) {
    case Strategy::registers:
      return kd_forward_in_registers(args, device, stream);
    case Strategy::pixels:
      return kd_forward_of_pixels(args, device, stream);
    case Strategy::shared_memory:
      return forward_in_shared_memory(args, selection.at, device, stream);
    case Strategy::streaming:
      return kd_forward_streaming(args, device, stream);
    default:
      return kd_forward_streaming_of_pixels(args, device, stream);
  }
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
