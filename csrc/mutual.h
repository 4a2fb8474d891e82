// The op `mutual` on raw pointers: M students that teach each other, every pair in one read of the M rows.
//
//   D_ij = KL(p_j ‖ p_i), p = softmax(z/τ): what student i has to learn from peer j
//   row_loss = row_weight·scale·Σ_{i≠j} a_ij D_ij
// A pair of weight 0 has no term, a student without a pair is not read.
#pragma once

#include <cstdint>

#include "kd.h"

namespace mtkd_fast {

// acc_t: float, or double when any logits are float64.
template <typename acc_t>
struct MutualArgs {
  int64_t rows, inner, classes;  // inner >= 1
  int students;                  // 2 .. kMaxTeachers
  Logits student[kMaxTeachers];
  void* gradient[kMaxTeachers];  // [rows, classes] contiguous, each in its student's dtype; null where not wanted
  const acc_t* pair_weights;     // [M, M], a_ij at i·M + j, the diagonal is not read; or null for 1/(M − 1)
  acc_t temperature, scale;
  bool detach_peers;  // the gradient of D_ij in z_j is left out
};

// One number per row, all in one [M² + 2M + 1, rows] buffer of acc_t; element (i, row) at i·rows + row. A row that does
// not count, a pair of weight 0 and a student that is not read have zeros.
struct MutualStats {
  int students;
  MTKD_HD int divergence(int i, int j) const { return i * students + j; }
  MTKD_HD int max(int i) const { return students * students + i; }
  MTKD_HD int sum(int i) const { return students * students + students + i; }  // Σ e^{(z−max)/τ}
  MTKD_HD int scale() const { return students * students + 2 * students; }     // row weight / items
  MTKD_HD int size() const { return students * students + 2 * students + 1; }
};

// Forward: row_loss, not divided by items. The gradients, where asked for, are those of Σ_rows row_loss/items.
template <typename acc_t>
struct MutualForward : MutualArgs<acc_t> {
  const acc_t* row_weights;  // [rows] or null: 0 means that the row is neither read nor counted
  const acc_t* items;        // one number on the device, or null for 1
  acc_t* row_loss;           // [rows]
  acc_t* row_stats;
  bool keep_stats;  // false: of row_stats only the scale is read later
};

// Backward, where the forward wrote no gradients: with f = scale of the row·upstream·scale/τ and E_i = Σ_j a_ji D_ji,
//   student i: f·(Σ_j a_ij (p_i − p_j) + p_i ⊙ (Σ_j a_ji (log p_i − log p_j) − E_i)), the last only for peers that
//   learn
template <typename acc_t>
struct MutualBackward : MutualArgs<acc_t> {
  const acc_t* upstream;  // element row at row·upstream_stride (0: one number), or null for 1
  int64_t upstream_stride;
  const acc_t* row_stats;
};

// CPU: rows [begin, end).
void mutual_forward_cpu(const MutualForward<float>&, int64_t begin, int64_t end);
void mutual_forward_cpu(const MutualForward<double>&, int64_t begin, int64_t end);
void mutual_backward_cpu(const MutualBackward<float>&, int64_t begin, int64_t end);
void mutual_backward_cpu(const MutualBackward<double>&, int64_t begin, int64_t end);

// CUDA, float accumulation: every row, on `stream` (a cudaStream_t). Null, or what went wrong.
bool mutual_fits_on_chip(const MutualArgs<float>&);
const char* mutual_forward_cuda(const MutualForward<float>&, int device, void* stream);
const char* mutual_backward_cuda(const MutualBackward<float>&, int device, void* stream);

}  // namespace mtkd_fast
