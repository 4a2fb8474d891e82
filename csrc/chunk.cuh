// Eight neighbouring columns of one row: as they lie in memory, and as floats. Eight halves are one 16-byte access,
// eight floats two. Aligned rows of class stride 1 take those; heads, tails, odd addresses and other strides go one by
// one.
#pragma once

#include "device.h"
#include "kd.h"

namespace mtkd_fast {

constexpr int kChunk = 8;

MTKD_DEVICE int element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline int host_element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Eight columns as they lie in memory. Halves leave `high` alone.
struct RawChunk {
  Words low, high;
};

// One row of a tensor, for reading.
struct InputRow {
  const char* data;
  int64_t stride;  // bytes from class to class
  DType dtype;
  bool vectors;  // every chunk that lies wholly in the row may be read 16 bytes at a time
};

// Row n as its two leading indices, divided out once for all tensors.
struct RowPosition {
  int64_t outer, inner;
};

MTKD_DEVICE RowPosition row_position(int64_t row, int64_t inner) {
  if (inner == 1) return {row, 0};
  if (row < inner) return {0, row};  // always, where rows take one stride: no division
  const int64_t outer = row / inner;
  return {outer, row - outer * inner};
}

MTKD_DEVICE InputRow input_row(const Logits& x, RowPosition at) {
  const int size = element_size(x.dtype);
  const char* data = static_cast<const char*>(x.data) + (at.outer * x.outer_stride + at.inner * x.inner_stride) * size;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Words) == 0;
  return {data, x.class_stride * size, x.dtype, aligned && x.class_stride == 1};
}

MTKD_DEVICE uint32_t half_minus_infinity(DType dtype) { return dtype == DType::bf16 ? 0xff80u : 0xfc00u; }

// Of a float, or of each of two halves.
MTKD_DEVICE uint32_t larger_of_words(uint32_t a, uint32_t b, DType dtype) {
  if (dtype == DType::bf16) return device::max_bf16(a, b);
  if (dtype == DType::f16) return device::max_f16(a, b);
  return device::float_as_word(fmaxf(device::word_as_float(a), device::word_as_float(b)));
}

// A chunk of −inf: what lies beyond the last class, and what is not read.
MTKD_DEVICE RawChunk empty_chunk(DType dtype) {
  const uint32_t half = half_minus_infinity(dtype);
  const uint32_t word = dtype == DType::f32 ? 0xff800000u : half << 16 | half;
  return {{{word, word, word, word}}, {{word, word, word, word}}};
}

// Eight elements that lie `stride` bytes apart, those below `left` of them.
template <typename Stride>
MTKD_DEVICE RawChunk gather_elements(const char* p, Stride stride, DType dtype, int64_t left) {
  RawChunk raw = empty_chunk(dtype);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= left) continue;
    if (dtype == DType::f32) {
      uint32_t& word = i < 4 ? raw.low.word[i] : raw.high.word[i - 4];
      word = device::load(reinterpret_cast<const uint32_t*>(p + i * stride));
    } else {
      const uint32_t half = device::load(reinterpret_cast<const uint16_t*>(p + i * stride));
      uint32_t& word = raw.low.word[i / 2];
      word = i % 2 == 0 ? (word & 0xffff0000u) | half : (word & 0xffffu) | half << 16;
    }
  }
  return raw;
}

// Dense halves on odd addresses are common (odd class counts): their strides are immediates.
MTKD_DEVICE RawChunk load_elements(const InputRow& row, int64_t first, int64_t classes) {
  const char* p = row.data + first * row.stride;
  if (row.dtype == DType::f32) return gather_elements(p, row.stride, DType::f32, classes - first);
  if (row.stride == 2) return gather_elements(p, 2, row.dtype, classes - first);
  return gather_elements(p, row.stride, row.dtype, classes - first);
}

MTKD_DEVICE bool takes_vectors(const InputRow& row, int64_t chunk, int64_t classes) {
  return row.vectors && (chunk + 1) * kChunk <= classes;
}

MTKD_DEVICE const Words* chunk_words(const InputRow& row, int64_t chunk) {
  return reinterpret_cast<const Words*>(row.data + chunk * kChunk * element_size(row.dtype));
}

// −inf beyond the last class.
MTKD_DEVICE RawChunk load_chunk(const InputRow& row, int64_t chunk, int64_t classes) {
  if (!takes_vectors(row, chunk, classes)) return load_elements(row, chunk * kChunk, classes);
  const Words* p = chunk_words(row, chunk);
  RawChunk raw;
  raw.low = device::load(p);
  raw.high = row.dtype == DType::f32 ? device::load(p + 1) : raw.low;
  return raw;
}

// Whether the row may be read 4 bytes at a time: floats always, halves where they are dense and even.
MTKD_DEVICE bool takes_words(const InputRow& row) {
  return row.dtype == DType::f32 || (row.stride == 2 && reinterpret_cast<uintptr_t>(row.data) % 4 == 0);
}

