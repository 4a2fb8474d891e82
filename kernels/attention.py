"""The distance "attention" of the op hint, in three passes (csrc/attention.h): the energies A = Σ_c f² of the positions
of every map; from those of both sides the distance and its slopes in A, in their place; and the gradient 2·f·slope.

A map is read once forward; read once, its gradient written once, backward. Programs walk along the channels of a block
of positions, in the order in which the map lies: channels first or channels last; other maps are copied.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distances import inverse_norm, scale_for
from .hint import weight_of
from .kd import Launch
from .logits import MAX_TUPLE, check_dtypes, in_units
from .rows import per_teacher_strides

TILE = 2048  # elements of a map at a time
ELEMENTS_PER_WARP = 512
RUN = {False: 64, True: 256}  # of those as many side by side: positions, or, channels last, channels
MAP_TILE = 2048  # positions of a map of energies at a time

SPECIALIZED = dict(
    do_not_specialize=["pairs", "weights_pair_stride", "weights_sample_stride"],
    do_not_specialize_on_alignment=["channels", "positions", "n_rows"],
)


@triton.jit
def sizes(channels, positions, LAST: tl.constexpr, UNIT: tl.constexpr):
    """Both; that of what lies side by side is a multiple of UNIT."""
    if LAST:
        return in_units(channels, UNIT), positions
    else:
        return channels, in_units(positions, UNIT)


@triton.jit
def pointers_of(features, sample, channels, positions, c, p, LAST: tl.constexpr):
    """Of positions p and channels c, [S, C]."""
    if LAST:
        return features + sample * channels * positions + p[:, None].to(tl.int64) * channels + c[None, :]
    else:
        return features + sample * channels * positions + p[:, None] + c[None, :].to(tl.int64) * positions


@triton.jit(**SPECIALIZED)
def attention_energy(
    maps, of_positions, pairs, weights, weights_pair_stride, weights_sample_stride, channels, positions,
    LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The energies of a block of positions; nothing is read or written where the weight is 0."""
    channels, positions = sizes(channels, positions, LAST, UNIT)
    blocks = tl.cdiv(positions, BLOCK_S)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    for k in tl.static_range(len(maps)):
        if tl.program_id(1) == k:
            used = weight_of(weights, weights_pair_stride, weights_sample_stride, pairs[k], sample) != 0
            total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
            for start in range(0, tl.where(used, channels, 0), BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                at = pointers_of(maps[k], sample, channels, positions, c, p, LAST)
                f = tl.load(at, mask=(p < positions)[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
                total += f * f
            tl.store(of_positions[k] + sample * positions + p, tl.sum(total, 1), mask=p < tl.where(used, positions, 0))


@triton.jit(**SPECIALIZED)
def attention_gradient(
    maps, of_positions, gradients, pairs, weights, weights_pair_stride, weights_sample_stride, channels, positions,
    LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """2·weight·slope·f of a block of positions; 0, and nothing read, where the weight is 0."""
    channels, positions = sizes(channels, positions, LAST, UNIT)
    blocks = tl.cdiv(positions, BLOCK_S)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    for k in tl.static_range(len(maps)):
        if tl.program_id(1) == k:
            weight = weight_of(weights, weights_pair_stride, weights_sample_stride, pairs[k], sample)
            readable = p < tl.where(weight != 0, positions, 0)
            factor = 2.0 * weight * tl.load(of_positions[k] + sample * positions + p, mask=readable, other=0.0)
            for start in range(0, channels, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                inside = (c < channels)[None, :]
                at = pointers_of(maps[k], sample, channels, positions, c, p, LAST)
                f = tl.load(at, mask=inside & readable[:, None], other=0.0).to(tl.float32)
                to = pointers_of(gradients[k], sample, channels, positions, c, p, LAST)
                gradient = (f * factor[:, None]).to(gradients[k].dtype.element_ty)
                tl.store(to, gradient, mask=inside & (p < positions)[:, None])


@triton.jit
def sum_of_squares(energies, end, positions, scale, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        scaled = scale * tl.load(energies + p, mask=p < positions, other=0.0)
        total += scaled * scaled
    return tl.sum(total, 0)


@triton.jit
def norm_of(energies, end, positions, BLOCK: tl.constexpr):
    """‖A‖ + 1e-6 (NaN, not inf, where ‖A‖ overflows), and that over ‖A‖, 0 for a map of zeros."""
    total = sum_of_squares(energies, end, positions, 1.0, BLOCK)
    scale = scale_for(total)
    again = sum_of_squares(energies, tl.where(scale != 1.0, end, 0), positions, scale, BLOCK)
    norm = tl.div_rn(tl.sqrt_rn(tl.where(scale != 1.0, again, total)), scale)
    divisor = norm + 1e-6 + 0.0 * norm
    return divisor, divisor * inverse_norm(norm)


@triton.jit
def attention_maps(a_energies, b_energies, p, inside, a_divisor, b_divisor):
    a = tl.div_rn(tl.load(a_energies + p, mask=inside, other=0.0), a_divisor)
    b = tl.div_rn(tl.load(b_energies + p, mask=inside, other=0.0), b_divisor)
    return a, b


@triton.jit(**SPECIALIZED)
def attention_distance(
    students, teachers, pairs, weights, weights_pair_stride, weights_sample_stride, positions, distance, n_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The distance of a sample, d = a − b, and 2/S·(d − A/‖A‖·⟨d, a⟩)/(‖A‖ + 1e-6) in place of A; 0 at weight 0."""
    sample = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(students)):
        if tl.program_id(1) == k:
            used = weight_of(weights, weights_pair_stride, weights_sample_stride, pairs[k], sample) != 0
            end = tl.where(used, positions, 0)
            a_energies, b_energies = students[k] + sample * positions, teachers[k] + sample * positions
            a_divisor, a_excess = norm_of(a_energies, end, positions, BLOCK)
            b_divisor, b_excess = norm_of(b_energies, end, positions, BLOCK)

            dd = tl.zeros((BLOCK,), tl.float32)
            da, db = dd, dd
            for start in range(0, end, BLOCK):
                p = start + tl.arange(0, BLOCK)
                a, b = attention_maps(a_energies, b_energies, p, p < positions, a_divisor, b_divisor)
                d = a - b
                dd, da, db = dd + d * d, da + d * a, db + d * b
            tl.store(distance + n_rows.to(tl.int64) * pairs[k] + sample, tl.div_rn(tl.sum(dd, 0), positions * 1.0))

            a_projection, b_projection = a_excess * tl.sum(da, 0), b_excess * tl.sum(db, 0)
            a_factor, b_factor = tl.div_rn(2.0 / positions, a_divisor), tl.div_rn(2.0 / positions, b_divisor)
            for start in range(0, positions, BLOCK):
                p = start + tl.arange(0, BLOCK)
                a, b = attention_maps(a_energies, b_energies, p, p < end, a_divisor, b_divisor)
                of_a, of_b = a_factor * ((a - b) - a_projection * a), b_factor * ((b - a) + b_projection * b)
                tl.store(a_energies + p, tl.where(used, of_a, 0.0), mask=p < positions)
                tl.store(b_energies + p, tl.where(used, of_b, 0.0), mask=p < positions)


class Map(NamedTuple):
    """[N, C, positions] or, channels last, [N, positions, C]."""

    features: Tensor
    pair: int
    channels: int
    positions: int
    last: bool


def laid_out(features: Sequence[Tensor]) -> list[Map]:
    """The maps of one side, copied only where they lie neither way. One position is one row of channels."""
    check_dtypes(features)
    for f in features:
        if f.shape[2:].numel() == 0 or f.dim() < 3:
            raise ValueError(f"features must be maps [N, C, ...] of one or more positions, got {tuple(f.shape)}")
    lasts = [f.movedim(1, -1).is_contiguous() for f in features]
    return [
        Map(f if last else f.contiguous(), k, f.shape[1], f.shape[2:].numel(), last)
        for k, (f, last) in enumerate(zip(features, lasts, strict=True))
    ]


def alike(keys: Sequence[object]) -> Iterator[list[int]]:
    """Indices of what one launch can take: equal keys, MAX_TUPLE at most."""
    groups: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for group in groups.values():
        for first in range(0, len(group), MAX_TUPLE):
            yield group[first : first + MAX_TUPLE]


def warps_for(tile: int) -> int:
    return max(1, tile // ELEMENTS_PER_WARP)


def weights_of(weights: Tensor | None) -> dict[str, object]:
    given, strides = (None, (0, 0)) if weights is None else per_teacher_strides(weights)
    return dict(weights=given, weights_pair_stride=strides[0], weights_sample_stride=strides[1])


def map_launches(
    kernel, maps: Sequence[Map], of_positions: Sequence[Tensor], weights: Tensor | None, **outputs: Sequence[Tensor]
) -> Iterator[Launch]:
    """Of a kernel on maps; ``outputs`` are as the maps."""
    for group in alike([(m.channels, m.positions, m.last) for m in maps]):
        first = maps[group[0]]
        across, along = (first.positions, first.channels) if first.last else (first.channels, first.positions)
        block_along = min(triton.next_power_of_2(along), RUN[first.last])
        block_across = min(triton.next_power_of_2(across), TILE // block_along)
        block_c, block_s = (block_along, block_across) if first.last else (block_across, block_along)
        written = {name: tuple(values[i] for i in group) for name, values in outputs.items()}
        tensors = [maps[i].features for i in group] + [x for values in written.values() for x in values]
        aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
        arguments = dict(
            maps=tuple(maps[i].features for i in group),
            of_positions=tuple(of_positions[i] for i in group),
            pairs=tuple(maps[i].pair for i in group),
            channels=first.channels,
            positions=first.positions,
            LAST=first.last,
            UNIT=math.gcd(16, along) if aligned else 1,
            BLOCK_C=block_c,
            BLOCK_S=block_s,
        )
        grid = (first.features.shape[0] * triton.cdiv(first.positions, block_s), len(group))
        yield Launch(kernel, grid, arguments | weights_of(weights) | written, warps_for(block_c * block_s))


def distance_launches(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor | None, distance: Tensor
) -> Iterator[Launch]:
    for pairs in alike([x.shape for x in students]):
        n_samples, positions = students[pairs[0]].shape
        arguments = dict(
            students=tuple(students[k] for k in pairs),
            teachers=tuple(teachers[k] for k in pairs),
            pairs=tuple(pairs),
            positions=positions,
            distance=distance,
            n_rows=n_samples,
            BLOCK=min(triton.next_power_of_2(positions), MAP_TILE),
        )
        yield Launch(
            attention_distance, (n_samples, len(pairs)), arguments | weights_of(weights), warps_for(arguments["BLOCK"])
        )


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The distances [K, N], and their slopes in the energies, [N, positions], of every student, then every teacher."""
    maps = laid_out(student) + laid_out(teacher)
    n_samples = student[0].shape[0]
    distance = student[0].new_empty((len(student), n_samples), dtype=torch.float32)
    slopes = [m.features.new_empty((n_samples, m.positions), dtype=torch.float32) for m in maps]
    if n_samples > 0:
        for launch in map_launches(attention_energy, maps, slopes, weights):
            launch.run()
        for launch in distance_launches(slopes[: len(student)], slopes[len(student) :], weights, distance):
            launch.run()
    return distance, slopes


def backward(
    features: Sequence[Tensor], slopes: Sequence[Tensor], weights: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of one side, an empty tensor where none is needed."""
    maps = laid_out(features)
    gradients = [
        torch.empty_like(m.features) if need else m.features.new_empty(0) for m, need in zip(maps, needs, strict=True)
    ]
    wanted = [k for k, need in enumerate(needs) if need and features[0].shape[0] > 0]
    of_wanted = [[x[k] for k in wanted] for x in (maps, slopes, gradients)]
    for launch in map_launches(attention_gradient, *of_wanted[:2], weights, gradients=of_wanted[2]):
        launch.run()
    return gradients
