// Where a row stays on chip. A tile holds a thread's share of a row as `pieces` of kWidth columns: the student, the
// teacher being read, and for each column the sums over teachers that its gradient needs. A thread keeps the same
// columns throughout, so a tile needs no barrier.
//
//   fetch_student, fetch_teacher   start reading a row; always called, in this order, kDepth teachers ahead
//   fetch_piece                    the same for one piece of the next teacher, where that takes the place of this one
//                                  (kDepth 1)
//   student_arrives, teacher_...   student(j, x) and teacher(j, x) give the logits of piece j from here on: −inf beyond
//   the
//                                  last class and where nothing is read
//   accumulate, mean               the sums over teachers of piece j
#pragma once

#include "kd_row.cuh"

namespace mtkd_fast {

// One row of logits, if it is to be read.
struct Wanted {
  InputRow row;
  bool reads;
  bool in_line;  // the lanes of this warp want neighbouring pixels, in order
};

inline bool any_wide(const KDArgs<float>& args) {
  bool wide = args.student.dtype == DType::f32;
  for (int k = 0; k < args.teachers; ++k) wide |= args.teacher[k].dtype == DType::f32;
  return wide;
}

// Sums over the teachers of N columns a thread, in registers.
template <int N, bool two_sums>
struct RegisterSums {
  float plain[N], by_signal[two_sums ? N : 1];

  MTKD_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      plain[i] = 0;
      if (two_sums) by_signal[i] = 0;
    }
  }
  // plain += first·x, by_signal = fade·by_signal + second·x
  MTKD_DEVICE void accumulate(int, const float (&x)[N], float first, float fade, float second) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      plain[i] += first * x[i];
      if (two_sums) by_signal[i] = fade * by_signal[i] + second * x[i];
    }
  }
  // a·plain − b·by_signal
  MTKD_DEVICE void mean(int, float a, float b, float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = two_sums ? a * plain[i] - b * by_signal[i] : plain[i];
  }
};

// In registers: N columns a thread in one piece. Rows come in through shared memory, [1 +
// kDepth][planes][kChunks][threads] of 16 bytes, so that the student and the next four teachers can be on their way
// without a register.
template <int N, bool two_sums>
struct RegisterTile : RegisterSums<N, two_sums> {
  static constexpr int kWidth = N;
  static constexpr int kChunks = N / kChunk;
  static constexpr int kDepth = 4;

  const KDForward<float>& args;
  const int rank, size;
  Words* slots;      // this thread's first
  const int planes;  // 2 where some logits are floats
  float s[N], t[N];

  static int64_t shared_bytes(const KDArgs<float>& args, int threads) {
    return (1 + kDepth) * (any_wide(args) ? 2 : 1) * kChunks * threads * static_cast<int64_t>(sizeof(Words));
  }

  MTKD_DEVICE RegisterTile(const KDForward<float>& args, bool wide, int rank, int size, char* shared)
      : args(args),
        rank(rank),
        size(size),
        slots(reinterpret_cast<Words*>(shared) + device::thread_index()),
        planes(wide ? 2 : 1) {}

  MTKD_DEVICE int pieces() const { return 1; }
  MTKD_DEVICE int64_t chunk(int, int c) const { return rank + static_cast<int64_t>(c) * size; }

