// The instruction set that the CPU kernels run in: the best this processor has, unless a test asks for a lesser one.
#pragma once

namespace mtkd_fast {

enum class CPUCapability : int { baseline = 0, avx2 = 1, avx512 = 2 };

constexpr const char* kCapabilityNames[] = {"baseline", "avx2", "avx512"};

CPUCapability best_cpu_capability();
CPUCapability cpu_capability();
void set_cpu_capability(CPUCapability);  // at most the best; for tests

}  // namespace mtkd_fast

// Calls FUNCTION of the namespace of the instruction set in use.
#if defined(__x86_64__)
#define MTKD_IN_INSTRUCTION_SET(FUNCTION, ...) \
  switch (cpu_capability()) {                  \
    case CPUCapability::avx512:                \
      return avx512::FUNCTION(__VA_ARGS__);    \
    case CPUCapability::avx2:                  \
      return avx2::FUNCTION(__VA_ARGS__);      \
    case CPUCapability::baseline:              \
      return baseline::FUNCTION(__VA_ARGS__);  \
  }
#else
#define MTKD_IN_INSTRUCTION_SET(FUNCTION, ...) return baseline::FUNCTION(__VA_ARGS__)
#endif
