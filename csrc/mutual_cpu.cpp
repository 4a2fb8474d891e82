// The op `mutual` on the CPU: mutual_rows.h, compiled per instruction set.
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

#include "cpu_capability.h"
#include "mutual.h"

#define MTKD_ROWS "mutual_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void mutual_forward_cpu(const MutualForward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mutual_forward, args, begin, end);
}
void mutual_forward_cpu(const MutualForward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mutual_forward, args, begin, end);
}
void mutual_backward_cpu(const MutualBackward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mutual_backward, args, begin, end);
}
void mutual_backward_cpu(const MutualBackward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(mutual_backward, args, begin, end);
}

}  // namespace mtkd_fast
