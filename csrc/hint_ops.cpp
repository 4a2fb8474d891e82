// The op `hint` on tensors, and its autograd.
#include "autograd.h"
#include "hint.h"

namespace mtkd_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Forward = Tensor(TensorList, TensorList, const OptionalTensor&);
using Backward = std::vector<Tensor>(TensorList, TensorList, const Tensor&, c10::List<bool>);

bool dense_alike(const Tensor& f, const Tensor& g) {
  return f.strides() == g.strides() && f.is_non_overlapping_and_dense();
}

// Tensors the arguments point into, kept alive: pairs of different memory layout are copied to a common one.
template <typename T>
std::vector<Tensor> fill(HintArgs<T>& args, TensorList student, TensorList teacher, const OptionalTensor& weights,
                         at::ScalarType dtype) {
  TORCH_CHECK_VALUE(!student.empty() && student.size() == teacher.size() && student.size() <= kMaxTeachers,
                    "student_features and teacher_features must hold 1 to ", kMaxTeachers, " pairs");
  args.samples = student[0].size(0);
  args.pairs = static_cast<int>(student.size());
  args.distance = nullptr;
  std::vector<Tensor> alive;
  for (int k = 0; k < args.pairs; ++k) {
    Tensor f = student[k], g = teacher[k];
    TORCH_CHECK_VALUE(f.sizes() == g.sizes() && f.size(0) == args.samples && f.device() == g.device(),
                      "each pair of features must have one shape and device, and all pairs as many samples");
    if (!(dense_alike(f, g) && (f.dim() == 1 || f.size(0) <= 1 || f.stride(0) * f.size(0) == f.numel())))
      f = f.contiguous(), g = g.contiguous();
    const int64_t elements = args.samples ? f.numel() / args.samples : 0;
    args.pair[k] = {f.const_data_ptr(), g.const_data_ptr(), elements,    elements,
                    elements,           dtype_of(f),        dtype_of(g), nullptr};
    alive.push_back(f);
    alive.push_back(g);
  }
  args.weights = nullptr;
  args.weights_pair_stride = args.weights_sample_stride = 0;
  if (weights) {
    const Tensor w = in_compute_dtype(*weights, dtype);
    TORCH_CHECK_VALUE(w.size(0) == args.pairs && (w.dim() == 1 || (w.dim() == 2 && w.size(1) == args.samples)),
                      "weights must have shape [K] or [K, N]");
    args.weights = w.const_data_ptr<T>();
    args.weights_pair_stride = w.stride(0);
    args.weights_sample_stride = w.dim() == 1 ? 0 : w.stride(1);
    alive.push_back(w);
  }
  return alive;
}

int64_t mean_elements(TensorList features) {
  int64_t elements = 0;
  for (const Tensor& f : features) elements += f.numel();
  return elements / std::max<int64_t>(1, static_cast<int64_t>(features.size()) * features[0].size(0));
}

Tensor hint_forward(TensorList student, TensorList teacher, const OptionalTensor& weights) {
  std::vector<Tensor> all(student.begin(), student.end());
  all.insert(all.end(), teacher.begin(), teacher.end());
  const at::ScalarType dtype = compute_dtype(all[0], all);
  return with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    HintArgs<T> args;
    const std::vector<Tensor> alive = fill(args, student, teacher, weights, dtype);
    Tensor distance = at::empty({args.pairs, args.samples}, student[0].options().dtype(dtype));
    args.distance = distance.mutable_data_ptr<T>();
    run<HintArgs<T>>(student[0].device(), args, args.pairs * args.samples, 2 * mean_elements(student), hint_forward_cpu,
                     MTKD_CUDA_LAUNCHER(hint_forward_cuda));
    return distance;
  });
}

std::vector<Tensor> hint_backward(TensorList student, TensorList teacher, const Tensor& weights,
                                  c10::List<bool> needs) {
  std::vector<Tensor> all(student.begin(), student.end());
  all.insert(all.end(), teacher.begin(), teacher.end());
  const at::ScalarType dtype = compute_dtype(all[0], all);
  return with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    HintArgs<T> args;
    const std::vector<Tensor> alive = fill(args, student, teacher, weights, dtype);
    std::vector<Tensor> gradients;
    for (int k = 0; k < args.pairs; ++k) {
      const Tensor& f = alive[2 * k];
      gradients.push_back(needs[k] ? at::empty_like(f) : at::empty({0}, f.options()));
      args.pair[k].gradient = needs[k] ? gradients[k].mutable_data_ptr() : nullptr;
    }
    run<HintArgs<T>>(student[0].device(), args, args.pairs * args.samples, 3 * mean_elements(student),
                     hint_backward_cpu, MTKD_CUDA_LAUNCHER(hint_backward_cuda));
    return gradients;
  });
}

