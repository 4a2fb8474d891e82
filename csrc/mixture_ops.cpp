// The op `mixture` on tensors, and its autograd.
#include "kd_autograd.h"
#include "mixture.h"
#include "row_tensors.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor>(TensorList, const OptionalTensor&, double, bool);
using Backward = std::tuple<Tensor, std::vector<Tensor>>(TensorList, const OptionalTensor&, const Tensor&,
                                                         const Tensor&, double, bool, c10::List<bool>);
using DivergenceForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, TensorList, const OptionalTensor&, double,
                                                             bool, bool);
using KDBackwardOp = std::vector<Tensor>(const Tensor&, TensorList, const OptionalTensor&, const Tensor&,
                                         const OptionalTensor&, const Tensor&, c10::string_view, double, double, double,
                                         double, double, c10::List<bool>);

// Where the rows of the tensors lie, `all` being a student or nothing and then the teachers. The weights in the compute
// dtype are returned to be kept alive.
template <typename T>
Tensor fill(MixtureArgs<T>& args, const std::vector<Tensor>& all, const RowGrid& grid, int64_t teachers,
            const OptionalTensor& weights, double temperature, bool skip_zero_weights, at::ScalarType dtype) {
  for (const Tensor& x : all)
    TORCH_CHECK_VALUE(x.sizes() == all[0].sizes() && x.device() == all[0].device(),
                      "student_logits and teacher_logits must have one shape and device");
  args.rows = all[0].numel() == 0 ? 0 : grid.outer * grid.inner;
  args.inner = grid.inner;
  args.classes = all[0].size(-1);
  args.teachers = static_cast<int>(teachers);
  const size_t first = all.size() - teachers;
  for (int64_t k = 0; k < teachers; ++k) args.teacher[k] = logits(all[first + k], grid, first + k);
  args.skip_zero_weights = skip_zero_weights;
  args.temperature = static_cast<T>(temperature);
  args.weights = nullptr;
  args.weights_teacher_stride = args.weights_row_stride = 0;
  if (!weights) return {};
  const Strided given = per_teacher(*weights, teachers, args.rows, dtype);
  args.weights = given.values.template const_data_ptr<T>();
  args.weights_teacher_stride = given.teacher_stride;
  args.weights_row_stride = given.row_stride;
  return given.values;
}

std::vector<Tensor> checked(TensorList teachers) {
  TORCH_CHECK_VALUE(!teachers.empty() && teachers.size() <= kMaxTeachers, "teacher_logits must hold 1 to ",
                    kMaxTeachers, " teachers, got ", teachers.size());
  return teachers.vec();
}

std::tuple<Tensor, Tensor> mixture_forward(TensorList teachers, const OptionalTensor& weights, double temperature,
                                           bool skip_zero_weights) {
  const std::vector<Tensor> all = checked(teachers);
  const at::ScalarType dtype = compute_dtype(all[0], teachers);
  return with_compute_type(dtype, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    MixtureForward<T> args;
    const Tensor alive = fill(args, all, RowGrid(all), teachers.size(), weights, temperature, skip_zero_weights, dtype);
    const Tensor probabilities = at::empty(all[0].sizes(), all[0].options().dtype(dtype));
    if (probabilities.is_cpu()) ask_for_huge_pages(probabilities);
    const Tensor row_stats = at::empty({2 * args.teachers, args.rows}, probabilities.options());
    args.probabilities = probabilities.mutable_data_ptr<T>();
    args.row_stats = row_stats.mutable_data_ptr<T>();
    run<MixtureForward<T>>(all[0].device(), args, {args.rows, args.classes * (args.teachers + 1)}, mixture_forward_cpu,
                           MTKD_CUDA_LAUNCHER(mixture_forward_cuda));
    return {probabilities, row_stats};
  });
}

// G is read as it comes from autograd: expanded from one number, or dense.
Logits upstream_logits(const Tensor& upstream, int64_t inner) {
  const bool one = upstream.numel() > 0 && upstream.strides() == std::vector<int64_t>(upstream.dim(), 0);
  const int64_t classes = one ? 0 : upstream.size(-1);
  return {upstream.const_data_ptr(), inner * classes, classes, one ? 0 : 1, dtype_of(upstream)};
}

