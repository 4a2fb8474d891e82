"""The distance "attention" of the op hint in Triton, and its autograd."""

import torch
from torch import Tensor

from mtkd_fast.kernels import attention as attention_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops.autograd import refuse_double_backward

ops = torch.ops.mtkd_fast


class AttentionDistance(torch.autograd.Function):
    """The distance of each sample, [K, N], differentiable in both maps."""

    @staticmethod
    def forward(ctx, weights, n_pairs, *features):
        distance, slopes = ops.attention_triton_forward(features[:n_pairs], features[n_pairs:], weights)
        ctx.save_for_backward(*features, *slopes)
        return distance

    @staticmethod
    def backward(ctx, upstream):
        n = len(ctx.saved_tensors) // 4
        student, teacher, of_student, of_teacher = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(4))
        needs = list(ctx.needs_input_grad[2:])
        return refuse_double_backward(
            None,
            None,
            *map_gradients(student, of_student, upstream, needs[:n]),
            *map_gradients(teacher, of_teacher, upstream, needs[n:]),
        )


def map_gradients(features, slopes, upstream: Tensor, needs: list[bool]) -> list[Tensor | None]:
    if not any(needs):
        return [None] * len(needs)
    found = ops.attention_triton_backward(features, slopes, upstream.detach(), needs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


implement(
    {"attention_triton_forward": attention_kernels.forward, "attention_triton_backward": attention_kernels.backward}
)
