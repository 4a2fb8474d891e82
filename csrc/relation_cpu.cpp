// The op `relation` on the CPU: relation_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu_capability.h"
#include "relation.h"
#include "row_stats.h"

#define MTKD_ROWS "relation_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

void relation_panels_cpu(const RelationPanels& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(panels, args, begin, end);
}
void relation_squares_cpu(const RelationSquares& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(squares, args, begin, end);
}
void relation_gradient_cpu(const RelationGradient& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(gradient, args, begin, end);
}
void relation_planes_cpu(const RelationPlanes& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(planes, args, begin, end);
}
void relation_angle_cpu(const RelationAngle& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(angle, args, begin, end);
}
void relation_distance_cpu(const RelationDistance& args, int64_t begin, int64_t end) {
  MTKD_IN_INSTRUCTION_SET(distance, args, begin, end);
}

}  // namespace mtkd_fast
