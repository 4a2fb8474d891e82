"""The case table of the op ``mixture``: Σ_k w_k p_k, and its KL from the student."""

import functools
import math
import zlib
from dataclasses import dataclass, replace

import torch
from tolerance import assert_numbers_close, assert_rows_close, plain_in_float64
from torch import Tensor

from cases import BF16, F16, F32, F64
from cases.kd import GIVEN, VALUES
from cases.layouts import LAYOUTS
from mtkd_fast import ensemble_probabilities, mixture_divergence


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    rows: tuple[int, ...] = (5,)
    classes: int = 33
    teachers: int = 3
    dtypes: tuple[torch.dtype, ...] = (F32,)  # the student's, then the teachers', the last one repeated
    values: str = "normal"
    layout: str = "contiguous"
    weights: str = "per row"
    temperature: float = 2.0
    upstream: str = "random"
    teachers_want: bool = True  # of the probabilities; their gradient of the divergence is the reference's alone
    weights_want: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    student: Tensor
    teachers: list[Tensor]
    weights: str | Tensor
    upstream: Tensor  # of the probabilities
    upstream_rows: Tensor  # of the divergence
    case: Case

    def cast(self, dtype: torch.dtype) -> "Inputs":
        def to(x):
            return x.detach().cpu().to(dtype).contiguous() if isinstance(x, Tensor) else x

        tensors = (self.student, [to(t) for t in self.teachers], self.weights, self.upstream, self.upstream_rows)
        return Inputs(*(x if isinstance(x, list) else to(x) for x in tensors), self.case)


def vanishing(g, n_teachers, rows):
    """As a saturated softmax leaves them: almost 0, below the smallest normal number, and 0."""
    w = torch.rand(n_teachers, *rows, generator=g) + 0.1
    for k in range(1, n_teachers):
        w[k] *= (1e-20, 1e-42, 0.0)[(k - 1) % 3]
    return w


WEIGHTS = GIVEN | {"vanishing": vanishing}


def build(case: Case, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    s, t = VALUES[case.values](g, case.teachers, math.prod(case.rows), case.classes)
    shape = (*case.rows, case.classes)
    place = LAYOUTS[case.layout]
    student, *teachers = (
        place(x.view(shape).to(case.dtypes[min(i, len(case.dtypes) - 1)]), device) for i, x in enumerate((s, *t))
    )
    weights = case.weights
    if weights != "uniform":
        weights = WEIGHTS[weights](g, case.teachers, case.rows).to(device)
    ones = case.upstream == "ones"
    upstream = torch.ones(()).expand(shape) if ones else torch.randn(shape, generator=g)
    upstream_rows = torch.ones(()).expand(case.rows) if ones else torch.randn(case.rows, generator=g)
    return Inputs(student, teachers, weights, upstream.to(device), upstream_rows.to(device), case)


@dataclass
class Result:
    value: Tensor
    gradients: dict[str, Tensor]


def leaves_of(inputs: Inputs, *, student: bool, teachers: bool) -> dict[str, Tensor]:
    named = {"student": inputs.student} if student else {}
    if teachers:
        named |= {f"teacher {k}": t for k, t in enumerate(inputs.teachers)}
    if inputs.case.weights_want and isinstance(inputs.weights, Tensor):
        named["weights"] = inputs.weights
    return named


def evaluate(function: str, inputs: Inputs, implementation: str) -> Result:
    """One call of the public function, and every gradient that the case asks for."""
    of_kl = function == "divergence"
    named = leaves_of(inputs, student=of_kl, teachers=not of_kl and inputs.case.teachers_want)
    leaves = {name: x.detach().requires_grad_() for name, x in named.items()}
    teachers = [leaves.get(f"teacher {k}", t) for k, t in enumerate(inputs.teachers)]
    options = dict(
        weights=leaves.get("weights", inputs.weights), temperature=inputs.case.temperature,
        implementation=implementation,
    )  # fmt: skip
    if of_kl:
        value, upstream = mixture_divergence(leaves["student"], teachers, **options), inputs.upstream_rows
    else:
        value, upstream = ensemble_probabilities(teachers, **options), inputs.upstream
    asked = ()
    if leaves:
        asked = torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))
    return Result(value.detach(), dict(zip(leaves, asked, strict=True)))


