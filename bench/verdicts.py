"""The targets, as data, and whether a run meets them. A missed one is told like a met one, with its worst cell.

A target is a number that a cell has, a set of cells, how the numbers of the set become one, and a bound.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import grid, results, timing
from .contenders import COMPILE, COPY, EAGER, ONE_THREAD

Measure = Callable[[dict], float | None]  # of a cell of the results; None: not measured there
WORST = "worst"  # of the cells, where each of them must be within the bound
MET, MISSED, PART, OPEN = "met", "missed", "met so far", "not measured"
SHORT_SECONDS = 300e-6  # of torch.compile, below which a call is mostly the host's work


class Target(NamedTuple):
    name: str
    measure: Measure
    bound: float
    cells: tuple[grid.Cell, ...]
    unit: str = "×"
    over: Callable[[Sequence[float]], float] | None = None  # None: every cell must be within the bound
    at_most: bool = False  # the bound is the largest number that is allowed; else the smallest
    only: Callable[[dict], bool] = lambda cell: True  # of the cells, where it depends on what was measured
    of_copy: Measure | None = None  # the same number of a copy, for comparison, where it has one

    def within(self, number: float) -> bool:
        return number <= self.bound if self.at_most else number >= self.bound


class Verdict(NamedTuple):
    name: str
    state: str
    number: float | None
    bound: float
    at_most: bool
    unit: str
    over: str
    worst: str | None  # the worst cell
    worst_number: float | None
    measured: int
    cells: int
    of_copy: float | None = None  # the same number of a copy, over the cells where it has one

    @property
    def found_in(self) -> str:
        cells = f"{self.measured} cells" if self.measured == self.cells else f"{self.measured} of {self.cells} cells"
        copy = "" if self.of_copy is None else f"; a copy from memory {in_unit(self.of_copy, self.unit)}"
        return f"{self.over} of {cells}{copy}"

    @property
    def sentence(self) -> str:
        limit = f"target {'at most' if self.at_most else 'at least'} {in_unit(self.bound, self.unit)}"
        if self.number is None:
            return f"{self.state:>12}  {self.name}: {limit}"
        said = f"{self.state:>12}  {self.name}: {in_unit(self.number, self.unit)} ({self.found_in}), {limit}; "
        return (
            said
            + (f"worst {in_unit(self.worst_number, self.unit)} " if self.over != WORST else "")
            + f"at {self.worst}"
        )


def in_unit(number: float, unit: str) -> str:
    return f"{number * 100:.0f}%" if unit == "%" else f"{number:.3g}{unit}"


def times(baseline: str) -> Measure:
    return lambda cell: results.speedup(cell, cell["ours"], baseline)


def share_of_copy(cell: dict) -> float | None:
    return results.share_of_floor(cell, cell["ours"], COPY)


def scaling(cell: dict) -> float | None:
    return results.speedup(cell, cell["ours"], cell["ours"] + ONE_THREAD)


def scaling_of_copy(cell: dict) -> float | None:
    """From memory: small ones stay in cache, and PyTorch does not share them out."""
    if cell["input_sets"] == 1:
        return None
    return results.speedup(cell, COPY, COPY + ONE_THREAD)


def host_overhead(cell: dict) -> float | None:
    inverse = results.speedup(cell, cell["ours"], "cross-entropy")
    return inverse and 1 / inverse


def memory_beyond(cell: dict) -> float | None:
    """Peak as a share of what is allowed: one gradient, O(N·K) numbers, and a slack that no size of the case is in."""
    peak = results.peak(cell, cell["ours"])
    if peak is None:
        return None
    return peak / (cell["gradient_bytes"] + cell["number_bytes"] + cell["slack_bytes"])


def is_short(cell: dict) -> bool:
    seconds = results.seconds(cell, COMPILE)
    return seconds is not None and seconds < SHORT_SECONDS


def _where(keep: Callable[[grid.Cell], bool], cells: Sequence[grid.Cell]) -> tuple[grid.Cell, ...]:
    return tuple(cell for cell in cells if keep(cell))


CPU_GRID = _where(lambda cell: cell not in (grid.HOST_OVERHEAD, grid.ANGLE), grid.targets())
CPU_LONG = _where(lambda cell: cell.case.classes >= 1000 and cell.case.dtype == grid.FP32, CPU_GRID)
GPU_LARGE = tuple(grid.Cell(case) for case in grid.GPU_LARGE)
GPU_SMALL = tuple(grid.Cell(case) for case in grid.GPU_SMALL)
GPU_ALL = (*GPU_LARGE, *GPU_SMALL)
GPU_ANGLE = (grid.Cell(grid.Relation("angle", 1024)),)

TARGETS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target("against eager PyTorch", times(EAGER), 20, CPU_GRID, over=timing.geometric_mean),
        Target("against torch.compile", times(COMPILE), 8, CPU_GRID, over=timing.geometric_mean),
        Target("no cell below, against torch.compile", times(COMPILE), 3, CPU_GRID, only=lambda c: not is_short(c)),
        Target("no cell below, where torch.compile takes under 300 µs", times(COMPILE), 1.5,
               (*CPU_GRID, grid.HOST_OVERHEAD), only=is_short),
        Target("speed of a copy of the minimal bytes, C ≥ 1000, fp32", share_of_copy, 0.75, CPU_LONG, unit="%"),
        Target("one to two cores", scaling, 1.8, CPU_GRID, over=timing.geometric_mean, of_copy=scaling_of_copy),
        Target("peak memory over one gradient + O(N·K)", memory_beyond, 1.0, CPU_GRID, at_most=True),
        Target("host overhead: time over that of F.cross_entropy", host_overhead, 1.5, (grid.HOST_OVERHEAD,),
               at_most=True),
        Target("RKD angle against its published form", times(EAGER), 20, (grid.ANGLE,)),
    ),
    "cuda": (
        Target("against eager PyTorch, C ≥ 1000, bf16", times(EAGER), 10, GPU_LARGE, over=timing.geometric_mean),
        Target("against torch.compile, C ≥ 1000, bf16", times(COMPILE), 3, GPU_LARGE, over=timing.geometric_mean),
        Target("against eager PyTorch, small shapes", times(EAGER), 10, GPU_SMALL, over=timing.geometric_mean),
        Target("against torch.compile, small shapes", times(COMPILE), 3, GPU_SMALL, over=timing.geometric_mean),
        Target("speed of a copy of the minimal bytes, C ≥ 1000, bf16", share_of_copy, 0.9, GPU_LARGE, unit="%"),
        Target("peak memory over one gradient + O(N·K)", memory_beyond, 1.0, GPU_ALL, at_most=True),
        Target("RKD angle against its published form", times(EAGER), 20, GPU_ANGLE),
    ),
}  # fmt: skip


def of(run: dict) -> list[Verdict]:
    """Every target of the run's device, met or not."""
    measured = {key(cell): cell for cell in run["cells"]}
    return [judge(target, measured) for target in TARGETS[run["machine"]["kind"]]]


