// Where a row stays on chip. A tile holds a thread's share of a row as kPieces of kWidth columns: the student, the
// teacher being read, and for each column the sums over teachers that its gradient needs. A thread keeps the same
// columns throughout, so a tile needs no barrier.
//
//   fetch_student, fetch_teacher   start reading a row; always called, in this order, ahead() teachers ahead, the next
//                                  one when a teacher has arrived (kFreesOnArrival) or is done with
//   student_arrives, teacher_...   student(j, x) and teacher(j, x) give the logits of piece j from here on: −inf beyond
//                                  the last class and where nothing is read
//   student_less                   the same less the maximum, after shift_student(max)
//   each_piece_of_teacher<n, b>    step(j, x) for every piece, n of them in a stretch of code; where b, written out for
//                                  each dtype
//   has                            whether the thread takes part in piece j
//   fade, accumulate, mean         the sums over teachers: of all columns, and of piece j
#pragma once

#include <algorithm>

#include "kd_row.cuh"

namespace mtkd_fast {

// One row of logits, if it is to be read.
struct Wanted {
  InputRow row;
  bool reads;
  bool in_line;  // the lanes of this warp want neighbouring pixels, in order
};

struct ResidentArgs : KDForward<float> {
  int group_width;  // lanes a row, where lanes share one; warps, where warps share pixels
  bool wide;        // some logits are floats
  // SharedTile: teachers that have a place, and bytes of a column there.
  int slots, slot_size;
};

inline int widest_teacher(const KDArgs<float>& args) {
  int size = 2;
  for (int k = 0; k < args.teachers; ++k) size = std::max(size, host_element_size(args.teacher[k].dtype));
  return size;
}

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
  MTKD_DEVICE void fade(float by) {
#pragma unroll
    for (int i = 0; i < N && two_sums; ++i) by_signal[i] *= by;
  }
  // Of piece j: plain += first·x, by_signal += second·x.
  template <int M>
  MTKD_DEVICE void accumulate(int j, const float (&x)[M], float first, float second) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      plain[j * M + i] += first * x[i];
      if (two_sums) by_signal[j * M + i] += second * x[i];
    }
  }
  // a·plain − b·by_signal
  template <int M>
  MTKD_DEVICE void mean(int j, float a, float b, float (&x)[M]) const {
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] = two_sums ? a * plain[j * M + i] - b * by_signal[j * M + i] : plain[j * M + i];
  }
};

// In registers: N columns a thread in one piece. Rows come in through shared memory, [1 +
// kAhead][planes][kChunks][threads] of 16 bytes, so that the student and the next four teachers can be on their way
// without a register.
template <int N, bool two_sums>
struct RegisterTile : RegisterSums<N, two_sums> {
  static constexpr int kWidth = N;
  static constexpr int kChunks = N / kChunk;
  static constexpr int kAhead = 4;
  static constexpr int kPieces = 1;
  static constexpr bool kFreesOnArrival = true;

  const ResidentArgs& args;
  const int rank, size;
  Words* slots;      // this thread's first
  const int planes;  // 2 where some logits are floats
  float s[N], t[N];

  static int64_t shared_bytes(const KDArgs<float>& args, int threads) {
    return (1 + kAhead) * (any_wide(args) ? 2 : 1) * kChunks * threads * static_cast<int64_t>(sizeof(Words));
  }

  MTKD_DEVICE RegisterTile(const ResidentArgs& args, int rank, int size, char* shared)
      : args(args),
        rank(rank),
        size(size),
        slots(reinterpret_cast<Words*>(shared) + device::thread_index()),
        planes(args.wide ? 2 : 1) {}

  static constexpr int ahead() { return kAhead; }
  static constexpr bool has(int) { return true; }
  MTKD_DEVICE int64_t chunk(int, int c) const { return rank + static_cast<int64_t>(c) * size; }

  MTKD_DEVICE void fetch_student(const Wanted& from) const { fetch(0, from); }
  MTKD_DEVICE void fetch_teacher(int k, const Wanted& from) const { fetch(1 + k % kAhead, from); }
  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    device::wait_for_copies<kAhead>();
    arrive(0, dtype, reads, s);
  }
  MTKD_DEVICE void teacher_arrives(int k, DType dtype, bool reads) {
    device::wait_for_copies<kAhead - 1>();
    arrive(1 + k % kAhead, dtype, reads, t);
  }

  MTKD_DEVICE void student(int, float (&x)[N]) const { copy(s, x); }
  MTKD_DEVICE void shift_student(float) const {}
  MTKD_DEVICE void student_less(int, float max, float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = shifted(s[i], max);
  }
  template <int, bool, typename Step>
  MTKD_DEVICE void each_piece_of_teacher(const Step& step) const {
    float x[N];
    copy(t, x);
    step(0, x);
  }

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

// The same with the logits in shared memory, N columns a thread in pieces of a chunk: only the sums are registers, so
// that a teacher's logits cost two reads of shared memory, and nothing that is written there. Each block of the group
// has a stretch of the row, and of its chunks piece j is number thread + j·threads. [slots of teachers, as they come;
// student, floats less their maximum once that is known][planes][chunks of the block] of 16 bytes, floats in two planes
// of four columns a chunk, so that neighbouring threads touch neighbouring 16 bytes.
template <int N, bool two_sums>
struct SharedTile : RegisterSums<N, two_sums> {
  static constexpr int kWidth = kChunk;
  static constexpr int kChunks = 1;
  static constexpr int kPieces = N / kChunk;
  static constexpr bool kFreesOnArrival = false;
  static constexpr int kMostSlots = 4;

