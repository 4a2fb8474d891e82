"""The op hint in Triton, and its autograd (the twin of csrc/hint_ops.cpp).

Where only students want a gradient, and pairs are so large that two reads of one take longer than a launch, the forward
writes the gradients for an upstream of 1, and the backward is the launch that finds that out, or rescales.
"""

import torch
from torch import Tensor

from mtkd_fast.kernels import hint as hint_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.attention import AttentionDistance
from mtkd_fast.triton_ops.autograd import refuse_double_backward
from mtkd_fast.triton_ops.kd import finish_gradient

ops = torch.ops.mtkd_fast

FUSED_BYTES = 4 << 20  # of a student's features: two reads of a pair are then 8 MB or more, at 4 TB/s two microseconds


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


class FusedHint(torch.autograd.Function):
    """The reduced loss, whose gradient in the students the forward writes."""

    @staticmethod
    def forward(ctx, weights, distance, reduction, n_pairs, *features):
        student, teacher = features[:n_pairs], features[n_pairs:]
        needs = list(ctx.needs_input_grad[4 : 4 + n_pairs])
        loss, gradients = ops.hint_triton_fused_forward(student, teacher, weights, distance, reduction, needs)
        ctx.save_for_backward(weights, *gradients)
        ctx.n_samples = student[0].shape[0]
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        weights, *gradients = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if upstream is not None:
            used = scales(weights, len(gradients), ctx.n_samples, upstream)
            for k, gradient in enumerate(gradients):
                if ctx.needs_input_grad[4 + k]:
                    found[4 + k] = finished(gradient, upstream.detach(), used[k])
        return refuse_double_backward(*found)


def scales(weights: Tensor | None, n_pairs: int, n_samples: int, like: Tensor) -> Tensor:
    """[K, N]: where the weight is 0 so is the gradient, whatever the upstream."""
    if weights is None:
        return like.new_ones(n_samples).expand(n_pairs, -1)
    return weights.detach().to(like.dtype).view(n_pairs, -1).expand(-1, n_samples).contiguous()


def finished(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    """gradient · upstream, as rows of samples, which lie one after the other, and back."""
    elements = gradient[:1].numel()
    samples = gradient.as_strided((gradient.shape[0], elements), (elements, 1))
    found = finish_gradient(samples, upstream, scale)
    return gradient if found is samples else found.as_strided(gradient.shape, gradient.stride())


def fuses(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str) -> bool:
    wanted = [f for f in student if f.requires_grad]
    others = [*teacher] if weights is None else [*teacher, weights]
    return (
        torch.is_grad_enabled()
        and distance != "attention"
        and len(wanted) > 0
        and not any(x.requires_grad for x in others)
        and all(f.dtype != torch.float16 and f.numel() * f.element_size() >= FUSED_BYTES for f in wanted)
    )


def fused_forward(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str, reduction: str,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    scale = 1 / max(student[0].shape[0], 1) if reduction == "mean" else 1.0
    distances, gradients = hint_kernels.fused(student, teacher, weights, distance, scale, needs)
    return reduced(weighted_sum(distances, weights), reduction), gradients


def hint(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, distance: str, reduction: str) -> Tensor:
    """The arguments of torch.ops.mtkd_fast.hint; the gradient to the weights is PyTorch's, over [K, N] numbers."""
    if fuses(student, teacher, weights, distance):
        return FusedHint.apply(weights, distance, reduction, len(student), *student, *teacher)
    skipped = None if weights is None or weights.requires_grad else weights
    if distance == "attention":
        distances = AttentionDistance.apply(skipped, len(student), *student, *teacher)
    else:
        distances = HintDistance.apply(skipped, distance, len(student), *student, *teacher)
    return reduced(weighted_sum(distances, weights), reduction)


implement(
    {
        "hint_triton_forward": hint_kernels.forward,
        "hint_triton_backward": hint_kernels.backward,
        "hint_triton_fused_forward": fused_forward,
    }
)
