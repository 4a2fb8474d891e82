"""The op relation in Triton, and its autograd (the twin of csrc/relation_ops.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast.kernels import relation as relation_kernels
from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.autograd import refuse_double_backward

ops = torch.ops.mtkd_fast

NEAREST = 1e-6  # of the distance loss


class Samples:
    """The samples that count: all B, or n of them, a number on the device."""

    def __init__(self, embeddings: Tensor, row_mask: Tensor | None):
        self.count = len(embeddings)
        self.left_out, self.n = None, None  # [B] bool; [], at least 1
        if row_mask is not None:
            self.left_out = ~row_mask
            self.n = row_mask.sum(dtype=torch.float64).clamp_(min=1)

    def over_power(self, x: Tensor, power: int) -> Tensor:
        return x / (float(self.count) ** power if self.n is None else self.n**power)

    def over_pairs(self, x: Tensor) -> Tensor:
        if self.n is not None:
            return x / (self.n * (self.n - 1)).clamp_(min=1)
        return x / max(1, self.count * (self.count - 1))


def centred(embeddings: Tensor, samples: Samples) -> Tensor:
    """Points [B, D] in float64, of mean 0; 0 where a sample is left out."""
    x = embeddings.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if samples.left_out is None:
        return x.sub_(x.mean(0, keepdim=True))
    left_out = samples.left_out[:, None]
    x.masked_fill_(left_out, 0)
    return x.sub_(x.sum(0, keepdim=True).div_(samples.n)).masked_fill_(left_out, 0)


class Side:
    """What is kept of one side: 12 B² bytes. Its points, of mean square 1, are made again when needed."""

    def __init__(self, embeddings: Tensor, samples: Samples):
        self.samples, self.count = samples, samples.count
        x = centred(embeddings, samples)
        size = samples.over_power(x.norm().square_(), 1).sqrt_()
        self.scale = torch.where(size > 0, size.reciprocal(), 1.0)  # from the embeddings to the points
        x.mul_(self.scale)
        self.poison = x.sum() * 0  # 0, or NaN: of a single sample nothing else is read
        self.nearest = (self.scale * NEAREST).square_()
        self.planes, self.distances = relation_kernels.planes(x, x @ x.T, self.nearest)
        if samples.left_out is not None:
            self.leave_out()

    def leave_out(self) -> None:
        """D = −1 and r = 0 for the pairs that are left out: every cosine is 0, and the distances are passed over."""
        out = self.samples.left_out[:, None] | self.samples.left_out
        of_pairs = self.planes[:, : self.count, : self.count]
        of_pairs[0].masked_fill_(out, -1)
        of_pairs[1:].masked_fill_(out, 0)
        squared = of_pairs[0].double() + of_pairs[1]
        distance = torch.maximum(squared, self.nearest).sqrt_().masked_fill_(out, 0)
        distance.diagonal().zero_()
        self.distances = distance.sum(1)

    def mean_distance(self) -> Tensor:
        mean = self.samples.over_pairs(self.distances.sum())
        if self.samples.n is not None:
            return torch.where(self.samples.n > 1, mean, 1.0)
        return mean if self.count > 1 else torch.ones_like(mean)

    def gradient(self, embeddings: Tensor, pull: Tensor, factor: Tensor) -> Tensor:
        """factor·Σ_j pull_ij·(x_i − x_j), in the embeddings."""
        x = centred(embeddings, self.samples).mul_(self.scale)
        towards = pull @ x
        x.mul_(pull.sum(1, keepdim=True)).sub_(towards).mul_(factor * self.scale)
        left_out = self.samples.left_out
        return x if left_out is None else x.masked_fill_(left_out[:, None], 0)  # NaN of another is none


def angle(student: Side, teacher: Side, write_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The loss, and, where a gradient is wanted, the pulls and factor that it is made of."""
    loss, pull = relation_kernels.angle(student.planes, teacher.planes, student.count, write_gradient)
    total = loss.sum().mul_(2)
    over_power = student.samples.over_power
    return over_power(total, 3), pull, over_power(torch.full_like(total, 4), 3)


