// The op `relation` on tensors: Gram matrices by PyTorch, triples by relation_cpu.cpp, and autograd. The forward
// computes the gradient, [B, D], for an upstream of 1; the backward scales it.
#include "autograd.h"
#include "relation.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, c10::string_view, bool);

// [B, D] in float64, without their mean, which no distance or angle sees but digits do.
Tensor centred(const Tensor& embeddings) {
  const Tensor x = embeddings.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  return x.sub_(x.mean(0, true));
}

// What is kept of one side: 16 B² bytes.
struct Side {
  Tensor gram, inverse_distance;

  Side() = default;
  explicit Side(const Tensor& embeddings) {
    const Tensor x = centred(embeddings);
    gram = x.mm(x.t());
    inverse_distance = at::empty_like(gram);
    const Points p{x.size(0), x.size(1), x.const_data_ptr<double>(), gram.const_data_ptr<double>(),
                   inverse_distance.mutable_data_ptr<double>()};
    at::parallel_for(0, p.count, 8, [&](int64_t begin, int64_t end) { relation_distances_cpu(p, begin, end); });
  }

  int64_t count() const { return gram.size(0); }
  Angles angles() const { return {gram.const_data_ptr<double>(), inverse_distance.const_data_ptr<double>()}; }
};

std::tuple<Tensor, Tensor> angle(const Tensor& embeddings, Side student, Side teacher, bool write_gradient) {
  const int64_t b = student.count();
  const double triples = static_cast<double>(b) * b * b;
  const Tensor loss = at::empty({b}, student.gram.options());
  Tensor gram, vertex, cosine;
  RelationAngle args{b, student.angles(), teacher.angles(), loss.mutable_data_ptr<double>(), nullptr, nullptr, nullptr};
  if (write_gradient) {
    gram = at::empty_like(student.gram), vertex = at::empty_like(gram), cosine = at::empty_like(gram);
    args.gram_gradient = gram.mutable_data_ptr<double>();
    args.vertex = vertex.mutable_data_ptr<double>();
    args.cosine = cosine.mutable_data_ptr<double>();
  }
  at::parallel_for(0, b, 4, [&](int64_t begin, int64_t end) { relation_angle_cpu(args, begin, end); });
  if (!write_gradient) return {loss.sum() / triples, at::empty({0}, loss.options())};
  student.gram.reset();
  teacher = Side();

  // A term c_ijk moves G_jk by n, G_ij and G_ik by −n, G_ii by n, and, through r_ij, ‖x_i − x_j‖² by −h·c·r_ij²/2.
  const Tensor by_distance = cosine.mul_(student.inverse_distance).mul_(student.inverse_distance).neg_();
  const Tensor diagonal = vertex.sum(1) + by_distance.sum(1) + by_distance.sum(0);
  gram.sub_(vertex.add_(by_distance), 2).diagonal().add_(diagonal);
  const Tensor symmetric = at::add_out(vertex, gram, gram.t());
  const Tensor gradient = symmetric.mm(centred(embeddings)).div_(triples);
  return {loss.sum() / triples, gradient.sub_(gradient.mean(0, true))};
}

// Distances over their mean; a pair closer than 1e-6 counts as 1e-6 away, without a gradient.
struct Distances {
  Tensor d, open;
  Tensor mean;
  double pairs;

  explicit Distances(const Side& side) {
    const int64_t b = side.count();
    const Tensor true_d = side.inverse_distance.reciprocal();  // inf where the points coincide
    open = (side.inverse_distance > 0).logical_and(side.inverse_distance <= 1e6);
    d = at::where(open.logical_or(true_d.isnan()), true_d, at::full_like(true_d, 1e-6)).fill_diagonal_(0);
    pairs = std::max<double>(1, static_cast<double>(b) * (b - 1));
    mean = d.sum() / pairs;
  }
};

std::tuple<Tensor, Tensor> distance(const Tensor& embeddings, const Side& student, const Side& teacher,
                                    bool write_gradient) {
  const double b = static_cast<double>(student.count());
  const Distances s(student), t(teacher);
  const Tensor x = centred(embeddings);
  if (b < 2) return {s.d.sum() + t.d.sum(), x.mul_(0)};
  const Tensor e = s.d / s.mean - t.d / t.mean, h = e.clamp(-1, 1) / (b * b);
  const Tensor loss = (h * (e - 0.5 * e.clamp(-1, 1))).sum();
  if (!write_gradient) return {loss, at::empty({0}, loss.options())};
  const Tensor by_d = h / s.mean - (h * s.d).sum() / (s.pairs * s.mean.square());
  const Tensor a = (by_d * student.inverse_distance).masked_fill(s.open.logical_not(), 0);  // ∂L/∂d² times 2
  return {loss, 2 * (a.sum(1, true) * x - a.mm(x))};
}

std::tuple<Tensor, Tensor> relation_forward(const Tensor& student, const Tensor& teacher, c10::string_view relation,
                                            bool write_gradient) {
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student and teacher must have shape [B, D] with one B");
  const at::ScalarType dtype = compute_dtype(student, teacher);
  auto [loss, gradient] = relation == "angle" ? angle(student, Side(student), Side(teacher), write_gradient)
                                              : distance(student, Side(student), Side(teacher), write_gradient);
  return {loss.to(dtype), gradient.to(student.scalar_type())};
}

struct Relation : public torch::autograd::Function<Relation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher,
                        const c10::string_view& relation) {
    static const auto forward_op = op<Forward>("mtkd_fast::relation_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, gradient] = forward_op.call(student, teacher, relation, true);
    ctx->save_for_backward({gradient});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const Tensor gradient = ctx->get_saved_variables()[0];
    variable_list gradients{(gradient * upstreams[0].detach()).to(gradient.scalar_type()), Tensor(), Tensor()};
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

TORCH_LIBRARY_IMPL(mtkd_fast, CPU, m) { m.impl("relation_forward", relation_forward); }
TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) { m.impl("relation", relation); }

}  // namespace mtkd_fast
