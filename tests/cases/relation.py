"""The case table of the op ``relation``: what every implementation is compared on, and why each case is there."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tolerance import assert_numbers_close, assert_rows_close, plain_in_float64
from torch import Tensor

from cases import BF16, F16, F32, F64, INF, NAN
from cases.layouts import LAYOUTS
from mtkd_fast import rkd_angle_loss, rkd_distance_loss
from mtkd_fast.reference import relation as reference

LOSSES = {"distance": rkd_distance_loss, "angle": rkd_angle_loss}


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    relation: str = "angle"
    batch: int = 9
    widths: tuple[int, int] = (5, 7)  # the student's, the teacher's
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    values: str = "normal"
    layout: str = "contiguous"
    upstream: float = 1.0
    left_out: tuple[int, ...] = ()  # samples that do not count

    def __str__(self) -> str:
        return self.name


@dataclass
class Result:
    loss: Tensor
    gradient: Tensor


# What the embeddings hold: (generator, B, D_s, D_t) -> student [B, D_s], teacher [B, D_t], float64.


def draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def normal(g, b, *widths):
    return [draw(g, b, d) for d in widths]


def scaled(factor):
    return lambda *a: [factor * x for x in normal(*a)]


def far_away(*a):
    return [x + 100 for x in normal(*a)]


def clusters(radius):
    def values(g, b, *widths):
        return [(draw(g, 4, d) + 100).repeat(-(-b // 4), 1)[:b] + radius * draw(g, b, d) for d in widths]

    return values


def loner_among_clusters(g, b, *widths):
    """What pulls at the last point is small beside what pulls the others at one another."""
    return [torch.cat([draw(g, 1, d).expand(b - 1, d) + 1e-3 * draw(g, b - 1, d), draw(g, 1, d)]) for d in widths]


def coincident(g, b, *widths):
    """Points that coincide in the student, in the teacher, in both."""
    student, teacher = normal(g, b, *widths)
    student[1] = student[0]
    student[5] = student[0]
    teacher[5] = teacher[0]
    teacher[2] = teacher[3]
    return student, teacher


def collinear(g, b, *widths):
    """All on one line in the student; three of them in the teacher."""
    student, teacher = normal(g, b, *widths)
    teacher[4] = 2 * teacher[2] - teacher[3]
    return draw(g, b, 1) * student[:1], teacher


def zero_vectors(*a):
    student, teacher = normal(*a)
    student[::3], teacher[1::3] = 0, 0
    return student, teacher


def all_alike(g, b, *widths):
    return [draw(g, 1, d).expand(b, d) for d in widths]


def one_side_alike(g, b, *widths):
    return draw(g, b, widths[0]), torch.ones(b, widths[1], dtype=F64)


def moved_and_turned(g, b, d, _):
    teacher = draw(g, b, d)
    return 3 * teacher @ torch.linalg.qr(draw(g, d, d))[0] + 2, teacher


def poisoned(poison, side):
    def values(*a):
        pair = normal(*a)
        pair[side][-1, 0] = poison
        return pair

    return values


VALUES = {
    "normal": normal,
    "far away": far_away,
    "tiny": scaled(1e-12),
    "huge": scaled(1e15),
    "clusters of 1e-2": clusters(1e-2),
    "clusters of 1e-3": clusters(1e-3),
    "loner": loner_among_clusters,
    "coincident": coincident,
    "collinear": collinear,
    "zero vectors": zero_vectors,
    "all alike": all_alike,
    "teacher alike": one_side_alike,
    "moved and turned": moved_and_turned,
    "nan": poisoned(NAN, 0),
    "nan in teacher": poisoned(NAN, 1),
    "inf": poisoned(INF, 0),
}

SIZES = (
    Case("B=1", "nothing to compare: 0, and a zero gradient", batch=1),
    Case("B=2", "one pair, no triangle", batch=2),
    Case("B=2 of NaN", "which is in the pair alone", batch=2, values="nan"),
    Case("B=3", "one triangle", batch=3),
    Case("4 of 9", "samples that do not count, first, last and between", left_out=(0, 3, 4, 7, 8)),
    Case("19 of 40", "the same, over tiles", batch=40, left_out=(*range(0, 40, 2), 5), upstream=-0.7),
    Case("1 of 5", "nothing to compare", batch=5, left_out=(0, 1, 2, 4)),
    Case("4 of 9 of NaN", "whatever the others hold", values="nan", left_out=(0, 3, 4, 7, 8)),
    Case("4 of 9 of a teacher of NaN", "on either side", values="nan in teacher", left_out=(0, 3, 4, 7, 8)),
    Case("8 of 9 of NaN", "in one that counts", values="nan", left_out=(0,)),
    Case("7 of 12, coincident", "points that coincide among those that count", values="coincident", batch=12,
         left_out=(4, 7, 8, 9, 11)),
    Case("far away but for one", "of mean 0 among those that count", values="far away", left_out=(8,)),
    Case("B=15", "one less than a tile", batch=15),
    Case("B=16", "a whole tile", batch=16),
    Case("B=17", "a tile and a point", batch=17, widths=(64, 3)),
    Case("B=24", "a tile and half a tile", batch=24),
    Case("B=33", "two tiles and a point", batch=33, widths=(1, 2)),
    Case("B=40", "more than one sum kept in float32 for each warp", batch=40, widths=(33, 16)),
    Case("width 1", "angles of 0 and π alone", widths=(1, 1)),
)  # fmt: skip

HARD = (
    *(Case(values, "hostile values", values=values, batch=12) for values in VALUES if values != "moved and turned"),
    Case("clusters of 1e-3, 32 points", "eight to a cluster", values="clusters of 1e-3", batch=32, widths=(16, 24)),
    Case("moved and turned", "a student like its teacher has nothing to learn", values="moved and turned",
         widths=(6, 6), batch=12),
    Case("coincident in bf16", "points that rounding made one", values="clusters of 1e-3", dtypes=(BF16, BF16)),
)  # fmt: skip

SETTINGS = (
    Case("bf16", "gradient rounded once", dtypes=(BF16, BF16), upstream=3.0),
    Case("fp16", "gradient rounded once: times an upstream that alone would not fit", dtypes=(F16, F16), upstream=1e5),
    Case(
        "fp16, small",
        "a gradient that fp16 would flush, with the upstream of a loss scaler",
        dtypes=(F16, F32),
        upstream=65536.0,
        batch=30,
        values="huge in fp16",
    ),
    Case("bf16 and fp32", "each side its own dtype", dtypes=(BF16, F32)),
    Case("fp32 and fp16", "each side its own dtype", dtypes=(F32, F16), upstream=-0.3),
    Case("upstream 0", "a zero gradient", upstream=0.0),
    *(
        Case(f"{layout} rows", "read as they lie", layout=layout, batch=11, upstream=-2.5)
        for layout in ("row stride", "misaligned", "transposed", "every other row", "repeated")
    ),
)
VALUES["huge in fp16"] = scaled(3e3)

EVERY = (*SIZES, *HARD, *SETTINGS)
CASES = tuple(replace(case, name=f"{case.name}, {name}", relation=name) for case in EVERY for name in LOSSES)
FLOAT64_CASES = tuple(
    replace(case, name=f"{case.name}, {name} in float64", relation=name, dtypes=dtypes)
    for case in EVERY
    for name in LOSSES
    for dtypes in ((F64, F64), (BF16, F64))
    if case.dtypes == (F32, F32)
)


def build(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    sides = VALUES[case.values](g, case.batch, *case.widths)
    return tuple(LAYOUTS[case.layout](x.to(dtype), device) for x, dtype in zip(sides, case.dtypes, strict=True))


def mask_of(case: Case, device: torch.device) -> Tensor | None:
    return torch.tensor([i not in case.left_out for i in range(case.batch)], device=device) if case.left_out else None


def evaluate(
    case: Case, student: Tensor, teacher: Tensor, implementation: str, relation: Callable | None = None
) -> Result:
    """By the function of the case's relation, or by another that comes to the same."""
    student = student.detach().requires_grad_()
    row_mask = mask_of(case, student.device)
    loss = (relation or LOSSES[case.relation])(student, teacher, row_mask=row_mask, implementation=implementation)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, case.upstream))
    return Result(loss.detach(), gradient)


