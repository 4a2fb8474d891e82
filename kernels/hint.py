"""The op hint: K pairs of features, the distance of each sample, and its gradient (csrc/hint.h).

A program per sample and pair: two reads forward, two reads and one write backward; or two reads and one write in all,
where the forward writes the gradient for an upstream of 1. For it the cosine reads a sample again, as it does forward
one of extreme norm. A sample's elements are read in the order in which they lie, which must be one dense order on both
sides of a pair; other pairs are copied to one first.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distances import COSINE, DISTANCES, cosine_from_sums, inverse_norm, kept_numbers, rho, scale_for, slope
from .kd import Launch
from .logits import MAX_TUPLE, check_dtypes, in_units
from .rows import SPECIALIZED, per_teacher_strides

ELEMENTS_PER_WARP = 512  # of one sample


@triton.jit
def weight_of(weights, pair_stride, sample_stride, k, sample):
    if weights is None:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.load(weights + pair_stride.to(tl.int64) * k + sample * sample_stride)


@triton.jit
def load_tile(features, sample, elements, i, mask):
    return tl.load(features + sample * elements + i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sums_of(student, teacher, sample, n, end, scale_f, scale_g, DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """Over the elements before `end`: Σ ρ(f − g) and two zeros, or, of the scaled features, Σ f², Σ g² and Σ f·g."""
    first = tl.zeros((BLOCK,), tl.float32)
    if DISTANCE == COSINE:
        gg, fg = first, first
    for start in range(0, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = load_tile(student, sample, n, i, i < n)
        g = load_tile(teacher, sample, n, i, i < n)
        if DISTANCE == COSINE:
            f, g = f * scale_f, g * scale_g
            first, gg, fg = first + f * f, gg + g * g, fg + f * g
        else:
            first += rho(f - g, DISTANCE)
    if DISTANCE == COSINE:
        return tl.sum(first, 0), tl.sum(gg, 0), tl.sum(fg, 0)
    else:
        return tl.sum(first, 0), 0.0, 0.0


@triton.jit
def cosine_of(student, teacher, sample, n, end, BLOCK: tl.constexpr):
    """cos(f, g), ‖f‖ and ‖g‖, from the elements before `end`; a sample of extreme norm is scaled and read again."""
    ff, gg, fg = sums_of(student, teacher, sample, n, end, 1.0, 1.0, COSINE, BLOCK)
    scale_f, scale_g = scale_for(ff), scale_for(gg)
    again = (scale_f != 1.0) | (scale_g != 1.0)
    sums = sums_of(student, teacher, sample, n, tl.where(again, end, 0), scale_f, scale_g, COSINE, BLOCK)
    ff, gg, fg = tl.where(again, sums[0], ff), tl.where(again, sums[1], gg), tl.where(again, sums[2], fg)
    return cosine_from_sums(ff, gg, fg, scale_f, scale_g)


@triton.jit
def slopes_of_cosine(distance, norm_f, norm_g, weight):
    """What weight·(c·f/‖f‖ − g/‖g‖)/‖f‖ has before f, g and the parenthesis."""
    inverse = inverse_norm(norm_f)
    return (1.0 - distance) * inverse, inverse_norm(norm_g), weight * inverse


@triton.jit
def write_gradient(
    student, teacher, gradient, sample, n, weight, of_f, of_g, factor, DISTANCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a sample, and Σ ρ(f − g) by the way; zeros, and nothing read, where the weight is 0."""
    total = tl.zeros((BLOCK,), tl.float32)
    readable = tl.where(weight != 0, n, 0)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = load_tile(student, sample, n, i, i < readable)
        g = load_tile(teacher, sample, n, i, i < readable)
        if DISTANCE == COSINE:
            by_element = of_f * f - of_g * g
        else:
            by_element = slope(f - g, DISTANCE)
            total += rho(f - g, DISTANCE)
        found = tl.where(weight != 0, factor * by_element, 0.0).to(gradient.dtype.element_ty)
        tl.store(gradient + sample * n + i, found, mask=i < n)
    return tl.sum(total, 0)


