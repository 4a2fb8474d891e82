"""Where logits lie: strides of the student and of K teachers, read in place, each with its own dtype.

Row n of a tensor starts at (n // inner)·outer_stride + (n % inner)·inner_stride, `inner` common to all tensors of a
call, so that logits[:, :-1] of a [B, L, C] tensor needs no copy. Offsets are 64-bit.

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
ENTRY = tl.constexpr(6)  # int64 numbers per teacher in the table: address, three strides, dtype, gradient's address
TABLES_KEPT = 64


class Strides(NamedTuple):
    """In elements; `inner` is 0 when one leading stride is enough."""

    outer: int
    inner: int
    classes: int


class Teachers(NamedTuple):
    """K teachers as kernel arguments."""

    pointers: tuple[Tensor, ...] | Tensor  # one tensor each, or the table
    strides: tuple[Strides, ...] | None  # None: they are in the table
    gradients: tuple[Tensor | None, ...] | None  # None: they are in the table
    dtype: int  # of all teachers of a table, or MIXED


class Layout(NamedTuple):
    """How every tensor of one call is addressed."""

    inner: int
    strides: list[Strides]  # student first
    unit: int  # C and every row stride are multiples of it, at most 16; 1 where a tensor is not 16-byte aligned;
    #            0 when a class stride is not 1


def check_dtypes(logits: Sequence[Tensor]) -> None:
    for x in logits:
        if x.dtype not in DTYPES:
            raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {x.dtype}")


def layout(logits: Sequence[Tensor]) -> Layout:
    """Joins the leading dimensions of all tensors (same shape) to at most two. Never copies."""
    *rows, n_classes = logits[0].shape
    dims: list[tuple[int, list[int]]] = []  # size, and the stride in every tensor; outermost first
    for axis, size in enumerate(rows):
        if size == 1:
            continue
        strides = [x.stride(axis) for x in logits]
        if dims and all(before == stride * size for before, stride in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        raise ValueError(
            "the rows of student_logits and teacher_logits must be reachable with at most two leading strides, "
            f"got shapes {tuple(logits[0].shape)} with strides {[x.stride() for x in logits]}: make one contiguous"
        )
    zeros = [0] * len(logits)
    inner = dims[1][0] if len(dims) == 2 else 1
    outer_strides = dims[0][1] if dims else zeros
    inner_strides = dims[1][1] if len(dims) == 2 else zeros
    class_strides = [1 if n_classes == 1 else x.stride(-1) for x in logits]
    strides = [Strides(*s) for s in zip(outer_strides, inner_strides, class_strides, strict=True)]
    unit = 1 if set(class_strides) == {1} else 0
    if unit and all(x.data_ptr() % 16 == 0 for x in logits):
        unit = math.gcd(16, n_classes, *outer_strides, *inner_strides)
    return Layout(inner, strides, unit)


def as_arguments(
    teachers: Sequence[Tensor], strides: Sequence[Strides], gradients: Sequence[Tensor | None] | None = None
) -> Teachers:
    gradients = tuple(gradients) if gradients else (None,) * len(teachers)
    if len(teachers) <= MAX_TUPLE:
        return Teachers(tuple(teachers), tuple(strides), gradients, MIXED.value)
    codes = [DTYPES[t.dtype] for t in teachers]
    entries = tuple(
        (t.data_ptr(), *stride, code, 0 if gradient is None else gradient.data_ptr())
        for t, stride, code, gradient in zip(teachers, strides, codes, gradients, strict=True)
    )
    dtype = codes[0] if len(set(codes)) == 1 else MIXED.value
    return Teachers(_table(teachers[0].device, entries), None, None, dtype)


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
def write_entry(entry, address, outer, inner, classes, dtype, gradient):
    tl.store(entry, address)
    tl.store(entry + 1, outer)
    tl.store(entry + 2, inner)
    tl.store(entry + 3, classes)
    tl.store(entry + 4, dtype)
    tl.store(entry + 5, gradient)


@triton.jit(do_not_specialize=range(1, 2 + 4 * 6))
def write_entries(
    table, first,
    a0: tl.int64, o0: tl.int64, i0: tl.int64, c0: tl.int64, d0: tl.int64, g0: tl.int64,
    a1: tl.int64, o1: tl.int64, i1: tl.int64, c1: tl.int64, d1: tl.int64, g1: tl.int64,
    a2: tl.int64, o2: tl.int64, i2: tl.int64, c2: tl.int64, d2: tl.int64, g2: tl.int64,
    a3: tl.int64, o3: tl.int64, i3: tl.int64, c3: tl.int64, d3: tl.int64, g3: tl.int64,
):  # fmt: skip
    """One variant for all values: nothing is left to compile when a graph is captured after a first call."""
    entry = table + first * ENTRY
    write_entry(entry, a0, o0, i0, c0, d0, g0)
    write_entry(entry + ENTRY, a1, o1, i1, c1, d1, g1)
    write_entry(entry + 2 * ENTRY, a2, o2, i2, c2, d2, g2)
    write_entry(entry + 3 * ENTRY, a3, o3, i3, c3, d3, g3)


@triton.jit
def in_units(x, UNIT: tl.constexpr):
    """x, known to be a multiple of UNIT: what lets the compiler load 128 bits at a time."""
    if UNIT > 1:
        return x // UNIT * UNIT
    else:
        return x


@triton.jit
def load_tile(x, outer, inner_stride, class_stride, rows, inner, cols, mask, UNIT: tl.constexpr):
    """Rows [R] (int64) and columns [1, C], or one column each [R, 1] -> logits as stored, −inf where masked."""
    offsets = rows // inner * in_units(outer, UNIT) + rows % inner * in_units(inner_stride, UNIT)
    if UNIT == 0:
        cols = cols.to(tl.int64) * class_stride
    return tl.load(x + offsets[:, None] + cols, mask=mask, other=-INF)


@triton.jit
def load_logits(x, strides, rows, inner, cols, mask, UNIT: tl.constexpr):
    return load_tile(x, strides[0], strides[1], strides[2], rows, inner, cols, mask, UNIT)


@triton.jit
def load_as(address, DTYPE: tl.constexpr, strides, rows, inner, cols, mask, UNIT: tl.constexpr):
    x = address.to(tl.pointer_type(DTYPE))
    if UNIT > 1:
        x = tl.multiple_of(x, 16)
    return load_logits(x, strides, rows, inner, cols, mask, UNIT)


@triton.jit
def load_from_table(table, k, rows, inner, cols, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    entry = table + k * ENTRY
    address = tl.load(entry)
    strides = (tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3))
    if DTYPE == F32:
        return load_as(address, tl.float32, strides, rows, inner, cols, mask, UNIT)
    elif DTYPE == BF16:
        return load_as(address, tl.bfloat16, strides, rows, inner, cols, mask, UNIT)
    elif DTYPE == F16:
        return load_as(address, tl.float16, strides, rows, inner, cols, mask, UNIT)
    else:
        dtype = tl.load(entry + 4)
        if dtype == F32:
            x = load_as(address, tl.float32, strides, rows, inner, cols, mask, UNIT).to(tl.float32)
        elif dtype == BF16:
            x = load_as(address, tl.bfloat16, strides, rows, inner, cols, mask, UNIT).to(tl.float32)
        else:
            x = load_as(address, tl.float16, strides, rows, inner, cols, mask, UNIT).to(tl.float32)
        return x


@triton.jit
def load_teacher(teachers, strides, k, rows, inner, cols, mask, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Teacher k as stored (in float32 from a table of mixed dtypes).

    A tuple needs a k that the compiler knows, a table does not.
    """
    if strides is None:
        return load_from_table(teachers, k, rows, inner, cols, mask, DTYPE, UNIT)
    else:
        return load_logits(teachers[k], strides[k], rows, inner, cols, mask, UNIT)