def key(cell: dict) -> tuple[str, ...]:
    return cell["op"], cell["objective"], cell["shape"], cell["of"]


def key_of(cell: grid.Cell) -> tuple[str, ...]:
    return cell.case.op, cell.case.objective, str(cell.case), cell.of


def judge(target: Target, measured: dict[tuple, dict]) -> Verdict:
    """``measured``: the cells of the results by ``key``."""
    found: list[tuple[float, str]] = []
    copies: list[float] = []
    expected = 0
    for wanted in target.cells:
        cell = measured.get(key_of(wanted))
        if cell is not None and not target.only(cell):
            continue
        expected += 1
        number = target.measure(cell) if cell is not None else None
        if number is not None:
            found.append((number, results.title(cell)))
            of_copy = target.of_copy(cell) if target.of_copy else None
            copies += [] if of_copy is None else [of_copy]
    over = WORST if target.over is None else "geometric mean"
    common = (target.bound, target.at_most, target.unit, over)
    if not found:
        return Verdict(target.name, OPEN, None, *common, None, None, 0, expected)
    worst_number, worst = max(found) if target.at_most else min(found)
    over_cells = target.over or (max if target.at_most else min)
    number = over_cells([number for number, _ in found])
    passed = target.within(number)
    state = MISSED if not passed else MET if len(found) == expected else PART
    of_copy = over_cells(copies) if copies else None
    return Verdict(target.name, state, number, *common, worst, worst_number, len(found), expected, of_copy)
