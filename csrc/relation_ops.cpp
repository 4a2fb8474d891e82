// The op `relation` on tensors, and its autograd. On a CPU all that is more than elementwise in B·D is
// relation_cpu.cpp's, but for the gradient of float64; on a GPU products of matrices are PyTorch's, in float64, and
// what is O(B³), or elementwise in B², is relation_cuda.cu's. The forward computes the gradient for an upstream of 1;
// the backward scales it.
#include "autograd.h"
#include "relation.h"

namespace mtkd_fast {
namespace {

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view, bool);

constexpr double kNearest = 1e-6;  // of the distance loss

// The samples that count: all B, or n of them, a number on the device.
struct Samples {
  int64_t count;
  Tensor left_out;  // [B] bool, undefined where all count
  Tensor n;         // [], at least 1

  Samples(const Tensor& embeddings, const OptionalTensor& mask) : count(embeddings.size(0)) {
    if (!mask) return;
    left_out = mask->logical_not();
    n = mask->sum(at::kDouble).clamp_min_(1);
  }
  Tensor over_power(const Tensor& x, int power) const {
    return n.defined() ? x / n.pow(power) : x / std::pow(static_cast<double>(count), power);
  }
  Tensor over_pairs(const Tensor& x) const {
    if (n.defined()) return x / (n * (n - 1)).clamp_min_(1);
    return x / std::max<double>(1, static_cast<double>(count) * (count - 1));
  }
  // [B, B], the pairs with a sample that is left out.
  Tensor pairs_left_out() const { return left_out.unsqueeze(1).logical_or(left_out.unsqueeze(0)); }
};

// Points [B, D] in float64, of mean 0: no distance sees it, but digits do. 0 where a sample is left out.
Tensor centred(const Tensor& embeddings, const Samples& samples) {
  const Tensor x = embeddings.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  if (!samples.left_out.defined()) return x.sub_(x.mean(0, true));
  const Tensor left_out = samples.left_out.unsqueeze(1);
  x.masked_fill_(left_out, 0);
  return x.sub_(x.sum(0, true).div_(samples.n)).masked_fill_(left_out, 0);
}

// What is kept of one side: 16 B² bytes on the CPU, 12 B² on a GPU. The points themselves, of mean square 1 for the
// sake of exponents, are made again when they are needed again.
struct Side {
  const Samples& samples;
  int64_t count;
  bool on_cpu, scales;
  Tensor scale;   // from the embeddings to the points; 1 unless `scales`
  Tensor poison;  // 0, or NaN: of a single sample nothing else is read
  Tensor nearest, planes, distances;

  Side(const Tensor& embeddings, const Samples& samples)
      : samples(samples),
        count(samples.count),
        on_cpu(embeddings.is_cpu()),
        scales(!on_cpu || embeddings.scalar_type() == at::kDouble) {
    on_cpu ? find_planes_on_cpu(embeddings) : find_planes(embeddings);
    if (samples.left_out.defined()) leave_out();
  }

  // Centred, and of mean square 1.
  Tensor scaled_points(const Tensor& embeddings) {
    const Tensor x = centred(embeddings, samples), size = samples.over_power(x.norm().square_(), 1).sqrt_();
    scale = at::where(size > 0, size.reciprocal(), at::ones_like(size));
    return x.mul_(scale);
  }