std::tuple<Tensor, std::vector<Tensor>> mixture_backward(TensorList teachers, const OptionalTensor& weights,
                                                         const Tensor& upstream, const Tensor& row_stats,
                                                         double temperature, bool skip_zero_weights,
                                                         c10::List<bool> needs) {
  const std::vector<Tensor> all = checked(teachers);
  const at::ScalarType dtype = compute_dtype(all[0], teachers);
  return with_compute_type(dtype, [&](auto zero) -> std::tuple<Tensor, std::vector<Tensor>> {
    using T = decltype(zero);
    MixtureBackward<T> args;
    const Tensor alive = fill(args, all, RowGrid(all), teachers.size(), weights, temperature, skip_zero_weights, dtype);
    TORCH_CHECK_VALUE(upstream.sizes() == all[0].sizes() && row_stats.size(0) == 2 * args.teachers &&
                          row_stats.size(1) == args.rows && row_stats.scalar_type() == dtype,
                      "upstream and row_stats must be those of the forward");
    Tensor g = in_compute_dtype(upstream, dtype);
    if (g.strides() != std::vector<int64_t>(g.dim(), 0)) g = g.contiguous();
    const Tensor stats = row_stats.contiguous(), dots = at::empty({args.teachers, args.rows}, stats.options());
    args.upstream = upstream_logits(g, args.inner);
    args.row_stats = stats.const_data_ptr<T>();
    args.dots = dots.mutable_data_ptr<T>();
    std::vector<Tensor> gradients;
    for (int k = 0; k < args.teachers; ++k) {
      gradients.push_back(contiguous_gradient(all[k], needs[k]));
      args.teacher_gradient[k] = needs[k] ? gradients[k].mutable_data_ptr() : nullptr;
    }
    run<MixtureBackward<T>>(all[0].device(), args, {args.rows, args.classes * (args.teachers + 1)},
                            mixture_backward_cpu, MTKD_CUDA_LAUNCHER(mixture_backward_cuda));
    return {dots, gradients};
  });
}

std::tuple<Tensor, Tensor, Tensor> mixture_divergence_forward(const Tensor& student, TensorList teachers,
                                                              const OptionalTensor& weights, double temperature,
                                                              bool skip_zero_weights, bool write_gradient) {
  std::vector<Tensor> all = checked(teachers);
  all.insert(all.begin(), student);
  const at::ScalarType dtype = compute_dtype(student, teachers);
  return with_compute_type(dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    MixtureDivergence<T> args;
    const RowGrid grid(all);
    const Tensor alive = fill(args, all, grid, teachers.size(), weights, temperature, skip_zero_weights, dtype);
    const Tensor divergence = at::empty({args.rows}, student.options().dtype(dtype));
    const Tensor row_stats =
        at::empty({RowStats{args.teachers}.size(Divergence::forward_kl), args.rows}, divergence.options());
    const Tensor gradient = contiguous_gradient(student, write_gradient);
    args.student = logits(student, grid, 0);
    args.divergence = divergence.mutable_data_ptr<T>();
    args.row_stats = row_stats.mutable_data_ptr<T>();
    args.gradient = write_gradient ? gradient.mutable_data_ptr() : nullptr;
    run<MixtureDivergence<T>>(student.device(), args, {args.rows, args.classes * (args.teachers + 2)},
                              mixture_divergence_cpu, MTKD_CUDA_LAUNCHER(mixture_divergence_cuda));
    return {divergence.view(student.sizes().slice(0, student.dim() - 1)), row_stats, gradient};
  });
}

bool wants_gradient(const OptionalTensor& weights) { return weights && weights->requires_grad(); }

