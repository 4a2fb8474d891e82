// The op `mutual` on tensors: checks that keep memory safe, allocation, reduction, and its autograd. Friendly errors
// and defaults are in mtkd_fast/checks.py and mutual.py.
//
// The forward writes every wanted gradient for an upstream of 1 (2M passes over N·C; kd_rescale finishes them), unless
// one of them is fp16, where an unscaled gradient would flush to zero (see kd_autograd.cpp), or, on a GPU, the M rows
// do not fit on chip. Then it keeps O(N·M²) numbers and the backward reads the logits again: 3M passes.
#include "autograd.h"
#include "mutual.h"
#include "row_tensors.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor, std::vector<Tensor>>(TensorList, const OptionalTensor&,
                                                                const OptionalTensor&, const OptionalTensor&, double,
                                                                double, bool, c10::string_view, bool, c10::List<bool>);
using Backward = std::vector<Tensor>(TensorList, const OptionalTensor&, const OptionalTensor&, const Tensor&, double,
                                     double, bool, c10::List<bool>);

// Fills the arguments and allocates the gradients; what the arguments point into is returned, to be kept alive.
template <typename T>
OptionalTensor fill(MutualArgs<T>& args, TensorList students, const OptionalTensor& pair_weights, double temperature,
                    double scale, bool detach_peers, const c10::List<bool>& needs, std::vector<Tensor>& gradients) {
  const int64_t count = static_cast<int64_t>(students.size());
  TORCH_CHECK_VALUE(count >= 2 && count <= kMaxTeachers, "student_logits must hold 2 to ", kMaxTeachers,
                    " students, got ", count);
  TORCH_CHECK_VALUE(static_cast<int64_t>(needs.size()) == count, "needs must hold one flag a student");
  for (const Tensor& z : students)
    TORCH_CHECK_VALUE(z.sizes() == students[0].sizes() && z.device() == students[0].device(),
                      "student_logits must have one shape and device");
  const RowGrid grid(students.vec());
  args.classes = students[0].size(-1);
  args.rows = students[0].numel() == 0 ? 0 : grid.outer * grid.inner;
  args.inner = grid.inner;
  args.students = static_cast<int>(count);
  for (int64_t i = 0; i < count; ++i) {
    args.student[i] = logits(students[i], grid, i);
    gradients.push_back(contiguous_gradient(students[i], needs[i]));
    args.gradient[i] = needs[i] ? gradients[i].mutable_data_ptr() : nullptr;
  }
  args.pair_weights = nullptr;
  args.temperature = static_cast<T>(temperature);
  args.scale = static_cast<T>(scale);
  args.detach_peers = detach_peers;
  if (!pair_weights) return std::nullopt;
  TORCH_CHECK_VALUE(pair_weights->dim() == 2 && pair_weights->size(0) == count && pair_weights->size(1) == count,
                    "pair_weights must have shape [M, M]");
  const Tensor weights = in_compute_dtype(*pair_weights, c10::CppTypeToScalarType<T>::value).contiguous();
  args.pair_weights = weights.template const_data_ptr<T>();
  return weights;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mutual_forward(TensorList students, const OptionalTensor& pair_weights,
                                                               const OptionalTensor& row_weights,
                                                               const OptionalTensor& num_items, double temperature,
                                                               double scale, bool detach_peers,
                                                               c10::string_view reduction, bool keep_stats,
                                                               c10::List<bool> needs) {
  const at::ScalarType dtype = compute_dtype(students[0], students);
  const Tensor& first = students[0];
  const at::TensorOptions options = first.options().dtype(dtype);
  return with_compute_type(dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, std::vector<Tensor>> {
    using T = decltype(zero);
    MutualForward<T> args;
    std::vector<Tensor> gradients;
    const OptionalTensor pairs = fill(args, students, pair_weights, temperature, scale, detach_peers, needs, gradients);
    OptionalTensor row_weight, items;
    if (row_weights) row_weight = flat_rows(in_compute_dtype(*row_weights, dtype), args.rows, "row_weights");
    args.row_weights = row_weight ? row_weight->template const_data_ptr<T>() : nullptr;
    if (reduction == "mean")
      items = num_items ? in_compute_dtype(*num_items, dtype)
                        : counted_rows<T>(args.rows, std::nullopt, row_weight, 0, options);
    args.items = items ? items->template const_data_ptr<T>() : nullptr;

    RowLosses<T> losses(args.rows, options);
    const Tensor row_stats = at::empty({MutualStats{args.students}.size(), args.rows}, options);
    args.row_loss = losses.data();
    args.row_stats = row_stats.mutable_data_ptr<T>();
    args.keep_stats = keep_stats;
    const bool none = reduction == "none";
    run<MutualForward<T>>(first.device(), args, {args.rows, 2 * args.classes * args.students}, mutual_forward_cpu,
                          MTKD_CUDA_LAUNCHER(mutual_forward_cuda), [&](int64_t begin, int64_t end) {
                            if (!none) losses.sum(begin, end);
                          });
    if (none) return {losses.of_rows().view(first.sizes().slice(0, first.dim() - 1)), row_stats, gradients};
    return {losses.reduced(items), row_stats, gradients};
  });
}

std::vector<Tensor> mutual_backward(TensorList students, const OptionalTensor& pair_weights,
                                    const OptionalTensor& upstream, const Tensor& row_stats, double temperature,
                                    double scale, bool detach_peers, c10::List<bool> needs) {
  const at::ScalarType dtype = compute_dtype(students[0], students);
  return with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    MutualBackward<T> args;
    std::vector<Tensor> gradients;
    const OptionalTensor pairs = fill(args, students, pair_weights, temperature, scale, detach_peers, needs, gradients);
    TORCH_CHECK_VALUE(row_stats.size(0) == MutualStats{args.students}.size() && row_stats.size(1) == args.rows &&
                          row_stats.scalar_type() == dtype,
                      "row_stats must be the forward's");
    const Tensor stats = row_stats.contiguous();
    args.row_stats = stats.const_data_ptr<T>();
    const Tensor up = upstream ? upstream_rows(*upstream, args.rows, dtype) : Tensor();
    args.upstream = up.defined() ? up.const_data_ptr<T>() : nullptr;
    args.upstream_stride = up.defined() ? up.stride(0) : 0;
    run<MutualBackward<T>>(students[0].device(), args, {args.rows, 2 * args.classes * args.students},
                           mutual_backward_cpu, MTKD_CUDA_LAUNCHER(mutual_backward_cuda));
    return gradients;
  });
}