@functools.cache
def oracle(case: Case, function: str) -> tuple[Result, Result, dict[str, Tensor]]:
    """The reference in float64 and in the library's precision, and the largest terms of every number."""
    inputs = build(case)
    exact = evaluate(function, inputs.cast(F64), "reference")
    in32 = inputs.cast(F32)
    plain = evaluate(function, in32, "reference")
    if F64 in case.dtypes:
        exact32 = evaluate(function, in32.cast(F64), "reference")
        plain.value = plain_in_float64(plain.value, exact32.value, exact.value)
        for name, x in exact.gradients.items():
            plain.gradients[name] = plain_in_float64(plain.gradients[name], exact32.gradients[name], x)
    dtypes = {"student": inputs.student.dtype, **{f"teacher {k}": t.dtype for k, t in enumerate(inputs.teachers)}}
    if isinstance(inputs.weights, Tensor):
        dtypes["weights"] = inputs.weights.dtype
    plain.gradients = {name: x.to(dtypes[name]) for name, x in plain.gradients.items()}
    return exact, plain, largest_terms(inputs.cast(F64), function)


def largest_terms(inputs: Inputs, function: str) -> dict[str, Tensor]:
    """By name, a magnitude for every row (every number of the weights' gradient); ``inputs`` in float64."""
    rows = inputs.student.shape[:-1]
    t = torch.stack(inputs.teachers) / inputs.case.temperature
    p = t.softmax(-1).nan_to_num(0.0)
    w = inputs.weights if isinstance(inputs.weights, Tensor) else torch.full((len(t),), 1 / len(t))
    w = (w.view(-1, *[1] * len(rows)) if w.dim() == 1 else w).expand(-1, *rows).double().abs()
    if function == "probabilities":
        size = (w[..., None] * p).sum(0).amax(-1)
        per_weight = (inputs.upstream.abs() * p).sum(-1)
        of_teacher = (w[..., None] * p * (inputs.upstream.abs() + per_weight[..., None])).amax(-1)
        found = {f"teacher {k}": x / inputs.case.temperature for k, x in enumerate(of_teacher)}
    else:
        log_q = (inputs.student / inputs.case.temperature).log_softmax(-1)
        possible = (t != -math.inf) & (w[..., None] != 0)
        log_p = torch.where(possible, t.log_softmax(-1) + w[..., None].log(), -math.inf).amax(0)
        ratio = sum(torch.where(x.isfinite(), x, 0.0).abs() for x in (log_q, log_p)) + 1.0
        per_weight = (p * ratio).sum(-1).clamp(min=max(1.0, math.log(p.shape[-1])))
        size = (w * per_weight).sum(0)
        largest = torch.maximum(w.sum(0)[..., None] * log_q.exp(), (w[..., None] * p).sum(0)).amax(-1)
        found = {"student": inputs.upstream_rows.abs() * largest.nan_to_num(0.0) / inputs.case.temperature}
        per_weight = per_weight * inputs.upstream_rows.abs()
    weights = inputs.weights
    if isinstance(weights, Tensor):
        found["weights"] = per_weight.reshape(len(t), -1).sum(1) if weights.dim() == 1 else per_weight
    return found | {"value": size}


def assert_matches(function: str, got: Result, case: Case, interpreted: bool = False) -> None:
    exact, plain, terms = oracle(case, function)
    if function == "divergence":
        assert_numbers_close("divergence", got.value, exact.value, plain.value, terms=terms["value"])
    else:
        assert_rows_close(
            "probabilities", got.value, exact.value, plain.value,
            terms=terms["value"], arithmetic=got.value.dtype, interpreted=interpreted,
        )  # fmt: skip
    assert got.gradients.keys() == exact.gradients.keys()
    for name, gradient in got.gradients.items():
        right, simple = exact.gradients[name], plain.gradients[name]
        assert gradient.dtype == simple.dtype, f"the gradient of {name} is {gradient.dtype}, expected {simple.dtype}"
        if name == "weights":
            assert_numbers_close("gradient of weights", gradient, right, simple, terms=terms[name])
        else:
            assert_rows_close(
                f"gradient of {name}", gradient, right, simple,
                terms=terms[name], arithmetic=got.value.dtype, interpreted=interpreted,
            )  # fmt: skip


