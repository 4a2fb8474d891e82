// Pixels of [B, C, H, W] as rows: classes lie H·W apart, pixels side by side. A lane has a pixel, a warp 32
// neighbouring ones, so that every class of a warp is one line of memory; several warps share the classes of more than
// a thread's registers hold.
#pragma once

#include "kd_tiles.cuh"

namespace mtkd_fast {

MTKD_HD constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// A block is one set of 32 pixels whose classes `warps` warps share, or, with a warp for each, several sets that know
// nothing of one another.
struct PixelGroup : WithinBlock {
  int warps;
  float* scratch;  // [kMaxStateFields][warps][pitch] states, [kMaxStateFields][kWarp] merged ones

  MTKD_DEVICE explicit PixelGroup(int warps, char* shared) : warps(warps), scratch(reinterpret_cast<float*>(shared)) {}
  MTKD_DEVICE int lane() const { return device::thread_index() % kWarp; }
  MTKD_DEVICE int rank() const { return warps == 1 ? 0 : device::thread_index() / kWarp; }
  MTKD_DEVICE int size() const { return warps; }
  MTKD_DEVICE bool leads() const { return rank() == 0; }
  MTKD_DEVICE int lanes() const { return 1; }
  MTKD_DEVICE int groups_in_block() const { return device::block_threads() / warps; }
  MTKD_DEVICE int index_in_block() const { return warps == 1 ? device::thread_index() : lane(); }
  static constexpr int groups_in_warp() { return kWarp; }
  MTKD_DEVICE bool any(bool x) const { return device::any_in_warp(x); }  // the same for every warp of the set
  MTKD_DEVICE void sync() const {
    if (warps > 1) device::sync_block();
  }

  // The states of a pixel, one a warp, become neighbouring lanes: every warp merges those of some pixels. A warp that
  // still reads what was merged cannot meet one that has come to the next merge: that writes elsewhere before a
  // barrier.
  template <typename State, typename MergeLanes>
  MTKD_DEVICE void merge(State& state, const MergeLanes& merge_lanes) const {
    if (warps == 1) return;
    constexpr int kFields = sizeof(State) / sizeof(float);
    static_assert(kFields <= kMaxStateFields, "the scratch is too small for this state");
    const int width = power_of_two_from(warps), pixels = kWarp / width, pitch = kWarp + pixels;
    float* merged = scratch + kMaxStateFields * warps * pitch;
    float* fields = reinterpret_cast<float*>(&state);
#pragma unroll
    for (int i = 0; i < kFields; ++i) scratch[(i * warps + rank()) * pitch + lane()] = fields[i];
    device::sync_block();
    const int from = lane() % width;
#pragma unroll 1
    for (int first = rank() * pixels; first < kWarp; first += warps * pixels) {
      const int pixel = first + lane() / width;
      state = State();
      if (from < warps) {
#pragma unroll
        for (int i = 0; i < kFields; ++i) fields[i] = scratch[(i * warps + from) * pitch + pixel];
      }
      merge_lanes(state, width);
      if (from != 0) continue;
#pragma unroll
      for (int i = 0; i < kFields; ++i) merged[i * kWarp + pixel] = fields[i];
    }
    device::sync_block();
#pragma unroll
    for (int i = 0; i < kFields; ++i) fields[i] = merged[i * kWarp + lane()];
  }

  static MTKD_HD int scratch_bytes(int warps) {
    const int pitch = kWarp + kWarp / power_of_two_from(warps);
    return warps == 1 ? 0 : kMaxStateFields * (warps * pitch + kWarp) * static_cast<int>(sizeof(float));
  }
  MTKD_DEVICE int scratch_bytes() const { return scratch_bytes(warps); }
};

// N classes a thread, in one piece. A warp's logits stay in shared memory as they came, [1 + kTeachers][N][32], the
// student, this teacher and those after it, a kilobyte and more on its way; the sums over teachers are registers. 32
// neighbouring pixels on a 16-byte boundary are copied as lines, 16 bytes a lane, where all of them are read; else each
// lane copies its own.
template <int N, bool two_sums>
struct PixelTile : RegisterSums<N, two_sums> {
  static constexpr int kWidth = N;
  static constexpr int kChunks = N / kChunk;
  static constexpr int kAhead = N == kChunk ? 4 : 2;
  static constexpr int kPieces = 1;
  static constexpr bool kReadsOn = false;
  static constexpr bool kKeepsExponentials = true;
  using Args = ResidentArgs;
  static constexpr int kTeachers = kAhead + 1;
  static constexpr int kCopied = sizeof(Words);

  const int first;  // class of this warp
  const int count;  // its classes, at most N
  const int slot_bytes;
  char* const slots;  // this warp's
  DType student_dtype, teacher_dtype;
  bool reads_student, reads_teacher;
  const char* teacher_slot;

  static MTKD_HD int slot_bytes_of(bool wide) { return N * kWarp * (wide ? 4 : 2); }
  static int64_t shared_bytes(const KDArgs<float>& args, int threads) {
    return static_cast<int64_t>(threads / kWarp) * (1 + kTeachers) * slot_bytes_of(any_wide(args));
  }

