// The op `mixture` on the CPU: mixture_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu_capability.h"
#include "mixture.h"

#define MTKD_ROWS "mixture_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void mixture_forward_cpu(const MixtureForward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_forward, args, begin, end);
}
void mixture_forward_cpu(const MixtureForward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_forward, args, begin, end);
}
void mixture_backward_cpu(const MixtureBackward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_backward, args, begin, end);
}
void mixture_backward_cpu(const MixtureBackward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_backward, args, begin, end);
}
void mixture_divergence_cpu(const MixtureDivergence<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_divergence, args, begin, end);
}
void mixture_divergence_cpu(const MixtureDivergence<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mixture_divergence, args, begin, end);
}

}  // namespace mtkd_fast
