// The passes of the op `kd` on tensors: checks that keep memory safe, allocation, reduction. Autograd is in
// kd_autograd.cpp; friendly errors and defaults are in mtkd_fast/checks.py and kd.py.
#include "row_tensors.h"

namespace mtkd_fast {
namespace {

// Returns where `gradient` is written, if it is wanted at all; others of the call have the same strides.
template <typename T>
Gradient fill(KDArgs<T>& args, const Tensor& student, TensorList teachers, const Tensor& gradient,
              std::string_view divergence, double beta, double temperature, double kd_scale, double ce_weight,
              double label_smoothing) {
  TORCH_CHECK_VALUE(!teachers.empty() && teachers.size() <= kMaxTeachers, "teacher_logits must hold 1 to ",
                    kMaxTeachers, " teachers, got ", teachers.size());
  std::vector<Tensor> all{student};
  for (const Tensor& teacher : teachers) {
    TORCH_CHECK_VALUE(teacher.sizes() == student.sizes() && teacher.device() == student.device(),
                      "teacher_logits must have the shape and device of student_logits");
    all.push_back(teacher);
  }
  const bool wanted = gradient.numel() > 0;
  if (wanted) all.push_back(gradient);
  const RowGrid grid(all);
  args.classes = student.size(-1);
  args.rows = grid.outer * grid.inner;
  if (student.numel() == 0) args.rows = 0;
  args.inner = grid.inner;
  args.teachers = static_cast<int>(teachers.size());
  args.student = logits(student, grid, 0);
  for (size_t k = 0; k < teachers.size(); ++k) args.teacher[k] = logits(teachers[k], grid, k + 1);
  args.target = nullptr;
  args.row_weights = nullptr;
  args.ignore_index = 0;
  args.divergence = by_name(kDivergences, divergence, "divergence");
  args.beta = static_cast<T>(beta);
  args.temperature = static_cast<T>(temperature);
  args.kd_scale = static_cast<T>(kd_scale);
  args.ce_weight = static_cast<T>(ce_weight);
  args.label_smoothing = static_cast<T>(label_smoothing);
  return wanted ? gradient_of(gradient, grid, teachers.size() + 1) : Gradient{};
}

// Pixels of many classes at once: how much a thread keeps depends on how many it has.
template <typename T>
Units units_of(const KDArgs<T>& args) {
  constexpr int64_t kRegisterBytes = 64;  // the widest
  const bool many = args.classes * kRegisterBytes * (args.teachers + 2) > kAcrossBytes;
  return {args.rows, args.classes * (args.teachers + 1), lies_in_planes(args.student) && many};
}

constexpr int64_t kPartColumns = 8192;  // of a part, at least: some 5 µs of work

// How many parts the columns of a row are shared out in, where there are fewer rows than threads.
template <typename Args>
int column_parts(const at::Device& device, const Args& args) {
  if (!device.is_cpu() || args.rows == 0 || args.rows >= at::get_num_threads() || at::in_parallel_region()) return 1;
  if (args.student.class_stride != 1) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), args.classes / kPartColumns));
}

void in_parallel(int count, const std::function<void(int)>& body) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
  });
}

void check_labels(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t *labels = target.const_data_ptr<int64_t>(), rows = target.numel();
  if (!some_label_is_wrong_cpu(labels, rows, classes, ignore_index)) return;
  for (int64_t n = 0; n < rows; ++n)
    TORCH_CHECK_VALUE(labels[n] == ignore_index || (labels[n] >= 0 && labels[n] < classes),
                      "target must hold labels in [0, ", classes, ") or ignore_index = ", ignore_index, ", got ",
                      labels[n]);
}

