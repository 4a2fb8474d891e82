// The op `hint` on the CPU: hint_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>

#include "cpu_capability.h"
#include "hint.h"

#define MTKD_ROWS "hint_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void hint_forward_cpu(const HintArgs<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_forward, args, begin, end);
}
void hint_forward_cpu(const HintArgs<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_forward, args, begin, end);
}
void hint_backward_cpu(const HintArgs<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_backward, args, begin, end);
}
void hint_backward_cpu(const HintArgs<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_backward, args, begin, end);
}
void hint_fused_cpu(const HintFused<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_fused, args, begin, end);
}
void hint_fused_cpu(const HintFused<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(hint_fused, args, begin, end);
}

}  // namespace mtkd_fast
