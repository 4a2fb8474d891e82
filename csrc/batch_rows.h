// batch.h in one instruction set (see instruction_sets.h).

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"

using Labels = Integers<double>;  // a register of int64_t
constexpr int kLabels = kLanes<double>;

inline Labels load_labels(const int64_t* from) {
  Labels x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

inline bool some_label_is_wrong(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  Labels wrong{};  // of all: a test that may leave the loop takes three times as long
  int64_t n = 0;
  for (; n + kLabels <= rows; n += kLabels) {
    const Labels x = load_labels(labels + n);
    wrong |= (x != ignore_index) & ((x < 0) | (x >= classes));
  }
  bool found = any_of(wrong);
  for (; n < rows; ++n) found |= labels[n] != ignore_index && (labels[n] < 0 || labels[n] >= classes);
  return found;
}

inline int64_t count_labels(const int64_t* labels, int64_t rows, int64_t ignore_index) {
  Labels counts{};
  int64_t n = 0;
  for (; n + kLabels <= rows; n += kLabels) counts -= load_labels(labels + n) != ignore_index;
  int64_t count = 0;
  for (int i = 0; i < kLabels; ++i) count += counts[i];
  for (; n < rows; ++n) count += labels[n] != ignore_index;
  return count;
}

// In a few sums: a single one would wait for every addition.
template <typename T>
double sum_of_rows(const T* values, int64_t rows) {
  constexpr int kSums = 16;
  const int64_t whole = rows / kSums * kSums;
  double sums[kSums] = {}, sum = 0;
  for (int64_t n = 0; n < whole; n += kSums)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] += values[n + i];
  for (int64_t n = whole; n < rows; ++n) sum += values[n];
  for (const double part : sums) sum += part;
  return sum;
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
