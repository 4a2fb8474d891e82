// A CUDA grid on the CPU, as csrc/device.h sees it. A thread is a fiber; the threads of a block, and of the blocks of a
// cluster, run in turn, each until its next barrier or shuffle, in an order that a test chooses: forward, reverse or
// shuffled; or warp by warp, each as far as a barrier lets it. A kernel that lacks a barrier is right in one order and
// wrong in another. Faults end the launch with a message:
//
//   a barrier that some threads do not reach, or reach elsewhere; a shuffle with absent lanes; a thread that ends early
//   an access to global memory outside the registered buffers, misaligned, or a write to an input
//   a write past the end of shared memory
//   a mailbox that nobody has opened, or that waits for something else; what is sent to a block of which some threads
//   have not begun or have ended; a barrier of the cluster that a thread waits for but has not arrived at
//
// Stores are seen at once: a barrier that orders too little shows only where it is absent. What is sent to a mailbox
// comes at once in two of the orders, and in the others only when every thread waits.
//
// Shared memory starts as NaN. Bytes loaded and stored are counted for each buffer, and on demand sectors of 32 bytes,
// as a warp touches them: those of its lanes' n-th access from the same line of the source are one access.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mtkd_fast::emulator {

// The thread that is running.
struct Thread {
  int index;
  int block_threads;
  int64_t block_index;
  int64_t grid_blocks;
  int cluster_rank;  // of its block
  int cluster_blocks;
  char* shared;
  int shared_bytes;
};
extern Thread* current;

extern int shared_memory;  // bytes that a block can have
extern int cluster_limit;  // blocks that a cluster can have

void barrier(int line);
void arrive_at_cluster();
void wait_for_cluster(int line);
void open(Mailbox* box);
void expect(Mailbox* box, int bytes);
void await(Mailbox* box, int parity, int line);
void send(float x, float* to, Mailbox* box, int block);
void warp_barrier(int line);
uint32_t shuffle(uint32_t value, int source_lane, int line);
bool any(bool value, int line);

void check_access(const void* p, int bytes, bool writes, int line, int alignment = 0);
void copy_bulk(void* shared, const void* global, int bytes, Mailbox* box);
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);

// Runs body(args) for every thread of the grid. Null, or the first fault.
const char* run(LaunchShape shape, void (*body)(const void* kernel, const void* args), const void* kernel,
                const void* args);

}  // namespace mtkd_fast::emulator