  MTKD_DEVICE PixelTile(const ResidentArgs& args, int rank, char* shared)
      : first(rank * N),
        count(static_cast<int>(args.classes - first < N ? args.classes - first : N)),
        slot_bytes(slot_bytes_of(args.wide)),
        slots(shared + device::thread_index() / kWarp * (1 + kTeachers) * slot_bytes) {}

  static constexpr bool has(int) { return true; }
  static constexpr int lead() { return 0; }
  MTKD_DEVICE void begin_row(int64_t) const {}
  MTKD_DEVICE int64_t chunk(int, int c) const { return first / kChunk + c; }

  MTKD_DEVICE void fetch_student(const Wanted& from) const { fetch(slots, from); }
  MTKD_DEVICE void fetch_teacher(int k, const Wanted& from) const { fetch(slot_of_teacher(k), from); }
  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    device::wait_for_copies<kAhead>();
    device::sync_warp();  // what other lanes copied is there
    student_dtype = dtype;
    reads_student = reads;
  }
  MTKD_DEVICE void teacher_arrives(int k, DType dtype, bool reads) {
    device::wait_for_copies<kAhead - 1>();
    device::sync_warp();
    teacher_slot = slot_of_teacher(k);
    teacher_dtype = dtype;
    reads_teacher = reads;
  }

  template <int, bool, typename Step>
  MTKD_DEVICE void each_piece_of_student(const Step& step) const {
    float x[N];
    get(slots, student_dtype, reads_student, x);
    step(0, x);
  }
  MTKD_DEVICE void shift_student(float) const {}
  MTKD_DEVICE void student_less(int, float max, float (&x)[N]) const {
    get(slots, student_dtype, reads_student, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = shifted(x[i], max);
  }
  template <int, bool, typename Step>
  MTKD_DEVICE void each_piece_of_teacher(const Step& step) const {
    float x[N];
    get(teacher_slot, teacher_dtype, reads_teacher, x);
    step(0, x);
  }

 private:
  static MTKD_DEVICE int lane() { return device::thread_index() % kWarp; }
  MTKD_DEVICE char* slot_of_teacher(int k) const { return slots + (1 + k % kTeachers) * slot_bytes; }

  MTKD_DEVICE void get(const char* slot, DType dtype, bool reads, float (&x)[N]) const {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(slot) + lane();
    if (dtype == DType::f32) {
      const float* floats = reinterpret_cast<const float*>(slot) + lane();
      get_each(reads, x, [&](int i) { return floats[i * kWarp]; });
    } else if (dtype == DType::bf16) {
      get_each(reads, x, [&](int i) { return device::word_as_float(uint32_t{halves[i * kWarp]} << 16); });
    } else {
      get_each(reads, x, [&](int i) { return device::unpack_f16(halves[i * kWarp]).x; });
    }
  }
  template <typename Logit>
  MTKD_DEVICE void get_each(bool reads, float (&x)[N], const Logit& logit) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = reads && i < count ? logit(i) : -infinity<float>();
  }

  MTKD_DEVICE void fetch(char* slot, const Wanted& from) const {
    const int64_t stride = from.row.stride;
    const bool wide = from.row.dtype == DType::f32;
    const char* pixel = from.row.data + first * stride;
    const char* line = pixel - lane() * (wide ? 4 : 2);
    const bool aligned = (reinterpret_cast<uintptr_t>(line) | static_cast<uintptr_t>(stride)) % kCopied == 0;
    device::sync_warp();  // what was in the slot has been read
    if (!device::any_in_warp(!from.reads || !from.in_line || !aligned)) {
      wide ? copy_lines<4>(slot, line, stride) : copy_lines<2>(slot, line, stride);
    } else if (from.reads) {
      wide ? copy_words(slot, pixel, stride) : copy_halves(slot, pixel, stride);
    }
    device::commit_copies();
  }
  template <int size>
  MTKD_DEVICE void copy_lines(char* slot, const char* line, int64_t stride) const {
    constexpr int kLanes = kWarp * size / kCopied, kClasses = kWarp / kLanes;  // of a class; in one go
    const int offset = lane() % kLanes * kCopied;
    for (int c = lane() / kLanes; c < count; c += kClasses) {
      device::copy_async(reinterpret_cast<Words*>(slot + c * kWarp * size + offset),
                         reinterpret_cast<const Words*>(line + c * stride + offset));
    }
  }
  MTKD_DEVICE void copy_words(char* slot, const char* pixel, int64_t stride) const {
    uint32_t* words = reinterpret_cast<uint32_t*>(slot) + lane();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      device::copy_async(words + i * kWarp, reinterpret_cast<const uint32_t*>(pixel + i * stride));
    }
  }
  MTKD_DEVICE void copy_halves(char* slot, const char* pixel, int64_t stride) const {
    uint16_t* halves = reinterpret_cast<uint16_t*>(slot) + lane();
#pragma unroll 1
    for (int c = 0; c < count; c += kChunk) {
      uint16_t x[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (c + i < count) x[i] = device::load(reinterpret_cast<const uint16_t*>(pixel + (c + i) * stride));
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (c + i < count) halves[(c + i) * kWarp] = x[i];
      }
    }
  }
};

}  // namespace mtkd_fast
