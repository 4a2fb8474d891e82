// The op `hint` on tensors, and its autograd.
//
// The forward writes the students' gradients for an upstream of 1 while it reads the features, 3 passes over them in
// place of 5, unless what follows. kd_rescale finishes them for another upstream: then 5 too. The cosine, which needs
// its sums first, looks at a sample twice, the second time in cache.
//   * a teacher or the weights need a gradient too,
//   * a student is fp16: see kd_autograd.cpp,
//   * a student is so small that on a GPU the launch of kd_rescale would take longer,
//   * the distance is "attention".
// Then the forward keeps one to three numbers a sample, and the backward reads the features again.
#include "autograd.h"
#include "hint.h"
#include "pairs.h"

namespace mtkd_fast {
namespace {

using Forward = Tensor(TensorList, TensorList, const OptionalTensor&, c10::string_view);
using Backward = std::vector<Tensor>(TensorList, TensorList, const Tensor&, const Tensor&, c10::List<bool>,
                                     c10::string_view);
using Fused = std::tuple<Tensor, std::vector<Tensor>>(TensorList, TensorList, const OptionalTensor&, c10::string_view,
                                                      c10::string_view, c10::List<bool>);
using AttentionForward = std::tuple<Tensor, std::vector<Tensor>>(TensorList, TensorList, const OptionalTensor&);
using AttentionBackward = std::vector<Tensor>(TensorList, TensorList, const Tensor&, c10::List<bool>);

bool dense_alike(const Tensor& f, const Tensor& g) {
  return f.strides() == g.strides() && f.is_non_overlapping_and_dense();
}

// The arguments but for what a pass writes, and the tensors that they point into: pairs of different memory layout are
// copied to a common one.
template <typename T>
struct Arguments : HintArgs<T> {
  std::vector<Tensor> student, teacher;
  OptionalTensor weights_kept;

