"""Where logits lie: strides of the student, of K teachers and of gradients, in place, each with its own dtype.

Row n of a tensor starts at (n // inner)·outer_stride + (n % inner)·inner_stride, `inner` common to all tensors of a
call, so that logits[:, :-1] of a [B, L, C] tensor needs no copy. Offsets are 64-bit.

Threads run along the classes, PIXELS = 0; or, where the rows follow each other in memory and the classes do not, along
the rows, pixels of [B, C, H, W] seen as [B, H, W, C]. PIXELS is then how many of them a thread may have side by side:
1, so that what is known of a row is in one thread and so are most of its sums, or 8, 128 bits of bf16, where there is
little of either.

Up to MAX_TUPLE teachers are a tuple of pointers, unrolled by the compiler. More of them are one table in device memory
and a run-time loop, compiled once for any K.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_stats import INF
from .weights import known_weights

MAX_TUPLE = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
F32, BF16, F16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MIXED = tl.constexpr(-1)
ENTRY = tl.constexpr(9)  # int64 numbers of a teacher in the table: address, three strides, dtype, and its gradient's
GRADIENT_AT = tl.constexpr(5)  # address and strides
TABLES_KEPT = 64


class Strides(NamedTuple):
    """In elements; `inner` is 0 when one leading stride is enough."""

    outer: int
    inner: int
    classes: int


class Teachers(NamedTuple):
    """K teachers and their gradients as kernel arguments."""

    pointers: tuple[Tensor, ...] | Tensor  # one tensor each, or the table
    strides: tuple[Strides, ...] | None  # None: they are in the table
    gradients: tuple[Tensor | None, ...] | None  # likewise
    gradient_strides: tuple[Strides | None, ...] | None
    dtype: int  # of all teachers of a table, or MIXED


class Layout(NamedTuple):
    """How every tensor of one call is addressed."""

    inner: int
    strides: list[Strides | None]
    unit: int  # C and every row stride are multiples of it, at most 16; 1 where a tensor is not 16-byte aligned;
    #            0 when a class stride is not 1. Along the pixels: `inner`, outer and class strides; inner strides


def check_dtypes(logits: Sequence[Tensor]) -> None:
    for x in logits:
        if x.dtype not in DTYPES:
            raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {x.dtype}")


def along_pixels(logits: Tensor) -> bool:
    """Whether rows follow each other in memory and classes do not: what the student's layout decides for a call."""
    *rows, classes = zip(logits.shape, logits.stride(), strict=True)
    rows = [stride for size, stride in rows if size != 1]
    return classes[0] > 1 and classes[1] != 1 and bool(rows) and rows[-1] == 1


