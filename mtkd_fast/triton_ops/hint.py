"""The op hint in Triton, and its autograd (the twin of csrc/hint_ops.cpp)."""

import torch
from torch import Tensor

from mtkd_fast.kernels import hint as hint_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.attention import AttentionDistance
from mtkd_fast.triton_ops.autograd import refuse_double_backward

ops = torch.ops.mtkd_fast


def weighted_sum(distance: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_k w_k · distance_k [N], where a weight of 0 removes its term, whatever the distance."""
    if weights is None:
        return distance.sum(0)
    w = (weights[:, None] if weights.dim() == 1 else weights).to(distance.dtype)
    return (w * distance.masked_fill((w == 0) & ~distance.isfinite(), 0)).sum(0)


def reduced(per_sample: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (max(per_sample.numel(), 1) if reduction == "mean" else 1)


class HintDistance(torch.autograd.Function):
    """The distance of each sample, [K, N], differentiable in both features."""

    @staticmethod
    def forward(ctx, weights, distance, n_pairs, *features):
        student, teacher = features[:n_pairs], features[n_pairs:]
        kept = ops.hint_triton_forward(student, teacher, weights, distance)
        ctx.save_for_backward(kept, *features)
        ctx.distance = distance
        return kept[0].clone()

    @staticmethod
    def backward(ctx, upstream):
        kept, *features = ctx.saved_tensors
        n_pairs = len(features) // 2
        student, teacher = features[:n_pairs], features[n_pairs:]
        needs = list(ctx.needs_input_grad[3:])
        # A distance is symmetric: the teachers' gradients are those of the students with the sides changed.
        changed = kept if len(kept) == 1 else torch.stack([kept[0], kept[2], kept[1]])
        of_student = feature_gradients(student, teacher, upstream, kept, needs[:n_pairs], ctx.distance)
        of_teacher = feature_gradients(teacher, student, upstream, changed, needs[n_pairs:], ctx.distance)
        return refuse_double_backward(None, None, None, *of_student, *of_teacher)


def feature_gradients(
    features, others, upstream: Tensor, kept: Tensor, needs: list[bool], distance: str
) -> list[Tensor | None]:
    if not any(needs):
        return [None] * len(needs)
    found = ops.hint_triton_backward(features, others, upstream.detach(), kept, needs, distance)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def hint(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str, reduction: str) -> Tensor:
    """The arguments of torch.ops.mtkd_fast.hint; the gradient to the weights is PyTorch's, over [K, N] numbers."""
    skipped = None if weights is None or weights.requires_grad else weights
    if distance == "attention":
        distances = AttentionDistance.apply(skipped, len(student), *student, *teacher)
    else:
        distances = HintDistance.apply(skipped, distance, len(student), *student, *teacher)
    return reduced(weighted_sum(distances, weights), reduction)


implement({"hint_triton_forward": hint_kernels.forward, "hint_triton_backward": hint_kernels.backward})
