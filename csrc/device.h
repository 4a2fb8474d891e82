// Everything a kernel asks of the machine: who it is, memory, barriers, shuffles, exponentials, launches. The one place
// that touches global memory. Two implementations of the same names: CUDA, and (MTKD_EMULATOR) a grid of fibers on the
// CPU that checks every access (tests/emulator). Kernels are written against this header and include nothing of CUDA.
#pragma once

#include <cstdint>
#include <cstring>

namespace mtkd_fast {

// 16 bytes, the widest access.
struct alignas(16) Words {
  uint32_t word[4];
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks that run side by side and see each other's shared memory
};

constexpr int kWarp = 32;
constexpr int kMaxCluster = 16;

// In shared memory: counts the bytes that come to a block, from others of its cluster or in bulk, phase after phase.
using Mailbox = uint64_t;

namespace device {
constexpr float kLog2E = 1.4426950408889634f;  // for exp2
}

}  // namespace mtkd_fast

#if defined(MTKD_EMULATOR)

#include "emulator.h"

#define MTKD_DEVICE inline
#define MTKD_KERNEL(max_threads, min_blocks) void
#define MTKD_PARAM(...) const __VA_ARGS__&

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#define MTKD_DEVICE __device__ __forceinline__
#define MTKD_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define MTKD_PARAM(...) const __grid_constant__ __VA_ARGS__

namespace mtkd_fast::device {

MTKD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MTKD_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
MTKD_DEVICE int64_t block_index() { return blockIdx.x; }
MTKD_DEVICE int64_t grid_blocks() { return gridDim.x; }

MTKD_DEVICE char* shared_memory() {
  extern __shared__ Words dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
}

// Clusters of blocks and bulk copies: code for what came before sm_90 leaves them out.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
constexpr bool kHasBulkCopies = kHasClusters;

MTKD_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
MTKD_DEVICE int cluster_blocks() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
MTKD_DEVICE int64_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
MTKD_DEVICE int64_t grid_clusters() {
  uint32_t clusters;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));
  return clusters;
}
// Waiting ends when all threads of the cluster have arrived; what they wrote before is there.
MTKD_DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
MTKD_DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

MTKD_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Of a mailbox: by one thread, before the block or the cluster meets.
MTKD_DEVICE void open(Mailbox* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// By one thread of the block, once a phase: it ends when so many bytes have come.
MTKD_DEVICE void expect(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
}
// Whether a phase has ended; they alternate between parities 0 and 1. It may wait a little before it says no.
MTKD_DEVICE bool has_ended(Mailbox* box, int parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred done;\n\tmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.b32 %0, 1, 0, done;\n\t}"
      : "=r"(done)
      : "r"(shared_address(box)), "r"(parity)
      : "memory");
  return done != 0;
}
// The same, where other blocks have sent.
MTKD_DEVICE bool has_ended_in_cluster(Mailbox* box, int parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred done;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.b32 %0, 1, 0, done;\n\t}"
      : "=r"(done)
      : "r"(shared_address(box)), "r"(parity)
      : "memory");
  return done != 0;
}
// For what other blocks send, and for bulk copies of this one.
MTKD_DEVICE void await(Mailbox* box, int parity) {
  while (!has_ended_in_cluster(box, parity)) continue;
}
MTKD_DEVICE void await_copies(Mailbox* box, int parity) {
  while (!has_ended(box, parity)) continue;
}
// To this address, by way of this mailbox, both in the shared memory of `block` of the cluster.
MTKD_DEVICE void send(float x, float* to, Mailbox* box, int block) {
  asm volatile(
      "{\n\t.reg .b32 there, box;\n\tmapa.shared::cluster.u32 there, %1, %3;\n\tmapa.shared::cluster.u32 box, %2, "
      "%3;\n\tst.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %0, [box];\n\t}" ::"f"(x),
      "r"(shared_address(to)), "r"(shared_address(box)), "r"(block)
      : "memory");
}