  // From the points as they are, unless they are float64: the squares of others neither overflow nor underflow there.
  void find_planes_on_cpu(const Tensor& embeddings) {
    const at::TensorOptions options = embeddings.options().dtype(at::kDouble);
    const Tensor x = scales ? scaled_points(embeddings) : embeddings;
    if (!scales) scale = at::ones({}, options);
    nearest = scale.mul(kNearest).square_();
    const int64_t pitch = relation_pitch(count), width = x.size(1), panels = pitch / kRelationTile;
    const Tensor packed = at::empty({pitch, width}, options), poisons = at::empty({panels}, options);
    const Tensor left_out = samples.left_out.defined() ? samples.left_out.contiguous() : Tensor();
    const RelationPanels points{count,
                                width,
                                pitch,
                                {x.const_data_ptr(), 0, x.stride(0), x.stride(1), dtype_of(x)},
                                left_out.defined() ? left_out.const_data_ptr<bool>() : nullptr,
                                packed.mutable_data_ptr<double>(),
                                poisons.mutable_data_ptr<double>()};
    run(x.device(), points, {panels, width * kRelationTile}, relation_panels_cpu, nullptr);
    poison = poisons.sum();
    planes = at::empty({2, pitch, pitch}, options);
    distances = at::empty({count}, options);
    const RelationSquares squares{width, pitch, packed.const_data_ptr<double>(), planes.mutable_data_ptr<double>()};
    run(x.device(), squares, {squares.parts(), pitch * width}, relation_squares_cpu, nullptr);
    const RelationPlanes rows{count,
                              width,
                              pitch,
                              nullptr,
                              nullptr,
                              nearest.const_data_ptr<double>(),
                              planes.mutable_data_ptr(),
                              distances.mutable_data_ptr<double>()};
    run(x.device(), rows, {pitch, 8 * pitch}, relation_planes_cpu, nullptr);
  }

  void find_planes(const Tensor& embeddings) {
    const Tensor x = scaled_points(embeddings);
    poison = x.sum().mul_(0);
    nearest = scale.mul(kNearest).square_();
    const int64_t pitch = relation_pitch(count);
    planes = at::empty({3, pitch, pitch}, x.options().dtype(at::kFloat));
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
    run(x.device(), args, {pitch, pitch}, relation_planes_cpu, MTKD_CUDA_LAUNCHER(relation_planes_cuda));
  }

  // D = −1 and r = 0 for the pairs that are left out: every cosine is 0, and the distances are passed over.
  void leave_out() {
    const Tensor out = samples.pairs_left_out(), of_pairs = planes.narrow(1, 0, count).narrow(2, 0, count);
    of_pairs.select(0, 0).masked_fill_(out, -1);
    of_pairs.narrow(0, 1, planes.size(0) - 1).masked_fill_(out, 0);
    Tensor squared = of_pairs.select(0, 0).to(at::kDouble);
    if (!on_cpu) squared.add_(of_pairs.select(0, 1));
    Tensor distance = at::maximum(squared, nearest).sqrt_().masked_fill_(out, 0);
    distance.diagonal().zero_();
    distances = distance.sum(1);
  }

  Tensor gradient_on_cpu(const Tensor& x, const Tensor& factors) const {
    const Tensor found = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    const Tensor left_out = samples.left_out.defined() ? samples.left_out.contiguous() : Tensor();
    const RelationGradient args{count,
                                x.size(1),
                                {x.const_data_ptr(), 0, x.stride(0), x.stride(1), dtype_of(x)},
                                left_out.defined() ? left_out.const_data_ptr<bool>() : nullptr,
                                factors.const_data_ptr<double>(),
                                found.mutable_data_ptr<float>()};
    run(x.device(), args, {count > 0 ? args.parts() : 0, count * count}, relation_gradient_cpu, nullptr);
    return found;
  }

  Tensor mean_distance() const {
    const Tensor mean = samples.over_pairs(distances.sum());
    if (samples.n.defined()) return at::where(samples.n > 1, mean, at::ones_like(mean));
    return count > 1 ? mean : at::ones_like(mean);
  }

