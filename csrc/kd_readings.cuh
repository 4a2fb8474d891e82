// What is read next, where that goes on from one row to the next: of each row that counts the student and then its
// teachers, but for those that weigh nothing.
#pragma once

#include "kd_row.cuh"

namespace mtkd_fast {

struct Reading {
  int64_t row;
  int which;  // 0: the student; 1 + k: teacher k
};

// Of a row that counts.
MTKD_DEVICE bool is_wanted(const KDForward<float>& args, Reading reading) {
  if (reading.which == 0) return args.kd_scale != 0 || args.ce_weight != 0;
  const bool may_skip = args.rule == WeightRule::given && args.skip_zero_weights;
  return args.kd_scale != 0 && !(may_skip && given_weight(args, reading.which - 1, reading.row) == 0);
}

// The first wanted one from here on, every `step`-th row; none where its row is beyond the last one. Where `from` is
// not a row's student, something of the row was wanted before: it counts.
MTKD_DEVICE Reading wanted_from(const KDForward<float>& args, Reading from, int64_t step) {
  for (; from.row < args.rows; from = {from.row + step, 0}) {
    if (from.which == 0 && !read_row(args, nullptr, from.row).counts) continue;
    for (; from.which <= args.teachers; ++from.which) {
      if (is_wanted(args, from)) return from;
    }
  }
  return from;
}

MTKD_DEVICE const Logits& logits_of(const KDForward<float>& args, int which) {
  return which == 0 ? args.student : args.teacher[which - 1];
}

}  // namespace mtkd_fast