std::tuple<Tensor, Tensor, Tensor> kd_forward(const Tensor& student, TensorList teachers, const OptionalTensor& target,
                                              const OptionalTensor& weights, const OptionalTensor& row_weights,
                                              const OptionalTensor& num_items, c10::string_view rule,
                                              c10::string_view divergence, double beta, double temperature,
                                              double kd_scale, double ce_weight, double label_smoothing,
                                              int64_t ignore_index, c10::string_view reduction, bool skip_zero_weights,
                                              bool keep_stats, bool write_gradient) {
  const at::ScalarType dtype = compute_dtype(student, teachers);
  const at::TensorOptions options = student.options().dtype(dtype);
  const bool mean = reduction == "mean", none = reduction == "none";

  return with_compute_type(dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    KDForward<T> args;
    const Tensor gradient = empty_gradient(student, write_gradient, /*like=*/student);
    args.gradient =
        fill(args, student, teachers, gradient, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing);
    args.rule = by_name(kWeightRules, rule, "weights");
    args.ignore_index = ignore_index;
    args.skip_zero_weights = skip_zero_weights;
    args.keep_stats = keep_stats;
    const bool needs_target =
        ce_weight != 0 || args.rule == WeightRule::confidence || args.divergence == Divergence::dkd;
    TORCH_CHECK_VALUE(target || !needs_target, "target must be given");
    TORCH_CHECK_VALUE((args.rule == WeightRule::given) == weights.has_value(),
                      "weights must be given for that rule only");

    OptionalTensor labels, row_weight, items;
    Strided given{};
    if (target) {
      labels = flat_rows(*target, args.rows, "target").to(at::kLong);
      if (student.is_cpu()) check_labels(*labels, args.classes, ignore_index);
      args.target = labels->const_data_ptr<int64_t>();
    }
    if (row_weights) {
      row_weight = flat_rows(in_compute_dtype(*row_weights, dtype), args.rows, "row_weights");
      args.row_weights = row_weight->template const_data_ptr<T>();
    }
    if (mean) {
      items = num_items ? in_compute_dtype(*num_items, dtype)
                        : counted_rows<T>(args.rows, labels, row_weight, ignore_index, options);
    }
    args.items = items ? items->template const_data_ptr<T>() : nullptr;
    args.weights = nullptr;
    args.weights_teacher_stride = args.weights_row_stride = 0;
    if (weights) {
      given = per_teacher(*weights, args.teachers, args.rows, dtype);
      args.weights = given.values.template const_data_ptr<T>();
      args.weights_teacher_stride = given.teacher_stride;
      args.weights_row_stride = given.row_stride;
    }

    RowLosses<T> losses(args.rows, options);
    Tensor row_stats = at::empty({RowStats{args.teachers}.size(args.divergence), args.rows}, options);
    args.row_loss = losses.data();
    args.row_stats = row_stats.mutable_data_ptr<T>();
    if (const int parts = column_parts(student.device(), args); parts > 1)
      kd_forward_columns_cpu(args, parts, in_parallel);
    else
      run<KDForward<T>>(student.device(), args, units_of(args), kd_forward_cpu, MTKD_CUDA_LAUNCHER(kd_forward_cuda),
                        [&](int64_t begin, int64_t end) {
                          if (!none) losses.sum(begin, end);
                        });

    if (none) return {losses.of_rows().view(student.sizes().slice(0, student.dim() - 1)), row_stats, gradient};
    return {losses.reduced(items), row_stats, gradient};
  });
}

