"""The op hint: K pairs of features, the mean squared difference of each sample, and its gradient (csrc/hint.h).

A program per sample and pair: two reads forward, two reads and one write backward. A sample's elements are read in the
order in which they lie, which must be one dense order on both sides of a pair; other pairs are copied to one first.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logits import MAX_TUPLE, check_dtypes, in_units
from .rows import SPECIALIZED, per_teacher_strides

ELEMENTS_PER_WARP = 512  # of one sample


@triton.jit
def weight_of(weights, strides, k, sample):
    if weights is None:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.load(weights + k * strides[0] + sample * strides[1])


@triton.jit
def load_tile(features, sample, elements, i, mask):
    return tl.load(features + sample * elements + i, mask=mask, other=0.0).to(tl.float32)


@triton.jit(**SPECIALIZED)
def hint_forward(
    students, teachers, elements, weights, weights_strides, distances, n_rows, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """mean (f − g)² of a sample; 0, and nothing read, where the weight is 0."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if tl.program_id(1) == k:
            n = in_units(elements[k], UNIT)
            used = weight_of(weights, weights_strides, k, sample) != 0
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, tl.where(used, n, 0), BLOCK):
                i = start + tl.arange(0, BLOCK)
                f = load_tile(students[k], sample, n, i, i < n)
                g = load_tile(teachers[k], sample, n, i, i < n)
                total += (f - g) * (f - g)
            tl.store(distances + sample + n_rows.to(tl.int64) * k, tl.sum(total, 0) / n)


@triton.jit(**SPECIALIZED)
def hint_backward(
    students, teachers, gradients, elements, weights, weights_strides, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """weight·2·(f − g)/n of a sample; 0, and nothing read, where the weight is 0."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if gradients[k] is not None:  # noqa: SIM102  (for the compiler, which drops the branch)
            if tl.program_id(1) == k:
                n = in_units(elements[k], UNIT)
                weight = weight_of(weights, weights_strides, k, sample)
                factor = weight * 2.0 / n
                readable = tl.where(weight != 0, n, 0)
                for start in range(0, n, BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    f = load_tile(students[k], sample, n, i, i < readable)
                    g = load_tile(teachers[k], sample, n, i, i < readable)
                    difference = tl.where(weight != 0, factor * (f - g), 0.0).to(gradients[k].dtype.element_ty)
                    tl.store(gradients[k] + sample * n + i, difference, mask=i < n)


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """``HintArgs``: the distance of every pair and sample, [K, N] float32."""
    n_samples = student[0].shape[0]
    distances = student[0].new_empty((len(student), n_samples), dtype=torch.float32)
    if n_samples > 0:
        for pairs, arguments in chunks(student, teacher, weights):
            launch(hint_forward, n_samples, **arguments, distances=distances[pairs], n_rows=n_samples)
    return distances


def backward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the students, an empty tensor where none is needed. Negated, they are those of the teachers."""
    n_samples = student[0].shape[0]
    gradients: list[Tensor] = []
    for pairs, arguments in chunks(student, teacher, weights):
        students = arguments["students"]
        wanted = [torch.empty_like(f) if need else None for f, need in zip(students, needs[pairs], strict=True)]
        if n_samples > 0 and any(needs[pairs]):
            launch(hint_backward, n_samples, **arguments, gradients=tuple(wanted))
        gradients += [f.new_empty(0) if g is None else g for f, g in zip(student[pairs], wanted, strict=True)]
    return gradients


def chunks(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None):
    """Kernel arguments for MAX_TUPLE pairs at a time."""
    check_dtypes([*student, *teacher])
    for first in range(0, len(student), MAX_TUPLE):
        pairs = slice(first, first + MAX_TUPLE)
        both = [laid_out_alike(f, g) for f, g in zip(student[pairs], teacher[pairs], strict=True)]
        given, strides = (None, None) if weights is None else per_teacher_strides(weights[pairs])
        yield (
            pairs,
            dict(
                students=tuple(f for f, _ in both),
                teachers=tuple(g for _, g in both),
                elements=tuple(f.shape[1:].numel() for f, _ in both),
                weights=given,
                weights_strides=strides,
            ),
        )


def laid_out_alike(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The pair, dense and in one order of elements, sample after sample; copied only where it is not."""
    dense = f.stride() == g.stride() and torch.ops.aten.is_non_overlapping_and_dense(f)
    sample_major = f.shape[0] <= 1 or f.stride(0) == f.shape[1:].numel()
    return (f, g) if dense and sample_major else (f.contiguous(), g.contiguous())


def launch(kernel, n_samples: int, **arguments) -> None:
    elements = arguments["elements"]
    tensors = [x for name in ("students", "teachers", "gradients") for x in arguments.get(name, ()) if x is not None]
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
    warps = min(8, max(1, triton.next_power_of_2(max(elements)) // ELEMENTS_PER_WARP))
    with torch.cuda.device_of(tensors[0]):
        kernel[(n_samples, len(elements))](
            **arguments,
            UNIT=math.gcd(16, *elements) if aligned else 1,
            BLOCK=warps * ELEMENTS_PER_WARP,
            num_warps=warps,
        )