  MTKD_DEVICE void fetch_student(const Wanted& from) const { fetch(0, from); }
  MTKD_DEVICE void fetch_teacher(int k, const Wanted& from) const { fetch(1 + k % kDepth, from); }
  MTKD_DEVICE void fetch_piece(int, const Wanted&) const {}
  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    device::wait_for_copies<kDepth>();
    arrive(0, dtype, reads, s);
  }
  MTKD_DEVICE void teacher_arrives(int k, DType dtype, bool reads) {
    device::wait_for_copies<kDepth - 1>();
    arrive(1 + k % kDepth, dtype, reads, t);
  }

  MTKD_DEVICE void student(int, float (&x)[N]) const { copy(s, x); }
  MTKD_DEVICE void teacher(int, float (&x)[N]) const { copy(t, x); }

 private:
  MTKD_DEVICE Words* slot(int row, int plane, int c) const {
    return slots + ((row * planes + plane) * kChunks + c) * device::block_threads();
  }
  MTKD_DEVICE void fetch(int row, const Wanted& from) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!from.reads || chunk(0, c) * kChunk >= args.classes) continue;
      copy_chunk(from.row, chunk(0, c), args.classes, slot(row, 0, c), slot(row, 1, c));
    }
    device::commit_copies();
  }
  MTKD_DEVICE void arrive(int row, DType dtype, bool reads, float (&x)[N]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      RawChunk raw = empty_chunk(dtype);
      if (reads && chunk(0, c) * kChunk < args.classes) {
        raw.low = *slot(row, 0, c);
        if (dtype == DType::f32) raw.high = *slot(row, 1, c);
      }
      decode(raw, dtype, x + c * kChunk);
    }
  }
  MTKD_DEVICE static void copy(const float (&from)[N], float (&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
};

// In shared memory: each block of the group has a stretch of the row, and of its chunks piece j is number thread +
// j·threads. Floats lie in two planes of four columns a chunk, so that neighbouring threads touch neighbouring 16
// bytes. Bytes a column: student and widest teacher as they are, 4 or 8 of sums.
template <bool two_sums>
struct SharedTile {
  static constexpr int kWidth = kChunk;
  static constexpr int kChunks = 1;
  static constexpr int kDepth = 1;

  int64_t classes;
  int pitch;         // chunks that a block has, but for the last ones
  int first, count;  // chunk of the row, chunks of this block
  Words *s, *t, *plain, *by_signal;
  DType student_dtype, teacher_dtype;

  static MTKD_HD int64_t chunks_of(int64_t classes) { return (classes + kChunk - 1) / kChunk; }
  static MTKD_HD int64_t chunks_of_block(int64_t classes, int blocks) {
    return (chunks_of(classes) + blocks - 1) / blocks;
  }

  static int64_t shared_bytes(const KDArgs<float>& args, int blocks) {
    int widest = 2;
    for (int k = 0; k < args.teachers; ++k) {
      if (args.teacher[k].dtype == DType::f32) widest = 4;
    }
    const int64_t bytes_per_column = host_element_size(args.student.dtype) + widest + (two_sums ? 8 : 4);
    return chunks_of_block(args.classes, blocks) * kChunk * bytes_per_column;
  }

  MTKD_DEVICE SharedTile(const KDForward<float>& args, bool, int rank, int size, char* shared)
      : classes(args.classes),
        pitch(static_cast<int>(chunks_of_block(args.classes, size / device::block_threads()))),
        first(rank / device::block_threads() * pitch),
        plain(reinterpret_cast<Words*>(shared)) {
    by_signal = plain + 2 * pitch;
    s = by_signal + (two_sums ? 2 * pitch : 0);
    t = s + (args.student.dtype == DType::f32 ? 2 * pitch : pitch);
    const int left = static_cast<int>(chunks_of(args.classes)) - first;
    count = left < pitch ? left : pitch;
  }

  MTKD_DEVICE int pieces() const {
    const int thread = device::thread_index();
    return thread < count ? (count - 1 - thread) / device::block_threads() + 1 : 0;
  }
  MTKD_DEVICE int64_t chunk(int j, int) const { return first + at(j); }

  MTKD_DEVICE void fetch_student(const Wanted& from) const { fetch(s, from); }
  MTKD_DEVICE void fetch_teacher(int, const Wanted& from) const { fetch(t, from); }
  MTKD_DEVICE void fetch_piece(int j, const Wanted& from) const {
    if (from.reads) copy(t, j, from.row);
    device::commit_copies();
  }
  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    device::wait_for_copies<0>();
    student_dtype = dtype;
    if (reads) return;
    for (int j = 0; j < pieces(); ++j) put_raw(s, j, empty_chunk(dtype), dtype);
  }
  MTKD_DEVICE void teacher_arrives(int, DType dtype, bool) {
    device::wait_for_copies<0>();
    teacher_dtype = dtype;
  }

  MTKD_DEVICE void student(int j, float (&x)[kChunk]) const { get(s, j, student_dtype, x); }
  MTKD_DEVICE void teacher(int j, float (&x)[kChunk]) const { get(t, j, teacher_dtype, x); }

  MTKD_DEVICE void clear() {
    const Words zero{};
    for (int j = 0; j < pieces(); ++j) {
      plain[at(j)] = plain[pitch + at(j)] = zero;
      if (two_sums) by_signal[at(j)] = by_signal[pitch + at(j)] = zero;
    }
  }
  MTKD_DEVICE void accumulate(int j, const float (&x)[kChunk], float first, float fade, float second) {
    float sum[kChunk];
    get(plain, j, DType::f32, sum);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[i] += first * x[i];
    put(plain, j, sum);
    if (!two_sums) return;
    get(by_signal, j, DType::f32, sum);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[i] = fade * sum[i] + second * x[i];
    put(by_signal, j, sum);
  }
  MTKD_DEVICE void mean(int j, float a, float b, float (&x)[kChunk]) const {
    get(plain, j, DType::f32, x);
    if (!two_sums) return;
    float y[kChunk];
    get(by_signal, j, DType::f32, y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = a * x[i] - b * y[i];
  }

 private:
  MTKD_DEVICE static int at(int j) { return device::thread_index() + j * device::block_threads(); }
  MTKD_DEVICE void get(const Words* from, int j, DType dtype, float (&x)[kChunk]) const {
    RawChunk raw;
    raw.low = from[at(j)];
    raw.high = dtype == DType::f32 ? from[pitch + at(j)] : raw.low;
    decode(raw, dtype, x);
  }
  MTKD_DEVICE void put_raw(Words* to, int j, const RawChunk& raw, DType dtype) const {
    to[at(j)] = raw.low;
    if (dtype == DType::f32) to[pitch + at(j)] = raw.high;
  }
  MTKD_DEVICE void put(Words* to, int j, const float (&x)[kChunk]) const {
    put_raw(to, j, encode(x, DType::f32), DType::f32);
  }

  MTKD_DEVICE void copy(Words* to, int j, const InputRow& row) const {
    copy_chunk(row, chunk(j, 0), classes, to + at(j), to + pitch + at(j));
  }
  MTKD_DEVICE void fetch(Words* to, const Wanted& from) const {
    for (int j = 0; from.reads && j < pieces(); ++j) copy(to, j, from.row);
    device::commit_copies();
  }
};

}  // namespace mtkd_fast