  int64_t classes;
  int slots;
  int pitch;         // chunks that a block has, but for the last ones
  int first, count;  // chunk of the row, chunks of this block
  int slot_words;
  Words *first_slot, *s;
  const Words* t;  // this teacher's slot
  DType student_dtype, teacher_dtype;

  static MTKD_HD int64_t chunks_of(int64_t classes) { return (classes + kChunk - 1) / kChunk; }
  static MTKD_HD int64_t chunks_of_block(int64_t classes, int blocks) {
    return (chunks_of(classes) + blocks - 1) / blocks;
  }

  static int64_t shared_bytes(const KDArgs<float>& args, int blocks, int slots) {
    const int bytes_per_column = slots * widest_teacher(args) + static_cast<int>(sizeof(float));
    return chunks_of_block(args.classes, blocks) * kChunk * bytes_per_column;
  }

  MTKD_DEVICE SharedTile(const ResidentArgs& args, int rank, int size, char* shared)
      : classes(args.classes),
        slots(args.slots),
        pitch(static_cast<int>(chunks_of_block(args.classes, size / device::block_threads()))),
        first(rank / device::block_threads() * pitch),
        slot_words(args.slot_size / 2 * pitch),
        first_slot(reinterpret_cast<Words*>(shared)),
        s(first_slot + slots * slot_words) {
    const int left = static_cast<int>(chunks_of(args.classes)) - first;
    count = left < pitch ? left : pitch;
  }

  MTKD_DEVICE bool has(int j) const { return at(j) < count; }
  MTKD_DEVICE int64_t chunk(int j, int) const { return first + at(j); }

  MTKD_DEVICE int ahead() const { return slots; }
  MTKD_DEVICE void fetch_student(const Wanted& from) const { fetch(s, from); }
  MTKD_DEVICE void fetch_teacher(int k, const Wanted& from) const { fetch(slot(k), from); }
  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    wait_for_all_but(slots);
    student_dtype = dtype;
    if (reads) return;
#pragma unroll 1
    for (int j = 0; has(j); ++j) put(s, j, empty_chunk(dtype), dtype);
  }
  MTKD_DEVICE void teacher_arrives(int k, DType dtype, bool) {
    wait_for_all_but(slots - 1);
    t = slot(k);
    teacher_dtype = dtype;
  }

  MTKD_DEVICE void student(int j, float (&x)[kChunk]) const { decode(get(s, j, student_dtype), student_dtype, x); }
  MTKD_DEVICE void shift_student(float max) const {
#pragma unroll 1
    for (int j = 0; has(j); ++j) {
      float x[kChunk];
      student(j, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = shifted(x[i], max);
      put(s, j, encode(x, DType::f32), DType::f32);
    }
  }
  MTKD_DEVICE void student_less(int j, float, float (&x)[kChunk]) const {
    decode(get(s, j, DType::f32), DType::f32, x);
  }
  template <int unrolled, bool for_each_dtype, typename Step>
  MTKD_DEVICE void each_piece_of_teacher(const Step& step) const {
    if (for_each_dtype) {
      with_dtype([&](DType dtype) { each_piece_of<unrolled>([&](int j, auto& x) { read(j, dtype, x); }, step); });
    } else {
      each_piece_of<unrolled>([&](int j, auto& x) { with_dtype([&](DType dtype) { read(j, dtype, x); }); }, step);
    }
  }

 private:
  MTKD_DEVICE Words* slot(int k) const { return first_slot + k % slots * slot_words; }
  MTKD_DEVICE static int at(int j) { return device::thread_index() + j * device::block_threads(); }
  MTKD_DEVICE static void wait_for_all_but(int pending) {
    static_assert(kMostSlots == 4, "");
    if (pending == 0) device::wait_for_copies<0>();
    if (pending == 1) device::wait_for_copies<1>();
    if (pending == 2) device::wait_for_copies<2>();
    if (pending == 3) device::wait_for_copies<3>();
    if (pending == 4) device::wait_for_copies<4>();
  }
  // Calls f(the teacher's dtype), which f is compiled for.
  template <typename F>
  MTKD_DEVICE void with_dtype(const F& f) const {
    if (teacher_dtype == DType::f32) {
      f(DType::f32);
    } else if (teacher_dtype == DType::bf16) {
      f(DType::bf16);
    } else {
      f(DType::f16);
    }
  }
  template <int unrolled, typename Read, typename Step>
  MTKD_DEVICE void each_piece_of(const Read& read_piece, const Step& step) const {
#pragma unroll unrolled
    for (int j = 0; j < kPieces; ++j) {
      if (!has(j)) break;
      float x[kChunk];
      read_piece(j, x);
      step(j, x);
    }
  }
  MTKD_DEVICE void read(int j, DType dtype, float (&x)[kChunk]) const { decode(get(t, j, dtype), dtype, x); }
  MTKD_DEVICE RawChunk get(const Words* from, int j, DType dtype) const {
    RawChunk raw;
    raw.low = from[at(j)];
    raw.high = dtype == DType::f32 ? from[pitch + at(j)] : raw.low;
    return raw;
  }
  MTKD_DEVICE void put(Words* to, int j, const RawChunk& raw, DType dtype) const {
    to[at(j)] = raw.low;
    if (dtype == DType::f32) to[pitch + at(j)] = raw.high;
  }
  MTKD_DEVICE void fetch(Words* to, const Wanted& from) const {
#pragma unroll 1
    for (int j = 0; from.reads && has(j); ++j) {
      copy_chunk(from.row, chunk(j, 0), classes, to + at(j), to + pitch + at(j));
    }
    device::commit_copies();
  }
};

}  // namespace mtkd_fast
