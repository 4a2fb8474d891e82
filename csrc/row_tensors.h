// What the ops on rows of logits share, as tensors: gradients, numbers of a row, the reduction of the loss.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "batch.h"
#include "tensors.h"

namespace mtkd_fast {

inline Logits logits(const Tensor& x, const RowGrid& grid, size_t i) {
  return {x.const_data_ptr(), grid.outer_stride[i], grid.inner_stride[i], x.stride(-1), dtype_of(x)};
}

// The gradient at place `i` of the grid.
inline Gradient gradient_of(const Tensor& x, const RowGrid& grid, size_t i) {
  return {x.mutable_data_ptr(), grid.outer_stride[i], grid.inner_stride[i], x.stride(-1), dtype_of(x)};
}

inline Tensor flat_rows(const Tensor& x, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(x.numel() == rows, name, " must hold one number per row, ", rows, ", got ", x.numel());
  return x.reshape({rows}).contiguous();
}

// The gradient of x, in the dense layout of `like`, so that pixels stay side by side, or another; an empty tensor where
// it is not needed.
inline Tensor empty_gradient(const Tensor& x, bool needed, const Tensor& like,
                             at::MemoryFormat layout = at::MemoryFormat::Preserve) {
  const Tensor gradient = needed ? at::empty_like(like, x.options(), layout) : at::empty({0}, x.options());
  if (gradient.is_cpu()) ask_for_huge_pages(gradient);
  return gradient;
}

inline Tensor contiguous_gradient(const Tensor& x, bool needed) {
  return empty_gradient(x, needed, x, at::MemoryFormat::Contiguous);
}

struct Strided {  // [K, N] numbers, any strides
  Tensor values;
  int64_t teacher_stride, row_stride;
};

// Weights [K] or [K, ...] as [K, N].
inline Strided per_teacher(const Tensor& weights, int64_t teachers, int64_t rows, at::ScalarType dtype) {
  Tensor w = in_compute_dtype(weights, dtype);
  TORCH_CHECK_VALUE(w.size(0) == teachers && (w.dim() == 1 || w.numel() == teachers * rows),
                    "weights must have shape [K] or [K, ...]");
  if (w.dim() == 1) return {w, w.stride(0), 0};
  w = w.reshape({teachers, rows});
  return {w, w.stride(0), w.stride(1)};
}

// One number, or one a row, as [rows] in the compute dtype; stride 0 for one number.
inline Tensor upstream_rows(const Tensor& upstream, int64_t rows, at::ScalarType dtype) {
  const Tensor up = in_compute_dtype(upstream, dtype);
  return up.dim() == 0 ? up.expand({rows}) : up.reshape({rows});
}

// How many rows count, at least 1, as one number on the device.
template <typename T>
Tensor counted_rows(int64_t rows, const OptionalTensor& target, const OptionalTensor& row_weights, int64_t ignore_index,
                    const at::TensorOptions& options) {
  if (options.device().is_cpu()) {
    const int64_t* labels = target ? target->const_data_ptr<int64_t>() : nullptr;
    const T* weights = row_weights ? row_weights->template const_data_ptr<T>() : nullptr;
    int64_t count = labels ? count_labels_cpu(labels, rows, ignore_index) : rows;
    for (int64_t n = 0; weights && n < rows; ++n) count -= weights[n] == 0 && !(labels && labels[n] == ignore_index);
    Tensor items = at::empty({}, options);
    *items.mutable_data_ptr<T>() = static_cast<T>(std::max<int64_t>(count, 1));
    return items;
  }
  if (!target && !row_weights) return at::full({}, std::max<int64_t>(rows, 1), options);
  Tensor counts = target ? target->ne(ignore_index) : row_weights->ne(0);
  if (target && row_weights) counts = counts.logical_and(row_weights->ne(0));
  return counts.sum().clamp_min(1).to(options.dtype());
}

// The losses of rows, and Σ row_loss / items. On the CPU, rows are summed by the thread that has just computed them: to
// read what another core has written costs 0.1 to 0.2 µs a line. Groups of rows that are of two threads are summed at
// the end, so that the order does not depend on the threads.
template <typename T>
class RowLosses {
 public:
  RowLosses(int64_t rows, const at::TensorOptions& options) : rows_(at::empty({rows}, options)) {
    if (rows_.is_cpu()) of_group_.assign((rows + kRowGroup - 1) / kRowGroup, kNotSummed);
  }

  T* data() const { return rows_.mutable_data_ptr<T>(); }
  const Tensor& of_rows() const { return rows_; }

  // The groups that lie within [begin, end).
  void sum(int64_t begin, int64_t end) {
    for (int64_t g = (begin + kRowGroup - 1) / kRowGroup; end_of(g) <= end && g < groups(); ++g)
      of_group_[g] = sum_of(g);
  }

  Tensor reduced(const OptionalTensor& items) const {
    if (!rows_.is_cpu()) {
      Tensor loss = rows_.sum();
      return items ? loss.div_(items->reshape({})) : loss;
    }
    double sum = 0;
    for (int64_t g = 0; g < groups(); ++g) sum += std::isnan(of_group_[g]) ? sum_of(g) : of_group_[g];
    Tensor loss = at::empty({}, rows_.options());
    *loss.mutable_data_ptr<T>() = static_cast<T>(items ? sum / *items->template const_data_ptr<T>() : sum);
    return loss;
  }

 private:
  static constexpr double kNotSummed = std::numeric_limits<double>::quiet_NaN();

  int64_t groups() const { return static_cast<int64_t>(of_group_.size()); }
  int64_t end_of(int64_t group) const { return std::min((group + 1) * kRowGroup, rows_.numel()); }
  double sum_of(int64_t group) const {
    return sum_of_rows_cpu(rows_.const_data_ptr<T>() + group * kRowGroup, end_of(group) - group * kRowGroup);
  }

  Tensor rows_;
  std::vector<double> of_group_;
};

}  // namespace mtkd_fast
