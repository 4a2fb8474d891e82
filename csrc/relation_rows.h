// The op `relation` in one instruction set (see instruction_sets.h). B³ triples at some 20 operations, in float64.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"

// ‖x_i − x_j‖² from the Gram matrix; from the points themselves where that would lose more than half the digits.
inline double squared_distance(const Points& p, int64_t i, int64_t j) {
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

inline void distances(const Points& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < p.count; ++j) {
      const double squared = i == j ? 0.0 : squared_distance(p, i, j);
      p.inverse_distance[i * p.count + j] = squared > 0 ? 1 / std::sqrt(squared) : squared * 0;  // NaN stays NaN
    }
}

// One side of the triples (i, j, ·): c_ijk = (G_jk − G_ik + same)·r_ik·r_ij.
struct Edge {
  const double *gram_j, *gram_i, *inverse;
  double same, inverse_ij;  // G_ii − G_ij, r_ij

  Edge(const Angles& side, int64_t count, int64_t i, int64_t j)
      : gram_j(side.gram + j * count),
        gram_i(side.gram + i * count),
        inverse(side.inverse_distance + i * count),
        same(gram_i[i] - gram_i[j]),
        inverse_ij(inverse[j]) {}

  template <typename V>
  V cosine(V g_j, V g_i, V r) const {
    return (g_j - g_i + same) * (r * inverse_ij);
  }
};

template <typename V>
struct EdgeSums {
  V loss{}, vertex{}, cosine{};
};

// One register, or one number, of columns k.
template <typename V, typename Load, typename Store>
inline void add_triples(const Edge& s, const Edge& t, int64_t k, double* gram_gradient, EdgeSums<V>& sums, Load at,
                        Store put) {
  const V r = at(s.inverse + k), c = s.cosine(at(s.gram_j + k), at(s.gram_i + k), r);
  const V e = c - t.cosine(at(t.gram_j + k), at(t.gram_i + k), at(t.inverse + k));
  const V above = e > 1.0 ? V{} + 1.0 : e, h = above < -1.0 ? V{} - 1.0 : above;  // NaN stays NaN
  sums.loss += h * (e - 0.5 * h);
  sums.cosine += h * c;
  const V n = h * (r * s.inverse_ij);
  sums.vertex += n;
  if (gram_gradient) put(gram_gradient + k, at(gram_gradient + k) + n);
}

inline void angle(const RelationAngle& args, int64_t begin, int64_t end) {
  using V = Vec<double>;
  const int64_t count = args.count, whole = count / kLanes<double> * kLanes<double>;
  constexpr int64_t kColumns = 4;  // that share the rows i in cache
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t last = std::min(end, first + kColumns);
    for (int64_t j = first; j < last; ++j) {
      args.loss[j] = 0;
      if (args.gram_gradient) std::fill_n(args.gram_gradient + j * count, count, 0.0);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = first; j < last; ++j) {
        const Edge s(args.student, count, i, j), t(args.teacher, count, i, j);
        double* gradient = args.gram_gradient ? args.gram_gradient + j * count : nullptr;
        EdgeSums<V> sums;
        EdgeSums<double> rest;
        for (int64_t k = 0; k < whole; k += kLanes<double>)
          add_triples(
              s, t, k, gradient, sums, [](const double* p) { return load(p); }, [](double* p, V x) { store(p, x); });
        for (int64_t k = whole; k < count; ++k)
          add_triples(s, t, k, gradient, rest, [](const double* p) { return *p; }, [](double* p, double x) { *p = x; });
        args.loss[j] += sum_of<double>(sums.loss) + rest.loss;
        if (!gradient) continue;
        args.vertex[i * count + j] = sum_of<double>(sums.vertex) + rest.vertex;
        args.cosine[i * count + j] = sum_of<double>(sums.cosine) + rest.cosine;
      }
  }
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
