// The op `relation` on tensors, and its autograd. Products of matrices are PyTorch's, in float64; what is O(B³), or
// elementwise in B², is relation_cpu.cpp's or relation_cuda.cu's. The forward computes the gradient for an upstream of
// 1; the backward scales it.
#include "autograd.h"
#include "relation.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, c10::string_view, bool);

constexpr double kNearest = 1e-6;  // of the distance loss

// Points [B, D] in float64, of mean 0: no distance sees it, but digits do.
Tensor centred(const Tensor& embeddings) {
  const Tensor x = embeddings.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  return x.sub_(x.mean(0, true));
}

// What is kept of one side: 16 B² bytes on the CPU, 12 B² on a GPU. The points themselves, of mean square 1 for the
// sake of exponents, are made again when they are needed again.
struct Side {
  int64_t count;
  bool on_cpu;
  Tensor scale;   // from the embeddings to the points
  Tensor poison;  // 0, or NaN: of a single sample nothing else is read
  Tensor nearest, planes, distances;

  explicit Side(const Tensor& embeddings) : count(embeddings.size(0)), on_cpu(embeddings.is_cpu()) {
    const Tensor x = centred(embeddings), size = x.norm() / std::sqrt(static_cast<double>(count));
    scale = at::where(size > 0, size.reciprocal(), at::ones_like(size));
    x.mul_(scale);
    poison = x.sum().mul_(0);
    nearest = scale.mul(kNearest).square_();
    const int64_t pitch = relation_pitch(count);
    planes = at::empty({on_cpu ? 2 : 3, pitch, pitch}, x.options().dtype(on_cpu ? at::kDouble : at::kFloat));
    distances = at::empty({count}, x.options());
    const Tensor gram = x.mm(x.t());
    const RelationPlanes args{count,
                              x.size(1),
                              pitch,
                              x.const_data_ptr<double>(),
                              gram.const_data_ptr<double>(),
                              nearest.const_data_ptr<double>(),
                              planes.mutable_data_ptr(),
                              distances.mutable_data_ptr<double>()};
    run(x.device(), args, pitch, pitch, relation_planes_cpu, MTKD_CUDA_LAUNCHER(relation_planes_cuda));
  }

  double pairs() const { return std::max<double>(1, static_cast<double>(count) * (count - 1)); }
  Tensor mean_distance() const { return count > 1 ? distances.sum() / pairs() : at::ones_like(scale); }

  // factor·Σ_j pull_ij·(x_i − x_j), in the embeddings.
  Tensor gradient(const Tensor& embeddings, const Tensor& pull, const Tensor& factor) const {
    const Tensor x = centred(embeddings).mul_(scale), towards = pull.mm(x);
    return x.mul_(pull.sum(1, true)).sub_(towards).mul_(factor * scale);
  }
};

// The loss, and, where a gradient is wanted, what it is made of.
struct Found {
  Tensor loss, pull, factor;
};

Found angle(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count, parts = relation_angle_parts(b, student.on_cpu);
  const double triples = static_cast<double>(b) * b * b;
  const at::TensorOptions options = student.distances.options();
  const Tensor loss = at::empty({parts}, options), pull = write_gradient ? at::empty({b, b}, options) : Tensor();
  const RelationAngle args{b,
                           relation_pitch(b),
                           student.planes.const_data_ptr(),
                           teacher.planes.const_data_ptr(),
                           loss.mutable_data_ptr<double>(),
                           write_gradient ? pull.mutable_data_ptr<double>() : nullptr};
  run(loss.device(), args, parts, b * b, relation_angle_cpu, MTKD_CUDA_LAUNCHER(relation_angle_cuda));
  const Tensor total = loss.sum() * (2 / triples);
  return {total, pull, at::full_like(total, 4 / triples)};
}

Found distance(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count;
  const double squared = static_cast<double>(b) * b;
  const Tensor loss = at::empty({b}, student.distances.options()), weighted = at::empty_like(loss);
  const Tensor mean = student.mean_distance(), teacher_mean = teacher.mean_distance();
  RelationDistance args{};
  args.count = b, args.pitch = relation_pitch(b);
  args.student = student.planes.const_data_ptr(), args.teacher = teacher.planes.const_data_ptr();
  args.student_nearest = student.nearest.const_data_ptr<double>();
  args.teacher_nearest = teacher.nearest.const_data_ptr<double>();
  args.student_mean = mean.const_data_ptr<double>(), args.teacher_mean = teacher_mean.const_data_ptr<double>();
  args.loss = loss.mutable_data_ptr<double>(), args.weighted = weighted.mutable_data_ptr<double>();
  const auto pass = [&] {
    run(loss.device(), args, b, b, relation_distance_cpu, MTKD_CUDA_LAUNCHER(relation_distance_cuda));
  };
  pass();
  const Tensor total = loss.sum() / squared;
  if (!write_gradient) return {total, Tensor(), Tensor()};
  const Tensor drag = weighted.sum() / (mean * student.pairs()), pull = at::empty({b, b}, loss.options());
  args.drag = drag.const_data_ptr<double>(), args.pull = pull.mutable_data_ptr<double>();
  pass();
  return {total, pull, mean.reciprocal().mul_(2 / squared)};
}

// The loss and its gradient, both in the compute dtype, so that the gradient is rounded once: after the upstream.
std::tuple<Tensor, Tensor> relation_forward(const Tensor& student, const Tensor& teacher, c10::string_view relation,
                                            bool write_gradient) {
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student and teacher must have shape [B, D] with one B");
  const at::ScalarType dtype = compute_dtype(student, teacher);
  Side s(student), t(teacher);
  const Found found = relation == "angle" ? angle(s, t, write_gradient) : distance(s, t, write_gradient);
  const Tensor loss = (found.loss + s.poison + t.poison).to(dtype);
  s.planes.reset(), t.planes.reset();
  if (!write_gradient) return {loss, at::empty({0}, student.options().dtype(dtype))};
  return {loss, s.gradient(student, found.pull, found.factor).to(dtype)};
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
MTKD_PASSES(m) { m.impl("relation_forward", relation_forward); }

}  // namespace mtkd_fast
