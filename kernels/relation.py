"""The op relation: squared distances of B points, and from them the angles and the distances of RKD (csrc/relation.h).

A side is kept as three planes [3, PITCH, PITCH] of float32: D rounded, the rest of D that this left out, and
r = 1/√(2·D). Where two large D nearly cancel, as in tight clusters far from one another, the rest brings the digits
back, so that the O(B³) part needs no float64, of which most GPUs have little.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kd import Launch

TILE = 16  # planes are padded to it, with zeros, which add nothing to any sum
LARGE_TILE = 32  # from LARGE_BATCH on: half the reads, and still more programs than processors
LARGE_BATCH = 512
KEPT = tl.constexpr(16)  # third points summed in float32 before their sum is added in float64
SPECIALIZED = dict(do_not_specialize=["count", "width"])


@triton.jit
def root(squared, nearest):
    """√max(D, nearest); NaN stays NaN."""
    return tl.sqrt(tl.where(squared < nearest, nearest, squared))


@triton.jit(**SPECIALIZED)
def relation_planes(x, gram, nearest, planes, distances, count, width, pitch, BLOCK: tl.constexpr):
    """Row i of the planes and Σ_j √D_ij, from G; from the points where G would lose more than half the digits."""
    i = tl.program_id(0).to(tl.int64)
    real = i < count
    own = tl.load(gram + i * count + i, mask=real, other=0.0)
    least = tl.load(nearest)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, pitch, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        pair = (j < count) & real & (i != j)
        both = own + tl.load(gram + j * count + j, mask=pair, other=0.0)
        squared = both - 2.0 * tl.load(gram + i * count + j, mask=pair, other=0.0)
        unsure = pair & ~(squared > 1e-8 * both)
        if tl.max(unsure.to(tl.int32), 0) > 0:
            direct = tl.zeros((BLOCK,), tl.float64)
            for d in range(0, width):
                difference = tl.load(x + i * width + d) - tl.load(x + j * width + d, mask=unsure, other=0.0)
                direct += difference * difference
            squared = tl.where(unsure, direct, squared)
        squared = tl.where(pair, squared, 0.0)
        total += tl.where(pair, root(squared, least), 0.0)
        rounded = squared.to(tl.float32)
        far = squared > 0
        inverse = tl.where(far, tl.sqrt(0.5 / tl.where(far, squared, 1.0)), squared)  # 0 stays 0, NaN stays NaN
        at = i * pitch + j
        plane = tl.cast(pitch, tl.int64) * pitch
        tl.store(planes + at, rounded, mask=j < pitch)
        tl.store(planes + plane + at, (squared - rounded.to(tl.float64)).to(tl.float32), mask=j < pitch)
        tl.store(planes + 2 * plane + at, inverse.to(tl.float32), mask=j < pitch)
    tl.store(distances + i, tl.sum(total, 0), mask=real)


@triton.jit
def load_pairs(planes, at, plane):
    return tl.load(planes + at), tl.load(planes + plane + at), tl.load(planes + 2 * plane + at)


@triton.jit
def numerator(x, y, z, rest):
    """x + y − z of squared sides: what may cancel first, then the smaller of x and y. A few ulp of √(x·y)."""
    return ((tl.maximum(x, y) - z) + tl.minimum(x, y)) + rest


@triton.jit
def clipped(e):
    """Huber′; NaN stays NaN."""
    above = tl.where(e > 1.0, 1.0, e)
    return tl.where(above < -1.0, -1.0, above)


@triton.jit
def corner_k(p, p_rest, a, a_rest, r_a, b, b_rest, r_b):
    """r·r of the sides that meet at k, and the cosine there."""
    q = r_a * r_b
    return q, numerator(a, b, p, (a_rest + b_rest) - p_rest) * q


@triton.jit
def corners_of_pair(p, p_rest, r, a, a_rest, r_a, b, b_rest, r_b):
    """The same at i and at j."""
    q_i = r * r_a
    q_j = r * r_b
    difference = a_rest - b_rest
    return q_i, numerator(p, a, b, p_rest + difference) * q_i, q_j, numerator(p, b, a, p_rest - difference) * q_j


@triton.jit
def apart(r):
    """The cosine of a corner with itself; NaN stays NaN."""
    return tl.where(r > 0, 1.0, r).to(tl.float64)


@triton.jit(**SPECIALIZED)
def relation_angle(
    student, teacher, losses, pulls, count, pitch, PULL: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr
):
    """A tile of pairs i < j meets every third point k: three cosines a side, in registers, and no sum across threads.

    A pair and a k: 62 float32 operations, 26 without a gradient; B³/2 of them. Bytes: 48·TILE for TILE² pairs and a k,
    24·B³/TILE in all, from the L2.
    """
    rows = tl.program_id(0)
    columns = tl.program_id(1)
    part = rows.to(tl.int64) * tl.num_programs(1) + columns
    if columns < rows:  # its mirror image does the work
        tl.store(losses + part, tl.zeros((), tl.float64))
    else:
        plane = tl.cast(pitch, tl.int64) * pitch
        i = (rows * TILE + tl.arange(0, TILE).to(tl.int64))[:, None]
        j = (columns * TILE + tl.arange(0, TILE).to(tl.int64))[None, :]
        p, p_rest, r = load_pairs(student, i * pitch + j, plane)
        p_t, p_rest_t, r_t = load_pairs(teacher, i * pitch + j, plane)
        own = r * r
        e = apart(r) - apart(r_t)
        loss = 0.5 * e * e
        pull = tl.zeros((TILE, TILE), tl.float64)
        for start in range(0, pitch, KEPT):
            kept_loss = tl.zeros((TILE, TILE), tl.float32)
            kept_pull = tl.zeros((TILE, TILE), tl.float32)
            for k in range(start, start + KEPT):
                row = tl.cast(k, tl.int64) * pitch
                a, a_rest, r_a = load_pairs(student, row + i, plane)
                b, b_rest, r_b = load_pairs(student, row + j, plane)
                a_t, a_rest_t, r_a_t = load_pairs(teacher, row + i, plane)
                b_t, b_rest_t, r_b_t = load_pairs(teacher, row + j, plane)
                q_k, c_k = corner_k(p, p_rest, a, a_rest, r_a, b, b_rest, r_b)
                _, c_k_t = corner_k(p_t, p_rest_t, a_t, a_rest_t, r_a_t, b_t, b_rest_t, r_b_t)
                e_k = c_k - c_k_t
                h_k = clipped(e_k)
                kept_loss += h_k * (e_k - 0.5 * h_k)
                if PULL:
                    q_i, c_i, q_j, c_j = corners_of_pair(p, p_rest, r, a, a_rest, r_a, b, b_rest, r_b)
                    _, c_i_t, _, c_j_t = corners_of_pair(p_t, p_rest_t, r_t, a_t, a_rest_t, r_a_t, b_t, b_rest_t, r_b_t)
                    kept_pull += clipped(c_i - c_i_t) * (q_i - c_i * own) - h_k * q_k
                    kept_pull += clipped(c_j - c_j_t) * (q_j - c_j * own)
            loss += kept_loss.to(tl.float64)
            pull += kept_pull.to(tl.float64)
        pair = (i < j) & (j < count)
        tl.store(losses + part, tl.sum(tl.sum(tl.where(pair, loss, 0.0), 1), 0))
        if PULL:
            pull = tl.where(i == j, 0.0, pull)
            tl.store(pulls + i * count + j, pull, mask=(i <= j) & (j < count))
            tl.store(pulls + j * count + i, pull, mask=pair)


@triton.jit
def load_squared(planes, at, plane, mask):
    """D in float64."""
    rounded = tl.load(planes + at, mask=mask, other=0.0).to(tl.float64)
    return rounded + tl.load(planes + plane + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit(**SPECIALIZED)
def relation_distance(
    student, teacher, nearest, nearest_t, mean, mean_t, drag, losses, weighted, pulls, count, pitch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i: Σ Huber(d/μ − d_t/μ_t) and Σ h·d, or, given their drag on the mean, its row of the pulls."""
    i = tl.program_id(0).to(tl.int64)
    plane = tl.cast(pitch, tl.int64) * pitch
    least = tl.load(nearest)
    least_t = tl.load(nearest_t)
    per_mean = tl.load(mean)
    per_mean_t = tl.load(mean_t)
    loss = tl.zeros((BLOCK,), tl.float64)
    moved = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < count
        squared = load_squared(student, i * pitch + j, plane, inside)
        d = root(squared, least)
        e = d / per_mean - root(load_squared(teacher, i * pitch + j, plane, inside), least_t) / per_mean_t
        h = clipped(e)
        pair = inside & (i != j) & ~(squared < 0)  # a D of −1 marks a pair that is left out
        if pulls is None:
            loss += tl.where(pair, h * (e - 0.5 * h), 0.0)
            moved += tl.where(pair, h * d, 0.0)
        else:
            pull = tl.where(squared < least, 0.0, (h - tl.load(drag)) / d)
            tl.store(pulls + i * count + j, tl.where(pair, pull, 0.0), mask=inside)
    if pulls is None:
        tl.store(losses + i, tl.sum(loss, 0))
        tl.store(weighted + i, tl.sum(moved, 0))


