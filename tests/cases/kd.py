"""The one case table: what every implementation of the op ``kd`` is compared on, and why each case is there.

A case is data; ``build`` turns it into tensors on a device, ``evaluate`` into numbers through the public function.
Divergences and weight rules come from the library's registries, so a new one is covered as soon as it is named there.
"""

import functools
import inspect
import math
import random
import zlib
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from tolerance import assert_numbers_close, assert_rows_close, plain_in_float64
from torch import Tensor

import mtkd_fast
from cases import BF16, F16, F32, F64, INF, NAN
from cases.layouts import LAYOUTS
from mtkd_fast.checks import WEIGHT_RULES
from mtkd_fast.reference.divergences import DIVERGENCES


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    divergence: str = "forward_kl"
    beta: float | None = None
    rows: tuple[int, ...] = (5,)
    classes: int = 33
    teachers: int = 3
    dtypes: tuple[torch.dtype, ...] = (F32,)  # the student's, then the teachers', the last one repeated
    values: str = "normal"
    student_layout: str = "contiguous"
    teacher_layout: str = "contiguous"
    weights: str = "uniform"
    labels: str = "random"
    row_weights: str = "none"
    temperature: float = 2.0
    temperature_squared: bool = True
    terms: tuple[float, float, float] = (1.0, 0.0, 0.0)  # kd_weight, ce_weight, label_smoothing
    reduction: str = "mean"
    wants: tuple[str, ...] = ("student",)  # gradients
    upstream: str = "one"
    stats: bool = True  # without them a pass may save less

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """The arguments of one call, and what is asked of it."""

    student: Tensor
    teachers: list[Tensor]
    target: Tensor | None
    weights: str | Tensor
    row_weights: Tensor | None
    num_items: float | Tensor | None
    upstream: Tensor | None
    wants: tuple[str, ...]
    options: dict = field(default_factory=dict)
    stats: bool = True

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers, on the CPU in one dtype and without strides."""

        def to(x):
            return x.detach().cpu().to(dtype).contiguous() if isinstance(x, Tensor) else x

        target = None if self.target is None else self.target.cpu()
        row_weights = to(self.row_weights)
        return Inputs(
            to(self.student), [to(t) for t in self.teachers], target, to(self.weights), row_weights,
            to(self.num_items), to(self.upstream), self.wants, self.options,
        )  # fmt: skip


@dataclass
class Result:
    loss: Tensor
    gradients: dict[str, Tensor]  # "student", "teacher 0", ..., "weights"
    stats: mtkd_fast.KDStats


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(mtkd_fast.multi_teacher_kd_loss).parameters.items()
    if name in ("divergence", "beta", "temperature", "temperature_squared", "kd_weight", "ce_weight", "label_smoothing",
                "ignore_index", "reduction")
}  # fmt: skip


# What the logits hold: (generator, K, N, C) -> student [N, C] and K teachers [N, C], float32.


def normal(g, n_teachers, n, c):
    draw = [2 * torch.randn(n, c, generator=g) for _ in range(n_teachers + 1)]
    return draw[0], draw[1:]


def scaled(factor):
    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        return s * factor, [t_k * factor for t_k in t]

    return values


def offset(by):
    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        return s + by, [t_k - by * (k + 1) for k, t_k in enumerate(t)]

    return values


def near(noise):
    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        return s, [s + noise * t_k for t_k in t]

    return values


def constant(g, n_teachers, n, c):
    return torch.zeros(n, c), [torch.zeros(n, c) for _ in range(n_teachers)]


def peaked_teachers(g, n_teachers, n, c):
    s, t = normal(g, n_teachers, n, c)
    for k, t_k in enumerate(t):
        t_k[:, k % c] += 60
    return s, t


def masked(student, teachers):
    """−inf where the given rule on the class indices says so; the last class is always kept."""

    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        classes = torch.arange(c)
        for x, rule in ((s, student), *((t_k, teachers) for t_k in t)):
            x[:, rule(classes, c) & (classes != c - 1)] = -INF
        return s, t

    return values


def nowhere(classes, c):
    return classes < 0


def every_third(classes, c):
    return classes % 3 == 1


def first_half(classes, c):
    return classes < c // 2


def all_but_a_few(classes, c):
    return (classes < c // 2) | (classes > c // 2 + 3)


def trailing(g, n_teachers, n, c):
    s, t = normal(g, n_teachers, n, c)
    for x in (s, *t):
        x[:, max(c // 2, 1) :] = -INF
    return s, t


def poisoned(where, value):
    """One element of the first row; the other rows must not notice."""

    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        x = s if where == "student" else t[-1]
        x[:1, c // 2] = value
        return s, t

    return values


def empty_row(where):
    """A first row without a finite logit."""

    def values(g, n_teachers, n, c):
        s, t = normal(g, n_teachers, n, c)
        (s if where == "student" else t[0])[:1] = -INF
        return s, t

    return values


VALUES = {
    "normal": normal,
    "wide": scaled(10.0),
    "cold": scaled(100.0),
    "near": near(1e-3),
    "equal": near(0.0),
    "constant": constant,
    "offset 50": offset(50.0),
    "offset 500": offset(500.0),
    "offset 5000": offset(5000.0),
    "peaked teachers": peaked_teachers,
    "masked in both": masked(every_third, every_third),
    "masked in teachers": masked(nowhere, every_third),
    "masked in student": masked(every_third, nowhere),
    "masked apart": masked(first_half, every_third),
    "leading masked": masked(first_half, first_half),
    "leading masked in student": masked(first_half, nowhere),
    "leading masked in teachers": masked(nowhere, first_half),
    "trailing masked": trailing,
    "all but a few masked": masked(all_but_a_few, all_but_a_few),
    "nan in student": poisoned("student", NAN),
    "nan in teacher": poisoned("teacher", NAN),
    "inf in student": poisoned("student", INF),
    "inf in teacher": poisoned("teacher", INF),
    "empty student row": empty_row("student"),
    "empty teacher row": empty_row("teacher"),
}


# Weights: (generator, K, rows) -> [K] or [K, ...].


def per_teacher(g, n_teachers, rows):
    return torch.rand(n_teachers, generator=g) + 0.1


def per_row(g, n_teachers, rows):
    return torch.rand(n_teachers, *rows, generator=g) + 0.1


def per_row_strided(g, n_teachers, rows):
    return per_row(g, n_teachers, rows).movedim(0, -1).contiguous().movedim(-1, 0)


def per_row_repeated(g, n_teachers, rows):
    return per_teacher(g, n_teachers, rows).view(n_teachers, *[1] * len(rows)).expand(n_teachers, *rows)


def zero_teacher(g, n_teachers, rows):
    w = per_teacher(g, n_teachers, rows)
    w[0] = 0
    return w


def zero_entries(g, n_teachers, rows):
    """A zero here and there, and every teacher's in the first row."""
    w = per_row(g, n_teachers, rows)
    w = torch.where(torch.rand(w.shape, generator=g) < 0.4, 0.0, w)
    w.view(n_teachers, -1)[:, :1] = 0
    return w


