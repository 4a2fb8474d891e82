// What is read next, where that goes on from one row to the next: of each row that counts the student and then its
// teachers, but for those that weigh nothing.
#pragma once

#include "kd_row.cuh"

namespace mtkd_fast {

struct Reading {
  int64_t row;
  int which;  // 0: the student; 1 + k: teacher k
};

MTKD_DEVICE bool is_wanted(const KDForward<float>& args, const Row& row, int which) {
  return which == 0 ? reads_student(args, row) : reads_teacher(args, row, known_weight(args, which - 1, row));
}

// The first wanted one from here on, every `step`-th row; none where its row is beyond the last one.
MTKD_DEVICE Reading wanted_from(const KDForward<float>& args, Reading from, int64_t step) {
  while (from.row < args.rows) {
    const Row row = read_row(args, nullptr, from.row);
    for (; from.which <= args.teachers; ++from.which) {
      if (is_wanted(args, row, from.which)) return from;
    }
    from = {from.row + step, 0};
  }
  return from;
}

MTKD_DEVICE const Logits& logits_of(const KDForward<float>& args, int which) {
  return which == 0 ? args.student : args.teacher[which - 1];
}

}  // namespace mtkd_fast
