// What the *_ops.cpp files share: from tensors to the raw pointers of kd.h, and running rows on a device. Only
// device-agnostic headers, so that the CUDA build compiles and links with a CPU-only torch.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "kd.h"

namespace mtkd_fast {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      TORCH_CHECK_TYPE(false, "logits and features must be float32, bfloat16, float16 or float64, got ",
                       x.scalar_type());
  }
}

// float64 as soon as one tensor is, else float32.
inline at::ScalarType compute_dtype(const Tensor& first, TensorList rest) {
  bool wide = first.scalar_type() == at::kDouble;
  for (const Tensor& x : rest) wide = wide || x.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// Calls body with a float or a double.
template <typename Body>
auto with_compute_type(at::ScalarType dtype, Body body) {
  return dtype == at::kDouble ? body(double()) : body(float());
}

// Small per-row tensors (O(N·K) numbers) in the compute dtype.
inline Tensor in_compute_dtype(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : x.to(dtype);
}

// The leading dimensions of several tensors of one shape as at most two, without a copy: rows = outer·inner.
struct RowGrid {
  int64_t outer = 1, inner = 1;
  std::vector<int64_t> outer_stride, inner_stride;  // one a tensor

  explicit RowGrid(const std::vector<Tensor>& tensors) : outer_stride(tensors.size()), inner_stride(tensors.size()) {
    int found = 0;
    for (int64_t d = tensors[0].dim() - 2; d >= 0; --d) {
      const int64_t size = tensors[0].size(d);
      if (size == 1) continue;
      if (found > 0 && continues(tensors, d, found == 1)) {
        (found == 1 ? inner : outer) *= size;
        continue;
      }
      TORCH_CHECK_VALUE(found < 2,
                        "student_logits and teacher_logits must have rows that two strides can reach; "
                        "got leading dimensions of ",
                        tensors[0].sizes(), " that need more: call .contiguous() first");
      (found == 0 ? inner : outer) = size;
      auto& strides = found == 0 ? inner_stride : outer_stride;
      for (size_t i = 0; i < tensors.size(); ++i) strides[i] = tensors[i].stride(d);
      ++found;
    }
  }

 private:
  // Whether dimension d of every tensor simply continues the dimensions already gathered on one side.
  bool continues(const std::vector<Tensor>& tensors, int64_t d, bool into_inner) const {
    const int64_t count = into_inner ? inner : outer;
    const auto& strides = into_inner ? inner_stride : outer_stride;
    for (size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].stride(d) != strides[i] * count) return false;
    return true;
  }
};

// Fresh memory costs a page fault for every 4 KB written, about a nanosecond a float: more than computing it. From 4 MB
// on, memory is fresh at every call (the allocator gives it back at once), and in pages of 2 MB 5 times cheaper.
inline void ask_for_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  if (x.nbytes() < (size_t{4} << 20)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr()), first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), begin + x.nbytes() - first, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
}

// The entry of that name in a table of named values.
template <typename Named, size_t kCount>
auto by_name(const Named (&table)[kCount], c10::string_view name, const char* argument) {
  for (const Named& entry : table)
    if (name == entry.name) return entry.value;
  TORCH_CHECK_VALUE(false, argument, " is not known to the fused kernels: '", name, "'");
}

constexpr int64_t kGrain = 16384;     // elements a thread should have before another is woken, some 5 µs of work
constexpr int64_t kRowGroup = 64;     // rows whose losses one thread sums (RowLosses): pieces are whole groups
constexpr int64_t kLeastPieces = 16;  // for each thread, that it take them one by one: few never end together

// Rows, or other units of work.
struct Units {
  int64_t count, elements;  // elements of each
  bool at_once = false;     // a thread takes all of its own
};

// Calls body(begin, end) on PyTorch's threads until all units are done. No two cores are equally fast, least of all
// those of a virtual machine: where there are many, a thread takes half of its share of what is left, again and again,
// so that all end together.
template <typename Body>
void share_out(const Units& units, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, units.elements));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units.count + grain - 1) / grain);
  const int64_t least = std::max(grain, kRowGroup);
  const bool at_once = units.at_once || threads == 1 || units.count < kLeastPieces * least * threads;
  if (at_once || at::in_parallel_region()) return at::parallel_for(0, units.count, grain, body);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next; begin < units.count;) {
      const int64_t piece = std::max(least, (units.count - begin) / (2 * threads));
      const int64_t end = std::min(units.count, begin + (piece + kRowGroup - 1) / kRowGroup * kRowGroup);
      if (!next.compare_exchange_weak(begin, end)) continue;
      body(begin, end);
      begin = next;
    }
  });
}

// Names a CUDA launcher of an op, in a build that has them.
#ifdef MTKD_CUDA
#define MTKD_CUDA_LAUNCHER(NAME) NAME
#else
#define MTKD_CUDA_LAUNCHER(NAME) nullptr
#endif

// MTKD_PASSES(m) { m.impl(...); } registers the passes of a file for the CPU and, in a build with CUDA, for it.
#ifdef MTKD_CUDA
#define MTKD_PASSES(m)                                           \
  static void register_passes(torch::Library& m);                \
  TORCH_LIBRARY_IMPL(mtkd_fast, CPU, m) { register_passes(m); }  \
  TORCH_LIBRARY_IMPL(mtkd_fast, CUDA, m) { register_passes(m); } \
  static void register_passes(torch::Library& m)
#else
#define MTKD_PASSES(m) TORCH_LIBRARY_IMPL(mtkd_fast, CPU, m)
#endif

// Runs a launcher of an op over its units: CPU threads, each of which calls afterwards(begin, end) for the rows it
// has done, or a CUDA stream.
template <typename Args, typename Cuda, typename Afterwards = void (*)(int64_t, int64_t)>
void run(
    const at::Device& device, const Args& args, const Units& units, void (*cpu)(const Args&, int64_t, int64_t),
    Cuda cuda, const Afterwards& afterwards = [](int64_t, int64_t) {}) {
  if (units.count == 0) return;
  if (device.is_cpu()) {
    share_out(units, [&](int64_t begin, int64_t end) {
      cpu(args, begin, end);
      afterwards(begin, end);
    });
    return;
  }
  if constexpr (std::is_invocable_v<Cuda, const Args&, int, void*>) {
    const c10::DeviceGuard guard(device);
    const c10::impl::VirtualGuardImpl backend(device.type());
    void* stream = backend.getStream(device).native_handle();
    const char* error = cuda(args, device.index(), stream);
    TORCH_CHECK(error == nullptr, "mtkd_fast CUDA kernel: ", error);
  } else {
    TORCH_CHECK_TYPE(false, "implementation='cpp' takes float32, bfloat16 and float16 on a GPU, got float64");
  }
}

}  // namespace mtkd_fast