  // factor·Σ_j pull_ij·(x_i − x_j), in the embeddings, as a product of (the sums of the rows − pull) with the points.
  // It takes the place of `pull`.
  Tensor gradient(const Tensor& embeddings, const Tensor& pull, const Tensor& factor, at::ScalarType dtype) const {
    const Tensor sums = pull.sum(1);
    pull.neg_().diagonal().copy_(sums);
    pull.mul_(factor * scale);
    if (on_cpu && dtype == at::kFloat) return gradient_on_cpu(embeddings, pull);
    const Tensor found = pull.mm(centred(embeddings, samples).mul_(scale));
    if (samples.left_out.defined()) found.masked_fill_(samples.left_out.unsqueeze(1), 0);  // NaN of another is none
    return found.to(dtype);
  }
};

// The loss, and, where a gradient is wanted, what it is made of.
struct Found {
  Tensor loss, pull, factor;
};

Found angle(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count, parts = relation_angle_parts(b, student.on_cpu);
  const at::TensorOptions options = student.distances.options();
  const Tensor loss = at::empty({parts}, options), pull = write_gradient ? at::empty({b, b}, options) : Tensor();
  const RelationAngle args{b,
                           relation_pitch(b),
                           student.planes.const_data_ptr(),
                           teacher.planes.const_data_ptr(),
                           loss.mutable_data_ptr<double>(),
                           write_gradient ? pull.mutable_data_ptr<double>() : nullptr};
  run(loss.device(), args, {parts, b * b}, relation_angle_cpu, MTKD_CUDA_LAUNCHER(relation_angle_cuda));
  const Tensor total = loss.sum().mul_(2);
  return {student.samples.over_power(total, 3), pull, student.samples.over_power(at::full_like(total, 4), 3)};
}

Found distance(const Side& student, const Side& teacher, bool write_gradient) {
  const int64_t b = student.count;
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
    run(loss.device(), args, {b, b}, relation_distance_cpu, MTKD_CUDA_LAUNCHER(relation_distance_cuda));
  };
  pass();
  const Tensor total = student.samples.over_power(loss.sum(), 2);
  if (!write_gradient) return {total, Tensor(), Tensor()};
  const Tensor drag = student.samples.over_pairs(weighted.sum() / mean), pull = at::empty({b, b}, loss.options());
  args.drag = drag.const_data_ptr<double>(), args.pull = pull.mutable_data_ptr<double>();
  pass();
  return {total, pull, student.samples.over_power(mean.reciprocal().mul_(2), 2)};
}

// The loss and its gradient, both in the compute dtype, so that the gradient is rounded once: after the upstream.
std::tuple<Tensor, Tensor> relation_forward(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
                                            c10::string_view relation, bool write_gradient) {
  TORCH_CHECK_VALUE(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0),
                    "student and teacher must have shape [B, D] with one B");
  const at::ScalarType dtype = compute_dtype(student, teacher);
  const Samples samples(student, mask);
  Side s(student, samples), t(teacher, samples);
  const Found found = relation == "angle" ? angle(s, t, write_gradient) : distance(s, t, write_gradient);
  const Tensor loss = (found.loss + s.poison + t.poison).to(dtype);
  s.planes.reset(), t.planes.reset();
  if (!write_gradient) return {loss, at::empty({0}, student.options().dtype(dtype))};
  return {loss, s.gradient(student, found.pull, found.factor, dtype)};
}

