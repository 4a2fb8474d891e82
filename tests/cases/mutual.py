"""The case table of the op ``mutual``: data, ``build``, ``evaluate`` and the oracle, as in cases/kd.py."""

import functools
import math
import zlib
from dataclasses import dataclass, field, replace

import torch
from tolerance import assert_numbers_close, assert_rows_close, plain_in_float64
from torch import Tensor

import mtkd_fast
from cases import BF16, F16, F32, F64
from cases.kd import (
    NUM_ITEMS,
    ROW_WEIGHTS,
    VALUES,
    _finite,
    deviation_of_log_ratio,
    difference_of_probabilities,
    pairwise,
    without_offset,
)
from cases.layouts import LAYOUTS


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    students: int = 3
    rows: tuple[int, ...] = (5,)
    classes: int = 33
    dtypes: tuple[torch.dtype, ...] = (F32,)  # the last one repeated
    values: str = "normal"  # of cases.kd: its student is student 0, its teachers the others
    layout: str = "contiguous"
    pairs: str = "mean"
    detach: bool = True
    row_weights: str = "none"
    temperature: float = 2.0
    temperature_squared: bool = True
    reduction: str = "mean"
    learners: str = "all"  # who requires grad: all, first, last two, nobody
    upstream: str = "one"
    divergences: bool = True  # without them a pass may save less

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """The arguments of one call, and who requires grad."""

    students: list[Tensor]
    pair_weights: Tensor | None
    row_weights: Tensor | None
    num_items: float | Tensor | None
    upstream: Tensor | None
    learners: list[int]
    options: dict = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers, on the CPU in one dtype and without strides, with divergences."""

        def to(x):
            return x.detach().cpu().to(dtype).contiguous() if isinstance(x, Tensor) else x

        options = self.options | dict(return_divergences=True)
        tensors = (self.pair_weights, self.row_weights, self.num_items, self.upstream)
        return Inputs([to(z) for z in self.students], *map(to, tensors), self.learners, options)


@dataclass
class Result:
    loss: Tensor
    gradients: dict[int, Tensor]
    divergences: Tensor | None


# Pair weights: (generator, M) -> [M, M].


def given(g, m):
    return torch.rand(m, m, generator=g) + 0.1


def signed(g, m):
    return torch.randn(m, m, generator=g)


def ring(g, m):
    """Everybody learns from the next one."""
    return torch.eye(m).roll(1, 1) * given(g, m)


def one_teaches(g, m):
    """Student 0 teaches the second, and nobody else has a pair."""
    a = torch.zeros(m, m)
    a[1, 0] = 0.7
    return a


def nobody(g, m):
    return torch.zeros(m, m)


def poisoned_diagonal(g, m):
    return given(g, m).fill_diagonal_(float("nan"))


PAIRS = {
    "mean": None,
    "given": given,
    "strided": lambda g, m: given(g, m).T,
    "signed": signed,
    "ring": ring,
    "one teaches": one_teaches,
    "nobody": nobody,
    "poisoned diagonal": poisoned_diagonal,
    "float16": lambda g, m: given(g, m).half(),
}
LEARNERS = {
    "all": lambda m: list(range(m)),
    "first": lambda m: [0],
    "last two": lambda m: [m - 2, m - 1],
    "nobody": lambda m: [],
}


def build(case: Case, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    m, shape = case.students, (*case.rows, case.classes)
    first, others = VALUES[case.values](g, m - 1, math.prod(case.rows), case.classes)
    layouts = list(LAYOUTS.values()) if case.layout == "a different one each" else [LAYOUTS[case.layout]]
    students = [
        layouts[i % len(layouts)](z.view(shape).to(case.dtypes[min(i, len(case.dtypes) - 1)]), device)
        for i, z in enumerate((first, *others))
    ]
    pairs = PAIRS[case.pairs](g, m) if PAIRS[case.pairs] else None
    row_weights = ROW_WEIGHTS[case.row_weights](g, case.rows) if ROW_WEIGHTS[case.row_weights] else None
    reduction, _, items = case.reduction.partition(" / ")
    num_items = {"": None, "number": NUM_ITEMS, "tensor": torch.tensor(NUM_ITEMS)}[items]
    shape_of_loss = case.rows if reduction == "none" else ()
    upstream = None if case.upstream == "one" else torch.randn(shape_of_loss, generator=g)

    def on_device(x):
        return x.to(device) if isinstance(x, Tensor) else x

    options = dict(
        temperature=case.temperature,
        temperature_squared=case.temperature_squared,
        detach_peers=case.detach,
        reduction=reduction,
        return_divergences=case.divergences,
    )
    moved = map(on_device, (pairs, row_weights, num_items, upstream))
    return Inputs(students, *moved, LEARNERS[case.learners](m), options)


def evaluate(inputs: Inputs, implementation: str, loss_function=mtkd_fast.mutual_kd_loss) -> Result:
    """One call of the public function and the gradients that the case asks for."""
    students = [z.detach().requires_grad_(i in inputs.learners) for i, z in enumerate(inputs.students)]
    returned = loss_function(
        students,
        pair_weights=inputs.pair_weights,
        row_weights=inputs.row_weights,
        num_items=inputs.num_items,
        implementation=implementation,
        **inputs.options,
    )
    loss, divergences = returned if inputs.options["return_divergences"] else (returned, None)
    gradients = {}
    if inputs.learners:
        upstream = torch.ones_like(loss) if inputs.upstream is None else inputs.upstream.to(loss.dtype)
        found = torch.autograd.grad(loss, [students[i] for i in inputs.learners], upstream)
        gradients = dict(zip(inputs.learners, found, strict=True))
    return Result(loss.detach(), gradients, divergences)


@dataclass
class Oracle:
    exact: Result  # the reference in float64
    plain: Result  # plain PyTorch in the library's precision
    terms: Result  # the largest terms that each number is the sum of


@functools.cache
def oracle(case: Case) -> Oracle:
    return oracle_of(build(case))


def oracle_of(inputs: Inputs) -> Oracle:
    in64 = inputs.cast(F64)
    exact = evaluate(replace(in64, students=[without_offset(z) for z in in64.students]), "reference")
    in32 = inputs.cast(F32)
    plain = evaluate(in32, "reference")
    if any(z.dtype == F64 for z in inputs.students):
        exact32 = evaluate(in32.cast(F64), "reference")
        plain.loss = plain_in_float64(plain.loss, exact32.loss, exact.loss)
        plain.divergences = plain_in_float64(plain.divergences, exact32.divergences, exact.divergences)
        for i, x in exact.gradients.items():
            plain.gradients[i] = plain_in_float64(plain.gradients[i], exact32.gradients[i], x)
    plain.gradients = {i: x.to(inputs.students[i].dtype) for i, x in plain.gradients.items()}
    return Oracle(exact, plain, largest_terms(in64, exact))


def largest_terms(inputs: Inputs, exact: Result) -> Result:
    """A magnitude for every number, and for every row of a gradient; ``inputs`` in float64."""
    m, rows, o = len(inputs.students), inputs.students[0].shape[:-1], inputs.options
    r = torch.ones(rows, dtype=F64) if inputs.row_weights is None else inputs.row_weights.abs()
    n = 1.0
    if o["reduction"] == "mean":
        n = max(int((r != 0).sum()), 1) if inputs.num_items is None else abs(float(inputs.num_items))
    a = torch.full((m, m), 1 / (m - 1), dtype=F64) if inputs.pair_weights is None else inputs.pair_weights.abs()
    a = a.clone().fill_diagonal_(0)
    size = _finite(exact.divergences).clamp(min=max(1.0, math.log(inputs.students[0].shape[-1])))
    scale = o["temperature"] ** 2 if o["temperature_squared"] else 1.0
    per_row = r / n * scale
    loss = per_row * torch.einsum("ij,ij...->...", a, size)
    upstream = torch.ones((), dtype=F64) if inputs.upstream is None else inputs.upstream.abs()
    log_p = [(z / o["temperature"]).log_softmax(-1) for z in inputs.students]
    gradients = {}
    for i in inputs.learners:
        of_row = torch.zeros(rows, dtype=F64)
        for j in range(m):
            if a[i, j] != 0:
                of_row += a[i, j] * difference_of_probabilities(log_p[j], log_p[i], size[i, j]).nan_to_num(0.0)
            if a[j, i] != 0 and not o["detach_peers"]:
                of_row += a[j, i] * deviation_of_log_ratio(log_p[i], log_p[j], size[j, i]).nan_to_num(0.0)
        gradients[i] = upstream * per_row / o["temperature"] * of_row
    return Result(loss if o["reduction"] == "none" else loss.sum(), gradients, size)


def assert_matches(got: Result, expected: Oracle, interpreted: bool = False) -> None:
    exact, plain, terms = expected.exact, expected.plain, expected.terms
    assert_numbers_close("loss", got.loss, exact.loss, plain.loss, terms=terms.loss)
    if got.divergences is not None:
        assert_numbers_close(
            "divergences", got.divergences, exact.divergences, plain.divergences, terms=terms.divergences
        )
    assert got.gradients.keys() == exact.gradients.keys()
    for i, gradient in got.gradients.items():
        assert gradient.dtype == plain.gradients[i].dtype
        assert_rows_close(
            f"gradient of student {i}", gradient, exact.gradients[i], plain.gradients[i],
            terms=terms.gradients[i], arithmetic=got.loss.dtype, interpreted=interpreted,
        )  # fmt: skip


# The table.

FACTORS = {
    "values": (
        "normal", "cold", "near", "offset 500", "peaked teachers", "masked in both", "masked in teachers",
        "masked in student", "leading masked", "nan in student",
    ),
    "classes": (1, 2, 3, 7, 31, 32, 33, 100),
    "students": (2, 3, 4, 5, 9),
    "rows": ((5,), (2, 3), (1,), (), (2, 1, 3)),
    "dtypes": ((F32,), (BF16,), (F16,), (BF16, F32), (F16, BF16, F32), (F32, F16)),
    "layout": ("a different one each", *LAYOUTS),
    "pairs": tuple(PAIRS),
    "detach": (True, False),
    "row_weights": ("none", "bool", "float"),
    "temperature": (1.0, 2.0, 3.7, 0.05),
    "temperature_squared": (True, False),
    "reduction": ("mean", "sum", "none", "mean / number", "mean / tensor"),
    "learners": tuple(LEARNERS),
    "upstream": ("one", "random"),
    "divergences": (True, False),
}  # fmt: skip

PAIRWISE = tuple(
    Case(name=f"pair {i}", why="every pair of settings occurs together", **chosen)
    for i, chosen in enumerate(pairwise(FACTORS))
)

BOTH = (True, False)
SIZES = (
    *(
        Case(f"C={c}, M={m}, detach={detach}", "around vector widths, tiles and the limits between kernels",
             classes=c, students=m, detach=detach, rows=(3,))
        for c, m in ((15, 2), (129, 3), (257, 9), (513, 5), (1000, 2), (1025, 4), (2049, 3), (4097, 2), (8193, 2))
        for detach in BOTH
    ),
    Case("C=16385", "past what one program keeps on chip", classes=16385, rows=(2,)),
    Case("C=50257 bf16", "GPT-2's vocabulary, odd", classes=50257, rows=(2,), dtypes=(BF16,), students=2, detach=False),
    Case("C=65537", "past 2^16", classes=65537, rows=(2,), students=2),
    Case("N=0", "an empty batch gives 0 and empty gradients", rows=(0,)),
    Case("N=0 of 2 dimensions", "an empty batch of sequences", rows=(0, 4), reduction="none"),
    Case("N=77", "several rows to a block, the last block not full", rows=(77,), classes=10, students=2),
    Case("N=131", "a prime number of rows, in several threads", rows=(131,), classes=100),
    Case("M=16", "more students than one tile of a short row takes", students=16, classes=200, rows=(2,), pairs="ring"),
    Case("M=64", "the most students", students=64, rows=(1,), classes=130),
    Case("M=64, peers learn", "the most students, of all dtypes", students=64, rows=(1,), detach=False,
         classes=40, dtypes=(F32, BF16, F16, F32), pairs="signed"),
)  # fmt: skip

HOSTILE = (
    *(
        Case(f"{values}, detach={detach}", "hostile values", values=values, rows=(3,), detach=detach)
        for values in VALUES
        for detach in BOTH
    ),
    *(
        Case(f"{values} over tiles, detach={detach}", "a whole tile without a finite logit", values=values,
             classes=5000, rows=(2,), detach=detach)
        for values in ("leading masked", "leading masked in teachers", "trailing masked", "all but a few masked")
        for detach in BOTH
    ),
    Case("cold at T=0.05", "exponents of thousands", values="cold", temperature=0.05, classes=100),
    Case("near at C=32000", "a divergence far below its terms", values="near", classes=32000, rows=(2,), students=2),
    Case("equal at C=32000", "equal rows give 0 to rounding", values="equal", classes=32000, rows=(2,)),
    Case("offset 5000 over tiles", "tiles whose maxima differ by much", values="offset 5000", classes=3000, rows=(2,),
         detach=False),
)  # fmt: skip

NOT_COUNTED = (
    Case("no row kept", "0, attached to the graph, zero gradient", row_weights="none kept"),
    Case("no row kept, none", "the same for every row", row_weights="none kept", reduction="none", detach=False),
    Case("poison outside", "what a row that does not count holds does not matter", values="empty student row",
         row_weights="bool", rows=(9,), detach=False),
    Case("unpaired poison", "a student without a pair is not read", values="empty teacher row", students=4,
         pairs="one teaches"),
    Case("nobody is paired", "0 and zero gradients", values="nan in student", pairs="nobody"),
)  # fmt: skip

LAYOUT_CASES = (
    Case("logits[:, :-1]", "two leading strides, read in place", rows=(3, 4), classes=1000, layout="all but last"),
    Case("logits[:, :-1] of long rows", "the same where the logits are read again", rows=(2, 2), classes=20000,
         layout="all but last"),
    Case("a different layout each", "no two tensors with the same strides", rows=(2, 3), classes=129, students=7,
         layout="a different one each", detach=False),
    Case("misaligned bf16", "rows that start between 16-byte lines", rows=(3,), classes=1000, dtypes=(BF16,),
         layout="misaligned"),
    Case("odd row stride, fp16", "each row aligned differently", rows=(5,), classes=257, dtypes=(F16,),
         layout="row stride", detach=False),
)  # fmt: skip

CASES = (
    *PAIRWISE,
    *(replace(case, divergences=False) for case in (*SIZES, *LAYOUT_CASES)),
    *HOSTILE,
    *NOT_COUNTED,
)

FLOAT64_CASES = tuple(
    replace(case, name=f"{case.name} in float64", dtypes=dtypes)
    for case, dtypes in zip(PAIRWISE[:16], [(F64,), (F64, F32), (F32, F64), (BF16, F64)] * 4, strict=True)
)
