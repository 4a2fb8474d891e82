"""The bytes that each pass of an op may move, and a count of those that Triton's interpreter moves.

Only the tensors of size N·C are modelled. What is O(N·K) is counted as well, under "rest".
"""

from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    loads: dict[str, int]
    stores: dict[str, int]


def size(x: Tensor, rows: int | None = None) -> int:
    """Bytes of x, or of that many of its rows."""
    return x.numel() * x.element_size() if rows is None else rows * x.shape[-1] * x.element_size()


def kd_bytes(
    student: Tensor,
    teachers: list[Tensor],
    *,
    counted: int,
    used: list[int] | None = None,
    label_of_student: bool = False,
    label_of_teachers: bool = False,
    blocks: int = 1,
    sweeps: int = 1,
    gradients: tuple[str, ...] = (),
) -> Traffic:
    """One pass of the op kd: K + 1 reads, and one write for each gradient.

    An elementwise divergence of rows that do not fit on chip takes two ``sweeps``: the sums of both softmaxes first.

    ``counted`` rows are read, of teacher k only the ``used[k]`` rows in which its weight is not 0. Where a
    cross-entropy is computed, the logit of each row's label is fetched once more by itself, in each of the ``blocks``
    that share a row and need it. Gradients are written whole, zeros included.
    """
    labels = blocks * counted
    used = [counted] * len(teachers) if used is None else used
    names = {"student": student} | {f"teacher {k}": t for k, t in enumerate(teachers)}
    loads = {"student": sweeps * size(student, counted) + label_of_student * labels * student.element_size()}
    for k, (teacher, rows) in enumerate(zip(teachers, used, strict=True)):
        loads[f"teacher {k}"] = sweeps * size(teacher, rows) + label_of_teachers * labels * teacher.element_size()
    stores = {f"gradient of {name}": size(names[name]) for name in gradients}
    return Traffic({name: n for name, n in loads.items() if n}, stores)


def rescale_bytes(gradient: Tensor, *, counted: int, changed: int, in_place: bool) -> Traffic:
    """One read and one write; in place only of the ``changed`` rows, those that count and whose upstream is not 1."""
    reads, writes = (changed, changed) if in_place else (counted, size(gradient) // size(gradient, 1))
    loads = {"gradient": size(gradient, reads)}
    stores = {"gradient" if in_place else "out": size(gradient, writes)}
    return Traffic(*({name: n for name, n in moved.items() if n} for moved in (loads, stores)))


def hint_bytes(student: list[Tensor], teacher: list[Tensor], *, used: list[int], gradients: bool) -> Traffic:
    """Two reads of the ``used[k]`` samples of each pair; one write of all of its gradient."""
    loads, stores = {}, {}
    for k, (f, g, samples) in enumerate(zip(student, teacher, used, strict=True)):
        elements = f.shape[1:].numel()
        loads[f"student {k}"] = samples * elements * f.element_size()
        loads[f"teacher {k}"] = samples * elements * g.element_size()
        if gradients:
            stores[f"gradient {k}"] = size(f)
    return Traffic({name: n for name, n in loads.items() if n}, stores)


def relation_planes_bytes(batch: int, pitch: int) -> Traffic:
    """Off the diagonal an element of the Gram matrix, and one of its diagonal beside it; three planes written."""
    return Traffic({"gram": 8 * 2 * batch * (batch - 1)}, {"planes": 4 * 3 * pitch**2})


def relation_angle_bytes(pitch: int, tile: int, *, gradient: int = 0) -> Traffic:
    """Tiles of pairs, those not below the diagonal: of each side three planes of the tile, and of its rows and columns
    for every third point. P is written on both sides of the diagonal, in float64.
    """
    tiles = (pitch // tile) * (pitch // tile + 1) // 2
    side = 4 * 3 * tiles * (tile**2 + pitch * 2 * tile)
    return Traffic({"student": side, "teacher": side}, {"pull": 8 * gradient**2} if gradient else {})


def mixture_bytes(
    teachers: list[Tensor], *, used: list[int], sweeps: int = 1, student: Tensor | None = None
) -> dict[str, int]:
    """Loads of the ``used[k]`` rows of each teacher, ``sweeps`` times, and of all rows of the student twice."""
    loads = {} if student is None else {"student": 2 * size(student)}
    loads |= {f"teacher {k}": sweeps * size(t, rows) for k, (t, rows) in enumerate(zip(teachers, used, strict=True))}
    return {name: n for name, n in loads.items() if n}


def mutual_bytes(students: list[Tensor], *, read: list[int], gradients: list[bool]) -> Traffic:
    """One read of ``read[i]`` rows of each student, one write of every wanted gradient."""
    loads = {f"student {i}": size(z, rows) for i, (z, rows) in enumerate(zip(students, read, strict=True))}
    stores = {f"gradient {i}": size(z) for i, (z, wanted) in enumerate(zip(students, gradients, strict=True)) if wanted}
    return Traffic({name: n for name, n in loads.items() if n}, stores)


def attention_bytes(side: str, maps: list[Tensor], used: list[int]) -> Traffic:
    """One read of the ``used[k]`` samples of each map, forward as backward."""
    return Traffic(
        {f"{side} {k}": n * f[0].numel() * f.element_size() for k, (f, n) in enumerate(zip(maps, used, strict=True))},
        {},
    )


@contextmanager
def counted_in_interpreter(tensors: dict[str, Tensor]):
    """Yields the Traffic of the kernels run inside, by the tensor that each unmasked lane touches."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = Traffic(Counter(), Counter())
    ranges = [(name, x.data_ptr(), x.data_ptr() + span(x)) for name, x in tensors.items()]

    def record(moved: Counter, pointers, mask) -> None:
        addresses = pointers.data[mask.data.astype(bool)]
        width = pointers.get_element_ty().primitive_bitwidth // 8
        left = addresses.size
        for name, begin, end in ranges:
            inside = int(((addresses >= begin) & (addresses < end)).sum())
            left -= inside
            if inside:
                moved[name] += inside * width
        if left:
            moved["rest"] += left * width

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *arguments):
        record(found.loads, pointers, mask)
        return load(self, pointers, mask, *arguments)

    def counted_store(self, pointers, value, mask, *arguments):
        record(found.stores, pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def span(x: Tensor) -> int:
    """Bytes from the first to the last element of x."""
    return (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def large(moved: dict[str, int]) -> dict[str, int]:
    """Without what is O(N·K)."""
    return {name: n for name, n in moved.items() if name != "rest"}
