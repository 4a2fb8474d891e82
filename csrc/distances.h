// The distances of a pair of features f and g, by name. distance_sums.h says what they are, kernels/distances.py is the
// Triton twin.
#pragma once

#include <cmath>

#include "row_stats.h"

namespace mtkd_fast {

enum class Distance : int { mse = 0, smooth_l1 = 1, cosine = 2 };

struct NamedDistance {
  const char* name;
  Distance value;
};
constexpr NamedDistance kDistances[] = {
    {"mse", Distance::mse}, {"smooth_l1", Distance::smooth_l1}, {"cosine", Distance::cosine}};

// What is kept of a pair and a sample: the distance, and for the cosine ‖f‖ and ‖g‖.
constexpr int kept_numbers(Distance distance) { return distance == Distance::cosine ? 3 : 1; }

MTKD_HD float sqrt_of(float x) { return sqrtf(x); }
MTKD_HD double sqrt_of(double x) { return sqrt(x); }

// Calls body with the distance as a type whose ::value is a constant.
template <Distance kDistance>
struct DistanceConstant {
  static constexpr Distance value = kDistance;
};
template <typename Body>
auto with_distance(Distance distance, Body body) {
  switch (distance) {
    case Distance::smooth_l1:
      return body(DistanceConstant<Distance::smooth_l1>());
    case Distance::cosine:
      return body(DistanceConstant<Distance::cosine>());
    default:
      return body(DistanceConstant<Distance::mse>());
  }
}

}  // namespace mtkd_fast