// Σ_k w_k·distance_k [N], where a weight of 0 removes its term.
Tensor weighted_sum(const Tensor& distance, const OptionalTensor& weights) {
  if (!weights) return distance.sum(0);
  const Tensor w = in_compute_dtype(weights->dim() == 1 ? weights->unsqueeze(1) : *weights, distance.scalar_type());
  return (w * distance).masked_fill(w.eq(0), 0).sum(0);
}

Tensor reduced(const Tensor& per_sample, c10::string_view reduction) {
  if (reduction == "none") return per_sample;
  const Tensor sum = per_sample.sum();
  return reduction == "sum" ? sum : sum / at::Scalar(per_sample.sym_numel().max(1));
}

struct Hint : public torch::autograd::Function<Hint> {
  static Tensor forward(AutogradContext* ctx, const TensorList& student, const TensorList& teacher,
                        const OptionalTensor& weights, const c10::string_view& reduction) {
    static const auto forward_op = op<Forward>("mtkd_fast::hint_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    const bool weights_need = weights && weights->requires_grad();
    const Tensor distance = forward_op.call(student, teacher, weights_need ? std::nullopt : weights);
    variable_list saved{distance, weights ? *weights : Tensor()};
    saved.insert(saved.end(), student.begin(), student.end());
    saved.insert(saved.end(), teacher.begin(), teacher.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["mean"] = reduction == "mean";
    return reduced(weighted_sum(distance, weights), reduction);
  }

  static void fill_gradients(TensorList features, TensorList others, const Tensor& weights, variable_list& gradients,
                             int64_t at) {
    static const auto backward_op = op<Backward>("mtkd_fast::hint_backward");
    c10::List<bool> needs;
    for (const Tensor& f : features) needs.push_back(f.requires_grad());
    if (!any_requires_grad(features)) return;
    const std::vector<Tensor> found = backward_op.call(features, others, weights, needs);
    for (size_t k = 0; k < features.size(); ++k)
      if (needs[k]) gradients[at + k] = found[k];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &distance = saved[0], &weights = saved[1];
    const int64_t pairs = (static_cast<int64_t>(saved.size()) - 2) / 2;
    const c10::SymInt samples = distance.sym_size(1);
    const TensorList student(saved.data() + 2, pairs), teacher(saved.data() + 2 + pairs, pairs);
    variable_list gradients(2 * pairs + 2);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      Tensor upstream = upstreams[0].detach().expand_symint({samples});
      if (ctx->saved_data["mean"].toBool()) upstream = upstream / at::Scalar(samples.max(1));
      const Tensor up = upstream.unsqueeze(0).expand_symint({pairs, samples});
      Tensor w = up;
      if (weights.defined()) {
        const Tensor given = in_compute_dtype(weights.detach(), distance.scalar_type());
        const Tensor wide = given.dim() == 1 ? given.unsqueeze(1) : given;
        w = (wide * up).masked_fill(wide.eq(0), 0);
        if (weights.requires_grad()) {
          const Tensor removed = wide.eq(0).logical_and(distance.isfinite().logical_not());
          const Tensor per_sample = (distance * up).masked_fill(removed, 0);
          gradients[2 * pairs] = (given.dim() == 1 ? per_sample.sum(1) : per_sample).to(weights.scalar_type());
        }
      }
      // A distance is symmetric: the teachers' gradients are those of the students with the sides changed.
      fill_gradients(student, teacher, w, gradients, 0);
      fill_gradients(teacher, student, w, gradients, pairs);
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor hint(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view reduction) {
  if (at::GradMode::is_enabled() &&
      (any_requires_grad(student) || any_requires_grad(teacher) || (weights && weights->requires_grad())))
    return Hint::apply(student, teacher, weights, reduction);
  static const auto forward_op = op<Forward>("mtkd_fast::hint_forward");
  return reduced(weighted_sum(forward_op.call(student, teacher, weights), weights), reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) { m.impl("hint", hint); }

TORCH_LIBRARY_IMPL(mtkd_fast, CPU, m) {
  m.impl("hint_forward", hint_forward);
  m.impl("hint_backward", hint_backward);
}

#ifdef MTKD_CUDA
TORCH_LIBRARY_IMPL(mtkd_fast, CUDA, m) {
  m.impl("hint_forward", hint_forward);
  m.impl("hint_backward", hint_backward);
}
#endif

}  // namespace mtkd_fast