@dataclass
class Oracle:
    exact: Result  # the reference in float64
    plain: Result  # plain PyTorch in the library's precision
    terms: Result  # what the numbers are sums of


@functools.cache
def oracle(case: Case) -> Oracle:
    student, teacher = (x.detach().contiguous() for x in build(case))
    return (of_the_others if case.left_out else oracle_of)(case, student, teacher)


def oracle_of(case: Case, student: Tensor, teacher: Tensor) -> Oracle:
    exact = evaluate(case, student.to(F64), teacher.to(F64), "reference")
    plain = evaluate(case, student.to(F32), teacher.to(F32), "reference")
    if F64 in case.dtypes:
        exact32 = evaluate(case, student.float().double(), teacher.float().double(), "reference")
        plain = Result(
            plain_in_float64(plain.loss, exact32.loss, exact.loss),
            plain_in_float64(plain.gradient, exact32.gradient, exact.gradient),
        )
    plain.gradient = plain.gradient.to(student.dtype)
    return Oracle(exact, plain, largest_terms(case, student.to(F64), teacher.to(F64), exact))


def of_the_others(case: Case, student: Tensor, teacher: Tensor) -> Oracle:
    """That of the batch without the samples that are left out, whose gradients are 0."""
    kept = [i for i in range(case.batch) if i not in case.left_out]
    fewer = replace(case, name=f"{case.name}, without", batch=len(kept), left_out=())
    found = oracle_of(fewer, student[kept], teacher[kept])
    for result in (found.exact, found.plain):
        result.gradient = result.gradient.new_zeros(student.shape).index_copy(0, torch.tensor(kept), result.gradient)
    per_row = found.terms.gradient
    found.terms.gradient = per_row.new_zeros(case.batch).index_copy(0, torch.tensor(kept), per_row)
    return found