@triton.jit
def load_label(x, strides, rows, inner, label, legal, UNIT: tl.constexpr):
    """The logit of each row's label [R], −inf where it is not legal."""
    y = load_logits(x, strides, rows, inner, label[:, None], legal[:, None], UNIT)
    return tl.sum(y.to(tl.float32), 1)


@triton.jit
def load_used(
    k, teachers, strides, weights, weights_strides, rows, inner, cols, counted, in_cols, legal, label, n_teachers,
    SKIP_ZERO: tl.constexpr, WITH_LABEL: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Teacher k [R, C], its logit of the label [R] and its known weight [R]; rows of weight 0 need not be read."""
    weight = known_weights(weights, weights_strides, k, rows, counted, n_teachers)
    read = counted & (weight != 0) if SKIP_ZERO else counted
    t = load_teacher(teachers, strides, k, rows, inner, cols, read[:, None] & in_cols, DTYPE, UNIT)
    y = weight
    if WITH_LABEL:
        at_label = (legal & read)[:, None]
        y = load_teacher(teachers, strides, k, rows, inner, label[:, None], at_label, DTYPE, UNIT)
        y = tl.sum(y.to(tl.float32), 1)
    return t, y, weight


@triton.jit
def store_gradient(gradient, rows, n_classes, cols, g, mask):
    """A contiguous [N, C] gradient, rounded once to its dtype."""
    tl.store(gradient + rows[:, None] * n_classes + cols, g.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def store_in_table(table, k, rows, n_classes, cols, g, mask, DTYPE: tl.constexpr):
    address = tl.load(table + k * ENTRY + 5)
    mask &= address != 0
    if DTYPE == F32:
        store_gradient(address.to(tl.pointer_type(tl.float32)), rows, n_classes, cols, g, mask)
    elif DTYPE == BF16:
        store_gradient(address.to(tl.pointer_type(tl.bfloat16)), rows, n_classes, cols, g, mask)
    elif DTYPE == F16:
        store_gradient(address.to(tl.pointer_type(tl.float16)), rows, n_classes, cols, g, mask)
    else:
        dtype = tl.load(table + k * ENTRY + 4)
        if dtype == F32:
            store_gradient(address.to(tl.pointer_type(tl.float32)), rows, n_classes, cols, g, mask)
        elif dtype == BF16:
            store_gradient(address.to(tl.pointer_type(tl.bfloat16)), rows, n_classes, cols, g, mask)
        else:
            store_gradient(address.to(tl.pointer_type(tl.float16)), rows, n_classes, cols, g, mask)


@triton.jit
def store_teacher_gradient(teachers, gradients, k, rows, n_classes, cols, g, mask, DTYPE: tl.constexpr):
    """The gradient of teacher k, if it is wanted."""
    if gradients is None:
        store_in_table(teachers, k, rows, n_classes, cols, g, mask, DTYPE)
    elif gradients[k] is not None:
        store_gradient(gradients[k], rows, n_classes, cols, g, mask)