std::vector<Tensor> kd_backward(const Tensor& student, TensorList teachers, const OptionalTensor& target,
                                const Tensor& weights, const OptionalTensor& upstream, const Tensor& row_stats,
                                c10::string_view divergence, double beta, double temperature, double kd_scale,
                                double ce_weight, double label_smoothing, c10::List<bool> needs) {
  const at::ScalarType dtype = compute_dtype(student, teachers);
  return with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    KDBackward<T> args;
    std::vector<Tensor> gradients{empty_gradient(student, needs[0], student)};
    for (size_t k = 0; k < teachers.size(); ++k)
      gradients.push_back(empty_gradient(teachers[k], needs[k + 1], student));
    auto wanted = [](const Tensor& x) { return x.numel() > 0; };
    const auto some = std::find_if(gradients.begin(), gradients.end(), wanted);
    args.student_gradient = fill(args, student, teachers, some == gradients.end() ? gradients[0] : *some, divergence,
                                 beta, temperature, kd_scale, ce_weight, label_smoothing);
    args.student_gradient.data = wanted(gradients[0]) ? gradients[0].mutable_data_ptr() : nullptr;
    args.student_gradient.dtype = args.student.dtype;
    for (int k = 0; k < args.teachers; ++k)
      args.teacher_gradient[k] = wanted(gradients[k + 1]) ? gradients[k + 1].mutable_data_ptr() : nullptr;
    TORCH_CHECK_VALUE(row_stats.size(0) == RowStats{args.teachers}.size(args.divergence) &&
                          row_stats.size(1) == args.rows && row_stats.scalar_type() == dtype,
                      "row_stats must be the forward's");
    const Tensor stats = row_stats.contiguous();
    args.row_stats = stats.const_data_ptr<T>();
    const Strided given = per_teacher(weights, args.teachers, args.rows, dtype);
    args.weights = given.values.template const_data_ptr<T>();
    args.weights_teacher_stride = given.teacher_stride;
    args.weights_row_stride = given.row_stride;
    OptionalTensor labels;
    if (target) {
      labels = flat_rows(*target, args.rows, "target").to(at::kLong);
      args.target = labels->const_data_ptr<int64_t>();
    }
    Tensor up;
    args.upstream = nullptr;
    args.upstream_stride = 0;
    if (upstream) {
      up = upstream_rows(*upstream, args.rows, dtype);
      args.upstream = up.const_data_ptr<T>();
      args.upstream_stride = up.stride(0);
    }

    if (const int parts = column_parts(student.device(), args); parts > 1)
      kd_backward_columns_cpu(args, parts, in_parallel);
    else
      run<KDBackward<T>>(student.device(), args, units_of(args), kd_backward_cpu, MTKD_CUDA_LAUNCHER(kd_backward_cuda));
    return gradients;
  });
}

void rescale_into(const Tensor& gradient, const Tensor& upstream, const Tensor& scale, const Tensor& out) {
  with_compute_type(scale.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = scale.numel();
    const Tensor scales = scale.contiguous();
    const Tensor up = upstream_rows(upstream, rows, scale.scalar_type());
    const bool in_place = out.is_same(gradient);
    if (in_place && up.is_cpu() && upstream.dim() == 0 && *up.const_data_ptr<T>() == 1) return;  // do not wake a thread
    KDRescale<T> args;
    const RowGrid grid({gradient, out});
    args.rows = rows;
    args.inner = grid.inner;
    args.classes = gradient.size(-1);
    args.gradient = gradient_of(gradient, grid, 0);
    args.out = out.data_ptr();
    args.upstream = up.const_data_ptr<T>();
    args.upstream_stride = up.stride(0);
    args.scale = scales.const_data_ptr<T>();
    run<KDRescale<T>>(gradient.device(), args, {rows, args.classes}, kd_rescale_cpu,
                      MTKD_CUDA_LAUNCHER(kd_rescale_cuda));
  });
}

Tensor kd_rescale(const Tensor& gradient, const Tensor& upstream, const Tensor& scale) {
  Tensor out = at::empty_like(gradient);
  if (out.is_cpu()) ask_for_huge_pages(out);
  rescale_into(gradient, upstream, scale, out);
  return out;
}

void kd_rescale_(const Tensor& gradient, const Tensor& upstream, const Tensor& scale) {
  rescale_into(gradient, upstream, scale, gradient);
}

}  // namespace

MTKD_PASSES(m) {
  m.impl("kd_forward", kd_forward);
  m.impl("kd_backward", kd_backward);
  m.impl("kd_rescale", kd_rescale);
  m.impl("kd_rescale_", kd_rescale_);
}

}  // namespace mtkd_fast