  Arguments(TensorList students, TensorList teachers, const OptionalTensor& weights, c10::string_view name) {
    this->distance = by_name(kDistances, name, "distance");
    this->samples = students[0].size(0);
    this->pairs = static_cast<int>(students.size());
    this->kept = nullptr;
    for (int k = 0; k < this->pairs; ++k) add(students[k], teachers[k]);
    weights_kept = in_compute_dtype(weights, dtype_as<T>());
    this->weights = pair_weights<T>(weights_kept, this->pairs, this->samples);
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
  check_pairs(student, teacher);
  return with_compute_type(dtype_of_pairs(student, teacher), [&](auto zero) {
    Arguments<decltype(zero)> args(student, teacher, weights, distance);
    return body(args);
  });
}

// Room for the gradients that are needed, [N, elements] as the features lie; an empty tensor for the others.
template <typename T>
std::vector<Tensor> empty_gradients(Arguments<T>& args, const c10::List<bool>& needs) {
  std::vector<Tensor> gradients;
  for (int k = 0; k < args.pairs; ++k) {
    const Tensor& f = args.student[k];
    const bool need = needs[k];
    gradients.push_back(need ? at::empty_like(f) : at::empty({0}, f.options()));
    if (f.is_cpu()) ask_for_huge_pages(gradients[k]);
    args.pair[k].gradient = need ? gradients[k].mutable_data_ptr() : nullptr;
  }
  return gradients;
}

double mean_factor(int64_t samples, c10::string_view reduction) {
  return reduction == "mean" ? 1.0 / static_cast<double>(std::max<int64_t>(samples, 1)) : 1.0;
}

Tensor hint_forward(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance) {
  return with_arguments(student, teacher, weights, distance, [&]<typename T>(Arguments<T>& args) {
    const auto options = student[0].options().dtype(dtype_of_pairs(student, teacher));
    Tensor kept = at::empty({kept_numbers(args.distance), args.pairs, args.samples}, options);
    args.kept = kept.mutable_data_ptr<T>();
    run<HintArgs<T>>(student[0].device(), args, {args.pairs * args.samples, 2 * mean_elements(student)},
                     hint_forward_cpu, MTKD_CUDA_LAUNCHER(hint_forward_cuda));
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
    const std::vector<Tensor> gradients = empty_gradients(args, needs);
    run<HintArgs<T>>(student[0].device(), args, {args.pairs * args.samples, 3 * mean_elements(student)},
                     hint_backward_cpu, MTKD_CUDA_LAUNCHER(hint_backward_cuda));
    return gradients;
  });
}

// The loss from the distances of all pairs, in float64 and in the order of the samples.
template <typename T>
Tensor loss_of(const Tensor& distances, const HintArgs<T>& args, c10::string_view reduction) {
  const T* distance = distances.const_data_ptr<T>();
  const auto of_sample = [&](int64_t n) {
    double sum = 0;  // where a weight is 0, so is the distance
    for (int k = 0; k < args.pairs; ++k) sum += double{args.weights(k, n)} * distance[k * args.samples + n];
    return sum;
  };
  if (reduction == "none") {
    Tensor loss = at::empty({args.samples}, distances.options());
    for (int64_t n = 0; n < args.samples; ++n) loss.mutable_data_ptr<T>()[n] = static_cast<T>(of_sample(n));
    return loss;
  }
  double sum = 0;
  for (int64_t n = 0; n < args.samples; ++n) sum += of_sample(n);
  Tensor loss = at::empty({}, distances.options());
  *loss.mutable_data_ptr<T>() = static_cast<T>(sum * mean_factor(args.samples, reduction));
  return loss;
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

// The reduced loss, and the gradient of its sum in the students where it is needed.
std::tuple<Tensor, std::vector<Tensor>> hint_fused_forward(TensorList student, TensorList teacher,
                                                           const OptionalTensor& weights, c10::string_view distance,
                                                           c10::string_view reduction, c10::List<bool> needs) {
  return with_arguments(
      student, teacher, weights, distance,
      [&]<typename T>(Arguments<T>& args) -> std::tuple<Tensor, std::vector<Tensor>> {
        const Tensor distances = at::empty({args.pairs, args.samples}, student[0].options().dtype(dtype_as<T>()));
        args.kept = distances.mutable_data_ptr<T>();
        const std::vector<Tensor> gradients = empty_gradients(args, needs);
        const HintFused<T> fused{args, static_cast<T>(mean_factor(args.samples, reduction))};
        run<HintFused<T>>(student[0].device(), fused, {args.pairs * args.samples, 3 * mean_elements(student)},
                          hint_fused_cpu, MTKD_CUDA_LAUNCHER(hint_fused_cuda));
        const Tensor loss = distances.is_cpu() ? loss_of<T>(distances, args, reduction)
                                               : reduced(weighted_sum(distances, weights), reduction);
        return {loss, gradients};
      });
}

// [kept_numbers, K, N] with f and g in each other's places: a distance is symmetric, so the teachers' gradients are
// those of the students with the sides changed.
Tensor sides_changed(const Tensor& kept) {
  if (kept.sym_size(0) == 1) return kept;
  return at::stack({kept.select(0, 0), kept.select(0, 2), kept.select(0, 1)});
}

// What a forward leaves: first the distances, [1, K, N] or with what else is kept of a sample below them; then, of
// "attention", the slopes of every student and of every teacher.
variable_list forward_pass(TensorList student, TensorList teacher, const OptionalTensor& weights,
                           c10::string_view distance) {
  if (distance != "attention") {
    static const auto forward_op = op<Forward>("mtkd_fast::hint_forward");
    return {forward_op.call(student, teacher, weights, distance)};
  }
  static const auto forward_op = op<AttentionForward>("mtkd_fast::attention_forward");
  auto [distances, slopes] = forward_op.call(student, teacher, weights);
  variable_list left{distances.unsqueeze(0)};
  left.insert(left.end(), slopes.begin(), slopes.end());
  return left;
}

// The gradients of one side, `left` what the forward left, or of the other with the sides changed.
std::vector<Tensor> backward_pass(TensorList features, TensorList others, const Tensor& weights, TensorList left,
                                  const c10::List<bool>& needs, c10::string_view distance, bool changed) {
  if (distance != "attention") {
    static const auto backward_op = op<Backward>("mtkd_fast::hint_backward");
    return backward_op.call(features, others, weights, changed ? sides_changed(left[0]) : left[0], needs, distance);
  }
  static const auto backward_op = op<AttentionBackward>("mtkd_fast::attention_backward");
  const TensorList slopes = left.slice(1 + (changed ? features.size() : 0), features.size());
  return backward_op.call(features, slopes, weights, needs);
}

struct Hint : public torch::autograd::Function<Hint> {
  static Tensor forward(AutogradContext* ctx, const TensorList& student, const TensorList& teacher,
                        const OptionalTensor& weights, const c10::string_view& distance,
                        const c10::string_view& reduction) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool weights_need = weights && weights->requires_grad();
    const variable_list left = forward_pass(student, teacher, weights_need ? std::nullopt : weights, distance);
    variable_list saved{weights ? *weights : Tensor()};
    saved.insert(saved.end(), student.begin(), student.end());
    saved.insert(saved.end(), teacher.begin(), teacher.end());
    saved.insert(saved.end(), left.begin(), left.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["pairs"] = static_cast<int64_t>(student.size());
    ctx->saved_data["mean"] = reduction == "mean";
    ctx->saved_data["distance"] = std::string(distance);
    return reduced(weighted_sum(left[0].select(0, 0), weights), reduction);
  }

  static void fill_gradients(TensorList features, TensorList others, const Tensor& weights, TensorList left,
                             c10::string_view distance, bool changed, variable_list& gradients, int64_t at) {
    c10::List<bool> needs;
    for (const Tensor& f : features) needs.push_back(f.requires_grad());
    if (!any_requires_grad(features)) return;
    const std::vector<Tensor> found = backward_pass(features, others, weights, left, needs, distance, changed);
    for (size_t k = 0; k < features.size(); ++k)
      if (needs[k]) gradients[at + k] = found[k];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string name = ctx->saved_data["distance"].toStringRef();
    const int64_t pairs = ctx->saved_data["pairs"].toInt();
    const Tensor& weights = saved[0];
    const TensorList all(saved), student = all.slice(1, pairs), teacher = all.slice(1 + pairs, pairs);
    const TensorList left = all.slice(1 + 2 * pairs);
    const c10::SymInt samples = left[0].sym_size(2);
    variable_list gradients(2 * pairs + 3);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const Tensor distance = left[0].select(0, 0);
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
          gradients[2 * pairs] = as_weights((distance * up).masked_fill(removed, 0), weights);
        }
      }
      fill_gradients(student, teacher, w, left, name, false, gradients, 0);
      fill_gradients(teacher, student, w, left, name, true, gradients, pairs);
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

// On a GPU two reads of a pair, at 4 TB/s two microseconds, take longer than the launch that finishes its gradient.
constexpr size_t kFusedBytesOnGpu = size_t{4} << 20;

bool fuses(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance) {
  const bool on_cpu = student[0].is_cpu();
  if (distance == "attention") return false;
  if (!at::GradMode::is_enabled()) return true;
  for (const Tensor& f : student) {
    if (!f.requires_grad()) continue;
    if (f.scalar_type() == at::kHalf || (!on_cpu && f.sym_numel() * f.itemsize() < kFusedBytesOnGpu)) return false;
  }
  return !any_requires_grad(teacher) && !(weights && weights->requires_grad());
}

// A gradient as rows of samples, which lie one after the other, and back.
Tensor as_samples(const Tensor& gradient) {
  const c10::SymInt samples = gradient.sym_size(0), elements = gradient.sym_numel() / samples.max(1);
  return gradient.as_strided_symint({samples, elements}, {elements, 1});
}

bool is_one(const Tensor& upstream) {
  if (is_traced(upstream) || upstream.dim() > 0 || !upstream.is_cpu()) return false;
  if (upstream.is_neg() || upstream._is_zerotensor()) return false;  // its memory says otherwise
  return upstream.scalar_type() == at::kDouble ? *upstream.const_data_ptr<double>() == 1
                                               : *upstream.const_data_ptr<float>() == 1;
}

// The gradients were written in the forward.
struct FusedHint : public torch::autograd::Function<FusedHint> {
  static Tensor forward(AutogradContext* ctx, const TensorList& student, const TensorList& teacher,
                        const OptionalTensor& weights, const c10::string_view& distance,
                        const c10::string_view& reduction) {
    static const auto fused_op = op<Fused>("mtkd_fast::hint_fused_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    c10::List<bool> needs;
    for (const Tensor& f : student) needs.push_back(f.requires_grad());
    auto [loss, gradients] = fused_op.call(student, teacher, weights, distance, reduction, needs);
    variable_list saved{weights ? *weights : Tensor()};
    saved.insert(saved.end(), gradients.begin(), gradients.end());
    ctx->save_for_backward(saved);
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t pairs = static_cast<int64_t>(saved.size()) - 1;
    variable_list gradients(2 * pairs + 3);
    if (!upstreams[0].defined()) return gradients;
    const Tensor& weights = saved[0];
    const Tensor upstream = upstreams[0].detach();
    const bool as_it_is = is_one(upstream) && !torch::autograd::get_current_graph_task_keep_graph();
    Tensor scale;
    for (int64_t k = 0; k < pairs; ++k) {
      const Tensor& gradient = saved[1 + k];
      if (!ctx->needs_input_grad(k)) continue;
      if (!as_it_is && !scale.defined()) scale = scales(weights, pairs, gradient.sym_size(0), upstream);
      gradients[k] = as_it_is ? gradient : finished(gradient, upstream, scale.select(0, k));
    }
    refuse_double_backward(gradients);
    return gradients;
  }

  // [K, N]: where a weight is 0 so is the gradient, whatever the upstream.
  static Tensor scales(const Tensor& weights, int64_t pairs, const c10::SymInt& samples, const Tensor& upstream) {
    at::AutoDispatchBelowADInplaceOrView below;
    if (!weights.defined()) return at::ones_symint({samples}, upstream.options()).expand_symint({pairs, samples});
    const Tensor given = in_compute_dtype(weights.detach(), upstream.scalar_type());
    return (given.dim() == 1 ? given.unsqueeze(1) : given).expand_symint({pairs, samples}).contiguous();
  }

  // gradient·upstream
  static Tensor finished(const Tensor& gradient, const Tensor& upstream, const Tensor& scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor rows = as_samples(gradient);
    const Tensor found = finish_gradient(rows, upstream, scale);
    return found.is_same(rows) ? gradient : found.as_strided_symint(gradient.sym_sizes(), gradient.sym_strides());
  }
};

Tensor hint(TensorList student, TensorList teacher, const OptionalTensor& weights, c10::string_view distance,
            c10::string_view reduction) {
  if (fuses(student, teacher, weights, distance)) {
    if (at::GradMode::is_enabled() && any_requires_grad(student))
      return FusedHint::apply(student, teacher, weights, distance, reduction);
    static const auto fused_op = op<Fused>("mtkd_fast::hint_fused_forward");
    c10::List<bool> none;
    for (size_t k = 0; k < student.size(); ++k) none.push_back(false);
    return std::get<0>(fused_op.call(student, teacher, weights, distance, reduction, none));
  }
  if (at::GradMode::is_enabled() &&
      (any_requires_grad(student) || any_requires_grad(teacher) || (weights && weights->requires_grad())))
    return Hint::apply(student, teacher, weights, distance, reduction);
  const Tensor distances = forward_pass(student, teacher, weights, distance)[0].select(0, 0);
  return reduced(weighted_sum(distances, weights), reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) { m.impl("hint", hint); }

MTKD_PASSES(m) {
  m.impl("hint_forward", hint_forward);
  m.impl("hint_fused_forward", hint_fused_forward);
  m.impl("hint_backward", hint_backward);
}

}  // namespace mtkd_fast
