"""Which cells are measured: a case, what of it is timed, and who takes part."""

from typing import NamedTuple

import torch

from .case import Case
from .contenders import GROUPS
from .ops.hint import Hint
from .ops.kd import KD
from .ops.mixture import Mixture
from .ops.mutual import Mutual
from .ops.relation import Relation
from .passes import BACKWARD, BOTH, FORWARD, GRAPH

FP32, BF16 = torch.float32, torch.bfloat16
AGAINST = ("eager", "compile", "ours", "one-thread", "floors")
EVERYONE, SOME = GROUPS, ("eager", "compile", "ours", "floors")
CLASSES, TEACHERS, DTYPES = (10, 1000, 32000, 100, 128256), (3, 1, 8), (FP32, BF16)
ELEMENTS, ROWS_OF_TEN = 4_000_000, 8192


class Cell(NamedTuple):
    case: Case
    of: str = BOTH
    who: tuple[str, ...] = AGAINST

    def __str__(self) -> str:
        return f"{self.case.title}, {self.of}"


def rows(classes: int) -> int:
    """N = 4M/C, the tokens or pixels of a large batch; of 10 classes 8192."""
    return ROWS_OF_TEN if classes == 10 else ELEMENTS // classes


def targets() -> list[Cell]:
    """The 30 cells that the CPU's targets speak of, and those of the two that stand alone."""
    grid = [Cell(KD("confidence", rows(c), c, k, d)) for d in DTYPES for k in TEACHERS for c in CLASSES]
    return [HOST_OVERHEAD, *grid, ANGLE]


HOST_OVERHEAD = Cell(KD("confidence", 256, 100, 3), who=(*AGAINST, "anchors"))
ANGLE = Cell(Relation("angle", 256), who=("eager", "ours", "one-thread", "floors"))

PARTS = tuple(Cell(KD("confidence", n, c, 3), of) for n, c in ((256, 100), (4000, 1000)) for of in (FORWARD, BACKWARD))
SINGLE = tuple(Cell(KD(objective, 1024, 1000, 3), who=("peers", *AGAINST))
               for objective in ("uniform", "kl", "jsd", "tvd", "ce_tvd"))  # fmt: skip
OTHERS = tuple(Cell(case) for case in (
    Mixture(rows=256, classes=100), Mixture(rows=1024, classes=1000), Mixture(rows=125, classes=32000),
    Mutual(rows=256, classes=100), Mutual(rows=1024, classes=1000), Mutual(rows=125, classes=32000),
    Hint("mse", 64, 512), Hint("mse", 64, 65536), Hint("cosine", 64, 65536), Hint("mse", 64, 65536, dtype=BF16),
    Relation("angle", 64), Relation("distance", 64), Relation("distance", 256),
))  # fmt: skip

QUICK = (
    Cell(KD("confidence", 256, 100, 3)),
    Cell(KD("confidence", 64, 4000, 3), who=("eager", "ours", "one-thread", "floors")),
    Cell(KD("confidence", 256, 100, 3), FORWARD, who=("eager", "ours", "floors")),
    *(Cell(case, who=("eager", "ours", "floors"))
      for case in (Mixture(), Mutual(), Hint("mse", 64, 512), Relation("angle", 32))),
)  # fmt: skip

_GPU_ROWS = {1000: 4096, 32000: 4096, 128256: 2048}
GPU_SMALL = tuple(KD("confidence", n, c, 3) for c in (100, 1000) for n in (64, 256, 1024, 4096))
GPU_LARGE = tuple(KD("confidence", n, c, k, BF16) for k in (3, 8, 1, 16) for c, n in _GPU_ROWS.items())


def gpu() -> list[Cell]:
    """In the order of what a run short of time should keep."""
    cases = (*GPU_LARGE[:6], *GPU_SMALL, *GPU_LARGE[6:])
    return [
        *(Cell(case, who=("eager", "compile", "stacked", "peers", "ours", "floors")) for case in cases),
        *(Cell(case, GRAPH, who=("eager", "compile", "ours")) for case in GPU_SMALL),
        Cell(Relation("angle", 1024), who=("eager", "ours", "floors")),
        *(Cell(KD(objective, 4096, c, 3, BF16), who=("peers", *AGAINST))
          for objective in ("uniform", "kl", "jsd", "tvd", "ce_tvd") for c in (1000, 32000)),
        *(Cell(case, FORWARD, who=SOME) for case in cases),
        *OTHERS,
    ]  # fmt: skip


def cells(device: str, name: str) -> list[Cell]:
    if name == "quick":
        return list(QUICK)
    if device == "cuda":
        return gpu()
    if name == "targets":
        return targets()
    return [*map(with_stacked_forms, targets()), *PARTS, *SINGLE, *OTHERS]


def with_stacked_forms(cell: Cell) -> Cell:
    """Where the batch is a common one: the other way to write the loss, eager and compiled."""
    case = cell.case
    common = isinstance(case, KD) and case.classes in (100, 1000) and case.teachers == 3 and case.dtype == FP32
    return cell._replace(who=(*cell.who, "stacked", "compile-stacked")) if common else cell


GRIDS = ("full", "targets", "quick")


def own(case: Case, device: str) -> list[Cell]:
    """A user's own shape: everyone, and every pass."""
    passes = (BOTH, FORWARD, BACKWARD, *((GRAPH,) if device == "cuda" else ()))
    return [Cell(case, of, EVERYONE if of == BOTH else SOME) for of in passes]