// A chunk on its way into shared memory, `low` and (floats) `high`. What cannot be copied asynchronously is there
// already.
MTKD_DEVICE void copy_chunk(const InputRow& row, int64_t chunk, int64_t classes, Words* low, Words* high) {
  const bool wide = row.dtype == DType::f32;
  if (takes_vectors(row, chunk, classes)) {
    device::copy_async(low, chunk_words(row, chunk));
    if (wide) device::copy_async(high, chunk_words(row, chunk) + 1);
    return;
  }
  const int64_t first = chunk * kChunk;
  const int in_word = wide ? 1 : 2;
  if (!takes_words(row) || (classes - first < kChunk && classes % in_word != 0)) {
    *low = load_elements(row, first, classes).low;  // halves: floats can always go word by word
    return;
  }
  const uint32_t nothing = empty_chunk(row.dtype).low.word[0];
#pragma unroll 2
  for (int i = 0; i < kChunk / in_word; ++i) {
    uint32_t* to = i < 4 ? &low->word[i] : &high->word[i - 4];
    const int64_t column = first + i * in_word;
    if (column < classes) {
      device::copy_async(to, reinterpret_cast<const uint32_t*>(row.data + column * row.stride));
    } else {
      *to = nothing;
    }
  }
}

// A chunk that lies on 16 bytes: what there is of it up to the last class, then zeros.
MTKD_DEVICE void copy_aligned_chunk(const InputRow& row, int64_t chunk, int64_t classes, Words* to) {
  const Words* p = chunk_words(row, chunk);
  const int words = row.dtype == DType::f32 ? 2 : 1;
  const int64_t left = (classes - chunk * kChunk) * element_size(row.dtype);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t bytes = left - i * static_cast<int64_t>(sizeof(Words));
    if (i >= words) continue;
    device::copy_async(to + i, p + i, bytes <= 0 ? 0 : bytes > 16 ? 16 : static_cast<int>(bytes));
  }
}

MTKD_DEVICE float load_element(const InputRow& row, int64_t column) {
  const char* p = row.data + column * row.stride;
  if (row.dtype == DType::f32) return device::load(reinterpret_cast<const float*>(p));
  const uint32_t half = device::load(reinterpret_cast<const uint16_t*>(p));
  return row.dtype == DType::bf16 ? device::word_as_float(half << 16) : device::unpack_f16(half).x;
}

// `x` points at eight registers.
MTKD_DEVICE void decode(const RawChunk& raw, DType dtype, float* x) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = device::word_as_float(raw.low.word[i]);
      x[i + 4] = device::word_as_float(raw.high.word[i]);
    }
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = device::word_as_float(raw.low.word[i] << 16);
      x[2 * i + 1] = device::word_as_float(raw.low.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto pair = device::unpack_f16(raw.low.word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

MTKD_DEVICE RawChunk encode(const float* x, DType dtype) {
  RawChunk raw{};
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.low.word[i] = device::float_as_word(x[i]);
      raw.high.word[i] = device::float_as_word(x[i + 4]);
    }
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.low.word[i] = device::pack_bf16(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.low.word[i] = device::pack_f16(x[2 * i], x[2 * i + 1]);
  }
  return raw;
}

// One row of an output.
struct OutputRow {
  char* data;
  int64_t stride;  // bytes from class to class
  DType dtype;
  bool vectors;
};

MTKD_DEVICE OutputRow output_row(char* data, int64_t class_stride, DType dtype) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Words) == 0;
  return {data, class_stride * element_size(dtype), dtype, aligned && class_stride == 1};
}

// From `lead` columns before the row on.
MTKD_DEVICE OutputRow output_row(const Gradient& x, RowPosition at, int lead = 0) {
  const int64_t first = at.outer * x.outer_stride + at.inner * x.inner_stride - lead;
  return output_row(static_cast<char*>(x.data) + first * element_size(x.dtype), x.class_stride, x.dtype);
}

// Of a contiguous [rows, classes] tensor.
MTKD_DEVICE OutputRow output_row(void* tensor, int64_t row, int64_t classes, DType dtype) {
  return output_row(static_cast<char*>(tensor) + row * classes * element_size(dtype), 1, dtype);
}

// Columns from `lead` on, which is less than a chunk.
MTKD_DEVICE void store_chunk(const OutputRow& row, int64_t chunk, int64_t classes, const float* x, int lead = 0) {
  const RawChunk raw = encode(x, row.dtype);
  if (row.vectors && (chunk + 1) * kChunk <= classes && (chunk > 0 || lead == 0)) {
    Words* p = reinterpret_cast<Words*>(row.data + chunk * kChunk * element_size(row.dtype));
    device::store(p, raw.low);
    if (row.dtype == DType::f32) device::store(p + 1, raw.high);
    return;
  }
  const int64_t left = classes - chunk * kChunk;
  const int first = chunk > 0 ? 0 : lead;
  char* p = row.data + chunk * kChunk * row.stride;
#pragma unroll
  for (int i = 0; i < kChunk; ++i, p += row.stride) {
    if (i >= left || i < first) continue;
    if (row.dtype == DType::f32) {
      device::store(reinterpret_cast<uint32_t*>(p), i < 4 ? raw.low.word[i] : raw.high.word[i - 4]);
    } else {
      const uint32_t word = raw.low.word[i / 2];
      device::store(reinterpret_cast<uint16_t*>(p), static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16));
    }
  }
}

}  // namespace mtkd_fast
