// The op `kd` on the CPU: kd_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu_capability.h"
#include "kd.h"

#define MTKD_ROWS "kd_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void kd_forward_cpu(const KDForward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(forward, args, begin, end);
}
void kd_forward_cpu(const KDForward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(forward, args, begin, end);
}
void kd_backward_cpu(const KDBackward<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(backward, args, begin, end);
}
void kd_backward_cpu(const KDBackward<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(backward, args, begin, end);
}
void kd_forward_columns_cpu(const KDForward<float>& args, int parts, const InParallel& in_parallel) {
  MTKD_IN_INSTRUCTION_SET(forward_columns, args, parts, in_parallel);
}
void kd_forward_columns_cpu(const KDForward<double>& args, int parts, const InParallel& in_parallel) {
  MTKD_IN_INSTRUCTION_SET(forward_columns, args, parts, in_parallel);
}
void kd_backward_columns_cpu(const KDBackward<float>& args, int parts, const InParallel& in_parallel) {
  MTKD_IN_INSTRUCTION_SET(backward_columns, args, parts, in_parallel);
}
void kd_backward_columns_cpu(const KDBackward<double>& args, int parts, const InParallel& in_parallel) {
  MTKD_IN_INSTRUCTION_SET(backward_columns, args, parts, in_parallel);
}
void kd_rescale_cpu(const KDRescale<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(rescale, args, begin, end);
}
void kd_rescale_cpu(const KDRescale<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(rescale, args, begin, end);
}

}  // namespace mtkd_fast