def distance(student: Side, teacher: Side, write_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same."""
    given = dict(nearest=student.nearest, nearest_t=teacher.nearest)
    given |= dict(mean=student.mean_distance(), mean_t=teacher.mean_distance())
    loss, weighted = relation_kernels.distance(student.planes, teacher.planes, student.count, **given)
    total = student.samples.over_power(loss.sum(), 2)
    if not write_gradient:
        return total, None, None
    drag = student.samples.over_pairs(weighted.sum() / given["mean"])
    pull = relation_kernels.distance_pull(student.planes, teacher.planes, student.count, **given, drag=drag)
    return total, pull, student.samples.over_power(given["mean"].reciprocal().mul_(2), 2)


def relation_forward(
    student: Tensor, teacher: Tensor, row_mask: Tensor | None, relation: str, write_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, both in the compute dtype: the gradient is rounded once, after the upstream."""
    dtype = compute_dtype(student, teacher)
    samples = Samples(student, row_mask)
    s, t = Side(student, samples), Side(teacher, samples)
    loss, pull, factor = (angle if relation == "angle" else distance)(s, t, write_gradient)
    loss = (loss + s.poison + t.poison).to(dtype)
    del s.planes, t.planes
    if not write_gradient:
        return loss, student.new_empty(0, dtype=dtype)
    return loss, s.gradient(student, pull, factor).to(dtype)


class Relation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, row_mask, relation):
        loss, gradient = ops.relation_triton_forward(student, teacher, row_mask, relation, True)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return None, None, None, None
        (gradient,) = ctx.saved_tensors
        return refuse_double_backward((gradient * upstream.detach()).to(ctx.dtype), None, None, None)


def relation(student: Tensor, teacher: Tensor, row_mask: Tensor | None, relation: str) -> Tensor:
    """The arguments of torch.ops.mtkd_fast.relation."""
    if torch.is_grad_enabled() and student.requires_grad:
        return Relation.apply(student, teacher, row_mask, relation)
    return ops.relation_triton_forward(student, teacher, row_mask, relation, False)[0]


def relation_peers_forward(
    points: Sequence[Tensor], row_mask: Tensor | None, angle_weight: float, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Of every student the mean over its peers, and its gradient. A side is made once for each student; a pair's loss
    is the same seen from either side.
    """
    dtype = compute_dtype(*points)
    samples = Samples(points[0], row_mask)
    sides = [Side(x, samples) for x in points]
    losses, pulls = [0.0] * len(points), [0.0] * len(points)
    for k, student in enumerate(sides):
        for j, peer in enumerate(sides):
            if j == k or (j < k and not needs[k]):
                continue
            loss, pull = both_relations(student, peer, angle_weight, needs[k])
            if needs[k]:
                pulls[k] = pulls[k] + pull
            if j > k:
                loss = loss + student.poison + peer.poison
                losses[k], losses[j] = losses[k] + loss, losses[j] + loss
    for side in sides:
        del side.planes
    share = 1 / (len(points) - 1)
    gradients = [
        side.gradient(x, pull, torch.full_like(loss, share)).to(dtype) if need else x.new_empty(0, dtype=dtype)
        for side, x, pull, loss, need in zip(sides, points, pulls, losses, needs, strict=True)
    ]
    return torch.stack(losses).mul_(share).to(dtype), gradients


def both_relations(
    student: Side, teacher: Side, angle_weight: float, write_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """distance + angle_weight·angle, and the pulls of the sum."""
    loss, pull, factor = distance(student, teacher, write_gradient)
    if write_gradient:
        pull.mul_(factor)
    if angle_weight == 0:
        return loss, pull
    of_angles, pull_of_angles, factor = angle(student, teacher, write_gradient)
    if write_gradient:
        pull.add_(pull_of_angles.mul_(factor), alpha=angle_weight)
    return loss + of_angles * angle_weight, pull


class RelationPeers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_mask, angle_weight, *points):
        needs = [x.requires_grad for x in points]
        losses, gradients = ops.relation_triton_peers_forward(points, row_mask, angle_weight, needs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in points]
        return losses

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.detach()
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        found = [(g * upstream[k]).to(dtype) if need else None for k, (g, dtype, need) in enumerate(saved)]
        return refuse_double_backward(None, None, *found)


def relation_peers(points: Sequence[Tensor], row_mask: Tensor | None, angle_weight: float) -> Tensor:
    """The arguments of torch.ops.mtkd_fast.relation_peers."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in points):
        return RelationPeers.apply(row_mask, angle_weight, *points)
    return ops.relation_triton_peers_forward(points, row_mask, angle_weight, [False] * len(points))[0]


implement({"relation_triton_forward": relation_forward, "relation_triton_peers_forward": relation_peers_forward})