MTKD_DEVICE void sync_block() { __syncthreads(); }
MTKD_DEVICE void sync_warp() { __syncwarp(); }
MTKD_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
MTKD_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }

// 2^x, 2 ulp; results below the smallest normal number are 0; NaN stays NaN.
MTKD_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MTKD_DEVICE float word_as_float(uint32_t x) { return __uint_as_float(x); }
MTKD_DEVICE uint32_t float_as_word(float x) { return __float_as_uint(x); }

// Two halves of one word, the lower address first.
MTKD_DEVICE float2 unpack_f16(uint32_t x) {
  __half2 h;
  memcpy(&h, &x, sizeof(x));
  return __half22float2(h);
}
MTKD_DEVICE uint32_t pack_f16(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  uint32_t x;
  memcpy(&x, &h, sizeof(x));
  return x;
}
MTKD_DEVICE uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  uint32_t x;
  memcpy(&x, &h, sizeof(x));
  return x;
}

// Of each of two halves the larger one; of a number and NaN the number.
MTKD_DEVICE uint32_t max_f16(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("max.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
MTKD_DEVICE uint32_t max_bf16(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

// Inputs that no thread of the grid writes.
MTKD_DEVICE Words load(const Words* p) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
MTKD_DEVICE float load(const float* p) { return __ldg(p); }
MTKD_DEVICE double load(const double* p) { return __ldg(p); }
MTKD_DEVICE int64_t load(const int64_t* p) { return __ldg(reinterpret_cast<const long long*>(p)); }
MTKD_DEVICE uint32_t load(const uint32_t* p) { return __ldg(p); }
MTKD_DEVICE uint16_t load(const uint16_t* p) { return __ldg(p); }

// What this thread may itself write afterwards.
MTKD_DEVICE Words load_own(const Words* p) {
  const uint4 x = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
MTKD_DEVICE uint32_t load_own(const uint32_t* p) { return __ldcg(p); }
MTKD_DEVICE uint16_t load_own(const uint16_t* p) { return __ldcg(p); }

MTKD_DEVICE void store(Words* p, Words x) {
  __stwb(reinterpret_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}
MTKD_DEVICE void store(float* p, float x) { __stwb(p, x); }
MTKD_DEVICE void store(double* p, double x) { __stwb(p, x); }
MTKD_DEVICE void store(uint32_t* p, uint32_t x) { __stwb(p, x); }
MTKD_DEVICE void store(uint16_t* p, uint16_t x) { __stwb(p, x); }

// 16 or 4 bytes from global to shared memory. What was copied since the last commit is a group; waiting leaves the
// youngest `pending` groups of this thread in flight.
MTKD_DEVICE void copy_async(Words* shared, const Words* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}
MTKD_DEVICE void copy_async(uint32_t* shared, const uint32_t* global) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}
// The first `bytes` of 16, then zeros.
MTKD_DEVICE void copy_async(Words* shared, const Words* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
MTKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
MTKD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Many times 16 bytes from global to shared memory, by one thread; the mailbox counts them. Behind order_bulk_copies.
MTKD_DEVICE void copy_bulk(Words* shared, const Words* global, int bytes, Mailbox* box) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(box))
               : "memory");
}
// Between what this thread has done to shared memory, or knows to have been done, and bulk copies to it.
MTKD_DEVICE void order_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// In shared memory; returns how many were counted before. Who is last knows what the others did before they counted.
MTKD_DEVICE int count(int* counter) {
  int before;
  asm volatile("atom.acq_rel.cta.shared::cta.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "r"(shared_address(counter))
               : "memory");
  return before;
}

// Host side.
inline int64_t max_blocks() { return 0x7fffffff; }

// The most dynamic shared memory that one block can ask for, or -1.
inline int shared_memory_limit(int device) {
  int bytes = -1;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : -1;
}

// What each of the blocks that share a multiprocessor can ask for.
struct SharedMemory {
  int of_multiprocessor, reserved, limit;
  int of_block(int blocks) const {
    constexpr int kGrain = 128;  // bytes, in which it is handed out
    return std::min(limit, of_multiprocessor / blocks / kGrain * kGrain - reserved);
  }
};

// Nothing where the device does not say.
inline SharedMemory shared_memory(int device) {
  SharedMemory memory{0, 0, shared_memory_limit(device)};
  int* const multiprocessor = &memory.of_multiprocessor;
  if (cudaDeviceGetAttribute(multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess)
    return {};
  if (cudaDeviceGetAttribute(&memory.reserved, cudaDevAttrReservedSharedMemoryPerBlock, device) != cudaSuccess)
    return {};
  return memory;
}

// Null, or what went wrong. All the memory that the device has, so that threads which launch a kernel in other shapes
// side by side do not take it from each other.
template <typename Args>
const char* allow(void (*kernel)(Args), LaunchShape shape) {
  constexpr int kWithoutAsking = 48 * 1024, kPortable = 8;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kWithoutAsking) {
    int device = 0;
    error = cudaGetDevice(&device);
    const int most = std::max(shape.shared_bytes, shared_memory_limit(device));
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && shape.cluster > kPortable)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline cudaLaunchConfig_t launch_config(LaunchShape shape, void* stream, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}

inline int multiprocessors(int device) {
  int count = 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}

// Of a question, after which nothing has been launched.
inline bool failed(cudaError_t answer) {
  if (answer != cudaSuccess) cudaGetLastError();
  return answer != cudaSuccess;
}

// What ask() says of a kernel, asked once for each device and shape; 0, and asked again, where it fails: below 0.
template <typename Ask>
int64_t remembered(const void* kernel, LaunchShape shape, int device, const Ask& ask) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int64_t> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, shape.threads, shape.shared_bytes, shape.cluster);
  const auto known = answers.find(key);
  if (known != answers.end()) return known->second;
  const int64_t answer = ask();
  if (answer < 0) return 0;
  return answers[key] = answer;
}

// Whether the device has clusters and bulk copies, and its code of the kernel knows of them: not before sm_90.
template <typename Args>
bool has_bulk_copies(void (*kernel)(Args), int device) {
  const void* const of = reinterpret_cast<const void*>(kernel);
  return remembered(of, {0, 0, 0}, device, [&]() -> int64_t {
    int has_clusters = 0;
    cudaFuncAttributes compiled{};
    if (failed(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device))) return -1;
    if (failed(cudaFuncGetAttributes(&compiled, of))) return -1;
    return has_clusters && compiled.ptxVersion >= 90;
  });
}