def negative(g, n_teachers, rows):
    return torch.randn(n_teachers, *rows, generator=g)


def half_precision(g, n_teachers, rows):
    return per_row(g, n_teachers, rows).half()


GIVEN = {
    "per teacher": per_teacher,
    "per row": per_row,
    "per row, strided": per_row_strided,
    "per row, repeated": per_row_repeated,
    "zero teacher": zero_teacher,
    "zero entries": zero_entries,
    "negative": negative,
    "float16": half_precision,
}


# Labels: (generator, rows, C) -> target, ignore_index.


def random_labels(g, rows, c):
    return torch.randint(c, rows, generator=g), -100


def first_and_last(g, rows, c):
    return torch.where(torch.arange(math.prod(rows)).view(rows) % 2 == 0, 0, c - 1), -100


def int32_labels(g, rows, c):
    return random_labels(g, rows, c)[0].int(), -100


def strided_labels(g, rows, c):
    return random_labels(g, (*rows, 2), c)[0][..., 1], -100


def ignored(index):
    def labels(g, rows, c):
        y = random_labels(g, rows, c)[0]
        return torch.where(torch.arange(y.numel()).view(rows) % 3 == 0, index, y), index

    return labels


def all_ignored(g, rows, c):
    return torch.full(rows, -100), -100


LABELS = {
    "none": None,
    "random": random_labels,
    "first and last": first_and_last,
    "int32": int32_labels,
    "strided": strided_labels,
    "some ignored": ignored(-100),
    "ignored by -1": ignored(-1),
    "ignored inside the range": ignored(0),
    "all ignored": all_ignored,
}


# Row weights: (generator, rows) -> [...].


def keep(g, rows):
    return torch.rand(rows, generator=g) < 0.7


def float_rows(g, rows):
    w = torch.randn(rows, generator=g)
    return torch.where(torch.rand(rows, generator=g) < 0.3, 0.0, w)


