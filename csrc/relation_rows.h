// The op `relation` in one instruction set (see instruction_sets.h), in double. B³/2 triangles at 32 operations and 8
// loads, of rows that a core has in its caches; without a gradient 12 and 6.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"

// ‖x_i − x_j‖² from the Gram matrix; from the points themselves where that would lose more than half the digits.
inline double squared_distance(const RelationPlanes& p, int64_t i, int64_t j) {
  const double* g = p.gram;
  const double both = g[i * p.count + i] + g[j * p.count + j], squared = both - 2 * g[i * p.count + j];
  if (squared > 1e-8 * both) return squared;
  double sum = 0;
  for (int64_t d = 0; d < p.width; ++d) {
    const double difference = p.x[i * p.width + d] - p.x[j * p.width + d];
    sum += difference * difference;
  }
  return sum;
}

inline double distance_of(double squared, double nearest) { return std::sqrt(squared < nearest ? nearest : squared); }

inline void planes(const RelationPlanes& args, int64_t begin, int64_t end) {
  const int64_t plane = args.pitch * args.pitch;
  for (int64_t i = begin; i < end; ++i) {
    double* squared = static_cast<double*>(args.planes) + i * args.pitch;
    double* inverse = squared + plane;
    std::fill_n(squared, args.pitch, 0.0);
    std::fill_n(inverse, args.pitch, 0.0);
    if (i >= args.count) continue;
    double sum = 0;
    for (int64_t j = 0; j < args.count; ++j) {
      if (j == i) continue;
      squared[j] = squared_distance(args, i, j);
      inverse[j] = squared[j] > 0 ? std::sqrt(0.5 / squared[j]) : squared[j];  // 0 stays 0, NaN stays NaN
      sum += distance_of(squared[j], *args.nearest);
    }
    args.distances[i] = sum;
  }
}

// One side of the triangles on the pair (i, j).
struct Edge {
  const double *squared_i, *squared_j, *inverse_i, *inverse_j;  // rows i and j
  double squared, inverse;                                      // of the pair

  Edge(const void* planes, int64_t pitch, int64_t i, int64_t j)
      : squared_i(static_cast<const double*>(planes) + i * pitch),
        squared_j(static_cast<const double*>(planes) + j * pitch),
        inverse_i(squared_i + pitch * pitch),
        inverse_j(squared_j + pitch * pitch),
        squared(squared_i[j]),
        inverse(inverse_i[j]) {}

  double apart() const { return inverse > 0 ? 1 : inverse; }  // cosine of a corner with itself; NaN stays NaN
};

// A register of third points k: the cosines at the corners i, j and k, and r·r of the two sides that meet there.
struct Triangles {
  Vec<double> c_i, c_j, c_k, q_i, q_j, q_k;

  Triangles(const Edge& edge, int64_t k) {
    const Vec<double> a = load(edge.squared_i + k), b = load(edge.squared_j + k);
    const Vec<double> r_a = load(edge.inverse_i + k), r_b = load(edge.inverse_j + k), difference = a - b;
    q_i = edge.inverse * r_a, q_j = edge.inverse * r_b, q_k = r_a * r_b;
    c_i = (edge.squared + difference) * q_i;
    c_j = (edge.squared - difference) * q_j;
    c_k = (a + b - edge.squared) * q_k;
  }
};

// Huber′; NaN stays NaN.
template <typename V>
inline V clipped(V e) {
  const V above = e > 1.0 ? V{} + 1.0 : e;
  return above < -1.0 ? V{} - 1.0 : above;
}

// One pair: its part of the loss, and P.
template <bool kPull>
inline double angles(const Edge& s, const Edge& t, int64_t pitch, double* pull_ij) {
  Vec<double> loss{}, pull{};
  for (int64_t k = 0; k < pitch; k += kLanes<double>) {
    const Triangles x(s, k), y(t, k);
    const Vec<double> e_k = x.c_k - y.c_k, h_k = clipped(e_k);
    loss += h_k * (e_k - 0.5 * h_k);
    if constexpr (kPull) {
      const Vec<double> h_i = clipped(x.c_i - y.c_i), h_j = clipped(x.c_j - y.c_j);
      const double own = s.inverse * s.inverse;
      pull += h_i * (x.q_i - x.c_i * own) + h_j * (x.q_j - x.c_j * own) - h_k * x.q_k;
    }
  }
  if constexpr (kPull) *pull_ij = sum_of<double>(pull);
  const double e = s.apart() - t.apart();
  return sum_of<double>(loss) + 0.5 * e * e;
}

inline double angles_of_row(const RelationAngle& args, int64_t i) {
  double loss = 0;
  if (args.pull) args.pull[i * args.count + i] = 0;
  for (int64_t j = i + 1; j < args.count; ++j) {
    const Edge s(args.student, args.pitch, i, j), t(args.teacher, args.pitch, i, j);
    if (!args.pull) {
      loss += angles<false>(s, t, args.pitch, nullptr);
      continue;
    }
    double* pull = args.pull + i * args.count + j;
    loss += angles<true>(s, t, args.pitch, pull);
    args.pull[j * args.count + i] = *pull;
  }
  return loss;
}

inline void angle(const RelationAngle& args, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const int64_t other = args.count - 1 - part;
    args.loss[part] = angles_of_row(args, part) + (other > part ? angles_of_row(args, other) : 0);
  }
}

inline void distance(const RelationDistance& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double* student = static_cast<const double*>(args.student) + i * args.pitch;
    const double* teacher = static_cast<const double*>(args.teacher) + i * args.pitch;
    double loss = 0, weighted = 0;
    if (args.pull) args.pull[i * args.count + i] = 0;
    for (int64_t j = 0; j < args.count; ++j) {
      if (student[j] < 0 && args.pull) args.pull[i * args.count + j] = 0;
      if (j == i || student[j] < 0) continue;
      const double d = distance_of(student[j], *args.student_nearest);
      const double d_t = distance_of(teacher[j], *args.teacher_nearest);
      const double e = d / *args.student_mean - d_t / *args.teacher_mean, h = clipped(e);
      loss += h * (e - 0.5 * h);
      weighted += h * d;
      if (args.pull) args.pull[i * args.count + j] = student[j] < *args.student_nearest ? 0 : (h - *args.drag) / d;
    }
    if (args.pull) continue;
    args.loss[i] = loss;
    args.weighted[i] = weighted;
  }
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
