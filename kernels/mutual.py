"""The op mutual: M students that teach each other, and its launchers (the twin of csrc/mutual.h).

A program holds one row of every student, [M_PAD, C]: each logit is read and exponentiated once, whatever M, then all
pairs are summed on chip.

A, on chip: the M rows in registers, the gradients written in the forward, 2M passes over N·C.
B, streaming: tiles, O(N·M²) numbers saved, the backward reads the logits again, 3M.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import kl_from_sums
from .kd import Launch, upstream_rows
from .logits import (
    BF16,
    ENTRY,
    F16,
    F32,
    as_arguments,
    check_dtypes,
    in_units,
    layout,
    load_logits,
    place_of,
    store_teacher_gradient,
)
from .row_stats import INF, cross_term, exp_at, larger, raise_cross, raising, shifted, softmax_state
from .rows import SPECIALIZED, counted_rows, store_row_loss

ON_CHIP_ELEMENTS = 8192  # of M rows in the registers of a program of 8 warps
ELEMENTS_PER_WARP = 1024


def row_stats_size(n_students: int) -> int:
    return n_students * n_students + 2 * n_students + 1


# ---------------------------------------------------------------------------------------------------------------- rows


@triton.jit
def row_of(x, i):
    """x [M_PAD, C] -> row i [C]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == i, x, 0.0), 0)


@triton.jit
def column_of(x, i):
    """x [M_PAD, M_PAD] -> column i [M_PAD]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == i, x, 0.0), 1)


@triton.jit
def entry_of(x, i):
    """x [M_PAD] -> its number i."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == i, x, 0.0), 0)


