// Strategy A, backward: the gradient that the forward wrote, times the upstream. An upstream of 1 in place costs a
// launch.
#pragma once

#include "kd_backward.cuh"

namespace mtkd_fast {

// A block takes a stretch of a row; or its threads a row each, neighbouring pixels, kBackwardChunks chunks of it.
struct RescaleArgs : KDRescale<float> {
  int64_t stretches;  // of a row
  bool pixels;
};

// As load_chunk, for a tensor that this grid may write.
MTKD_DEVICE RawChunk load_own_chunk(const OutputRow& row, int64_t chunk, int64_t classes) {
  RawChunk raw = empty_chunk(row.dtype);
  if (row.vectors && (chunk + 1) * kChunk <= classes) {
    const Words* p = reinterpret_cast<const Words*>(row.data + chunk * kChunk * element_size(row.dtype));
    raw.low = device::load_own(p);
    if (row.dtype == DType::f32) raw.high = device::load_own(p + 1);
    return raw;
  }
  const int64_t left = classes - chunk * kChunk;
  const char* p = row.data + chunk * kChunk * row.stride;
#pragma unroll
  for (int i = 0; i < kChunk; ++i, p += row.stride) {
    if (i >= left) continue;
    if (row.dtype == DType::f32) {
      uint32_t& word = i < 4 ? raw.low.word[i] : raw.high.word[i - 4];
      word = device::load_own(reinterpret_cast<const uint32_t*>(p));
    } else {
      const uint32_t half = device::load_own(reinterpret_cast<const uint16_t*>(p));
      uint32_t& word = raw.low.word[i / 2];
      word = i % 2 == 0 ? (word & 0xffff0000u) | half : (word & 0xffffu) | half << 16;
    }
  }
  return raw;
}

MTKD_DEVICE void rescale_chunks(const RescaleArgs& args, int64_t index, int64_t first, int64_t end, int64_t step) {
  const float upstream = upstream_of(args.upstream, args.upstream_stride, index);
  const bool in_place = args.out == args.gradient.data;
  if (in_place && upstream == 1) return;
  const bool counts = device::load(args.scale + index) != 0;
  if (in_place && !counts) return;  // 0 already

  const RowPosition position = row_position(index, args.inner);
  const OutputRow from = output_row(args.gradient, position);
  OutputRow to = from;
  to.data = static_cast<char*>(args.out) + (from.data - static_cast<char*>(args.gradient.data));
  to.vectors = from.vectors && reinterpret_cast<uintptr_t>(to.data) % sizeof(Words) == 0;
  const int64_t chunks = (args.classes + kChunk - 1) / kChunk;
  for (int64_t c = first; c < end && c < chunks; c += step) {
    float x[kChunk] = {};
    if (counts) {
      decode(load_own_chunk(from, c, args.classes), from.dtype, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] *= upstream;
    }
    store_chunk(to, c, args.classes, x);
  }
}

MTKD_KERNEL(kBackwardThreads, 2) kd_rescale(MTKD_PARAM(RescaleArgs) args) {
  const bool one_for_all = args.upstream_stride == 0 && args.out == args.gradient.data;
  if (one_for_all && upstream_of(args.upstream, 0, 0) == 1) return;
  const int thread = device::thread_index(), lanes = args.pixels ? 1 : kBackwardThreads;  // of a row
  const int rows_in_block = kBackwardThreads / lanes, chunks = lanes * kBackwardChunks;
  const int64_t steps = (args.rows + rows_in_block - 1) / rows_in_block * args.stretches;
  for (int64_t i = device::block_index(); i < steps; i += device::grid_blocks()) {
    const int64_t row = i / args.stretches * rows_in_block + thread / lanes, first = i % args.stretches * chunks;
    if (row < args.rows) rescale_chunks(args, row, first + thread % lanes, first + chunks, lanes);
  }
}

}  // namespace mtkd_fast