def largest_terms(case: Case, student: Tensor, teacher: Tensor, exact: Result) -> Result:
    """Huber's argument e is a difference of two numbers of size 1, each with its own rounding: in the loss, times the
    slope h of e; in row i of the gradient, times the derivatives of such numbers, 1/d_ij or 1/μ. Triangles on a short
    side pull at a far third point twice, in opposite directions, and with h/d of the short side.
    """
    arithmetic = F64 if F64 in case.dtypes else F32
    count, d = len(student), (student[:, None] - student).norm(dim=-1)
    of = reference.angles if case.relation == "angle" else lambda x: reference.over_mean(reference.distances(x))
    a, b = of(student), of(teacher)
    size = torch.maximum(a.abs(), b.abs())
    slope = (a - b).abs().clamp(max=1) + torch.finfo(arithmetic).eps * size
    sharpness = max(lost_digits(student), lost_digits(teacher)) if arithmetic == F64 else 1.0
    loss = torch.maximum((slope * size).mean(), exact.loss)
    if case.relation == "angle":
        inverse = torch.where(d > 0, 1 / d, 0.0)
        per_row = (inverse.sum(1) + slope.mean() * inverse.mean() * count) / count**2
    else:
        per_row = torch.where((d > 1e-6).any(1), count / reference.distances(student).sum(), 0.0)
    return Result(sharpness * loss.nan_to_num(0.0), sharpness * abs(case.upstream) * per_row.nan_to_num(0.0))


def lost_digits(x: Tensor) -> float:
    """In float64 a squared distance is a difference of squares of centred points; from 1e8 times smaller on, direct."""
    squares = (x - x.mean(0)).square().sum(1)
    ratio = (squares[:, None] + squares) / (x[:, None] - x).square().sum(-1)
    return max(1.0, torch.where(ratio < 1e8, ratio, 1.0).max().item())


def assert_matches(got: Result, oracle: Oracle, interpreted: bool = False) -> None:
    exact, plain, terms = oracle.exact, oracle.plain, oracle.terms
    assert_numbers_close("loss", got.loss, exact.loss, plain.loss, terms=terms.loss)
    assert_rows_close(
        "gradient", got.gradient, exact.gradient, plain.gradient, terms=terms.gradient, arithmetic=got.loss.dtype,
        interpreted=interpreted,
    )  # fmt: skip