_SIZES = (1, 2, 3, 7, 10, 15, 16, 17, 31, 64, 100, 257, 1000, 1023, 1024, 1025, 2049, 4097, 8193)
CASES = (
    *(Case(f"C={c}", "around vector widths, tiles and the limits between kernels", classes=c, rows=(3,))
      for c in _SIZES),
    Case("C=50257 bf16", "GPT-2's vocabulary, odd", classes=50257, rows=(2,), dtypes=(BF16,)),
    Case("N=0", "an empty batch", rows=(0,)),
    Case("N=0 of 2 dimensions", "an empty batch of sequences", rows=(0, 4)),
    Case("one row", "no leading dimension", rows=(), weights="per teacher"),
    Case("N=77", "no multiple of any block of rows", rows=(77,), classes=10),
    *(Case(f"K={k}", "as many teachers as arguments, as a table, as allowed", teachers=k, rows=(3,))
      for k in (1, 2, 4, 5, 16, 64)),
    Case("K=6 mixed", "a table of several dtypes", teachers=6, dtypes=(BF16, F32, F16, BF16, F32)),
    Case("K=6 over tiles", "a table, in tiles", teachers=6, classes=9000, rows=(2,), values="masked apart"),
    *(Case(f"{values}", "hostile values", values=values) for values in VALUES),
    *(Case(f"{values} over tiles", "the same in tiles", values=values, classes=9001, rows=(2,))
      for values in ("leading masked", "leading masked in teachers", "masked apart", "trailing masked", "offset 500",
                     "all but a few masked", "cold", "nan in teacher", "empty teacher row", "empty student row")),
    *(Case(f"weights {weights}", "every form of weights", weights=weights, rows=(2, 3))
      for weights in (*WEIGHTS, "uniform") if weights != "negative"),
    *(Case(f"weights {weights} that learn nothing", "then a weight of 0 leaves its teacher unread", weights=weights,
           weights_want=False, values=values)
      for weights, values in (("zero entries", "normal"), ("zero teacher", "empty teacher row"), ("per row", "cold"))),
    Case("zero teacher without a finite logit", "its weight gets 0", weights="zero teacher",
         values="empty teacher row"),
    Case("zero entries of masked teachers", "weights of 0 where others exclude classes", weights="zero entries",
         values="masked apart"),
    *(Case(f"vanishing weights, {values}", "gradients of weights that have all but vanished", weights="vanishing",
           values=values, teachers=4)
      for values in ("peaked teachers", "cold", "wide", "masked in teachers", "masked in student")),
    *(Case(f"dtypes {name}", "mixtures of dtypes", dtypes=dtypes, classes=100)
      for name, dtypes in (("bf16", (BF16,)), ("fp16", (F16,)), ("bf16 and fp32", (BF16, F32)),
                           ("fp32, fp16, bf16", (F32, F16, BF16)))),
    *(Case(f"layout {layout}", "read in place", layout=layout, rows=(2, 3), classes=40, dtypes=(F32, BF16))
      for layout in LAYOUTS),
    *(Case(f"temperature {temperature}", "sharp and flat", temperature=temperature)
      for temperature in (1.0, 4.0, 20.0, 3.7, 0.05)),
    Case("upstream of one number", "as .sum() gives it", upstream="ones", rows=(2, 3)),
    Case("frozen teachers", "only the weights learn", teachers_want=False),
)  # fmt: skip

FLOAT64_CASES = tuple(
    replace(case, name=f"{case.name} in float64", dtypes=dtypes)
    for case, dtypes in zip(CASES[::4], [(F64,), (F64, F32), (F32, F64), (BF16, F64)] * 20, strict=False)
)
