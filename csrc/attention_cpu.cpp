// The distance "attention" on the CPU: attention_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "cpu_capability.h"
#include "distances.h"

#define MTKD_ROWS "attention_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void attention_energy_cpu(const AttentionMaps<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_energy, args, begin, end);
}
void attention_energy_cpu(const AttentionMaps<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_energy, args, begin, end);
}
void attention_distance_cpu(const AttentionPairs<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_distance, args, begin, end);
}
void attention_distance_cpu(const AttentionPairs<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_distance, args, begin, end);
}
void attention_gradient_cpu(const AttentionMaps<float>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_gradient, args, begin, end);
}
void attention_gradient_cpu(const AttentionMaps<double>& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(attention_gradient, args, begin, end);
}

}  // namespace mtkd_fast
