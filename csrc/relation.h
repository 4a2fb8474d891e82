// The op `relation` on raw pointers: angles between all triples of B points, through two Gram matrices in float64.
// Memory O(B²): neither the B×B×D differences nor the B×B×B angles exist.
#pragma once

#include <cstdint>

namespace mtkd_fast {

// Of one side: points x [B, D], centred, and their Gram matrix G [B, B].
struct Points {
  int64_t count, width;
  const double* x;
  const double* gram;
  double* inverse_distance;  // [B, B], 1/‖x_i − x_j‖; 0 where the points coincide
};

// One side of the angles.
struct Angles {
  const double* gram;
  const double* inverse_distance;
};

// c_ijk = (G_jk − G_ij − G_ik + G_ii)·r_ij·r_ik, the cosine at vertex i; L = Σ Huber(c^S − c^T)/B³.
// With h = clip(c^S − c^T, ±1)/B³, of the gradient in the student's Gram matrix:
//   gram_gradient[j, k] = Σ_i h_ijk r_ij r_ik,   vertex[i, j] = Σ_k h_ijk r_ij r_ik,   cosine[i, j] = Σ_k h_ijk c_ijk
struct RelationAngle {
  int64_t count;
  Angles student, teacher;
  double* loss;  // [B], its sum over j is L
  double* gram_gradient;
  double* vertex;  // [B, B] each, or all three null: no gradient
  double* cosine;
};

void relation_distances_cpu(const Points&, int64_t begin, int64_t end);     // rows i
void relation_angle_cpu(const RelationAngle&, int64_t begin, int64_t end);  // columns j: each writes what is its own

}  // namespace mtkd_fast
