// The op `hint` on tensors, and its autograd.
#include "autograd.h"
#include "hint.h"

namespace mtkd_fast {
namespace {

using Forward = Tensor(TensorList, TensorList, const OptionalTensor&, c10::string_view);
using Backward = std::vector<Tensor>(TensorList, TensorList, const Tensor&, const Tensor&, c10::List<bool>,
                                     c10::string_view);

bool dense_alike(const Tensor& f, const Tensor& g) {
  return f.strides() == g.strides() && f.is_non_overlapping_and_dense();
}

Distance distance_by_name(c10::string_view name) {
  for (const NamedDistance& entry : kDistances)
    if (name == entry.name) return entry.value;
  TORCH_CHECK_VALUE(false, "distance is not known to the fused kernels: '", name, "'");
}

at::ScalarType dtype_of_pairs(TensorList student, TensorList teacher) {
  const bool wide =
      compute_dtype(student[0], student) == at::kDouble || compute_dtype(teacher[0], teacher) == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// The arguments but for what a pass writes, and the tensors that they point into: pairs of different memory layout are
// copied to a common one.
template <typename T>
struct Arguments : HintArgs<T> {
  std::vector<Tensor> student, teacher;
  Tensor weights_kept;

  Arguments(TensorList students, TensorList teachers, const OptionalTensor& weights, c10::string_view name) {
    this->distance = distance_by_name(name);
    this->samples = students[0].size(0);
    this->pairs = static_cast<int>(students.size());
    this->kept = nullptr;
    for (int k = 0; k < this->pairs; ++k) add(students[k], teachers[k]);
    this->weights = nullptr;
    this->weights_pair_stride = this->weights_sample_stride = 0;
    if (!weights) return;
    weights_kept = in_compute_dtype(*weights, std::is_same_v<T, double> ? at::kDouble : at::kFloat);
    const Tensor& w = weights_kept;
    TORCH_CHECK_VALUE(w.size(0) == this->pairs && (w.dim() == 1 || (w.dim() == 2 && w.size(1) == this->samples)),
                      "weights must have shape [K] or [K, N]");
    this->weights = w.template const_data_ptr<T>();
    this->weights_pair_stride = w.stride(0);
    this->weights_sample_stride = w.dim() == 1 ? 0 : w.stride(1);
  }

 private:
  void add(Tensor f, Tensor g) {
    TORCH_CHECK_VALUE(f.sizes() == g.sizes() && f.size(0) == this->samples && f.device() == g.device(),
                      "each pair of features must have one shape and device, and all pairs as many samples");
    if (!(dense_alike(f, g) && (f.dim() == 1 || f.size(0) <= 1 || f.stride(0) * f.size(0) == f.numel())))
      f = f.contiguous(), g = g.contiguous();
    const int64_t elements = this->samples ? f.numel() / this->samples : 0;
    this->pair[student.size()] = {f.const_data_ptr(), g.const_data_ptr(), elements,    elements,
                                  elements,           dtype_of(f),        dtype_of(g), nullptr};
    student.push_back(std::move(f));
    teacher.push_back(std::move(g));
  }
};

// Calls body with the arguments of a pass, in float or in double.
template <typename Body>
auto with_arguments(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance,
                    Body body) {
  TORCH_CHECK_VALUE(!student.empty() && student.size() == teacher.size() && student.size() <= kMaxTeachers,
                    "student_features and teacher_features must hold 1 to ", kMaxTeachers, " pairs");
  return with_compute_type(dtype_of_pairs(student, teacher), [&](auto zero) {
    Arguments<decltype(zero)> args(student, teacher, weights, distance);
    return body(args);
  });
}

int64_t mean_elements(TensorList features) {
  int64_t elements = 0;
  for (const Tensor& f : features) elements += f.numel();
  return elements / std::max<int64_t>(1, static_cast<int64_t>(features.size()) * features[0].size(0));
}

Tensor hint_forward(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance) {
  return with_arguments(student, teacher, weights, distance, [&]<typename T>(Arguments<T>& args) {
    const auto options = student[0].options().dtype(dtype_of_pairs(student, teacher));
    Tensor kept = at::empty({kept_numbers(args.distance), args.pairs, args.samples}, options);
    args.kept = kept.mutable_data_ptr<T>();
    run<HintArgs<T>>(student[0].device(), args, args.pairs * args.samples, 2 * mean_elements(student), hint_forward_cpu,
                     MTKD_CUDA_LAUNCHER(hint_forward_cuda));
    return kept;
  });
}

std::vector<Tensor> hint_backward(TensorList student, TensorList teacher, const Tensor& weights, const Tensor& kept,
                                  c10::List<bool> needs, c10::string_view distance) {
  return with_arguments(student, teacher, weights, distance, [&]<typename T>(Arguments<T>& args) {
    const Tensor numbers = kept.contiguous();
    TORCH_CHECK_VALUE(numbers.numel() == kept_numbers(args.distance) * args.pairs * args.samples,
                      "kept must be what the forward returned");
    args.kept = const_cast<T*>(numbers.const_data_ptr<T>());
    std::vector<Tensor> gradients;
    for (int k = 0; k < args.pairs; ++k) {
      const Tensor& f = args.student[k];
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

// [kept_numbers, K, N] with f and g in each other's places: a distance is symmetric, so the teachers' gradients are
// those of the students with the sides changed.
Tensor sides_changed(const Tensor& kept) {
  if (kept.sym_size(0) == 1) return kept;
  return at::stack({kept.select(0, 0), kept.select(0, 2), kept.select(0, 1)});
}

struct Hint : public torch::autograd::Function<Hint> {
  static Tensor forward(AutogradContext* ctx, const TensorList& student, const TensorList& teacher,
                        const OptionalTensor& weights, const c10::string_view& distance,
                        const c10::string_view& reduction) {
    static const auto forward_op = op<Forward>("mtkd_fast::hint_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    const bool weights_need = weights && weights->requires_grad();
    const Tensor kept = forward_op.call(student, teacher, weights_need ? std::nullopt : weights, distance);
    variable_list saved{kept, weights ? *weights : Tensor()};
    saved.insert(saved.end(), student.begin(), student.end());
    saved.insert(saved.end(), teacher.begin(), teacher.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["mean"] = reduction == "mean";
    ctx->saved_data["distance"] = std::string(distance);
    return reduced(weighted_sum(kept.select(0, 0), weights), reduction);
  }

  static void fill_gradients(TensorList features, TensorList others, const Tensor& weights, const Tensor& kept,
                             c10::string_view distance, variable_list& gradients, int64_t at) {
    static const auto backward_op = op<Backward>("mtkd_fast::hint_backward");
    c10::List<bool> needs;
    for (const Tensor& f : features) needs.push_back(f.requires_grad());
    if (!any_requires_grad(features)) return;
    const std::vector<Tensor> found = backward_op.call(features, others, weights, kept, needs, distance);
    for (size_t k = 0; k < features.size(); ++k)
      if (needs[k]) gradients[at + k] = found[k];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &kept = saved[0], &weights = saved[1];
    const std::string name = ctx->saved_data["distance"].toStringRef();
    const int64_t pairs = (static_cast<int64_t>(saved.size()) - 2) / 2;
    const c10::SymInt samples = kept.sym_size(2);
    const TensorList student(saved.data() + 2, pairs), teacher(saved.data() + 2 + pairs, pairs);
    variable_list gradients(2 * pairs + 3);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const Tensor distance = kept.select(0, 0);
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
      fill_gradients(student, teacher, w, kept, name, gradients, 0);
      fill_gradients(teacher, student, w, sides_changed(kept), name, gradients, pairs);
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor hint(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance,
            c10::string_view reduction) {
  if (at::GradMode::is_enabled() &&
      (any_requires_grad(student) || any_requires_grad(teacher) || (weights && weights->requires_grad())))
    return Hint::apply(student, teacher, weights, distance, reduction);
  static const auto forward_op = op<Forward>("mtkd_fast::hint_forward");
  const Tensor kept = forward_op.call(student, teacher, weights, distance);
  return reduced(weighted_sum(kept.select(0, 0), weights), reduction);
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
