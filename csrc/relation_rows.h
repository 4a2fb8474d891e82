// The op `relation` in one instruction set (see instruction_sets.h), in double. B³/2 triangles at 32 operations and 8
// loads, of rows that a core has in its caches; without a gradient 12 and 6.

namespace mtkd_fast {
namespace MTKD_ISA {

#include "vec.h"
//
#include "halves.h"
//
#include "tile.h"

using Doubles = Vec<double>;
constexpr int kL = kLanes<double>;
constexpr int kPanelRegisters = kRelationTile / kL;

inline Doubles square_root(Doubles x) {
#if MTKD_VEC_BYTES == 64
  return _mm512_sqrt_pd(x);
#elif MTKD_VEC_BYTES == 32
  return _mm256_sqrt_pd(x);
#else
  for (int i = 0; i < kL; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// ------------------------------------------------------------------------------------------------------------
// distances

// A panel, a square of numbers at a time.
inline void panel(const RelationPanels& args, int64_t p) {
  constexpr int kColumns = 64;
  alignas(64) double rows[kRelationTile][kColumns] = {};
  double* to = args.panels + p * args.width * kRelationTile;
  Doubles poison{};
  for (int64_t begin = 0; begin < args.width; begin += kColumns) {
    const int count = static_cast<int>(std::min<int64_t>(kColumns, args.width - begin));
    const double* row[kRelationTile];
    for (int r = 0; r < kRelationTile; ++r) {
      const int64_t i = p * kRelationTile + r;
      const bool reads = i < args.count && !(args.left_out && args.left_out[i]);
      row[r] = reads ? read_tile(args.points, i * args.points.inner_stride, begin, count, rows[r]) : rows[r];
    }
    for (int c = 0; c < count; c += kL) {
      const int here = std::min(kL, count - c);
      for (int r = 0; r < kRelationTile; r += kL) {
        Doubles square[kL];
        for (int u = 0; u < kL; ++u) {
          square[u] = load_part(row[r + u] + c, here);
          poison += square[u] * 0.0;
        }
        transpose<double>(square);
        for (int u = 0; u < here; ++u) store(to + (begin + c + u) * kRelationTile + r, square[u]);
      }
    }
  }
  args.poison[p] = sum_of<double>(poison);
}

inline void panels(const RelationPanels& args, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) panel(args, p);
}

// D of all pairs of two panels: as many of its rows at a time as registers hold, 2 operations a coordinate and pair.
inline void squares_of_panels(const double* a, const double* b, int64_t width,
                              double (&out)[kRelationTile][kRelationTile]) {
  constexpr int kRows = MTKD_VEC_BYTES == 64 ? 8 : MTKD_VEC_BYTES == 32 ? 2 : 1;
  for (int row = 0; row < kRelationTile; row += kRows) {
    Doubles sums[kRows][kPanelRegisters] = {};
    for (int64_t d = 0; d < width; ++d) {
      const double *x = a + d * kRelationTile + row, *y = b + d * kRelationTile;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kPanelRegisters; ++c) {
          const Doubles difference = x[r] - load(y + c * kL);
          sums[r][c] += difference * difference;
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kPanelRegisters; ++c) store(&out[row + r][c * kL], sums[r][c]);
  }
}

inline void squares_of_row(const RelationSquares& args, int64_t i) {
  alignas(64) double tile[kRelationTile][kRelationTile];
  const int64_t panel = args.width * kRelationTile;
  for (int64_t j = i; j < args.pitch / kRelationTile; ++j) {
    squares_of_panels(args.panels + i * panel, args.panels + j * panel, args.width, tile);
    double* here = args.squared + (i * args.pitch + j) * kRelationTile;
    double* mirrored = args.squared + (j * args.pitch + i) * kRelationTile;
    for (int r = 0; r < kRelationTile; ++r) {
      for (int c = 0; c < kRelationTile; ++c) {
        here[r * args.pitch + c] = tile[r][c];
        mirrored[r * args.pitch + c] = tile[c][r];
      }
    }
  }
}

inline void squares(const RelationSquares& args, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const int64_t other = args.pitch / kRelationTile - 1 - part;
    squares_of_row(args, part);
    if (other > part) squares_of_row(args, other);
  }
}

// A mask of the columns from j on that are pairs of sample i.
inline Integers<double> pairs_of(int64_t i, int64_t j, int64_t count) {
  Integers<double> column{};
  for (int u = 0; u < kL; ++u) column[u] = u;
  column += j;
  return column < count && column != i;
}

inline Doubles distance_of(Doubles squared, double nearest) {  // NaN stays NaN
  return square_root(squared < nearest ? Doubles{} + nearest : squared);
}

// Row by row: what is no pair becomes 0, and r and the sums of the distances are made.
inline void planes(const RelationPlanes& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double* squared = static_cast<double*>(args.planes) + i * args.pitch;
    double* inverse = squared + args.pitch * args.pitch;
    Doubles sum{};
    for (int64_t j = 0; j < args.pitch; j += kL) {
      const auto pair = pairs_of(i, j, i < args.count ? args.count : 0);
      const Doubles d = pair ? load(squared + j) : Doubles{};
      store(squared + j, d);
      store(inverse + j, d > 0.0 ? square_root(0.5 / d) : d);  // 0 stays 0, NaN stays NaN
      sum += pair ? distance_of(d, *args.nearest) : Doubles{};
    }
    if (i < args.count) args.distances[i] = sum_of<double>(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// angles

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

// -------------------------------------------------------------------------------------------------------- distance
// loss

inline void distance(const RelationDistance& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double* student = static_cast<const double*>(args.student) + i * args.pitch;
    const double* teacher = static_cast<const double*>(args.teacher) + i * args.pitch;
    Doubles loss{}, weighted{};
    for (int64_t j = 0; j < args.count; j += kL) {
      const Doubles squared = load(student + j);
      const auto pair = pairs_of(i, j, args.count) && !(squared < 0.0);
      const Doubles d = distance_of(squared, *args.student_nearest);
      const Doubles d_t = distance_of(load(teacher + j), *args.teacher_nearest);
      const Doubles e = d / *args.student_mean - d_t / *args.teacher_mean, h = clipped(e);
      if (args.pull) {
        const Doubles pull = pair && !(squared < *args.student_nearest) ? (h - *args.drag) / d : Doubles{};
        store_part(args.pull + i * args.count + j, pull, static_cast<int>(std::min<int64_t>(kL, args.count - j)));
      } else {
        loss += pair ? h * (e - 0.5 * h) : Doubles{};
        weighted += pair ? h * d : Doubles{};
      }
    }
    if (args.pull) continue;
    args.loss[i] = sum_of<double>(loss);
    args.weighted[i] = sum_of<double>(weighted);
  }
}

// -------------------------------------------------------------------------------------------------------------
// gradient

// As many rows of a product at a time as registers hold.
constexpr int kProductRows = MTKD_VEC_BYTES == 64 ? 8 : MTKD_VEC_BYTES == 32 ? 2 : 1;

// Rows [i, i + kProductRows) of factors·x, x [count, 16]; rows past the last one are copies of it.
inline void product(const RelationGradient& args, int64_t i, const double* x,
                    double (&out)[kProductRows][kRelationTile]) {
  const double* row[kProductRows];
  for (int r = 0; r < kProductRows; ++r) row[r] = args.factors + std::min(i + r, args.count - 1) * args.count;
  Doubles sums[kProductRows][kPanelRegisters] = {};
  for (int64_t j = 0; j < args.count; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kPanelRegisters; ++c) sums[r][c] += row[r][j] * load(x + j * kRelationTile + c * kL);
    }
  }
  for (int r = 0; r < kProductRows; ++r)
    for (int c = 0; c < kPanelRegisters; ++c) store(&out[r][c * kL], sums[r][c]);
}

// x_j − x_0 of 16 columns, x_0 the first point that counts; 0 in points that are left out.
inline void pack_columns(const RelationGradient& args, int64_t begin, int count, double* x) {
  alignas(64) double tile[kRelationTile] = {}, origin[kRelationTile] = {};
  bool first = true;
  for (int64_t j = 0; j < args.count; ++j, x += kRelationTile) {
    std::fill_n(x, kRelationTile, 0.0);
    if (args.left_out && args.left_out[j]) continue;
    const double* from = read_tile(args.points, j * args.points.inner_stride, begin, count, tile);
    if (first) std::copy_n(from, count, origin);
    first = false;
    for (int c = 0; c < count; ++c) x[c] = from[c] - origin[c];
  }
}

inline void gradient(const RelationGradient& args, int64_t begin, int64_t end) {
  struct Free {
    void operator()(double* p) const { std::free(p); }
  };
  const size_t bytes = args.count * kRelationTile * sizeof(double);
  const std::unique_ptr<double, Free> x(static_cast<double*>(std::aligned_alloc(64, bytes)));
  if (!x) throw std::bad_alloc();
  for (int64_t part = begin; part < end; ++part) {
    const int64_t column = part * kRelationTile;
    const int columns = static_cast<int>(std::min<int64_t>(kRelationTile, args.width - column));
    pack_columns(args, column, columns, x.get());
    for (int64_t i = 0; i < args.count; i += kProductRows) {
      alignas(64) double out[kProductRows][kRelationTile];
      product(args, i, x.get(), out);
      for (int r = 0; r < kProductRows && i + r < args.count; ++r) {
        const bool zero = args.left_out && args.left_out[i + r];  // NaN of another is none
        float* to = args.gradient + (i + r) * args.width + column;
        for (int c = 0; c < columns; ++c) to[c] = zero ? 0.0f : static_cast<float>(out[r][c]);
      }
    }
  }
}

}  // namespace MTKD_ISA
}  // namespace mtkd_fast
