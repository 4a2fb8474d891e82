#include "cpu_capability.h"

#include <atomic>

namespace mtkd_fast {

CPUCapability best_cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CPUCapability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return CPUCapability::avx2;
#endif
  return CPUCapability::baseline;
}

static std::atomic<CPUCapability>& in_use() {
  static std::atomic<CPUCapability> capability{best_cpu_capability()};
  return capability;
}

CPUCapability cpu_capability() { return in_use().load(std::memory_order_relaxed); }

void set_cpu_capability(CPUCapability capability) { in_use().store(capability, std::memory_order_relaxed); }

}  // namespace mtkd_fast
