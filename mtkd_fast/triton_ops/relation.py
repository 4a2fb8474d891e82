"""The op relation in Triton, and its autograd (the twin of csrc/relation_ops.cpp)."""

import torch
from torch import Tensor

from mtkd_fast.kernels import relation as relation_kernels
from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.autograd import refuse_double_backward

ops = torch.ops.mtkd_fast

NEAREST = 1e-6  # of the distance loss


def centred(embeddings: Tensor) -> Tensor:
    """Points [B, D] in float64, of mean 0."""
    x = embeddings.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return x.sub_(x.mean(0, keepdim=True))


class Side:
    """What is kept of one side: 12 B² bytes. Its points, of mean square 1, are made again when needed."""

    def __init__(self, embeddings: Tensor):
        x = centred(embeddings)
        size = x.norm() / len(x) ** 0.5
        self.scale = torch.where(size > 0, size.reciprocal(), 1.0)  # from the embeddings to the points
        x.mul_(self.scale)
        self.poison = x.sum() * 0  # 0, or NaN: of a single sample nothing else is read
        self.nearest = (self.scale * NEAREST).square_()
        self.planes, self.distances = relation_kernels.planes(x, x @ x.T, self.nearest)
        self.count = len(x)
        self.pairs = max(1, self.count * (self.count - 1))

    def mean_distance(self) -> Tensor:
        return self.distances.sum() / self.pairs if self.count > 1 else torch.ones_like(self.scale)

    def gradient(self, embeddings: Tensor, pull: Tensor, factor: float | Tensor) -> Tensor:
        """factor·Σ_j pull_ij·(x_i − x_j), in the embeddings."""
        x = centred(embeddings).mul_(self.scale)
        towards = pull @ x
        return x.mul_(pull.sum(1, keepdim=True)).sub_(towards).mul_(factor * self.scale)


def angle(student: Side, teacher: Side, write_gradient: bool) -> tuple[Tensor, Tensor | None, float]:
    """The loss, and, where a gradient is wanted, the pulls and factor that it is made of."""
    triples = student.count**3
    loss, pull = relation_kernels.angle(student.planes, teacher.planes, student.count, write_gradient)
    return loss.sum() * (2 / triples), pull, 4 / triples


def distance(student: Side, teacher: Side, write_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same."""
    given = dict(nearest=student.nearest, nearest_t=teacher.nearest)
    given |= dict(mean=student.mean_distance(), mean_t=teacher.mean_distance())
    loss, weighted = relation_kernels.distance(student.planes, teacher.planes, student.count, **given)
    total = loss.sum() / student.count**2
    if not write_gradient:
        return total, None, None
    drag = weighted.sum() / (given["mean"] * student.pairs)
    pull = relation_kernels.distance_pull(student.planes, teacher.planes, student.count, **given, drag=drag)
    return total, pull, given["mean"].reciprocal() * (2 / student.count**2)


def relation_forward(student: Tensor, teacher: Tensor, relation: str, write_gradient: bool) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, both in the compute dtype: the gradient is rounded once, after the upstream."""
    dtype = compute_dtype(student, teacher)
    s, t = Side(student), Side(teacher)
    loss, pull, factor = (angle if relation == "angle" else distance)(s, t, write_gradient)
    loss = (loss + s.poison + t.poison).to(dtype)
    del s.planes, t.planes
    if not write_gradient:
        return loss, student.new_empty(0, dtype=dtype)
    return loss, s.gradient(student, pull, factor).to(dtype)


class Relation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, relation):
        loss, gradient = ops.relation_triton_forward(student, teacher, relation, True)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return refuse_double_backward((gradient * upstream.detach()).to(ctx.dtype), None, None)


def relation(student: Tensor, teacher: Tensor, relation: str) -> Tensor:
    """The arguments of torch.ops.mtkd_fast.relation."""
    if torch.is_grad_enabled() and student.requires_grad:
        return Relation.apply(student, teacher, relation)
    return ops.relation_triton_forward(student, teacher, relation, False)[0]


implement({"relation_triton_forward": relation_forward})
