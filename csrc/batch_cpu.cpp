// batch.h: batch_rows.h, compiled per instruction set.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "batch.h"
#include "cpu_capability.h"

#define MTKD_ROWS "batch_rows.h"
#include "instruction_sets.h"

namespace mtkd_fast {

bool some_label_is_wrong_cpu(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  MTKD_IN_INSTRUCTION_SET(some_label_is_wrong, labels, rows, classes, ignore_index);
  __builtin_unreachable();
}
int64_t count_labels_cpu(const int64_t* labels, int64_t rows, int64_t ignore_index) {
  MTKD_IN_INSTRUCTION_SET(count_labels, labels, rows, ignore_index);
  __builtin_unreachable();
}
double sum_of_rows_cpu(const float* values, int64_t rows) {
  MTKD_IN_INSTRUCTION_SET(sum_of_rows, values, rows);
  __builtin_unreachable();
}
double sum_of_rows_cpu(const double* values, int64_t rows) {
  MTKD_IN_INSTRUCTION_SET(sum_of_rows, values, rows);
  __builtin_unreachable();
}

}  // namespace mtkd_fast