@triton.jit(**SPECIALIZED)
def hint_forward(
    students, teachers, elements, weights, weights_pair_stride, weights_sample_stride, kept, kept_stride, n_rows,
    DISTANCE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is kept of a sample, `kept_stride` apart; 0, and nothing read, where the weight is 0."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if tl.program_id(1) == k:
            n = in_units(elements[k], UNIT)
            used = weight_of(weights, weights_pair_stride, weights_sample_stride, k, sample) != 0
            end = tl.where(used, n, 0)
            to = kept + sample + n_rows.to(tl.int64) * k
            if DISTANCE == COSINE:
                cosine, norm_f, norm_g = cosine_of(students[k], teachers[k], sample, n, end, BLOCK)
                tl.store(to, tl.where(used, 1.0 - cosine, 0.0))
                tl.store(to + kept_stride.to(tl.int64), norm_f)
                tl.store(to + kept_stride.to(tl.int64) * 2, norm_g)
            else:
                total, _, _ = sums_of(students[k], teachers[k], sample, n, end, 1.0, 1.0, DISTANCE, BLOCK)
                tl.store(to, total / n)


@triton.jit(**SPECIALIZED)
def hint_backward(
    students, teachers, gradients, elements, weights, weights_pair_stride, weights_sample_stride,
    kept, kept_stride, n_rows, DISTANCE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight·∂distance/∂f of a sample; 0, and nothing read, where the weight is 0."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if gradients[k] is not None:  # noqa: SIM102  (for the compiler, which drops the branch)
            if tl.program_id(1) == k:
                n = in_units(elements[k], UNIT)
                weight = weight_of(weights, weights_pair_stride, weights_sample_stride, k, sample)
                if DISTANCE == COSINE:
                    of_sample = kept + sample + n_rows.to(tl.int64) * k
                    norm_f = tl.load(of_sample + kept_stride.to(tl.int64))
                    norm_g = tl.load(of_sample + kept_stride.to(tl.int64) * 2)
                    of_f, of_g, factor = slopes_of_cosine(tl.load(of_sample), norm_f, norm_g, weight)
                else:
                    of_f, of_g, factor = 0.0, 0.0, weight / n
                write_gradient(
                    students[k], teachers[k], gradients[k], sample, n, weight, of_f, of_g, factor, DISTANCE, BLOCK
                )


@triton.jit(**SPECIALIZED)
def hint_fused(
    students, teachers, gradients, elements, weights, weights_pair_stride, weights_sample_stride,
    scale, kept, kept_stride, n_rows, DISTANCE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The distance of a sample and, where there is room for it, scale·weight·∂distance/∂f."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if tl.program_id(1) == k:
            n = in_units(elements[k], UNIT)
            weight = weight_of(weights, weights_pair_stride, weights_sample_stride, k, sample)
            end = tl.where(weight != 0, n, 0)
            if DISTANCE == COSINE:
                cosine, norm_f, norm_g = cosine_of(students[k], teachers[k], sample, n, end, BLOCK)
                distance = tl.where(weight != 0, 1.0 - cosine, 0.0)
                of_f, of_g, factor = slopes_of_cosine(distance, norm_f, norm_g, scale * weight)
            else:
                of_f, of_g, factor = 0.0, 0.0, scale * weight / n
            if gradients[k] is not None:
                total = write_gradient(
                    students[k], teachers[k], gradients[k], sample, n, weight, of_f, of_g, factor, DISTANCE, BLOCK
                )
            elif DISTANCE != COSINE:
                total, _, _ = sums_of(students[k], teachers[k], sample, n, end, 1.0, 1.0, DISTANCE, BLOCK)
            if DISTANCE != COSINE:
                distance = total / n
            tl.store(kept + sample + n_rows.to(tl.int64) * k, distance)


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None, distance: str) -> Tensor:
    """``HintArgs.kept``: [kept_numbers, K, N] float32, first the distances."""
    n_samples = student[0].shape[0]
    kept = student[0].new_empty((kept_numbers(distance), len(student), n_samples), dtype=torch.float32)
    if n_samples > 0:
        for pairs, arguments in chunks(student, teacher, weights, distance):
            launch(hint_forward, n_samples, **arguments, kept=kept[:, pairs]).run()
    return kept


def backward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor,
    kept: Tensor,
    needs: Sequence[bool],
    distance: str,
) -> list[Tensor]:
    """The gradients of the students, an empty tensor where none is needed; ``kept`` is what ``forward`` returned."""
    n_samples = student[0].shape[0]
    kept = kept.contiguous()
    gradients: list[Tensor] = []
    for pairs, arguments in chunks(student, teacher, weights, distance):
        students = arguments["students"]
        wanted = [torch.empty_like(f) if need else None for f, need in zip(students, needs[pairs], strict=True)]
        if n_samples > 0 and any(needs[pairs]):
            launch(hint_backward, n_samples, **arguments, kept=kept[:, pairs], gradients=tuple(wanted)).run()
        gradients += [f.new_empty(0) if g is None else g for f, g in zip(student[pairs], wanted, strict=True)]
    return gradients


def fused(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    distance: str,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The distances [K, N], and the gradients of scale·Σ weight·distance; an empty tensor where none is needed."""
    n_samples = student[0].shape[0]
    distances = student[0].new_empty((1, len(student), n_samples), dtype=torch.float32)
    gradients: list[Tensor] = []
    for pairs, arguments in chunks(student, teacher, weights, distance):
        students = arguments["students"]
        wanted = [torch.empty_like(f) if need else None for f, need in zip(students, needs[pairs], strict=True)]
        if n_samples > 0:
            arguments |= dict(gradients=tuple(wanted), scale=scale)
            launch(hint_fused, n_samples, **arguments, kept=distances[:, pairs]).run()
        gradients += [f.new_empty(0) if g is None else g for f, g in zip(student[pairs], wanted, strict=True)]
    return distances[0], gradients


def chunks(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None, distance: str):
    """Kernel arguments for MAX_TUPLE pairs at a time."""
    check_dtypes([*student, *teacher])
    for first in range(0, len(student), MAX_TUPLE):
        pairs = slice(first, first + MAX_TUPLE)
        both = [laid_out_alike(f, g) for f, g in zip(student[pairs], teacher[pairs], strict=True)]
        given, strides = (None, (0, 0)) if weights is None else per_teacher_strides(weights[pairs])
        yield (
            pairs,
            dict(
                students=tuple(f for f, _ in both),
                teachers=tuple(g for _, g in both),
                elements=tuple(f.shape[1:].numel() for f, _ in both),
                weights=given,
                weights_pair_stride=strides[0],
                weights_sample_stride=strides[1],
                DISTANCE=DISTANCES[distance],
            ),
        )


def laid_out_alike(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The pair, dense and in one order of elements, sample after sample; copied only where it is not."""
    dense = f.stride() == g.stride() and torch.ops.aten.is_non_overlapping_and_dense(f)
    sample_major = f.shape[0] <= 1 or f.stride(0) == f.shape[1:].numel()
    return (f, g) if dense and sample_major else (f.contiguous(), g.contiguous())


def launch(kernel, n_samples: int, *, kept: Tensor, **arguments) -> Launch:
    elements = arguments["elements"]
    tensors = [x for name in ("students", "teachers", "gradients") for x in arguments.get(name, ()) if x is not None]
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
    warps = min(8, max(1, triton.next_power_of_2(max(elements)) // ELEMENTS_PER_WARP))
    arguments |= dict(
        kept=kept,
        kept_stride=kept.stride(0),
        n_rows=n_samples,
        UNIT=math.gcd(16, *elements) if aligned else 1,
        BLOCK=warps * ELEMENTS_PER_WARP,
    )
    return Launch(kernel, (n_samples, len(elements)), arguments, warps)