struct Relation : public torch::autograd::Function<Relation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
                        const c10::string_view& relation) {
    static const auto forward_op = op<Forward>("mtkd_fast::relation_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, gradient] = forward_op.call(student, teacher, mask, relation, true);
    ctx->save_for_backward({gradient});
    ctx->saved_data["dtype"] = static_cast<int64_t>(student.scalar_type());
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    variable_list gradients(4);
    if (!upstreams[0].defined()) return gradients;
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    gradients[0] = (ctx->get_saved_variables()[0] * upstreams[0].detach()).to(dtype);
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor relation(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask, c10::string_view relation) {
  if (at::GradMode::is_enabled() && student.requires_grad()) return Relation::apply(student, teacher, mask, relation);
  static const auto forward_op = op<Forward>("mtkd_fast::relation_forward");
  return std::get<0>(forward_op.call(student, teacher, mask, relation, false));
}

// ---------- students that learn from one another

using PeersForward = std::tuple<Tensor, std::vector<Tensor>>(TensorList, const OptionalTensor&, double,
                                                             c10::List<bool>);

// distance + angle_weight·angle of one side to another; its pull is that of the sum.
Found both_relations(const Side& student, const Side& teacher, double angle_weight, bool write_gradient) {
  Found found = distance(student, teacher, write_gradient);
  if (write_gradient) found.pull.mul_(found.factor);
  if (angle_weight == 0) return found;
  const Found angles = angle(student, teacher, write_gradient);
  found.loss = found.loss + angles.loss * angle_weight;
  if (write_gradient) found.pull.add_(angles.pull.mul_(angles.factor), angle_weight);
  return found;
}

// Students that learn from one another: of every student the mean over its peers, and its gradient. A side is made once
// for each student, where a loss a pair would make it 4·(M − 1) times; a pair's loss is the same seen from either side.
std::tuple<Tensor, std::vector<Tensor>> relation_peers_forward(TensorList points, const OptionalTensor& mask,
                                                               double angle_weight, c10::List<bool> needs) {
  TORCH_CHECK_VALUE(points.size() > 1, "points must hold 2 students or more");
  for (const Tensor& x : points)
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == points[0].size(0), "points must have shape [B, D] with one B");
  const at::ScalarType dtype = compute_dtype(points[0], points);
  const int64_t students = static_cast<int64_t>(points.size());
  const Samples samples(points[0], mask);
  std::vector<Side> sides;
  sides.reserve(students);
  for (const Tensor& x : points) sides.emplace_back(x, samples);

  std::vector<Tensor> losses(students), pulls(students), gradients;
  const auto add = [](Tensor& sum, const Tensor& x) { sum = sum.defined() ? sum + x : x; };
  for (int64_t k = 0; k < students; ++k) {
    for (int64_t j = 0; j < students; ++j) {
      if (j == k || (j < k && !needs[k])) continue;
      const Found found = both_relations(sides[k], sides[j], angle_weight, needs[k]);
      if (needs[k]) add(pulls[k], found.pull);
      if (j < k) continue;
      const Tensor loss = found.loss + sides[k].poison + sides[j].poison;
      add(losses[k], loss);
      add(losses[j], loss);
    }
  }
  for (Side& side : sides) side.planes.reset();
  const double share = 1.0 / static_cast<double>(students - 1);
  for (int64_t k = 0; k < students; ++k) {
    const Tensor none = at::empty({0}, points[k].options().dtype(dtype));
    gradients.push_back(needs[k] ? sides[k].gradient(points[k], pulls[k], at::full_like(losses[k], share), dtype)
                                 : none);
    pulls[k].reset();
  }
  return {at::stack(losses).mul_(share).to(dtype), gradients};
}

struct RelationPeers : public torch::autograd::Function<RelationPeers> {
  static Tensor forward(AutogradContext* ctx, const TensorList& points, const OptionalTensor& mask,
                        double angle_weight) {
    static const auto forward_op = op<PeersForward>("mtkd_fast::relation_peers_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    c10::List<bool> needs;
    c10::List<int64_t> dtypes;
    for (const Tensor& x : points) {
      needs.push_back(x.requires_grad());
      dtypes.push_back(static_cast<int64_t>(x.scalar_type()));
    }
    auto [losses, gradients] = forward_op.call(points, mask, angle_weight, needs);
    ctx->save_for_backward(gradients);
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["dtypes"] = dtypes;
    return losses;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const variable_list saved = ctx->get_saved_variables();
    const auto needs = ctx->saved_data["needs"].toBoolList();
    const auto dtypes = ctx->saved_data["dtypes"].toIntList();
    const Tensor upstream = upstreams[0].detach();
    variable_list gradients(saved.size() + 2);
    for (size_t k = 0; k < saved.size(); ++k) {
      if (!needs[k]) continue;
      gradients[k] =
          (saved[k] * upstream.select(0, static_cast<int64_t>(k))).to(static_cast<at::ScalarType>(dtypes[k]));
    }
    refuse_double_backward(gradients);
    return gradients;
  }
};

Tensor relation_peers(TensorList points, const OptionalTensor& mask, double angle_weight) {
  if (at::GradMode::is_enabled() && any_requires_grad(points)) return RelationPeers::apply(points, mask, angle_weight);
  static const auto forward_op = op<PeersForward>("mtkd_fast::relation_peers_forward");
  c10::List<bool> needs;
  for (size_t k = 0; k < points.size(); ++k) needs.push_back(false);
  return std::get<0>(forward_op.call(points, mask, angle_weight, needs));
}

}  // namespace

TORCH_LIBRARY_IMPL(mtkd_fast, CompositeImplicitAutograd, m) {
  m.impl("relation", relation);
  m.impl("relation_peers", relation_peers);
}

MTKD_PASSES(m) {
  m.impl("relation_forward", relation_forward);
  m.impl("relation_peers_forward", relation_peers_forward);
}

}  // namespace mtkd_fast
