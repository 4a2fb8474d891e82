// Autograd of the op `kd`: which gradients the forward writes, which the backward recomputes.
//
// Strategy A, the student's gradient written in the forward for an upstream of 1 and finished by kd_rescale, unless
//   * a teacher needs a gradient too (its rows are read again anyway),
//   * the student is fp16: an unscaled gradient divided by the number of rows would flush to zero, so the backward
//     computes it with the upstream (the gradient scaler's factor) in fp32 and rounds once,
//   * on a GPU, the row does not fit on chip.
// Then strategy B: the forward keeps O(N·K) numbers, the backward reads the logits again.
#include "kd_autograd.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, TensorList, const OptionalTensor&,
                                                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                   c10::string_view, c10::string_view, double, double, double, double,
                                                   double, int64_t, c10::string_view, bool, bool, bool);
using Backward = std::vector<Tensor>(const Tensor&, TensorList, const OptionalTensor&, const Tensor&,
                                     const OptionalTensor&, const Tensor&, c10::string_view, double, double, double,
                                     double, double, c10::List<bool>);

struct KDOptions {
  c10::string_view rule, divergence;
  double beta, temperature, kd_scale, ce_weight, label_smoothing;
  int64_t ignore_index;
  c10::string_view reduction;
  bool stats;  // the caller wants row_stats
};

auto call_forward(const Tensor& student, TensorList teachers, const OptionalTensor& target,
                  const OptionalTensor& weights, const OptionalTensor& row_weights, const OptionalTensor& num_items,
                  const KDOptions& o, bool skip_zero_weights, bool keep_stats, bool write_gradient) {
  static const auto forward = op<Forward>("mtkd_fast::kd_forward");
  return forward.call(student, teachers, target, weights, row_weights, num_items, o.rule, o.divergence, o.beta,
                      o.temperature, o.kd_scale, o.ce_weight, o.label_smoothing, o.ignore_index, o.reduction,
                      skip_zero_weights, keep_stats, write_gradient);
}

bool fits_on_chip(const Tensor& student, TensorList teachers, const KDOptions& o) {
  if (!student.is_cuda()) return true;  // on a CPU the second sweep finds the rows in cache, or is no worse than B
#ifdef MTKD_CUDA
  KDArgs<float> args{};
  args.divergence = by_name(kDivergences, o.divergence, "divergence");
  args.classes = student.sym_size(-1).guard_int(__FILE__, __LINE__);
  args.teachers = static_cast<int>(teachers.size());
  args.student.dtype = dtype_of(student);
  // How it lies, from its strides alone: a size would make another graph of every batch.
  const auto is_one = [&](int64_t d) { return student.sym_stride(d).sym_eq(1).guard_bool(__FILE__, __LINE__); };
  args.student.class_stride = is_one(-1) ? 1 : 2;
  args.inner = 1;
  for (int64_t d = 0; d < student.dim() - 1 && args.student.class_stride != 1; ++d) {
    if (!is_one(d)) continue;
    args.student.inner_stride = 1;
    args.inner = 2;
  }
  for (size_t k = 0; k < teachers.size(); ++k) args.teacher[k].dtype = dtype_of(teachers[k]);
  const c10::DeviceGuard guard(student.device());
  const bool by_rule = o.rule == "confidence" || o.rule == "entropy";
  return kd_fits_on_chip(args, by_rule ? WeightRule::confidence : WeightRule::uniform, student.device().index());
#else
  return false;
#endif
}

bool gradient_in_forward(const Tensor& student, TensorList teachers, const KDOptions& o) {
  return student.requires_grad() && !any_requires_grad(teachers) && student.scalar_type() != at::kHalf &&
         fits_on_chip(student, teachers, o);
}