ROW_WEIGHTS = {"none": None, "bool": keep, "float": float_rows, "none kept": lambda g, rows: torch.zeros(rows)}

NUM_ITEMS = 7.0


def build(case: Case, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    n = math.prod(case.rows)
    s, t = VALUES[case.values](g, case.teachers, n, case.classes)
    dtypes = [case.dtypes[min(i, len(case.dtypes) - 1)] for i in range(case.teachers + 1)]
    shape = (*case.rows, case.classes)
    student = LAYOUTS[case.student_layout](s.view(shape).to(dtypes[0]), device)
    names = list(LAYOUTS) if case.teacher_layout == "a different one each" else case.teacher_layout.split(", ")
    layouts = [LAYOUTS[name] for name in names]
    teachers = [
        layouts[k % len(layouts)](t_k.view(shape).to(dtype), device)
        for k, (t_k, dtype) in enumerate(zip(t, dtypes[1:], strict=True))
    ]

    target, ignore_index = LABELS[case.labels](g, case.rows, case.classes) if LABELS[case.labels] else (None, -100)
    weights = GIVEN[case.weights](g, case.teachers, case.rows) if case.weights in GIVEN else case.weights
    row_weights = ROW_WEIGHTS[case.row_weights](g, case.rows) if ROW_WEIGHTS[case.row_weights] else None
    reduction, _, items = case.reduction.partition(" / ")
    num_items = {"": None, "number": NUM_ITEMS, "tensor": torch.tensor(NUM_ITEMS)}[items]
    shape_of_loss = case.rows if reduction == "none" else ()
    upstream = None if case.upstream == "one" else torch.randn(shape_of_loss, generator=g)
    kd_weight, ce_weight, label_smoothing = case.terms

    def on_device(x):
        return x.to(device) if isinstance(x, Tensor) else x

    options = DEFAULTS | dict(
        divergence=case.divergence,
        beta=case.beta,
        temperature=case.temperature,
        temperature_squared=case.temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    moved = map(on_device, (target, weights, row_weights, num_items, upstream))
    return Inputs(student, teachers, *moved, case.wants, options, case.stats)


def evaluate(inputs: Inputs, implementation: str, loss_function=mtkd_fast.multi_teacher_kd_loss) -> Result:
    """One call of the public function and the gradients that the case asks for."""
    student = inputs.student.detach().requires_grad_("student" in inputs.wants)
    teachers = [t.detach().requires_grad_("teachers" in inputs.wants) for t in inputs.teachers]
    weights = inputs.weights
    if "weights" in inputs.wants:
        weights = weights.detach().requires_grad_()
    returned = loss_function(
        student,
        teachers,
        inputs.target,
        weights=weights,
        row_weights=inputs.row_weights,
        num_items=inputs.num_items,
        return_stats=inputs.stats,
        implementation=implementation,
        **inputs.options,
    )
    loss, stats = returned if inputs.stats else (returned, None)
    named = {"student": student, **{f"teacher {k}": t for k, t in enumerate(teachers)}, "weights": weights}
    leaves = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = {name: torch.zeros_like(x) for name, x in leaves.items()}
    if loss.requires_grad:
        upstream = torch.ones_like(loss) if inputs.upstream is None else inputs.upstream.to(loss.dtype)
        asked = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
        gradients |= {name: g for name, g in zip(leaves, asked, strict=True) if g is not None}
    return Result(loss.detach(), gradients, stats)


@dataclass
class Oracle:
    exact: Result  # the reference in float64
    plain: Result  # plain PyTorch in the library's precision
    terms: dict[str, Tensor]  # the largest terms that each number is the sum of


@functools.cache
def oracle(case: Case) -> Oracle:
    return oracle_of(build(case))


def oracle_of(inputs: Inputs) -> Oracle:
    in64 = inputs.cast(F64)
    without_offsets = [without_offset(x) for x in (in64.student, *in64.teachers)]
    exact = evaluate(replace(in64, student=without_offsets[0], teachers=without_offsets[1:]), "reference")
    in32 = inputs.cast(F32)
    plain = evaluate(in32, "reference")
    if F64 in (inputs.student.dtype, *(t.dtype for t in inputs.teachers)):
        plain = in_float64(plain, evaluate(in32.cast(F64), "reference"), exact)
    leaves = {"student": inputs.student, **{f"teacher {k}": t for k, t in enumerate(inputs.teachers)}}
    leaves["weights"] = inputs.weights
    plain.gradients = {name: x.to(leaves[name].dtype) for name, x in plain.gradients.items()}
    return Oracle(exact, plain, largest_terms(in64, exact))


def without_offset(logits: Tensor) -> Tensor:
    """The same softmaxes, relative to each row's maximum: the oracle would lose an offset's digits when it divides by
    τ.
    """
    highest = torch.where(logits.isfinite(), logits, -INF).amax(-1, keepdim=True)
    return logits - torch.where(highest.isfinite(), highest, 0.0)


def in_float64(plain32: Result, exact32: Result, exact: Result) -> Result:
    return Result(
        plain_in_float64(plain32.loss, exact32.loss, exact.loss),
        {
            name: plain_in_float64(plain32.gradients[name], exact32.gradients[name], x)
            for name, x in exact.gradients.items()
        },
        mtkd_fast.KDStats(*map(plain_in_float64, plain32.stats, exact32.stats, exact.stats)),
    )


STATS_OF_ROWS = ("divergence", "teacher_ce", "teacher_entropy", "student_ce")

# How large the terms are that a number is the sum of, for the tolerance rule.


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0).abs()


# Of log x, log y, D and what the divergence takes besides, beta and the target.


def difference_of_probabilities(log_x: Tensor, log_y: Tensor, d: Tensor, *_) -> Tensor:
    """x - y"""
    return torch.maximum(log_x, log_y).exp().amax(-1)


def deviation_of_log_ratio(log_x: Tensor, log_y: Tensor, d: Tensor, *_) -> Tensor:
    """x (log x - log y - D)"""
    return (log_x.exp() * (_finite(log_x - log_y) + d[..., None])).amax(-1)


def deviation_from_mixture(log_x: Tensor, log_y: Tensor, d: Tensor, *_) -> Tensor:
    """x (log x - log m + slope), m between x and y; no slope exceeds max(1, D)"""
    return deviation_of_log_ratio(log_x, torch.logaddexp(log_x, log_y) - math.log(2), d)


def deviation_of_sign(log_x: Tensor, log_y: Tensor, d: Tensor, *_) -> Tensor:
    """x (sign(x - y) - slope); where 4 ulp of the logarithms decide the sign, either is right."""
    ulps = 4 * torch.finfo(F32).eps
    blurred = (log_x - log_y).abs() <= ulps * torch.maximum(log_x.abs(), log_y.abs()).clamp(
        min=math.log(log_x.shape[-1])
    )
    return log_x.exp().amax(-1) + torch.where(blurred & (log_x != log_y), log_x.exp(), 0.0).sum(-1) / ulps


def with_target_apart(of_others, of_target):
    """Terms of the other classes, times beta, and of the target: of its log-odds in x and in y."""

    def terms(log_x: Tensor, log_y: Tensor, d: Tensor, beta: float, target: Tensor) -> Tensor:
        at_target = torch.arange(log_x.shape[-1]) == target[..., None]
        others = [x.masked_fill(at_target, -INF).log_softmax(-1) for x in (log_x, log_y)]
        target_part = [torch.where(at_target, x, -INF).logsumexp(-1) for x in (log_x, log_y)]
        return beta * of_others(*others, d / max(beta, 1.0)).nan_to_num(0.0) + of_target(*target_part)

    return terms


def log_odds(log_x: Tensor) -> Tensor:
    return log_x - torch.log1p(-log_x.exp())


GRADIENT_TERMS = {  # in the student and in the teacher, x the side's own; a divergence not named here has none
    "forward_kl": (difference_of_probabilities, deviation_of_log_ratio),
    "reverse_kl": (deviation_of_log_ratio, difference_of_probabilities),
    "jsd": (deviation_from_mixture, deviation_from_mixture),
    "tvd": (deviation_of_sign, deviation_of_sign),
    "skew_kl": (deviation_from_mixture, deviation_from_mixture),
    "skew_reverse_kl": (deviation_from_mixture, deviation_from_mixture),
    "dkd": (
        with_target_apart(difference_of_probabilities, lambda q, p: torch.ones_like(q)),
        with_target_apart(deviation_of_log_ratio, lambda p, q: 1 + _finite(log_odds(p) - log_odds(q))),
    ),
}


def largest_terms(inputs: Inputs, exact: Result) -> dict[str, Tensor]:
    """By name of a number or a gradient, a magnitude for every row; ``inputs`` in float64."""
    rows, n_classes = inputs.student.shape[:-1], inputs.student.shape[-1]
    o, stats = inputs.options, exact.stats
    log_sum = max(1.0, math.log(n_classes))  # what a log-sum-exp reaches
    beta = DIVERGENCES[o["divergence"]].beta if o["beta"] is None else o["beta"]

    counts = torch.ones(rows, dtype=torch.bool)
    if inputs.target is not None:
        counts &= inputs.target != o["ignore_index"]
    r = torch.ones(rows, dtype=F64)
    if inputs.row_weights is not None:
        counts &= inputs.row_weights != 0
        r = inputs.row_weights.to(F64).abs()
    n = 1.0
    if o["reduction"] == "mean":
        n = max(int(counts.sum()), 1) if inputs.num_items is None else abs(float(inputs.num_items))
    r = torch.where(counts, r, 0.0) / n
    upstream = torch.ones((), dtype=F64) if inputs.upstream is None else inputs.upstream.abs()

    found = {"student": torch.zeros(rows, dtype=F64)}
    for name in STATS_OF_ROWS:
        if (stat := getattr(stats, name)) is not None:
            found[f"stats.{name}"] = _finite(stat).clamp(min=log_sum)
    if stats.divergence is not None and o["divergence"] == "dkd":
        found["stats.divergence"] = _finite(stats.divergence).clamp(min=max(1.0, beta) * log_sum)
    loss = torch.zeros(rows, dtype=F64)
    if stats.divergence is not None:
        kd_scale = abs(o["kd_weight"]) * (o["temperature"] ** 2 if o["temperature_squared"] else 1.0)
        found["stats.weights"] = torch.ones(stats.weights.shape)
        w = stats.weights.abs().nan_to_num(0.0)
        if isinstance(inputs.weights, str):
            w = w.clamp(min=1 / max(len(w) - 1, 1))  # a rule's weight is a difference of shares
        size = found["stats.divergence"]
        d = kd_scale * size
        loss = loss + (w * d).sum(0)
        found["weights"] = upstream * r * d
        if isinstance(inputs.weights, Tensor) and inputs.weights.dim() == 1:
            found["weights"] = found["weights"].reshape(len(d), -1).sum(1)
        log_q = (inputs.student / o["temperature"]).log_softmax(-1)
        student_terms, teacher_terms = GRADIENT_TERMS.get(o["divergence"], (lambda *_: torch.zeros(rows),) * 2)
        target = inputs.target
        for k, t in enumerate(inputs.teachers):
            log_p = (t / o["temperature"]).log_softmax(-1)
            scale = upstream * r * kd_scale * w[k] / o["temperature"]
            of_teacher = teacher_terms(log_p, log_q, size[k], beta, target).nan_to_num(0.0)
            of_student = student_terms(log_q, log_p, size[k], beta, target).nan_to_num(0.0)
            found[f"teacher {k}"] = scale * of_teacher
            found["student"] = found["student"] + scale * of_student
    if stats.student_ce is not None:
        loss = loss + abs(o["ce_weight"]) * found["stats.student_ce"]
        found["student"] = found["student"] + upstream * r * abs(o["ce_weight"])  # softmax - one-hot: at most 1
    found["loss"] = r * loss if o["reduction"] == "none" else (r * loss).sum()
    return found


def assert_matches(got: Result, expected: Oracle, interpreted: bool = False) -> None:
    """The comparison of the whole suite; test_breaks.py proves that it notices."""
    exact, plain, terms = expected.exact, expected.plain, expected.terms
    assert_numbers_close("loss", got.loss, exact.loss, plain.loss, terms=terms["loss"])
    assert got.gradients.keys() == exact.gradients.keys()
    for name, gradient in got.gradients.items():
        right, simple = exact.gradients[name], plain.gradients[name]
        assert gradient.dtype == simple.dtype, f"the gradient of {name} is {gradient.dtype}, expected {simple.dtype}"
        of_it = terms.get(name, torch.zeros(()))
        if name == "weights":
            assert_numbers_close("gradient of weights", gradient, right, simple, terms=of_it.expand(right.shape))
        else:
            assert_rows_close(
                f"gradient of {name}", gradient, right, simple,
                terms=of_it, arithmetic=got.loss.dtype, interpreted=interpreted,
            )  # fmt: skip
    for name, stat in got.stats._asdict().items() if got.stats else ():
        right = getattr(exact.stats, name)
        assert (stat is None) == (right is None), f"stats.{name} is {'missing' if stat is None else 'unexpected'}"
        if stat is not None:
            simple = getattr(plain.stats, name)
            assert_numbers_close(f"stats.{name}", stat, right, simple, terms=terms[f"stats.{name}"])


def check(
    backend, student, teachers, target=None, *, weights="uniform", row_weights=None, num_items=None, upstream=None,
    wants=("student",), **options,
) -> Result:  # fmt: skip
    """The comparison for tensors that a test makes itself."""
    inputs = Inputs(
        student, list(teachers), target, weights, row_weights, num_items, upstream, wants, DEFAULTS | options
    )
    got = evaluate(inputs, backend.implementation)
    assert_matches(got, oracle_of(inputs), backend.interpreted)
    return got


def loss_and_gradient(backend, student, teachers, target, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row."""
    leaf = student.detach().requires_grad_()
    loss = backend.loss(leaf, teachers, target, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_same_bits(these, those, rows) -> None:
    for ours, theirs in zip(these, those, strict=True):
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=0)


def check_rows_alone(backend, student, teachers, target, **options) -> None:
    """The gradient of a row has the same bits whatever rows are beside it."""

    def gradient(rows: slice) -> torch.Tensor:
        leaf = student[rows].requires_grad_()
        loss = backend.loss(leaf, [t[rows] for t in teachers], target[rows], reduction="sum", **options)
        return torch.autograd.grad(loss, leaf)[0]

    together = gradient(slice(None))
    for n in range(len(student)):
        assert torch.equal(together[n : n + 1], gradient(slice(n, n + 1)))


# The table.

WITHOUT_TARGET = tuple(name for name, divergence in DIVERGENCES.items() if not divergence.takes_target)


def allowed(chosen: dict) -> bool:
    """What the library refuses is no case here; test_public.py has it."""
    needs_labels = chosen.get("weights") == "confidence" or chosen.get("terms", (0, 0))[1] != 0
    divergence = chosen.get("divergence")
    needs_labels |= divergence is not None and DIVERGENCES[divergence].takes_target
    if chosen.get("beta") is not None and divergence is not None and DIVERGENCES[divergence].beta is None:
        return False
    if chosen.get("labels") == "none" and needs_labels:
        return False
    if chosen.get("weights") == "entropy" and chosen.get("values") == "cold":
        return False  # entropies that underflow in float32 make 0/0 of their weights
    return "weights" not in chosen.get("wants", ()) or chosen.get("weights", "per row") in GIVEN


FACTORS = {
    "divergence": tuple(DIVERGENCES),
    "beta": (None, 0.25),
    "weights": (*WEIGHT_RULES, *GIVEN),
    "values": (
        "normal", "cold", "near", "offset 500", "peaked teachers", "masked in both", "masked in teachers",
        "masked in student", "leading masked",
    ),
    "classes": (1, 2, 3, 7, 31, 32, 33, 100),
    "teachers": (1, 2, 3, 5, 8),
    "rows": ((5,), (2, 3), (1,), (), (2, 1, 3)),
    "dtypes": ((F32,), (BF16,), (F16,), (BF16, F32), (F16, BF16, F32), (F32, F16)),
    "student_layout": tuple(LAYOUTS),
    "teacher_layout": ("a different one each", *LAYOUTS),
    "labels": tuple(name for name in LABELS if name != "all ignored"),
    "row_weights": ("none", "bool", "float"),
    "temperature": (1.0, 2.0, 4.0, 3.7, 0.05),
    "temperature_squared": (True, False),
    "terms": ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.7, 0.5, 0.1), (0.0, 1.0, 0.2), (-1.0, 0.3, 1.0)),
    "reduction": ("mean", "sum", "none", "mean / number", "mean / tensor"),
    "wants": ((), ("student",), ("teachers",), ("student", "teachers"), ("student", "weights"), ("weights",)),
    "upstream": ("one", "random"),
    "stats": (True, False),
}  # fmt: skip


def pairwise(factors: dict[str, tuple], seed: int = 0) -> list[dict]:
    """Choices in which every allowed pair of levels of every two factors occurs: greedy, a row at a time."""
    draw = random.Random(seed)
    order = list(factors)
    missing = {
        frozenset(((f, a), (g, b)))
        for f, g in combinations(order, 2)
        for a in factors[f]
        for b in factors[g]
        if allowed({f: a, g: b})
    }

    def gained(level: tuple, chosen: dict) -> int:
        return sum(frozenset((level, other)) in missing for other in chosen.items())

    found = []
    while missing:
        chosen = dict(draw.choice(sorted(missing, key=lambda pair: sorted(map(str, pair)))))
        for f in draw.sample(order, len(order)):
            if f not in chosen:
                levels = [a for a in draw.sample(factors[f], len(factors[f])) if allowed({**chosen, f: a})]
                chosen[f] = max(levels, key=lambda a, f=f, chosen=chosen: gained((f, a), chosen))
        missing -= set(map(frozenset, combinations(chosen.items(), 2)))
        found.append(chosen)
    return found


PAIRWISE = tuple(
    Case(name=f"pair {i}", why="every pair of settings occurs together", **chosen)
    for i, chosen in enumerate(pairwise(FACTORS))
)

SIZES = (
    *(
        Case(f"C={c}", "around vector widths, tiles and the limits between kernels", classes=c, rows=(3,), teachers=2,
             weights="confidence", terms=(1.0, 1.0, 0.1))
        for c in (15, 17, 63, 65, 127, 129, 257, 511, 1000, 1023, 1024, 1025, 1271, 2047, 2049, 4095, 4097, 8191, 8192)
    ),
    Case("C=8193 bf16", "half precision past a power of two", classes=8193, rows=(3,), dtypes=(BF16,),
         weights="entropy"),
    Case("C=16385", "past what one program keeps on chip", classes=16385, rows=(2,), weights="confidence"),
    Case("C=50257 bf16", "GPT-2's vocabulary, odd", classes=50257, rows=(2,), dtypes=(BF16,),
         wants=("student", "teachers")),
    Case("C=65537", "past 2^16, where peers stop", classes=65537, rows=(2,), teachers=2, terms=(1.0, 1.0, 0.0)),
    Case("C=262145 bf16", "past the largest vocabulary in use", classes=262145, rows=(2,), teachers=2, dtypes=(BF16,)),
    Case("N=0", "an empty batch gives 0 and an empty gradient", rows=(0,), terms=(1.0, 1.0, 0.0)),
    Case("N=0 of 2 dimensions", "an empty batch of sequences", rows=(0, 4), reduction="none"),
    Case("N=1", "less than any block of rows", rows=(1,)),
    Case("N=77", "no multiple of any block of rows", rows=(77,), classes=10, weights="confidence"),
    Case("N=131", "a prime number of rows, in several threads", rows=(131,), classes=100, terms=(1.0, 1.0, 0.0)),
    Case("N=2049 C=10", "where a peer's last block of rows was NaN", rows=(2049,), classes=10, teachers=2),
    Case("K=16", "more teachers than a tuple of pointers takes", teachers=16, weights="confidence"),
    Case("K=64", "the most teachers", teachers=64, rows=(3,), weights="entropy"),
    Case("K=64 given", "the most teachers, each with its own gradient", teachers=64, rows=(3,), weights="per row",
         dtypes=(F32, BF16, F16, F32), wants=("student", "teachers", "weights")),
)  # fmt: skip

KLS = ("forward_kl", "reverse_kl")  # through which every rule meets every value; the others take turns

HOSTILE = tuple(
    replace(case, name=f"{case.name}, {divergence}", divergence=divergence)
    for divergence in DIVERGENCES
    for case in (
        *(
            Case(f"{values}, {weights}", "hostile values under every weight rule", values=values, weights=weights,
                 rows=(3,), terms=(1.0, 1.0, 0.0))
            for i, values in enumerate(VALUES)
            for weights in (WEIGHT_RULES if divergence in KLS else WEIGHT_RULES[i % len(WEIGHT_RULES) :][:1])
            if values not in FACTORS["values"]
        ),
        *(
            Case(f"{values} over tiles", "a whole tile without a finite logit", values=values, classes=5000, rows=(2,),
                 weights=weights, terms=(1.0, terms, 0.0))
            for values in ("leading masked", "leading masked in teachers", "trailing masked", "all but a few masked")
            for weights, terms in (("confidence", 1.0),)
        ),
        Case("cold at T=0.05", "exponents of thousands", values="cold", temperature=0.05, weights="confidence",
             classes=100),
        Case("near at C=32000", "a divergence far below its terms", values="near", classes=32000, rows=(2,),
             teachers=1),
        Case("equal at C=32000", "equal rows give 0 to rounding", values="equal", classes=32000, rows=(2,), teachers=2),
        Case("hopeless teachers", "teachers that exclude the label share the softmax", values="masked in teachers",
             labels="int32", weights="confidence", classes=3, rows=(6,)),
    )
)  # fmt: skip

ROWS_THAT_DO_NOT_COUNT = (
    *(
        Case(f"all ignored, {reduction}", "0, attached to the graph, zero gradient", labels="all ignored",
             reduction=reduction, terms=(1.0, 1.0, 0.0), weights=weights, wants=("student", "teachers"))
        for reduction, weights in (("mean", "uniform"), ("sum", "confidence"), ("none", "entropy"))
    ),
    Case("no row kept", "row weights of 0 alone", row_weights="none kept", wants=("student", "teachers")),
    Case("poison outside", "what an ignored row holds does not matter", values="nan in student", labels="some ignored",
         weights="confidence", terms=(1.0, 1.0, 0.1), wants=("student", "teachers")),
    Case("empty row outside", "nor that it has no finite logit", values="empty teacher row", labels="some ignored",
         weights="entropy"),
    Case("unrouted poison", "a teacher of weight 0 is not read", values="empty teacher row", weights="zero teacher",
         wants=("student", "teachers")),
    Case("unrouted poison, weights want a gradient", "the gradient of a weight 0 is D", values="empty teacher row",
         weights="zero teacher", wants=("student", "weights")),
)  # fmt: skip

LAYOUT_CASES = (
    Case("logits[:, :-1]", "two leading strides, read in place", rows=(3, 4), classes=1000,
         student_layout="all but last", teacher_layout="all but last", weights="confidence", terms=(1.0, 1.0, 0.0)),
    Case("logits[:, :-1] of strategy B", "the same where the backward pass reads the logits again", rows=(2, 2),
         classes=20000, teachers=2, student_layout="all but last", teacher_layout="all but last"),
    Case("a different layout each", "no two tensors with the same strides", rows=(2, 3), classes=129, teachers=9,
         teacher_layout="a different one each", student_layout="transposed", wants=("student", "teachers")),
    Case("misaligned bf16", "rows that start between 16-byte lines", rows=(3,), classes=1000, dtypes=(BF16,),
         student_layout="misaligned", teacher_layout="misaligned", weights="confidence"),
    Case("odd row stride, fp16", "each row aligned differently", rows=(5,), classes=257, dtypes=(F16,),
         student_layout="row stride", teacher_layout="row stride", wants=("student", "teachers")),
    *(
        Case(f"pixels, {name}", why, student_layout="pixels", terms=(1.0, 1.0, 0.1), labels="some ignored", **chosen)
        for name, why, chosen in (
            ("odd", "[B, C, H, W] with rows along H·W, which nothing divides", dict(
                rows=(2, 5, 7), classes=7, teachers=2, teacher_layout="pixels", weights="confidence")),
            ("even", "whole lines of memory", dict(
                rows=(2, 8, 16), classes=21, dtypes=(BF16,), teacher_layout="pixels", weights="entropy",
                divergence="reverse_kl")),
            ("other teachers", "each tensor at its own strides", dict(
                rows=(2, 5, 7), classes=7, dtypes=(F32, BF16, F16), wants=("student", "teachers"),
                teacher_layout="pixels, contiguous, some channels", weights="confidence", row_weights="float")),
            ("many teachers", "a table of pixels", dict(
                rows=(2, 4, 8), classes=5, teachers=6, dtypes=(BF16,), wants=("student", "teachers"),
                teacher_layout="pixels", weights="zero entries", row_weights="bool")),
            ("many mixed teachers", "a table of mixed dtypes and strides", dict(
                rows=(2, 5, 7), classes=7, teachers=6, dtypes=(F16, F32, BF16, F16), wants=("student", "teachers"),
                teacher_layout="some channels, pixels, contiguous", divergence="dkd")),
            ("poison beside", "a backward that reads in wide loads reads ignored pixels too", dict(
                rows=(2, 4, 8), classes=9, dtypes=(F16,), teacher_layout="pixels", values="nan in student")),
            ("unrouted poison", "nor does a teacher of weight 0 reach its pixel", dict(
                rows=(2, 4, 8), classes=9, dtypes=(F16,), teacher_layout="pixels", values="empty teacher row",
                weights="zero teacher")),
            ("many classes", "past what one program keeps on chip", dict(
                rows=(2, 4, 6), classes=300, teachers=2, teacher_layout="pixels, some channels", divergence="jsd",
                upstream="random", reduction="none")),
        )
    ),
    Case("channels last, teachers of pixels", "the student's layout decides", rows=(2, 5, 7), classes=7,
         teacher_layout="pixels", wants=("student", "teachers")),
)  # fmt: skip

CASES = (
    *PAIRWISE,
    *(replace(case, stats=False) for case in (*SIZES, *LAYOUT_CASES)),
    *HOSTILE,
    *ROWS_THAT_DO_NOT_COUNT,
)

FLOAT64_CASES = tuple(
    replace(case, name=f"{case.name} in float64", dtypes=dtypes)
    for case, dtypes in zip(PAIRWISE[:24], [(F64,), (F64, F32), (F32, F64), (BF16, F64)] * 6, strict=True)
)
