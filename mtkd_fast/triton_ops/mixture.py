"""The op mixture in Triton, and its autograd (the twin of csrc/mixture_ops.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast.kernels import mixture as mixture_kernels
from mtkd_fast.schemas.library import implement
from mtkd_fast.triton_ops import kd
from mtkd_fast.triton_ops.autograd import as_weights, refuse_double_backward

ops = torch.ops.mtkd_fast


def wants_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


class Mixture(torch.autograd.Function):
    """Σ_k w_k p_k [..., C], differentiable in the weights and the teachers."""

    @staticmethod
    def forward(ctx, temperature, weights, *teachers):
        probabilities, row_stats = ops.mixture_triton_forward(
            teachers, weights, temperature, not wants_gradient(weights)
        )
        ctx.temperature = temperature
        ctx.save_for_backward(row_stats, weights, *teachers)
        return probabilities

    @staticmethod
    def backward(ctx, upstream):
        row_stats, weights, *teachers = ctx.saved_tensors
        weights_need, *needs = ctx.needs_input_grad[1:]
        given = None if weights is None else weights.detach()
        dots, found = ops.mixture_triton_backward(
            teachers, given, upstream.detach(), row_stats, ctx.temperature, not weights_need, needs
        )
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        of_weights = summed_over_rows(dots, given) if weights_need else None
        return refuse_double_backward(None, of_weights, *gradients)


def summed_over_rows(dots: Tensor, weights: Tensor) -> Tensor:
    """[K, N] in the shape of the weights; 0 for a weight of 0 where it is not finite."""
    wide = weights[:, None] if weights.dim() == 1 else weights.reshape(dots.shape)
    return as_weights(dots.masked_fill((wide == 0) & ~dots.isfinite(), 0), weights)


def mixture(teachers: Sequence[Tensor], weights: Tensor | None, temperature: float) -> Tensor:
    if torch.is_grad_enabled() and wants_gradient(weights, *teachers):
        return Mixture.apply(temperature, weights, *teachers)
    return ops.mixture_triton_forward(teachers, weights, temperature, True)[0]


class MixtureDivergence(torch.autograd.Function):
    """KL(pbar‖q) [...], differentiable in the student and the weights, as csrc/mixture_ops.cpp says."""

    @staticmethod
    def forward(ctx, temperature, student, weights, *teachers):
        in_forward = student.requires_grad and student.dtype.itemsize >= 4
        weights_need = wants_gradient(weights)
        divergence, row_stats, gradient = ops.mixture_triton_divergence_forward(
            student, teachers, weights, temperature, not weights_need, in_forward
        )
        ctx.in_forward, ctx.temperature = in_forward, temperature
        logits = (student, *teachers) if student.requires_grad and not in_forward else ()
        ctx.save_for_backward(row_stats, gradient, weights if weights_need else None, *logits)
        return divergence

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.detach()
        row_stats, gradient, weights, *logits = ctx.saved_tensors
        of_weights = None if weights is None else kd.weight_gradient(weights, upstream, row_stats, 1.0)
        of_student = None
        if ctx.in_forward:
            of_student = kd.finish_gradient(gradient, upstream, row_stats[-1])
        elif logits:
            student, *teachers = logits
            used = row_stats[len(teachers) : 2 * len(teachers)]
            needs = [True, *[False] * len(teachers)]
            of_student = ops.kd_triton_backward(
                student, teachers, None, used, upstream, row_stats, "forward_kl", 0.0, ctx.temperature, 1.0, 0.0, 0.0,
                needs,
            )[0]  # fmt: skip
        n_teachers = len(ctx.needs_input_grad) - 3
        return refuse_double_backward(None, of_student, of_weights, *[None] * n_teachers)


def mixture_divergence(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, temperature: float
) -> Tensor:
    if torch.is_grad_enabled() and wants_gradient(student, weights):
        return MixtureDivergence.apply(temperature, student, weights, *teachers)
    return ops.mixture_triton_divergence_forward(student, teachers, weights, temperature, True, False)[0]


implement(
    {
        "mixture_triton_forward": mixture_kernels.forward,
        "mixture_triton_backward": mixture_kernels.backward,
        "mixture_triton_divergence_forward": mixture_kernels.divergence,
    }
)
