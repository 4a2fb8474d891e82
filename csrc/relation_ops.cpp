// The op `relation` on tensors, and its autograd. Products of matrices are PyTorch's, in float64; what is O(B³), or
// elementwise in B², is relation_cpu.cpp's or relation_cuda.cu's. The forward computes the gradient for an upstream of
// 1; the backward scales it.
#include "autograd.h"
#include "relation.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, c10::string_view, bool);

constexpr double kNearest = 1e-6;  // of the distance loss

// What is kept of one side: 16 B² bytes on the CPU, 12 B² on a GPU.
struct Side {
  Tensor scale;  // from the embeddings to x
  Tensor x;      // [B, D] in float64, of mean 0 and mean square 1, which no angle sees but digits and exponents do
  Tensor nearest, planes, distances;

  explicit Side(const Tensor& embeddings) {
    x = embeddings.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
    x.sub_(x.mean(0, true));
    const Tensor size = x.norm() / std::sqrt(static_cast<double>(x.size(0)));
    scale = at::where(size > 0, size.reciprocal(), at::ones_like(size));
    x.mul_(scale);
    nearest = scale.mul(kNearest).square_();
    const int64_t b = x.size(0), pitch = relation_pitch(b);
    planes = at::empty({x.is_cpu() ? 2 : 3, pitch, pitch}, x.options().dtype(x.is_cpu() ? at::kDouble : at::kFloat));
    distances = at::empty({b}, x.options());
    const Tensor gram = x.mm(x.t());
    const RelationPlanes args{b,
                              x.size(1),
                              pitch,
                              x.const_data_ptr<double>(),
                              gram.const_data_ptr<double>(),
                              nearest.const_data_ptr<double>(),
                              planes.mutable_data_ptr(),
                              distances.mutable_data_ptr<double>()};
    run(x.device(), args, pitch, pitch, relation_planes_cpu, MTKD_CUDA_LAUNCHER(relation_planes_cuda));
  }

  int64_t count() const { return x.size(0); }
  double pairs() const { return std::max<double>(1, static_cast<double>(count()) * (count() - 1)); }
  Tensor mean_distance() const { return count() > 1 ? distances.sum() / pairs() : at::ones_like(scale); }
  Tensor poison() const { return x.sum().mul_(0); }  // 0, or NaN: of a single sample nothing else is read

  // factor·Σ_j pull_ij·(x_i − x_j), in the embeddings.
  Tensor gradient(const Tensor& pull, const Tensor& factor) const {
    return (x * pull.sum(1, true)).sub_(pull.mm(x)).mul_(factor * scale);
  }
};

using Loss = std::tuple<Tensor, Tensor>;  // and the gradient, undefined where none is wanted

Loss angle(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count(), parts = relation_angle_parts(b, student.x.is_cpu());
  const double triples = static_cast<double>(b) * b * b;
  const Tensor loss = at::empty({parts}, student.x.options());
  const Tensor pull = write_gradient ? at::empty({b, b}, student.x.options()) : Tensor();
  const RelationAngle args{b,
                           relation_pitch(b),
                           student.planes.const_data_ptr(),
                           teacher.planes.const_data_ptr(),
                           loss.mutable_data_ptr<double>(),
                           write_gradient ? pull.mutable_data_ptr<double>() : nullptr};
  run(student.x.device(), args, parts, b * b, relation_angle_cpu, MTKD_CUDA_LAUNCHER(relation_angle_cuda));
  const Tensor total = loss.sum() * (2 / triples);
  return {total, write_gradient ? student.gradient(pull, at::full_like(total, 4 / triples)) : Tensor()};
}

Loss distance(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count();
  const double squared = static_cast<double>(b) * b;
  const Tensor loss = at::empty({b}, student.x.options()), weighted = at::empty_like(loss);
  const Tensor mean = student.mean_distance(), teacher_mean = teacher.mean_distance();
  RelationDistance args{};
  args.count = b, args.pitch = relation_pitch(b);
  args.student = student.planes.const_data_ptr(), args.teacher = teacher.planes.const_data_ptr();
  args.student_nearest = student.nearest.const_data_ptr<double>();
  args.teacher_nearest = teacher.nearest.const_data_ptr<double>();
  args.student_mean = mean.const_data_ptr<double>(), args.teacher_mean = teacher_mean.const_data_ptr<double>();
  args.loss = loss.mutable_data_ptr<double>(), args.weighted = weighted.mutable_data_ptr<double>();
  const auto pass = [&] {
    run(student.x.device(), args, b, b, relation_distance_cpu, MTKD_CUDA_LAUNCHER(relation_distance_cuda));
  };
  pass();
  const Tensor total = loss.sum() / squared;
  if (!write_gradient) return {total, Tensor()};
  const Tensor drag = weighted.sum() / (mean * student.pairs()), pull = at::empty({b, b}, student.x.options());
  args.drag = drag.const_data_ptr<double>(), args.pull = pull.mutable_data_ptr<double>();
  pass();
  return {total, student.gradient(pull, mean.reciprocal().mul_(2 / squared))};
}

// The loss and its gradient, both in the compute dtype, so that the gradient is rounded once: after the upstream.
Loss relation_forward(const Tensor& student, const Tensor& teacher, c10::string_view relation, bool write_gradient) {
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student and teacher must have shape [B, D] with one B");
  const at::ScalarType dtype = compute_dtype(student, teacher);
  const Side s(student), t(teacher);
  const auto [loss, gradient] = relation == "angle" ? angle(s, t, write_gradient) : distance(s, t, write_gradient);
  return {(loss + s.poison() + t.poison()).to(dtype),
          gradient.defined() ? gradient.to(dtype) : at::empty({0}, student.options().dtype(dtype))};
}

struct Relation : public torch::autograd::Function<Relation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher,
                        const c10::string_view& relation) {
    static const auto forward_op = op<Forward>("mtkd_fast::relation_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, gradient] = forward_op.call(student, teacher, relation, true);
    ctx->save_for_backward({gradient});
    ctx->saved_data["dtype"] = static_cast<int64_t>(student.scalar_type());
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    variable_list gradients(3);
    if (!upstreams[0].defined()) return gradients;
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    gradients[0] = (ctx->get_saved_variables()[0] * upstreams[0].detach()).to(dtype);
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor relation(const Tensor& student, const Tensor& teacher, c10::string_view relation) {
  if (at::GradMode::is_enabled() && student.requires_grad()) return Relation::apply(student, teacher, relation);
  static const auto forward_op = op<Forward>("mtkd_fast::relation_forward");
  return std::get<0>(forward_op.call(student, teacher, relation, false));
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) { m.impl("relation", relation); }
TORCH_LIBRARY_IMPL(mtkd_fast, CPU, m) { m.impl("relation_forward", relation_forward); }

#ifdef MTKD_CUDA
TORCH_LIBRARY_IMPL(mtkd_fast, CUDA, m) { m.impl("relation_forward", relation_forward); }
#endif

}  // namespace mtkd_fast
