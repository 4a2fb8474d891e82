// DKD (dkd.h): the states are those of the other classes, and this brings the target back, from its own logit `label`.
#pragma once

#include "kd_formulas.cuh"

namespace mtkd_fast {

MTKD_DEVICE float odds_at_one(float label, float max, float sum1) { return log_odds(label, max, log_of(sum1), 1.0f); }

MTKD_DEVICE float cross_entropy_apart(float label, float max, float sum1) {
  return -log_sigmoid(odds_at_one(label, max, sum1));
}

MTKD_DEVICE float entropy_apart(float label, const TeacherState& t) {
  return entropy_with_target(odds_at_one(label, t.max, t.sum1), t.sum1, entropy(t.sum1, t.dot1));
}

// mean(−log q) at temperature 1.
MTKD_DEVICE float uniform_cross_entropy_apart(float label, const SoftmaxState<float>& s, int64_t classes) {
  const float total = s.total + (label - offset_of(s.max));
  return log_sum_with_target(odds_at_one(label, s.max, s.sum1), label, s.max, s.sum1) - total / classes;
}

}  // namespace mtkd_fast