namespace mtkd_fast::device {

inline int thread_index() { return emulator::current->index; }
inline int block_threads() { return emulator::current->block_threads; }
inline int64_t block_index() { return emulator::current->block_index; }
inline int64_t grid_blocks() { return emulator::current->grid_blocks; }
inline char* shared_memory() { return emulator::current->shared; }

constexpr bool kHasClusters = true;
constexpr bool kHasBulkCopies = true;
inline int cluster_rank() { return emulator::current->cluster_rank; }
inline int cluster_blocks() { return emulator::current->cluster_blocks; }
inline int64_t cluster_index() { return block_index() / cluster_blocks(); }
inline int64_t grid_clusters() { return grid_blocks() / cluster_blocks(); }
inline void arrive_at_cluster() { emulator::arrive_at_cluster(); }
inline void wait_for_cluster(int line = __builtin_LINE()) { emulator::wait_for_cluster(line); }
inline void open(Mailbox* box) { emulator::open(box); }
inline void expect(Mailbox* box, int bytes) { emulator::expect(box, bytes); }
inline void await(Mailbox* box, int parity, int line = __builtin_LINE()) { emulator::await(box, parity, line); }
inline void await_copies(Mailbox* box, int parity, int line = __builtin_LINE()) { emulator::await(box, parity, line); }
inline void send(float x, float* to, Mailbox* box, int block) { emulator::send(x, to, box, block); }

inline void sync_block(int line = __builtin_LINE()) { emulator::barrier(line); }
inline void sync_warp(int line = __builtin_LINE()) { emulator::warp_barrier(line); }
inline bool any_in_warp(bool x, int line = __builtin_LINE()) { return emulator::any(x, line); }

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float word_as_float(uint32_t x) { return bits<float>(x); }
inline uint32_t float_as_word(float x) { return bits<uint32_t>(x); }

inline float shuffle_xor(float x, int lanes, int line = __builtin_LINE()) {
  return bits<float>(emulator::shuffle(bits<uint32_t>(x), (thread_index() % kWarp) ^ lanes, line));
}

// As ex2.approx.ftz: results below the smallest normal number are 0.
inline float exp2(float x) {
  const float y = ::exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

struct Pair {
  float x, y;
};

inline float f16_as_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(mantissa * 0x1p-24f));
  return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline Pair unpack_f16(uint32_t x) { return {f16_as_float(x & 0xffffu), f16_as_float(x >> 16)}; }

// Adding 1.5·2^23 ulps rounds to nearest even.
inline uint32_t float_as_f16(float x) {
  const uint32_t sign = bits<uint32_t>(x) >> 16 & 0x8000u;
  const float size = fabsf(x);
  if (std::isnan(x)) return sign | 0x7e00u;
  if (size >= 65520.0f) return sign | 0x7c00u;
  if (size < 0x1p-14f) return sign | static_cast<uint32_t>(nearbyintf(size * 0x1p24f));
  const uint32_t word = bits<uint32_t>(size);
  return sign | ((word - (112u << 23) + 0xfffu + (word >> 13 & 1u)) >> 13);
}
inline uint32_t pack_f16(float lo, float hi) { return float_as_f16(lo) | float_as_f16(hi) << 16; }

inline uint32_t float_as_bf16(float x) {
  const uint32_t word = bits<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffu;
  return (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
}
inline uint32_t pack_bf16(float lo, float hi) { return float_as_bf16(lo) | float_as_bf16(hi) << 16; }

inline uint32_t max_f16(uint32_t a, uint32_t b) {
  const Pair x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}
inline uint32_t max_bf16(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) { return fmaxf(bits<float>(x), bits<float>(y)); };
  return pack_bf16(larger(a << 16, b << 16), larger(a & 0xffff0000u, b & 0xffff0000u));
}

template <typename T>
inline T load(const T* p, int line = __builtin_LINE()) {
  emulator::check_access(p, sizeof(T), false, line);
  T x;
  memcpy(static_cast<void*>(&x), p, sizeof(T));
  return x;
}
template <typename T>
inline T load_own(const T* p, int line = __builtin_LINE()) {
  return load(p, line);
}
template <typename T>
inline void store(T* p, T x, int line = __builtin_LINE()) {
  emulator::check_access(p, sizeof(T), true, line);
  memcpy(static_cast<void*>(p), &x, sizeof(T));
}

// A copy lands when this thread waits for its group, and not before.
template <typename T>
inline void copy_async(T* shared, const T* global, int line = __builtin_LINE()) {
  emulator::check_access(global, sizeof(T), false, line);
  emulator::copy_async(shared, global, sizeof(T));
}
inline void copy_async(Words* shared, const Words* global, int bytes, int line = __builtin_LINE()) {
  if (bytes > 0) emulator::check_access(global, bytes, false, line, sizeof(Words));
  Words words{};
  memcpy(&words, global, bytes);
  emulator::copy_async(shared, &words, sizeof(Words));
}
inline void copy_bulk(Words* shared, const Words* global, int bytes, Mailbox* box, int line = __builtin_LINE()) {
  emulator::check_access(global, bytes, false, line, sizeof(Words));
  emulator::copy_bulk(shared, global, bytes, box);
}
inline void order_bulk_copies() {}
inline int count(int* counter) { return (*counter)++; }
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
inline void wait_for_copies() {
  emulator::wait_for_copies(pending);
}

inline int64_t max_blocks() { return 5; }  // so few that kernels must loop
inline int shared_memory_limit(int) { return emulator::shared_memory; }
struct SharedMemory {
  int of_block(int blocks) const { return (emulator::shared_memory + 1024) / blocks / 128 * 128 - 1024; }
};
inline SharedMemory shared_memory(int) { return {}; }
inline int multiprocessors(int) { return 1; }

template <typename Args>
bool has_bulk_copies(void (*)(const Args&), int) {
  return emulator::cluster_limit > 1;
}

template <typename Args>
int64_t side_by_side(void (*)(const Args&), LaunchShape shape, int) {
  if (shape.cluster > emulator::cluster_limit) return 0;
  return shape.cluster == 1 ? max_blocks() : 2;
}

template <typename Args>
const char* launch(void (*kernel)(const Args&), LaunchShape shape, void*, const Args& args) {
  auto body = [](const void* kernel, const void* args) {
    reinterpret_cast<void (*)(const Args&)>(const_cast<void*>(kernel))(*static_cast<const Args*>(args));
  };
  return emulator::run(shape, body, reinterpret_cast<const void*>(kernel), &args);
}

}  // namespace mtkd_fast::device

using std::isfinite;
