// The op `relation` on raw pointers. What its losses know of a batch are the squared distances D_ij = ‖x_i − x_j‖² and
// r_ij = 1/√(2·D_ij), 0 where points coincide. With the symmetric pull_ij = ∂L/∂D_ij of a pair, the gradient in x_i is
// 2·Σ_j pull_ij·(x_i − x_j), a product of matrices. Memory O(B²): neither the B×B×D differences nor the B×B×B angles
// exist. No sum depends on the order of threads.
#pragma once

#include <cstdint>

#include "kd.h"

namespace mtkd_fast {

constexpr int kRelationTile = 16;

// Rows and columns of a plane: B in whole tiles and registers. Beyond B all is 0 and adds nothing to any sum.
inline int64_t relation_pitch(int64_t count) { return (count + kRelationTile - 1) / kRelationTile * kRelationTile; }

// CPU: the points in double, in panels of 16, [pitch/16, D, 16]: a coordinate of 16 points side by side. Those beyond B
// and those that are left out are 0.
struct RelationPanels {
  int64_t count, width, pitch;
  Logits points;         // [B, D]
  const bool* left_out;  // [B] or null
  double* panels;
  double* poison;  // [pitch/16]: 0, or NaN where a point is not finite
};

// CPU: D from the differences of the coordinates, so that points may lie as close or as far from 0 as they like. The
// panels on one side of the diagonal are computed, in parts of as many: panels p and pitch/16 − 1 − p.
struct RelationSquares {
  int64_t width, pitch;
  const double* panels;
  double* squared;  // [pitch, pitch]

  int64_t parts() const { return (pitch / kRelationTile + 1) / 2; }
};

// Planes of one side, [planes, pitch, pitch]. CPU: D, which is there already, and r in double. CUDA: D rounded to
// float, the rest of D that this left out, and r, in float; for points of mean square 1, so that neither overflows.
struct RelationPlanes {
  int64_t count, width, pitch;
  const double* x;        // [B, D], centred; CUDA only
  const double* gram;     // [B, B]; CUDA only
  const double* nearest;  // [1], of `distances`: a smaller D counts as this one
  void* planes;
  double* distances;  // [B], Σ_j √D_ij
};

// Angles: c the cosine at a corner of a triangle. B³/2·L = Σ_{i<j} Σ_k Huber(c^S_k − c^T_k), k the corner between i and
// j, and a term for each pair that coincides on one side alone, whose cosine with itself is 1 on the other.
struct RelationAngle {
  int64_t count, pitch;
  const void *student, *teacher;  // planes
  double* loss;                   // [relation_angle_parts], its sum is B³/2·L
  double* pull;                   // [B, B], of B³/2·L; or null: no gradient
};

// Distances over their mean μ: B²·L = Σ_ij h·(e − h/2) with e = d^S/μ^S − d^T/μ^T and h = clip(e, ±1). Two passes,
// since every distance moves the mean: loss, and weighted[i] = Σ_j h·d^S; then, given drag = Σ_i weighted[i]/(M·μ^S)
// with M = B·(B − 1), pull[i, j] = (h − drag)/d^S, of B²·μ^S·L, and 0 where D^S is below nearest. Pairs whose D^S is −1
// are left out; B and M are then those of the samples that count.
struct RelationDistance {
  int64_t count, pitch;
  const void *student, *teacher;                                                         // planes
  const double *student_nearest, *teacher_nearest, *student_mean, *teacher_mean, *drag;  // [1] each
  double *loss, *weighted;                                                               // [B] each, or
  double* pull;                                                                          // [B, B]
};

// CPU: gradient_i = Σ_j factors_ij·(x_j − x_0) in float, of factors whose rows sum to 0, so that any point may stand
// for x_0: it spares digits. Rows that are left out are 0.
struct RelationGradient {
  int64_t count, width;
  Logits points;          // [B, D]
  const bool* left_out;   // [B] or null
  const double* factors;  // [B, B]
  float* gradient;        // [B, D]

  int64_t parts() const { return (width + kRelationTile - 1) / kRelationTile; }  // columns, 16 at a time
};

// How the sum of RelationAngle::loss is split: CPU threads take rows i and B − 1 − i together, blocks of a grid tiles.
constexpr int kRelationTileColumns = 8;
inline int64_t relation_angle_parts(int64_t count, bool on_cpu) {
  const int64_t pitch = relation_pitch(count);
  return on_cpu ? (count + 1) / 2 : pitch / kRelationTile * (pitch / kRelationTileColumns);
}

void relation_panels_cpu(const RelationPanels&, int64_t begin, int64_t end);      // panels
void relation_squares_cpu(const RelationSquares&, int64_t begin, int64_t end);    // parts
void relation_gradient_cpu(const RelationGradient&, int64_t begin, int64_t end);  // parts
void relation_planes_cpu(const RelationPlanes&, int64_t begin, int64_t end);      // rows of the planes
void relation_angle_cpu(const RelationAngle&, int64_t begin, int64_t end);        // parts
void relation_distance_cpu(const RelationDistance&, int64_t begin, int64_t end);  // rows
const char* relation_planes_cuda(const RelationPlanes&, int device, void* stream);
const char* relation_angle_cuda(const RelationAngle&, int device, void* stream);
const char* relation_distance_cuda(const RelationDistance&, int device, void* stream);

}  // namespace mtkd_fast