def layout(logits: Sequence[Tensor | None], pixels: bool = False) -> Layout:
    """Joins the leading dimensions of all tensors (same shape) to at most two. Never copies."""
    present = [x for x in logits if x is not None]
    first = present[0]
    *rows, n_classes = first.shape
    dims: list[tuple[int, list[int]]] = []  # size, and the stride in every tensor; outermost first
    for axis, size in enumerate(rows):
        if size == 1:
            continue
        strides = [x.stride(axis) for x in present]
        if dims and all(before == stride * size for before, stride in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        raise ValueError(
            "the rows of student_logits and teacher_logits must be reachable with at most two leading strides, "
            f"got shapes {tuple(first.shape)} with strides {[x.stride() for x in present]}: make one contiguous"
        )
    while len(dims) < 2:
        dims.insert(0 if pixels else len(dims), (1, [0] * len(present)))
    (_, outer), (n_inner, inner) = dims
    classes = [1 if n_classes == 1 else x.stride(-1) for x in present]
    length, along, across = (n_inner, inner, classes) if pixels else (n_classes, classes, inner)
    unit = 1 if set(along) == {1} else 0
    if unit and all(x.data_ptr() % 16 == 0 for x in present):
        unit = math.gcd(16, length, *outer, *across)
    strides = map(Strides, outer, inner, classes)
    return Layout(n_inner, [None if x is None else next(strides) for x in logits], unit)


def as_arguments(
    teachers: Sequence[Tensor], strides: Sequence[Strides],
    gradients: Sequence[Tensor | None] = (), gradient_strides: Sequence[Strides | None] = (),
) -> Teachers:  # fmt: skip
    """``gradients``: none at all, or one or None for each teacher."""
    if len(teachers) <= MAX_TUPLE:
        return Teachers(tuple(teachers), tuple(strides), tuple(gradients), tuple(gradient_strides), MIXED.value)
    codes = [DTYPES[t.dtype] for t in teachers]
    none = (None,) * len(teachers)
    of_gradients = [
        (0,) * 4 if g is None else (g.data_ptr(), *at)
        for g, at in zip(gradients or none, gradient_strides or none, strict=True)
    ]
    entries = tuple(
        (t.data_ptr(), *at, code, *of_gradient)
        for t, at, code, of_gradient in zip(teachers, strides, codes, of_gradients, strict=True)
    )
    dtype = codes[0] if len(set(codes)) == 1 else MIXED.value
    return Teachers(_table(teachers[0].device, entries), None, None, None, dtype)


# Tables by content and stream, the least recently used first.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()


def _table(device: torch.device, entries: tuple[tuple[int, ...], ...]) -> Tensor:
    """[K, ENTRY]. A CUDA graph gets a table of its own, in its own memory, written again at every replay."""
    if device.type != "cuda":
        return torch.tensor(entries)
    if torch.cuda.is_current_stream_capturing():
        return write_table(device, entries)
    key = (device, torch.cuda.current_stream(device).cuda_stream, entries)
    table = _tables.pop(key, None)
    _tables[key] = write_table(device, entries) if table is None else table
    if len(_tables) > TABLES_KEPT:
        _tables.popitem(last=False)
    return _tables[key]


def write_table(device: torch.device, entries: tuple[tuple[int, ...], ...]) -> Tensor:
    """From the arguments of launches, four entries each, which a graph can record; an upload it cannot."""
    padded = entries + ((0,) * ENTRY.value,) * (-len(entries) % 4)
    table = torch.empty(len(padded), ENTRY.value, dtype=torch.int64, device=device)
    for first in range(0, len(padded), 4):
        numbers = sum(padded[first : first + 4], ())
        write_entries[(1,)](table, first, *numbers, num_warps=1)
    return table[: len(entries)]


@triton.jit
def write_entry(entry, address, outer, inner, classes, dtype, gradient, to_outer, to_inner, to_classes):
    tl.store(entry, address)
    tl.store(entry + 1, outer)
    tl.store(entry + 2, inner)
    tl.store(entry + 3, classes)
    tl.store(entry + 4, dtype)
    tl.store(entry + 5, gradient)
    tl.store(entry + 6, to_outer)
    tl.store(entry + 7, to_inner)
    tl.store(entry + 8, to_classes)


@triton.jit(do_not_specialize=range(1, 2 + 4 * 9))
def write_entries(
    table, first,
    a0: tl.int64, o0: tl.int64, i0: tl.int64, c0: tl.int64, d0: tl.int64,
    ga0: tl.int64, go0: tl.int64, gi0: tl.int64, gc0: tl.int64,
    a1: tl.int64, o1: tl.int64, i1: tl.int64, c1: tl.int64, d1: tl.int64,
    ga1: tl.int64, go1: tl.int64, gi1: tl.int64, gc1: tl.int64,
    a2: tl.int64, o2: tl.int64, i2: tl.int64, c2: tl.int64, d2: tl.int64,
    ga2: tl.int64, go2: tl.int64, gi2: tl.int64, gc2: tl.int64,
    a3: tl.int64, o3: tl.int64, i3: tl.int64, c3: tl.int64, d3: tl.int64,
    ga3: tl.int64, go3: tl.int64, gi3: tl.int64, gc3: tl.int64,
):  # fmt: skip
    """One variant for all values: nothing is left to compile when a graph is captured after a first call."""
    entry = table + first * ENTRY
    write_entry(entry, a0, o0, i0, c0, d0, ga0, go0, gi0, gc0)
    write_entry(entry + ENTRY, a1, o1, i1, c1, d1, ga1, go1, gi1, gc1)
    write_entry(entry + 2 * ENTRY, a2, o2, i2, c2, d2, ga2, go2, gi2, gc2)
    write_entry(entry + 3 * ENTRY, a3, o3, i3, c3, d3, ga3, go3, gi3, gc3)


@triton.jit
def in_units(x, UNIT: tl.constexpr):
    """x, known to be a multiple of UNIT: what lets the compiler load 128 bits at a time."""
    if UNIT > 1:
        return x // UNIT * UNIT
    else:
        return x


@triton.jit
def rows_of_program(program, inner, n_rows, UNIT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows [R] (int64) of the program-th block, and where they lie: outer and inner index, and whether they exist.

    Along the pixels a block has one outer index, so that its rows follow each other in memory as far as they exist.
    """
    if PIXELS:
        inner = in_units(inner, UNIT)
        blocks = tl.cdiv(inner, BLOCK_N)
        outer_index = (program // blocks).to(tl.int64)
        inner_index = (program % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        return outer_index * inner + inner_index, (outer_index, inner_index, inner_index < inner)
    else:
        rows = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        return rows, place_of(rows, inner, rows < n_rows)


@triton.jit
def place_of(rows, inner, in_rows):
    """Where any rows [R] lie."""
    return rows // inner, rows % inner, in_rows


@triton.jit
def read_mask(read, place, in_cols, PIXELS: tl.constexpr):
    """The elements [R, C] to load for the rows that are to be read [R].

    A mask that differs from pixel to pixel would cost wide loads their width: a block of pixels is read as a whole or
    not at all. What is read in vain reaches no result, as the −inf of a row that is not read does not.
    """
    if PIXELS > 1:
        _outer, _inner, in_rows = place
        read = in_rows & (tl.max(read.to(tl.int32), 0) != 0)
    return read[:, None] & in_cols


@triton.jit
def pointers_to(x, strides, place, cols, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    """Columns [1, C], or one column each [R, 1] -> pointers [R, C] or [R, 1]."""
    outer_index, inner_index, _in_rows = place
    outer = outer_index * in_units(strides[0], UNIT)
    if PIXELS:
        cols = cols.to(tl.int64) * in_units(strides[2], UNIT)
        if UNIT == 0:
            inner_index = inner_index * strides[1]
        pointers = x + (outer + inner_index)[:, None] + cols
        if PIXELS == 1:
            pointers = tl.multiple_of(pointers, (1, 1))  # as if no more were known, so that a thread gets one pixel
        return pointers
    else:
        if UNIT == 0:
            cols = cols.to(tl.int64) * strides[2]
        return x + (outer + inner_index * in_units(strides[1], UNIT))[:, None] + cols


@triton.jit
def load_logits(x, strides, place, cols, mask, UNIT: tl.constexpr, PIXELS: tl.constexpr = False):
    """Logits as stored, −inf where masked."""
    return tl.load(pointers_to(x, strides, place, cols, UNIT, PIXELS), mask=mask, other=-INF)


@triton.jit
def in_table(entry, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Pointer and strides."""
    x = tl.load(entry).to(tl.pointer_type(DTYPE))
    if UNIT > 1:
        x = tl.multiple_of(x, 16)
    return x, (tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3))


@triton.jit
def load_as(DTYPE: tl.constexpr, table, k, place, cols, mask, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    x, strides = in_table(table + k * ENTRY, DTYPE, UNIT)
    return load_logits(x, strides, place, cols, mask, UNIT, PIXELS)


@triton.jit
def load_from_table(table, k, place, cols, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    if DTYPE == F32:
        return load_as(tl.float32, table, k, place, cols, mask, UNIT, PIXELS)
    elif DTYPE == BF16:
        return load_as(tl.bfloat16, table, k, place, cols, mask, UNIT, PIXELS)
    elif DTYPE == F16:
        return load_as(tl.float16, table, k, place, cols, mask, UNIT, PIXELS)
    else:
        dtype = tl.load(table + k * ENTRY + 4)
        if dtype == F32:
            x = load_as(tl.float32, table, k, place, cols, mask, UNIT, PIXELS).to(tl.float32)
        elif dtype == BF16:
            x = load_as(tl.bfloat16, table, k, place, cols, mask, UNIT, PIXELS).to(tl.float32)
        else:
            x = load_as(tl.float16, table, k, place, cols, mask, UNIT, PIXELS).to(tl.float32)
        return x


@triton.jit
def load_teacher(
    teachers, strides, k, place, cols, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr = False
):
    """Teacher k as stored (in float32 from a table of mixed dtypes).

    A tuple needs a k that the compiler knows, a table does not.
    """
    if strides is None:
        return load_from_table(teachers, k, place, cols, mask, DTYPE, UNIT, PIXELS)
    else:
        return load_logits(teachers[k], strides[k], place, cols, mask, UNIT, PIXELS)


@triton.jit
def load_label(x, strides, place, label, legal, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    """The logit of each row's label [R], −inf where it is not legal."""
    y = load_logits(x, strides, place, label[:, None], legal[:, None], UNIT, PIXELS)
    return tl.sum(y.to(tl.float32), 1)


@triton.jit
def load_used(
    k, teachers, strides, weights, weights_strides, rows, place, cols, counted, in_cols, legal, label, n_teachers,
    SKIP_ZERO: tl.constexpr, WITH_LABEL: tl.constexpr,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Teacher k [R, C], its logit of the label [R] and its known weight [R]; rows of weight 0 need not be read."""
    weight = known_weights(weights, weights_strides, k, rows, counted, n_teachers)
    read = counted & (weight != 0) if SKIP_ZERO else counted
    mask = read_mask(read, place, in_cols, PIXELS)
    t = load_teacher(teachers, strides, k, place, cols, mask, DTYPE, UNIT, PIXELS)
    y = weight
    if WITH_LABEL:
        at_label = (legal & read)[:, None]
        y = load_teacher(teachers, strides, k, place, label[:, None], at_label, DTYPE, UNIT, PIXELS)
        y = tl.sum(y.to(tl.float32), 1)
    return t, y, weight


@triton.jit
def store_gradient(x, strides, place, cols, g, mask, UNIT: tl.constexpr, PIXELS: tl.constexpr = False):
    """A gradient [R, C], rounded once to its dtype."""
    tl.store(pointers_to(x, strides, place, cols, UNIT, PIXELS), g.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_as(DTYPE: tl.constexpr, table, k, place, cols, g, mask, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    x, strides = in_table(table + k * ENTRY + GRADIENT_AT, DTYPE, UNIT)
    store_gradient(x, strides, place, cols, g, mask & (x.to(tl.int64) != 0), UNIT, PIXELS)


@triton.jit
def store_in_table(table, k, place, cols, g, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    if DTYPE == F32:
        store_as(tl.float32, table, k, place, cols, g, mask, UNIT, PIXELS)
    elif DTYPE == BF16:
        store_as(tl.bfloat16, table, k, place, cols, g, mask, UNIT, PIXELS)
    elif DTYPE == F16:
        store_as(tl.float16, table, k, place, cols, g, mask, UNIT, PIXELS)
    else:
        dtype = tl.load(table + k * ENTRY + 4)
        if dtype == F32:
            store_as(tl.float32, table, k, place, cols, g, mask, UNIT, PIXELS)
        elif dtype == BF16:
            store_as(tl.bfloat16, table, k, place, cols, g, mask, UNIT, PIXELS)
        else:
            store_as(tl.float16, table, k, place, cols, g, mask, UNIT, PIXELS)


@triton.jit
def store_teacher_gradient(
    teachers, gradients, gradient_strides, k, place, cols, g, mask,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr = False,
):  # fmt: skip
    """The gradient of teacher k, if it is wanted."""
    if gradients is None:
        store_in_table(teachers, k, place, cols, g, mask, DTYPE, UNIT, PIXELS)
    elif gradients[k] is not None:
        store_gradient(gradients[k], gradient_strides[k], place, cols, g, mask, UNIT, PIXELS)


@triton.jit
def store_contiguous(x, rows, n_classes, cols, values, mask):
    """Rows of a contiguous [N, C] output, rounded once to its dtype."""
    tl.store(x + rows[:, None] * n_classes + cols, values.to(x.dtype.element_ty), mask=mask)