@triton.jit
def load_pairs(pair_weights, n_students, M_PAD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """a_ij at [i, j], or at [j, i]; 0 on the diagonal."""
    i, j = tl.arange(0, M_PAD)[:, None], tl.arange(0, M_PAD)[None, :]
    pairs = (i < n_students) & (j < n_students) & (i != j)
    if pair_weights is None:
        return tl.where(pairs, 1.0 / (n_students - 1), 0.0)
    elif TRANSPOSED:
        return tl.load(pair_weights + j * n_students + i, mask=pairs, other=0.0)
    else:
        return tl.load(pair_weights + i * n_students + j, mask=pairs, other=0.0)


@triton.jit
def load_rows_as(address, offsets, cols, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    x = address.to(tl.pointer_type(DTYPE))
    if UNIT > 1:
        x = tl.multiple_of(x, (16, 16))
    return tl.load(x + offsets + cols, mask=mask, other=-INF).to(tl.float32)


@triton.jit
def load_students(
    students, strides, place, cols, in_cols, read, n_students,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, M_PAD: tl.constexpr,
):  # fmt: skip
    """Columns [1, C] of a row (place_of) of every student that `read` [M_PAD] names, [M_PAD, C]; −inf elsewhere."""
    ms = tl.arange(0, M_PAD)[:, None]
    if strides is None:
        entry, exists = students + ms * ENTRY, ms < n_students
        address = tl.load(entry, mask=exists, other=0)
        outer = in_units(tl.load(entry + 1, mask=exists, other=0), UNIT)
        inner_stride = in_units(tl.load(entry + 2, mask=exists, other=0), UNIT)
        outer_index, inner_index, _in_rows = place
        offsets = outer_index[:, None] * outer + inner_index[:, None] * inner_stride
        mask = read[:, None] & in_cols
        if UNIT == 0:
            cols = cols.to(tl.int64) * tl.load(entry + 3, mask=exists, other=0)
        if DTYPE == F32:
            return load_rows_as(address, offsets, cols, mask, tl.float32, UNIT)
        elif DTYPE == BF16:
            return load_rows_as(address, offsets, cols, mask, tl.bfloat16, UNIT)
        elif DTYPE == F16:
            return load_rows_as(address, offsets, cols, mask, tl.float16, UNIT)
        else:
            dtype = tl.load(entry + 4, mask=exists, other=F32)
            z = load_rows_as(address, offsets, cols, mask & (dtype == F32), tl.float32, UNIT)
            bf16 = load_rows_as(address, offsets, cols, mask & (dtype == BF16), tl.bfloat16, UNIT)
            f16 = load_rows_as(address, offsets, cols, mask & (dtype == F16), tl.float16, UNIT)
            return tl.where(dtype == F32, z, tl.where(dtype == BF16, bf16, f16))
    else:
        z = tl.full((M_PAD, cols.shape[1]), -INF, tl.float32)
        for k in tl.static_range(len(students)):
            wanted = tl.sum(((tl.arange(0, M_PAD) == k) & read).to(tl.int32), 0) != 0
            x = load_logits(students[k], strides[k], place, cols, in_cols & wanted, UNIT)
            z = tl.where(ms == k, x.to(tl.float32), z)
        return z


@triton.jit
def cross_sums(d, e, n_students):
    """At [i, j], Σ_c e_j (d_j − d_i) of the columns at hand, d and e [M_PAD, C]."""
    ms = tl.arange(0, d.shape[0])[:, None]
    cross = tl.zeros((d.shape[0], d.shape[0]), tl.float32)
    for i in range(n_students):
        of_peers = tl.sum(cross_term(d, e, d, row_of(d, i)[None, :]), 1)
        cross = tl.where(ms == i, of_peers[None, :], cross)
    return cross


@triton.jit
def finish_row(
    max, sum, cross, a, read, row, counted, legal, row_weight, row_scale, row_loss, row_stats,
    n_rows, n_students, inv_t, scale, M_PAD: tl.constexpr,
):  # fmt: skip
    """Stores what the forward knows of a row; returns D_ij [M_PAD, M_PAD], 0 where a_ij is."""
    d = kl_from_sums(cross, sum[None, :], sum[:, None], inv_t)
    d = tl.where((a != 0) & counted, d, 0.0)
    loss = tl.sum(tl.sum(tl.where(a != 0, a * d, 0.0), 1), 0)
    store_row_loss(row_loss, loss, 0.0, scale, 0.0, row_weight, counted, legal, row, row < n_rows, False)

    i, j = tl.arange(0, M_PAD)[:, None], tl.arange(0, M_PAD)[None, :]
    inside = (i < n_students) & (j < n_students)
    tl.store(row_stats + (i * n_students + j).to(tl.int64) * n_rows + row[:, None], d, mask=inside)
    ms = tl.arange(0, M_PAD)
    at = row_stats + (n_students * n_students + ms).to(tl.int64) * n_rows + row
    tl.store(at, tl.where(read, max, 0.0), mask=ms < n_students)
    tl.store(at + n_students.to(tl.int64) * n_rows, tl.where(read, sum, 0.0), mask=ms < n_students)
    tl.store(scale_of(row_stats, row, n_students, n_rows), row_scale)
    return d


@triton.jit
def scale_of(row_stats, row, n_students, n_rows):
    return row_stats + (n_students * n_students + 2 * n_students).to(tl.int64) * n_rows + row


@triton.jit
def gradient_of(i, d, e, sum, divergence, a, a_t, inv_t, DETACH: tl.constexpr):
    """Student i [C]: Σ_j a_ij (p_i − p_j), and, where peers learn, p_i ⊙ (Σ_j a_ji (log p_i − log p_j) − E_i).

    a and the divergences [i, j], a_t [j, i]; d and e [M_PAD, C] of everybody.
    """
    e_i, sum_i = row_of(e, i), entry_of(sum, i)
    learns = column_of(a_t, i)  # a_ij over j
    used = learns != 0
    some = tl.max(used.to(tl.int32), 0) != 0
    of_peers = tl.sum(tl.where(used[:, None], (learns / sum)[:, None] * e, 0.0), 0)
    g = tl.where(some, tl.sum(learns, 0) / sum_i * e_i - of_peers, 0.0)
    if not DETACH:
        teaches = column_of(a, i)  # a_ji over j
        used = teaches != 0
        some = tl.max(used.to(tl.int32), 0) != 0
        constants = teaches * (tl.log(sum) - tl.log(sum_i) - column_of(divergence, i))
        constant = tl.sum(tl.where(used, constants, 0.0), 0)
        ratios = tl.sum(tl.where(used[:, None], teaches[:, None] * (row_of(d, i)[None, :] - d), 0.0), 0)
        g += tl.where(some & (e_i != 0), e_i / sum_i * (ratios * inv_t + constant), 0.0)
    return g


@triton.jit
def write_gradients(
    students, student_strides, gradients, gradient_strides, place, cols, in_cols, counted, factor, d, e, sum,
    divergence, a, a_t, n_students, inv_t, DETACH: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """factor·gradient_of every student that wants it, 0 in a row that does not count."""
    if student_strides is None:
        for i in range(n_students):
            g = tl.where(counted, factor * gradient_of(i, d, e, sum, divergence, a, a_t, inv_t, DETACH), 0.0)
            store_teacher_gradient(
                students, gradients, gradient_strides, i, place, cols, g[None, :], in_cols, DTYPE, UNIT
            )
    else:
        for i in tl.static_range(len(students)):
            if gradients[i] is not None:
                g = tl.where(counted, factor * gradient_of(i, d, e, sum, divergence, a, a_t, inv_t, DETACH), 0.0)
                store_teacher_gradient(
                    students, gradients, gradient_strides, i, place, cols, g[None, :], in_cols, DTYPE, UNIT
                )


@triton.jit
def readers(a, a_t, counted):
    """Who is read [M_PAD]: the students with a pair."""
    paired = tl.max((a != 0).to(tl.int32) + (a_t != 0).to(tl.int32), 1) != 0
    return paired & counted


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(**SPECIALIZED)
def mutual_on_chip(
    students, student_strides, gradients, gradient_strides, pair_weights, row_weights, items, row_loss, row_stats,
    n_rows, inner, n_classes, n_students, inv_t, scale,
    DETACH: tl.constexpr, M_PAD: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A: loss, row_stats and gradients of one row of all students."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    place = place_of(row, inner, row < n_rows)
    n_classes = in_units(n_classes, UNIT)
    counted, legal, _label, row_weight, row_scale = counted_rows(
        None, row_weights, items, row, row < n_rows, 0, n_classes
    )
    a = load_pairs(pair_weights, n_students, M_PAD, False)
    a_t = load_pairs(pair_weights, n_students, M_PAD, True)
    read = readers(a, a_t, counted)

    cols = tl.arange(0, BLOCK_C)[None, :]
    in_cols = cols < n_classes
    z = load_students(students, student_strides, place, cols, in_cols, read, n_students, DTYPE, UNIT, M_PAD)
    max, d, e, sum = softmax_state(z, inv_t)
    divergence = finish_row(
        max, sum, cross_sums(d, e, n_students), a, read, row, counted, legal, row_weight, row_scale, row_loss,
        row_stats, n_rows, n_students, inv_t, scale, M_PAD,
    )  # fmt: skip
    write_gradients(
        students, student_strides, gradients, gradient_strides, place, cols, in_cols, counted,
        row_scale * scale * inv_t, d, e, sum, divergence, a, a_t, n_students, inv_t, DETACH, DTYPE, UNIT,
    )  # fmt: skip


@triton.jit(**SPECIALIZED)
def mutual_streaming(
    students, student_strides, pair_weights, row_weights, items, row_loss, row_stats,
    n_rows, inner, n_classes, n_students, inv_t, scale,
    M_PAD: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """B, and the forward under no_grad: loss and row_stats, tile by tile."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    place = place_of(row, inner, row < n_rows)
    n_classes = in_units(n_classes, UNIT)
    counted, legal, _label, row_weight, row_scale = counted_rows(
        None, row_weights, items, row, row < n_rows, 0, n_classes
    )
    a = load_pairs(pair_weights, n_students, M_PAD, False)
    read = readers(a, load_pairs(pair_weights, n_students, M_PAD, True), counted)

    max = tl.full((M_PAD,), -INF, tl.float32)
    sum = tl.zeros((M_PAD,), tl.float32)
    cross = tl.zeros((M_PAD, M_PAD), tl.float32)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        z = load_students(
            students, student_strides, place, cols, cols < n_classes, read, n_students, DTYPE, UNIT, M_PAD
        )
        tile_max, d, e, tile_sum = softmax_state(z, inv_t)
        new_max = larger(max, tile_max)
        shift, factor, _ = raising(max, new_max, inv_t, 1)
        tile_shift, tile_factor, _ = raising(tile_max, new_max, inv_t, 1)
        cross = raise_cross(cross, sum[None, :], shift[None, :], factor[None, :], shift[:, None])
        cross += raise_cross(
            cross_sums(d, e, n_students), tile_sum[None, :], tile_shift[None, :], tile_factor[None, :],
            tile_shift[:, None],
        )  # fmt: skip
        sum = factor * sum + tile_factor * tile_sum
        max = new_max
    finish_row(
        max, sum, cross, a, read, row, counted, legal, row_weight, row_scale, row_loss, row_stats,
        n_rows, n_students, inv_t, scale, M_PAD,
    )  # fmt: skip


@triton.jit(**SPECIALIZED)
def mutual_backward(
    students, student_strides, gradients, gradient_strides, pair_weights, upstream, row_stats,
    n_rows, inner, n_classes, n_students, upstream_stride, inv_t, scale,
    DETACH: tl.constexpr, M_PAD: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """B, backward: a tile of one row of all students."""
    n_classes = in_units(n_classes, UNIT)
    n_tiles = tl.cdiv(n_classes, BLOCK_C)
    row = (tl.program_id(0) // n_tiles).to(tl.int64) + tl.arange(0, 1)
    place = place_of(row, inner, row < n_rows)
    cols = (tl.program_id(0) % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_cols = cols < n_classes

    factor = tl.load(scale_of(row_stats, row, n_students, n_rows))
    counted = factor != 0
    if upstream is not None:
        factor *= tl.load(upstream + row * upstream_stride)
    a = load_pairs(pair_weights, n_students, M_PAD, False)
    a_t = load_pairs(pair_weights, n_students, M_PAD, True)
    read = readers(a, a_t, counted)
    z = load_students(students, student_strides, place, cols, in_cols, read, n_students, DTYPE, UNIT, M_PAD)
    i, j = tl.arange(0, M_PAD)[:, None], tl.arange(0, M_PAD)[None, :]
    inside = (i < n_students) & (j < n_students)
    divergence = tl.load(row_stats + (i * n_students + j).to(tl.int64) * n_rows + row[:, None], mask=inside, other=0.0)
    ms = tl.arange(0, M_PAD)
    at = row_stats + (n_students * n_students + ms).to(tl.int64) * n_rows + row
    max = tl.load(at, mask=read, other=0.0)
    sum = tl.load(at + n_students.to(tl.int64) * n_rows, mask=read, other=0.0)
    d = shifted(z, max[:, None])
    write_gradients(
        students, student_strides, gradients, gradient_strides, place, cols, in_cols, counted,
        factor * scale * inv_t, d, exp_at(d, inv_t), sum, divergence, a, a_t, n_students, inv_t, DETACH, DTYPE, UNIT,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- launches


def fits_on_chip(n_students: int, n_classes: int) -> bool:
    """Whether the forward can write the gradients (strategy A)."""
    return triton.next_power_of_2(n_students) * triton.next_power_of_2(n_classes) <= ON_CHIP_ELEMENTS


def forward(
    students: Sequence[Tensor], pair_weights: Tensor | None, row_weights: Tensor | None, items: Tensor | None, *,
    temperature: float, scale: float, detach_peers: bool, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """``MutualForward``: (row_loss [N], row_stats [M² + 2M + 1, N], the gradients for an upstream of 1 or empty)."""
    first = students[0]
    n_rows = first.shape[:-1].numel()
    row_loss = first.new_empty(n_rows, dtype=torch.float32)
    row_stats = first.new_empty((row_stats_size(len(students)), n_rows), dtype=torch.float32)
    gradients = [z.new_empty(z.shape if need else 0) for z, need in zip(students, needs, strict=True)]
    if n_rows > 0:
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        forward_launch(
            students, pair_weights, row_weights, items, row_loss, row_stats, wanted,
            temperature=temperature, scale=scale, detach_peers=detach_peers,
        ).run()  # fmt: skip
    return row_loss, row_stats, gradients


def forward_launch(
    students: Sequence[Tensor], pair_weights: Tensor | None, row_weights: Tensor | None, items: Tensor | None,
    row_loss: Tensor, row_stats: Tensor, gradients: Sequence[Tensor | None], *,
    temperature: float, scale: float, detach_peers: bool,
) -> Launch:  # fmt: skip
    n_classes, on_chip = students[0].shape[-1], any(g is not None for g in gradients)
    if on_chip and not fits_on_chip(len(students), n_classes):
        raise ValueError(
            f"gradients in the forward take at most {ON_CHIP_ELEMENTS} logits a row, all students together"
        )
    most = ON_CHIP_ELEMENTS if on_chip else ON_CHIP_ELEMENTS // 2
    wanted = gradients if on_chip else ()
    arguments, warps = common_arguments(students, wanted, pair_weights, temperature, scale, detach_peers, most)
    arguments |= dict(
        row_weights=None if row_weights is None else row_weights.reshape(-1).to(torch.float32).contiguous(),
        items=None if items is None else items.reshape(()).to(torch.float32),
        row_loss=row_loss, row_stats=row_stats,
    )  # fmt: skip
    if not on_chip:
        del arguments["gradients"], arguments["gradient_strides"], arguments["DETACH"]
    return Launch(mutual_on_chip if on_chip else mutual_streaming, (row_loss.numel(),), arguments, warps)


def common_arguments(
    students: Sequence[Tensor], gradients: Sequence[Tensor | None], pair_weights: Tensor | None, temperature: float,
    scale: float, detach_peers: bool, most_elements: int,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """What every kernel of the op is told, and its warps: a program holds at most so many elements of all students."""
    check_dtypes(students)
    where = layout([*students, *gradients])
    table = as_arguments(students, where.strides[: len(students)], gradients, where.strides[len(students) :])
    n_classes, m_pad = students[0].shape[-1], triton.next_power_of_2(len(students))
    block_c = min(triton.next_power_of_2(n_classes), max(1, most_elements // m_pad))
    arguments = dict(
        students=table.pointers, student_strides=table.strides,
        gradients=table.gradients, gradient_strides=table.gradient_strides,
        pair_weights=None if pair_weights is None else pair_weights.to(torch.float32).contiguous(),
        n_rows=students[0].shape[:-1].numel(), inner=where.inner, n_classes=n_classes, n_students=len(students),
        inv_t=1.0 / temperature, scale=scale, DETACH=detach_peers, M_PAD=m_pad, DTYPE=table.dtype, UNIT=where.unit,
        BLOCK_C=block_c,
    )  # fmt: skip
    return arguments, min(8, max(1, m_pad * block_c // ELEMENTS_PER_WARP))


def backward(
    students: Sequence[Tensor], pair_weights: Tensor | None, upstream: Tensor | None, row_stats: Tensor,
    temperature: float, scale: float, detach_peers: bool, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """``MutualBackward``: the gradient of each student; an empty tensor where none is needed."""
    gradients = [z.new_empty(z.shape if need else 0) for z, need in zip(students, needs, strict=True)]
    if students[0].shape[:-1].numel() > 0 and any(needs):
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        backward_launch(students, pair_weights, upstream, row_stats, temperature, scale, detach_peers, wanted).run()
    return gradients


def backward_launch(
    students: Sequence[Tensor], pair_weights: Tensor | None, upstream: Tensor | None, row_stats: Tensor,
    temperature: float, scale: float, detach_peers: bool, gradients: Sequence[Tensor | None],
) -> Launch:  # fmt: skip
    arguments, warps = common_arguments(
        students, gradients, pair_weights, temperature, scale, detach_peers, ON_CHIP_ELEMENTS // 2
    )
    per_row, per_row_stride = upstream_rows(upstream)
    arguments |= dict(upstream=per_row, upstream_stride=per_row_stride, row_stats=row_stats)
    tiles = triton.cdiv(students[0].shape[-1], arguments["BLOCK_C"])
    return Launch(mutual_backward, (row_stats.shape[1] * tiles,), arguments, warps)
