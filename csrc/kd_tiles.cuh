// Where a row stays on chip. A tile holds a thread's share of a row as kPieces of kWidth columns: the student, the
// teacher being read, and for each column the sums over teachers that its gradient needs. A thread keeps the same
// columns throughout. Between two calls of fetch_next the block meets, by a merge.
//
//   fetch_student, fetch_teacher   start reading a row; always called, in this order, kAhead teachers ahead, the next
//                                  one when a teacher has arrived
//   fetch_next                     the same where the tile itself finds what comes next, on into the next row
//                                  (kReadsOn): when the student is done with, or a teacher that was read
//   student_arrives, teacher_...   from here on logits are there: −inf beside the classes; where nothing is read, no
//                                  piece or −inf
//   each_piece_of_student<n, b>,   step(j, x) for every piece, n of them in a stretch of code; where b, written out for
//   each_piece_of_teacher<n, b>    each dtype
//   student_less                   a piece of the student less the maximum, after shift_student(max)
//   has, chunk, lead               whether the thread takes part in piece j; which chunks of the row it is, where they
//                                  are counted from `lead` columns before the first class
//   fade, accumulate, mean         the sums over teachers: of all columns, and of piece j
#pragma once

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

// In registers: a chunk a thread. Rows come in through shared memory, [1 + kAhead][planes][threads] of 16 bytes, so
// that the student and the next four teachers can be on their way without a register.
template <bool two_sums>
struct RegisterTile : RegisterSums<kChunk, two_sums> {
  static constexpr int kWidth = kChunk;
  static constexpr int kChunks = 1;
  static constexpr int kAhead = 4;
  static constexpr int kPieces = 1;
  static constexpr bool kReadsOn = false;
  static constexpr bool kKeepsExponentials = true;
  using Args = ResidentArgs;

  const ResidentArgs& args;
  const int rank;
  Words* slots;      // this thread's first
  const int planes;  // 2 where some logits are floats
  float s[kChunk], t[kChunk];

  static int64_t shared_bytes(const KDArgs<float>& args, int threads) {
    return (1 + kAhead) * (any_wide(args) ? 2 : 1) * threads * static_cast<int64_t>(sizeof(Words));
  }

  MTKD_DEVICE RegisterTile(const ResidentArgs& args, int rank, char* shared)
      : args(args),
        rank(rank),
        slots(reinterpret_cast<Words*>(shared) + device::thread_index()),
        planes(args.wide ? 2 : 1) {}

  static constexpr bool has(int) { return true; }
  static constexpr int lead() { return 0; }
  MTKD_DEVICE void begin_row(int64_t) const {}
  MTKD_DEVICE int64_t chunk(int, int) const { return rank; }

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

  MTKD_DEVICE void shift_student(float) const {}
  MTKD_DEVICE void student_less(int, float max, float (&x)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = shifted(s[i], max);
  }
  template <int, bool, typename Step>
  MTKD_DEVICE void each_piece_of_student(const Step& step) const {
    float x[kChunk];
    copy(s, x);
    step(0, x);
  }
  template <int, bool, typename Step>
  MTKD_DEVICE void each_piece_of_teacher(const Step& step) const {
    float x[kChunk];
    copy(t, x);
    step(0, x);
  }

 private:
  MTKD_DEVICE bool is_there(bool reads) const { return reads && rank * kChunk < args.classes; }
  MTKD_DEVICE Words* slot(int row, int plane) const { return slots + (row * planes + plane) * device::block_threads(); }
  MTKD_DEVICE void fetch(int row, const Wanted& from) const {
    if (is_there(from.reads)) copy_chunk(from.row, rank, args.classes, slot(row, 0), slot(row, 1));
    device::commit_copies();
  }
  MTKD_DEVICE void arrive(int row, DType dtype, bool reads, float (&x)[kChunk]) const {
    RawChunk raw = empty_chunk(dtype);
    if (is_there(reads)) {
      raw.low = *slot(row, 0);
      if (dtype == DType::f32) raw.high = *slot(row, 1);
    }
    decode(raw, dtype, x);
  }
  MTKD_DEVICE static void copy(const float (&from)[kChunk], float (&to)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = from[i];
  }
};

}  // namespace mtkd_fast
