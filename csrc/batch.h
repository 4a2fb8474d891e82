// What a batch of rows comes down to on the CPU: labels checked and rows counted, for which the whole call waits in one
// thread, and losses summed.
#pragma once

#include <cstdint>

namespace mtkd_fast {

// Whether a label other than ignore_index lies outside [0, classes).
bool some_label_is_wrong_cpu(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index);

int64_t count_labels_cpu(const int64_t* labels, int64_t rows, int64_t ignore_index);  // those that are not ignored

// In float64, in an order that is the same whatever the number of threads and the instruction set.
double sum_of_rows_cpu(const float* values, int64_t rows);
double sum_of_rows_cpu(const double* values, int64_t rows);

}  // namespace mtkd_fast