// ------------------------------------------------------------------------------------------------------------ autograd

struct MutualOptions {
  double temperature, scale;
  bool detach_peers;
  c10::string_view reduction;
  bool stats;  // the caller wants row_stats
};

auto call_forward(TensorList students, const OptionalTensor& pair_weights, const OptionalTensor& row_weights,
                  const OptionalTensor& num_items, const MutualOptions& o, bool keep_stats,
                  const c10::List<bool>& needs) {
  static const auto forward = op<Forward>("mtkd_fast::mutual_forward");
  return forward.call(students, pair_weights, row_weights, num_items, o.temperature, o.scale, o.detach_peers,
                      o.reduction, keep_stats, needs);
}

bool fits_on_chip(TensorList students) {
  if (!students[0].is_cuda()) return true;  // on a CPU the second sweep finds the rows in cache, or is no worse
#ifdef MTKD_CUDA
  MutualArgs<float> args{};
  args.classes = students[0].sym_size(-1).guard_int(__FILE__, __LINE__);
  args.students = static_cast<int>(students.size());
  return mutual_fits_on_chip(args);
#else
  return false;
#endif
}

bool gradients_in_forward(TensorList students) {
  for (const Tensor& z : students)
    if (z.requires_grad() && z.scalar_type() == at::kHalf) return false;
  return fits_on_chip(students);
}

struct Mutual : public torch::autograd::Function<Mutual> {
  static variable_list forward(AutogradContext* ctx, const TensorList& students, const OptionalTensor& pair_weights,
                               const OptionalTensor& row_weights, const OptionalTensor& num_items,
                               const MutualOptions& o) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool in_forward = gradients_in_forward(students);
    c10::List<bool> needs;
    for (const Tensor& z : students) needs.push_back(in_forward && z.requires_grad());
    auto [loss, row_stats, gradients] =
        call_forward(students, pair_weights, row_weights, num_items, o, o.stats || !in_forward, needs);
    ctx->mark_non_differentiable({row_stats});
    ctx->set_materialize_grads(false);

    variable_list saved{row_stats, pair_weights ? *pair_weights : Tensor()};
    if (in_forward)
      saved.insert(saved.end(), gradients.begin(), gradients.end());
    else
      saved.insert(saved.end(), students.begin(), students.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["in_forward"] = in_forward;
    ctx->saved_data["temperature"] = o.temperature;
    ctx->saved_data["scale"] = o.scale;
    ctx->saved_data["detach_peers"] = o.detach_peers;
    return {loss, row_stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    static const auto backward_op = op<Backward>("mtkd_fast::mutual_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &row_stats = saved[0], &pair_weights = saved[1];
    const int64_t count = static_cast<int64_t>(saved.size()) - 2;
    variable_list gradients(count + 4);
    if (!upstreams[0].defined()) return gradients;
    const Tensor upstream = upstreams[0].detach();
    c10::List<bool> needs;
    for (int64_t i = 0; i < count; ++i) needs.push_back(ctx->needs_input_grad(i));
    if (ctx->saved_data["in_forward"].toBool()) {
      for (int64_t i = 0; i < count; ++i)
        if (needs[i]) gradients[i] = finish_gradient(saved[2 + i], upstream, row_stats.select(0, -1));
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      const std::vector<Tensor> found = backward_op.call(
          TensorList(saved.data() + 2, count), pair_weights.defined() ? OptionalTensor(pair_weights) : std::nullopt,
          upstream, row_stats, ctx->saved_data["temperature"].toDouble(), ctx->saved_data["scale"].toDouble(),
          ctx->saved_data["detach_peers"].toBool(), needs);
      for (int64_t i = 0; i < count; ++i)
        if (needs[i]) gradients[i] = found[i];
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

std::tuple<Tensor, Tensor> mutual(TensorList students, const OptionalTensor& pair_weights,
                                  const OptionalTensor& row_weights, const OptionalTensor& num_items,
                                  double temperature, double scale, bool detach_peers, c10::string_view reduction,
                                  bool keep_stats) {
  const MutualOptions options{temperature, scale, detach_peers, reduction, keep_stats};
  if (at::GradMode::is_enabled() && any_requires_grad(students)) {
    const variable_list out = Mutual::apply(students, pair_weights, row_weights, num_items, options);
    return {out[0], out[1]};
  }
  c10::List<bool> needs;
  for (size_t i = 0; i < students.size(); ++i) needs.push_back(false);
  auto [loss, row_stats, _] = call_forward(students, pair_weights, row_weights, num_items, options, keep_stats, needs);
  return {loss, row_stats};
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) { m.impl("mutual", mutual); }

MTKD_PASSES(m) {
  m.impl("mutual_forward", mutual_forward);
  m.impl("mutual_backward", mutual_backward);
}

}  // namespace mtkd_fast