struct KDLoss : public torch::autograd::Function<KDLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& student, const TensorList& teachers,
                               const OptionalTensor& target, const OptionalTensor& weights,
                               const OptionalTensor& row_weights, const OptionalTensor& num_items, const KDOptions& o) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool in_forward = gradient_in_forward(student, teachers, o);
    const bool weights_need = weights && weights->requires_grad();
    auto [loss, row_stats, gradient] = call_forward(student, teachers, target, weights, row_weights, num_items, o,
                                                    /*skip_zero_weights=*/!weights_need,
                                                    /*keep_stats=*/o.stats || weights_need || !in_forward, in_forward);
    ctx->mark_non_differentiable({row_stats});
    ctx->set_materialize_grads(false);  // no zeros of that size for row_stats at every backward

    variable_list saved{row_stats, weights_need ? *weights : Tensor(), gradient};
    const bool recompute = !in_forward && (student.requires_grad() || any_requires_grad(teachers));
    if (recompute) {
      saved.push_back(target ? *target : Tensor());
      saved.push_back(student);
      saved.insert(saved.end(), teachers.begin(), teachers.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["in_forward"] = in_forward;
    ctx->saved_data["kd_scale"] = o.kd_scale;
    ctx->saved_data["teachers"] = static_cast<int64_t>(teachers.size());
    if (recompute) {
      ctx->saved_data["divergence"] = std::string(o.divergence);
      ctx->saved_data["beta"] = o.beta;
      ctx->saved_data["temperature"] = o.temperature;
      ctx->saved_data["ce_weight"] = o.ce_weight;
      ctx->saved_data["label_smoothing"] = o.label_smoothing;
    }
    return {loss, row_stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t n_teachers = ctx->saved_data["teachers"].toInt();
    const double kd_scale = ctx->saved_data["kd_scale"].toDouble();
    const size_t student_at = 0, weights_at = n_teachers + 2, inputs = n_teachers + 6;
    variable_list gradients(inputs);
    if (!upstreams[0].defined()) return gradients;
    const Tensor &row_stats = saved[0], &weights = saved[1], &gradient = saved[2], upstream = upstreams[0].detach();

    if (weights.defined())  // before the gradient is finished in place, so that an error leaves it as it was
      gradients[weights_at] = weight_gradient(weights.detach(), upstream, row_stats, n_teachers, kd_scale);
    if (ctx->saved_data["in_forward"].toBool())
      gradients[student_at] =
          finish_gradient(gradient, upstream, row_stats.select(0, RowStats{static_cast<int>(n_teachers)}.scale()));
    else if (saved.size() > 3)
      recompute(ctx, saved, upstream, n_teachers, kd_scale, gradients);
    refuse_double_backward(gradients);
    return gradients;
  }

  static void recompute(AutogradContext* ctx, const variable_list& saved, const Tensor& upstream, int64_t n_teachers,
                        double kd_scale, variable_list& gradients) {
    static const auto backward = op<Backward>("mtkd_fast::kd_backward");
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor &row_stats = saved[0], &target = saved[3], &student = saved[4];
    const TensorList teachers(saved.data() + 5, n_teachers);
    c10::List<bool> needs;
    for (int64_t i = 0; i <= n_teachers; ++i) needs.push_back(saved[4 + i].requires_grad() && ctx->needs_input_grad(i));
    const std::vector<Tensor> found = backward.call(
        student, teachers, target.defined() ? OptionalTensor(target) : std::nullopt,
        row_stats.narrow(0, n_teachers, n_teachers), upstream, row_stats, ctx->saved_data["divergence"].toStringRef(),
        ctx->saved_data["beta"].toDouble(), ctx->saved_data["temperature"].toDouble(), kd_scale,
        ctx->saved_data["ce_weight"].toDouble(), ctx->saved_data["label_smoothing"].toDouble(), needs);
    for (int64_t i = 0; i <= n_teachers; ++i)
      if (needs[i]) gradients[i] = found[i];
  }
};

std::tuple<Tensor, Tensor> kd(const Tensor& student, TensorList teachers, const OptionalTensor& target,
                              const OptionalTensor& weights, const OptionalTensor& row_weights,
                              const OptionalTensor& num_items, c10::string_view rule, c10::string_view divergence,
                              double beta, double temperature, double kd_scale, double ce_weight,
                              double label_smoothing, int64_t ignore_index, c10::string_view reduction, bool stats) {
  const KDOptions options{rule,      divergence,      beta,         temperature, kd_scale,
                          ce_weight, label_smoothing, ignore_index, reduction,   stats};
  const bool differentiable = at::GradMode::is_enabled() && (student.requires_grad() || any_requires_grad(teachers) ||
                                                             (weights && weights->requires_grad()));
  if (!differentiable) {
    auto [loss, row_stats, _] =
        call_forward(student, teachers, target, weights, row_weights, num_items, options,
                     /*skip_zero_weights=*/true, /*keep_stats=*/stats, /*write_gradient=*/false);
    return {loss, row_stats};
  }
  const variable_list out = KDLoss::apply(student, teachers, target, weights, row_weights, num_items, options);
  return {out[0], out[1]};
}

// ---------------------------------------------------------------- D_k [K, ...] by itself

struct KDDivergence : public torch::autograd::Function<KDDivergence> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const TensorList& teachers,
                        const c10::string_view& divergence, double beta, double temperature) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor row_stats = statistics(student, teachers, divergence, beta, temperature);
    variable_list saved{row_stats, student};
    saved.insert(saved.end(), teachers.begin(), teachers.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["divergence"] = std::string(divergence);
    ctx->saved_data["beta"] = beta;
    ctx->saved_data["temperature"] = temperature;
    return divergences(row_stats, student, teachers.size());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    static const auto backward = op<Backward>("mtkd_fast::kd_backward");
    const variable_list saved = ctx->get_saved_variables();
    const int64_t n_teachers = static_cast<int64_t>(saved.size()) - 2;
    const TensorList teachers(saved.data() + 2, n_teachers);
    c10::List<bool> needs;
    for (int64_t i = 0; i <= n_teachers; ++i) needs.push_back(saved[1 + i].requires_grad() && ctx->needs_input_grad(i));
    variable_list gradients(n_teachers + 4);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const Tensor upstream = upstreams[0].detach().reshape_symint({n_teachers, saved[0].sym_size(1)});
      const std::vector<Tensor> found =
          backward.call(saved[1], teachers, std::nullopt, upstream, std::nullopt, saved[0],
                        ctx->saved_data["divergence"].toStringRef(), ctx->saved_data["beta"].toDouble(),
                        ctx->saved_data["temperature"].toDouble(), 1.0, 0.0, 0.0, needs);
      for (int64_t i = 0; i <= n_teachers; ++i)
        if (needs[i]) gradients[i] = found[i];
    }
    refuse_double_backward(gradients);
    return gradients;
  }

  static Tensor statistics(const Tensor& student, TensorList teachers, c10::string_view divergence, double beta,
                           double temperature) {
    const KDOptions options{"uniform", divergence, beta, temperature, 1.0, 0.0, 0.0, 0, "sum", true};
    return std::get<1>(call_forward(student, teachers, std::nullopt, std::nullopt, std::nullopt, std::nullopt, options,
                                    /*skip_zero_weights=*/false, /*keep_stats=*/true, /*write_gradient=*/false));
  }

  static Tensor divergences(const Tensor& row_stats, const Tensor& student, int64_t n_teachers) {
    std::vector<c10::SymInt> shape{n_teachers};
    shape.insert(shape.end(), student.sym_sizes().begin(), student.sym_sizes().end() - 1);
    return row_stats.narrow(0, 0, n_teachers).clone().view_symint(shape);
  }
};

Tensor kd_divergence(const Tensor& student, TensorList teachers, c10::string_view divergence, double beta,
                     double temperature) {
  if (at::GradMode::is_enabled() && (student.requires_grad() || any_requires_grad(teachers)))
    return KDDivergence::apply(student, teachers, divergence, beta, temperature);
  const Tensor row_stats = KDDivergence::statistics(student, teachers, divergence, beta, temperature);
  return KDDivergence::divergences(row_stats, student, teachers.size());
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) {
  m.impl("kd", kd);
  m.impl("kd_divergence", kd_divergence);
}

}  // namespace mtkd_fast