OptionalTensor optional(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// --------------------------------------------------------------------------------------------------------- mixture

struct Mixture : public torch::autograd::Function<Mixture> {
  static Tensor forward(AutogradContext* ctx, const TensorList& teachers, const OptionalTensor& weights,
                        double temperature) {
    static const auto forward_op = op<Forward>("mtkd_fast::mixture_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [probabilities, row_stats] = forward_op.call(teachers, weights, temperature, !wants_gradient(weights));
    variable_list saved{row_stats, weights ? *weights : Tensor()};
    saved.insert(saved.end(), teachers.begin(), teachers.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["temperature"] = temperature;
    return probabilities;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    static const auto backward_op = op<Backward>("mtkd_fast::mixture_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &row_stats = saved[0], &weights = saved[1];
    const int64_t n_teachers = static_cast<int64_t>(saved.size()) - 2;
    const TensorList teachers(saved.data() + 2, n_teachers);
    const bool weights_need = weights.defined() && weights.requires_grad();
    c10::List<bool> needs;
    for (const Tensor& t : teachers) needs.push_back(t.requires_grad());
    variable_list gradients(n_teachers + 2);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      auto [dots, found] =
          backward_op.call(teachers, optional(weights.defined() ? weights.detach() : weights), upstreams[0].detach(),
                           row_stats, ctx->saved_data["temperature"].toDouble(), !weights_need, needs);
      for (int64_t k = 0; k < n_teachers; ++k)
        if (needs[k]) gradients[k] = found[k];
      if (weights_need) {
        const Tensor given = weights.detach();
        const Tensor wide = given.dim() == 1 ? given.unsqueeze(1) : given.reshape_symint(dots.sym_sizes());
        const Tensor removed = wide.eq(0).logical_and(dots.isfinite().logical_not());
        gradients[n_teachers] = as_weights(dots.masked_fill(removed, 0), given);
      }
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor mixture(TensorList teachers, const OptionalTensor& weights, double temperature) {
  if (at::GradMode::is_enabled() && (any_requires_grad(teachers) || wants_gradient(weights)))
    return Mixture::apply(teachers, weights, temperature);
  static const auto forward_op = op<Forward>("mtkd_fast::mixture_forward");
  return std::get<0>(forward_op.call(teachers, weights, temperature, true));
}

// ---------------------------------------------------------------------------------------------- mixture_divergence

// The forward writes the student's gradient for an upstream of 1, unless the student is bf16 or fp16: its gradient
// would be rounded again after the upstream, which is another for every row. That one kd_backward makes with the
// upstream, from the same row_stats.
struct MixtureKL : public torch::autograd::Function<MixtureKL> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const TensorList& teachers,
                        const OptionalTensor& weights, double temperature) {
    static const auto forward_op = op<DivergenceForward>("mtkd_fast::mixture_divergence_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    const bool in_forward = student.requires_grad() && c10::elementSize(student.scalar_type()) >= 4;
    auto [divergence, row_stats, gradient] =
        forward_op.call(student, teachers, weights, temperature, !wants_gradient(weights), in_forward);
    variable_list saved{row_stats, gradient, weights ? *weights : Tensor()};
    if (student.requires_grad() && !in_forward) {
      saved.push_back(student);
      saved.insert(saved.end(), teachers.begin(), teachers.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["in_forward"] = in_forward;
    ctx->saved_data["teachers"] = static_cast<int64_t>(teachers.size());
    ctx->saved_data["temperature"] = temperature;
    return divergence;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &row_stats = saved[0], &gradient = saved[1], &weights = saved[2], upstream = upstreams[0].detach();
    const int64_t n_teachers = ctx->saved_data["teachers"].toInt();
    variable_list gradients(n_teachers + 3);
    if (weights.defined() && weights.requires_grad())
      gradients[n_teachers + 1] = weight_gradient(weights.detach(), upstream, row_stats, n_teachers, 1.0);
    if (ctx->saved_data["in_forward"].toBool())
      gradients[0] = finish_gradient(gradient, upstream, row_stats.select(0, -1));
    else if (saved.size() > 3)
      gradients[0] = recompute(saved, upstream, n_teachers, ctx->saved_data["temperature"].toDouble());
    refuse_double_backward(gradients);
    return gradients;
  }

  static Tensor recompute(const variable_list& saved, const Tensor& upstream, int64_t n_teachers, double temperature) {
    static const auto backward = op<KDBackwardOp>("mtkd_fast::kd_backward");
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor &row_stats = saved[0], &student = saved[3];
    c10::List<bool> needs;
    for (int64_t i = 0; i <= n_teachers; ++i) needs.push_back(i == 0);
    return backward.call(student, TensorList(saved.data() + 4, n_teachers), std::nullopt,
                         row_stats.narrow(0, n_teachers, n_teachers), upstream, row_stats, "forward_kl", /*beta=*/0.0,
                         temperature, 1.0, 0.0, 0.0, needs)[0];
  }
};

Tensor mixture_divergence(const Tensor& student, TensorList teachers, const OptionalTensor& weights,
                          double temperature) {
  if (at::GradMode::is_enabled() && (student.requires_grad() || wants_gradient(weights)))
    return MixtureKL::apply(student, teachers, weights, temperature);
  static const auto forward_op = op<DivergenceForward>("mtkd_fast::mixture_divergence_forward");
  return std::get<0>(forward_op.call(student, teachers, weights, temperature, true, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) {
  m.impl("mixture", mixture);
  m.impl("mixture_divergence", mixture_divergence);
}

MTKD_PASSES(m) {
  m.impl("mixture_forward", mixture_forward);
  m.impl("mixture_backward", mixture_backward);
  m.impl("mixture_divergence_forward", mixture_divergence_forward);
}

}  // namespace mtkd_fast