def pitch_of(count: int) -> int:
    """B rounded up to whole tiles."""
    tile = TILE if count < LARGE_BATCH else LARGE_TILE
    return -(-count // tile) * tile


class Row(NamedTuple):
    """Columns that a program takes at once of a row, and its warps."""

    block: int
    num_warps: int


def block_of(count: int) -> Row:
    """Two columns a thread: the roots and quotients in float64 take many registers."""
    block = min(512, max(64, triton.next_power_of_2(count)))
    return Row(block, block // 64)


def planes(x: Tensor, gram: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """``RelationPlanes``: the planes [3, PITCH, PITCH] of points [B, D], and Σ_j √D_ij [B]."""
    launch = planes_launch(x, gram, nearest)
    launch.run()
    return launch.arguments["planes"], launch.arguments["distances"]


def planes_launch(x: Tensor, gram: Tensor, nearest: Tensor) -> Launch:
    count, width = x.shape
    pitch = pitch_of(count)
    shape = block_of(pitch)
    arguments = dict(
        x=x,
        gram=gram,
        nearest=nearest,
        planes=x.new_empty((3, pitch, pitch), dtype=torch.float32),
        distances=x.new_empty(count),
        count=count,
        width=width,
        pitch=pitch,
        BLOCK=shape.block,
    )
    return Launch(relation_planes, (pitch,), arguments, shape.num_warps)


def angle(student: Tensor, teacher: Tensor, count: int, write_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """``RelationAngle`` of two sides' planes: (parts of the loss, pulls [B, B])."""
    launch = angle_launch(student, teacher, count, write_gradient)
    launch.run()
    return launch.arguments["losses"], launch.arguments["pulls"]


def angle_launch(student: Tensor, teacher: Tensor, count: int, write_gradient: bool) -> Launch:
    pitch = student.shape[-1]
    tile = TILE if count < LARGE_BATCH else LARGE_TILE
    tiles = pitch // tile
    arguments = dict(
        student=student,
        teacher=teacher,
        losses=student.new_empty(tiles * tiles, dtype=torch.float64),
        pulls=student.new_empty((count, count), dtype=torch.float64) if write_gradient else None,
        count=count,
        pitch=pitch,
        PULL=write_gradient,
        TILE=tile,
        KEPT=KEPT.value,
    )
    return Launch(relation_angle, (tiles, tiles), arguments, num_warps=tile // 4)


def distance(student: Tensor, teacher: Tensor, count: int, **scalars: Tensor) -> tuple[Tensor, Tensor]:
    """The first pass of ``RelationDistance``, given nearest, nearest_t, mean, mean_t: (loss [B], weighted [B])."""
    losses, weighted = (student.new_empty(count, dtype=torch.float64) for _ in range(2))
    distance_launch(student, teacher, count, **scalars, drag=None, losses=losses, weighted=weighted, pulls=None).run()
    return losses, weighted


def distance_pull(student: Tensor, teacher: Tensor, count: int, **scalars: Tensor) -> Tensor:
    """The second, given the drag as well: the pulls [B, B]."""
    pulls = student.new_empty((count, count), dtype=torch.float64)
    distance_launch(student, teacher, count, **scalars, losses=None, weighted=None, pulls=pulls).run()
    return pulls


def distance_launch(student: Tensor, teacher: Tensor, count: int, **arguments: Tensor | None) -> Launch:
    shape = block_of(count)
    arguments |= dict(student=student, teacher=teacher, count=count, pitch=student.shape[-1], BLOCK=shape.block)
    return Launch(relation_distance, (count,), arguments, shape.num_warps)