// How many blocks of this shape, or clusters of them, run side by side on the device: 0 where it has no room for one.
template <typename Args>
int64_t side_by_side(void (*kernel)(Args), LaunchShape shape, int device) {
  const void* const of = reinterpret_cast<const void*>(kernel);
  if (shape.cluster > 1 && !has_bulk_copies(kernel, device)) return 0;
  return remembered(of, shape, device, [&]() -> int64_t {
    int count = 0;
    cudaLaunchAttribute cluster{};
    shape.blocks = shape.cluster;
    const cudaLaunchConfig_t config = launch_config(shape, nullptr, &cluster);
    if (allow(kernel, shape) != nullptr) return -1;
    const int all = cudaSharedmemCarveoutMaxShared;  // for as many blocks as there is room for
    if (failed(cudaFuncSetAttribute(of, cudaFuncAttributePreferredSharedMemoryCarveout, all))) return -1;
    if (shape.cluster > 1) return failed(cudaOccupancyMaxActiveClusters(&count, of, &config)) ? -1 : count;
    const size_t bytes = config.dynamicSmemBytes;
    if (failed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, of, shape.threads, bytes))) return -1;
    return count * multiprocessors(device);
  });
}

// Null, or what went wrong.
template <typename Args>
const char* launch(void (*kernel)(Args), LaunchShape shape, void* stream, const Args& args) {
  if (const char* refused = allow(kernel, shape)) return refused;
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = launch_config(shape, stream, &cluster);
  void* parameters[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtkd_fast::device

#endif
