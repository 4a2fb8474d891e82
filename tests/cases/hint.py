"""The case table of the op ``hint``: a case is data; ``build`` makes tensors of it, ``evaluate`` the numbers."""

import functools
import zlib
from dataclasses import dataclass, replace

import torch
from tolerance import assert_numbers_close, assert_rows_close
from torch import Tensor

from cases import BF16, F16, F32, F64, INF, NAN
from mtkd_fast import hint_loss

OF_ELEMENTS = ("mse", "smooth_l1", "cosine")  # "attention" takes maps


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    distance: str = "mse"
    shapes: tuple[tuple[int, ...], ...] = ((7,), (3, 4, 4))  # of a sample, pair by pair
    teacher_channels: tuple[int, ...] = ()  # pair by pair; those of the student, if empty
    samples: int = 5
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)  # student and teacher
    values: str = "normal"
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    weights: str = "per sample"
    reduction: str = "mean"
    upstream: str = "one"
    wants: tuple[str, ...] = ("student", "teacher", "weights")

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None
    upstream: Tensor | None

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers, on the CPU in one dtype and without strides."""

        def to(x):
            return None if x is None else x.detach().cpu().to(dtype).contiguous()

        return Inputs([*map(to, self.student)], [*map(to, self.teacher)], to(self.weights), to(self.upstream))


@dataclass
class Result:
    loss: Tensor
    gradients: dict[str, Tensor]  # "student 0", ..., "teacher 0", ..., "weights"


# What the features hold: (generator, [N, ...]) -> student and teacher, float32.


def normal(g, shape):
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def scaled(student, teacher):
    def values(g, shape):
        f, t = normal(g, shape)
        return f * student, t * teacher

    return values


def near(g, shape):
    f, t = normal(g, shape)
    return f, f + 1e-3 * t


def equal(g, shape):
    f, _ = normal(g, shape)
    return f, f.clone()


def at_one(g, shape):
    """Differences of exactly ±1 and ±its neighbours, where Huber's function changes its form."""
    steps = torch.tensor([1.0, -1.0, 1 + 2**-20, 1 - 2**-20, 0.0, -1 - 2**-20])
    d = steps[torch.randint(6, shape, generator=g)]
    return d, torch.zeros(shape)


def zero_sample(side):
    def values(g, shape):
        both = normal(g, shape)
        both[side][1:3] = 0
        return both

    return values


def poisoned(side, value):
    """One element of the second sample; the others must not notice."""

    def values(g, shape):
        both = normal(g, shape)
        both[side][1:2].view(-1)[0] = value
        return both

    return values


def mixed_sizes(g, shape):
    """Every sample of another order of magnitude, from the smallest normal numbers to the largest."""
    f, t = normal(g, shape)
    size = torch.tensor([1e-37, 1e-25, 1.0, 1e18, 1e36])[torch.arange(shape[0]) % 5]
    size = size.view(-1, *[1] * (len(shape) - 1))
    return f * size, t * size.flip(0)


VALUES = {
    "normal": normal,
    "wide": scaled(30.0, 10.0),
    "near": near,
    "equal": equal,
    "differences at one": at_one,
    "huge": scaled(1e30, 1.0),
    "tiny": scaled(1.0, 1e-30),
    "huge and tiny": scaled(1e32, 1e-32),
    "every size": mixed_sizes,
    "large": scaled(1e15, 1e12),
    "small": scaled(1e-18, 1e-15),
    "large and small": scaled(1e15, 1e-15),
    "zero in student": zero_sample(0),
    "zero in teacher": zero_sample(1),
    "nan in student": poisoned(0, NAN),
    "nan in teacher": poisoned(1, NAN),
    "inf in student": poisoned(0, INF),
}


# How features lie in memory: [N, ...] -> the same values. What lies between the samples is NaN.

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "sample stride": lambda x: torch.cat([x, torch.full_like(x, NAN)], 1)[:, : x.shape[1]],
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


# Weights: (generator, K, N) -> None, [K] or [K, N].


def zero_entries(g, k, n):
    return torch.rand(k, n, generator=g) * (torch.rand(k, n, generator=g) < 0.6)


def second_sample_zero(g, k, n):
    return torch.rand(k, n, generator=g) * (torch.arange(n) != 1)


WEIGHTS = {
    "none": lambda g, k, n: None,
    "per pair": lambda g, k, n: torch.rand(k, generator=g),
    "per sample": lambda g, k, n: torch.rand(k, n, generator=g),
    "zero entries": zero_entries,
    "second sample zero": second_sample_zero,
    "negative": lambda g, k, n: torch.randn(k, generator=g),
    "repeated": lambda g, k, n: torch.rand(k, 1, generator=g).expand(k, n),
    "strided": lambda g, k, n: torch.rand(n, k, generator=g).t(),
    "float16": lambda g, k, n: torch.rand(k, n, generator=g).half(),
}


def drawn(case: Case, k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pair k, float32; where its sides have channels of their own, the first of the widest."""
    shape = case.shapes[k]
    if not case.teacher_channels:
        return VALUES[case.values](g, (case.samples, *shape))
    channels = shape[0], case.teacher_channels[k]
    both = VALUES[case.values](g, (case.samples, max(channels), *shape[1:]))
    return tuple(x[:, :c].contiguous() for x, c in zip(both, channels, strict=True))


def build(case: Case, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    pairs = [drawn(case, k, g) for k in range(len(case.shapes))]
    sides = [
        [LAYOUTS[layout](x.to(dtype).to(device)) for x in side]
        for side, dtype, layout in zip(zip(*pairs, strict=True), case.dtypes, case.layouts, strict=True)
    ]
    weights = WEIGHTS[case.weights](g, len(case.shapes), case.samples)
    upstream = None
    if case.upstream == "random":
        upstream = torch.randn(case.samples if case.reduction == "none" else (), generator=g).to(device)
    return Inputs(*sides, None if weights is None else weights.to(device), upstream)


def evaluate(case: Case, inputs: Inputs, implementation: str) -> Result:
    """One call of the public function and the gradients that the case asks for."""
    student, teacher = (
        [x.detach().requires_grad_(name in case.wants) for x in side]
        for name, side in (("student", inputs.student), ("teacher", inputs.teacher))
    )
    weights = inputs.weights
    if weights is not None:
        weights = weights.detach().requires_grad_("weights" in case.wants)
    loss = hint_loss(
        student, teacher, weights=weights, distance=case.distance, reduction=case.reduction,
        implementation=implementation,
    )  # fmt: skip
    named = {f"student {k}": x for k, x in enumerate(student)} | {f"teacher {k}": x for k, x in enumerate(teacher)}
    leaves = {name: x for name, x in (named | {"weights": weights}).items() if x is not None and x.requires_grad}
    upstream = torch.ones_like(loss) if inputs.upstream is None else inputs.upstream.to(loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return Result(loss.detach(), dict(zip(leaves, gradients, strict=True)))


@dataclass
class Oracle:
    exact: Result  # the reference in float64
    plain: Result  # plain PyTorch in the library's precision
    terms: dict[str, Tensor]  # the largest terms that each number is the sum of


@functools.cache
def oracle(case: Case) -> Oracle:
    inputs = build(case)
    precise = inputs.cast(F64)
    exact = evaluate(case, precise, "reference")
    plain = evaluate(case, inputs.cast(F64 if F64 in case.dtypes else F32), "reference")
    return Oracle(exact, plain, terms_of(case, precise, exact))


def terms_of(case: Case, x: Inputs, exact: Result) -> dict[str, Tensor]:
    """The cosine is taken from 1, and its gradient is the difference of two unit vectors over the norm. Attention maps
    are subtracted.
    """
    k, n = len(x.student), case.samples
    weights = torch.ones(k, n, dtype=F64) if x.weights is None else x.weights.abs().view(k, -1).expand(k, n)
    up = torch.ones(n, dtype=F64) if x.upstream is None else x.upstream.abs().expand(n)
    up = up / max(n, 1) if case.reduction == "mean" else up
    none = torch.zeros((), dtype=F64)
    if case.distance == "attention":
        return terms_of_attention(case, x, exact, weights, up)
    if case.distance != "cosine":
        positive = hint_loss(
            x.student, x.teacher, weights=weights, distance=case.distance, reduction=case.reduction,
            implementation="reference",
        )  # fmt: skip
        return dict.fromkeys(exact.gradients, none) | {"loss": positive.nan_to_num(0)}
    per_sample = 2 * weights.sum(0)
    terms = {
        "loss": per_sample if case.reduction == "none" else per_sample.sum() / (n if case.reduction == "mean" else 1)
    }
    terms["weights"] = 2 * up.sum() if x.weights is not None and x.weights.dim() == 1 else 2 * up.max()
    for i, pair in enumerate(zip(x.student, x.teacher, strict=True)):
        f, g = (v.reshape(n, -1) for v in pair)
        for name, own in (("student", f), ("teacher", g)):
            largest = sum(v.abs().amax(1) / v.norm(dim=1) for v in (f, g))
            terms[f"{name} {i}"] = (weights[i] * up * largest / own.norm(dim=1)).nan_to_num(0, 0, 0)
    return terms


def terms_of_attention(case: Case, x: Inputs, exact: Result, weights: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Of (a − b)², an error of a is worth |a − b|·a; of its gradient 2·f·slope, the slope loses what a − b does."""
    n = case.samples
    per_pair, terms = [], {}
    for i, pair in enumerate(zip(x.student, x.teacher, strict=True)):
        energies = [v.square().sum(1).flatten(1) for v in pair]
        divisors = [e.norm(dim=1) + 1e-6 for e in energies]
        a, b = (e / divisor[:, None] for e, divisor in zip(energies, divisors, strict=True))
        per_pair.append(((a - b).abs() * (a + b)).mean(1).nan_to_num(0))
        largest = 2 / a.shape[1] * (a + b).amax(1)
        for name, f, divisor in zip(("student", "teacher"), pair, divisors, strict=True):
            term = weights[i] * up * 2 * f.abs().flatten(1).amax(1) * largest / divisor
            terms[f"{name} {i}"] = term.nan_to_num(0, 0, 0)
    distances = torch.stack(per_pair)
    per_sample = (weights * distances).sum(0)
    terms["loss"] = per_sample
    if case.reduction != "none":
        terms["loss"] = per_sample.sum() / (n if case.reduction == "mean" else 1)
    terms["weights"] = (
        (distances * up).sum() if x.weights is not None and x.weights.dim() == 1 else (distances * up).max()
    )
    return terms


def assert_matches(case: Case, got: Result, right: Oracle, interpreted: bool = False) -> None:
    arithmetic = F64 if F64 in case.dtypes else F32
    assert got.loss.dtype == arithmetic
    exact, plain = right.exact, right.plain
    assert_numbers_close("loss", got.loss, exact.loss, plain.loss, terms=right.terms["loss"])
    assert got.gradients.keys() == exact.gradients.keys()
    for name, gradient in got.gradients.items():
        rows = [
            x.reshape(1 if name == "weights" else len(x), -1)
            for x in (gradient, exact.gradients[name], plain.gradients[name].to(gradient.dtype))
        ]
        assert_rows_close(
            f"gradient of {name}", *rows, terms=right.terms[name], arithmetic=arithmetic, interpreted=interpreted
        )


SHAPES = {
    "one number": ((1,),),
    "vectors": ((7,), (64,)),
    "around vector widths": ((15,), (16,), (17,), (31,), (33,)),
    "maps of different size": ((3, 4, 4), (8, 2, 2), (5,)),
    "large": ((64, 9, 9),),
    "samples that are numbers": ((),),
}
DTYPES = {"bf16": (BF16, BF16), "fp16": (F16, F16), "bf16 and fp32": (BF16, F32), "fp32 and fp16": (F32, F16)}

# A poisoned sample's gradient is not finite, and so is no weight's that it meets.
FEATURES = ("student", "teacher")

ANY_DISTANCE = (
    *(Case(name, "widths, remainders, tiles", shapes=shapes) for name, shapes in SHAPES.items()),
    *(Case(f"weights {weights}", "every shape and stride of weights", weights=weights) for weights in WEIGHTS),
    *(Case(name, "widened on the way in, rounded once on the way out", dtypes=dtypes, shapes=((8, 3, 3), (40,)))
      for name, dtypes in DTYPES.items()),
    *(Case(f"{layout} {side}", "two sides that lie differently are compared element by element",
           shapes=((6, 3, 5), (12,)), layouts=(layout if side != "teacher" else "contiguous",
                                               layout if side != "student" else "contiguous"))
      for layout in LAYOUTS if layout != "contiguous" for side in ("student", "teacher", "both")),
    *(Case(f"reduction {reduction}", "and an upstream of its own", reduction=reduction, upstream="random")
      for reduction in ("none", "sum", "mean")),
    *(Case(f"{n} samples", "one, and more than a block", samples=n, shapes=((33,),)) for n in (1, 77)),
    Case("64 pairs", "the most", shapes=tuple((3 + k % 5,) for k in range(64))),
    Case("wide", "differences far above 1", values="wide"),
    Case("near", "differences far below the features", values="near", wants=("student", "teacher")),
    Case("equal", "nothing to learn", values="equal", wants=("student", "teacher")),
    Case("nan in student", "NaN stays where it is", values="nan in student", reduction="none", wants=FEATURES),
    Case("nan in teacher", "on either side", values="nan in teacher", reduction="none", wants=FEATURES),
    Case("poison unread", "a pair of weight 0 is not read", values="nan in student", weights="second sample zero",
         wants=FEATURES),
    Case("poison and a weight that learns", "the gradient of a weight 0 is the distance, or 0 where there is none",
         values="nan in student", weights="second sample zero", wants=("weights",)),
    Case("only the student learns", "no gradient that nobody wants", wants=("student",)),
    Case("only the teacher learns", "the sides changed", wants=("teacher",)),
)  # fmt: skip

MAPS = {
    "one position": ((5, 1), (64, 1)),
    "one channel": ((1, 5, 5), (1, 3)),
    "one number": ((1, 1),),
    "channels of their own": ((4, 3, 3), (16, 5, 7), (3, 2, 4)),
    "lines and volumes": ((6, 33), (3, 2, 3, 5)),
    "around vector widths": ((3, 15), (5, 16), (9, 17), (17, 31), (8, 33)),
    "many channels": ((300, 2, 2), (70, 7, 7)),
    "many positions": ((3, 33, 65),),
    "more channels than are taken together": ((2500, 3),),
}
TEACHER_CHANNELS = {"channels of their own": (7, 5, 40), "many channels": (31, 130), "many positions": (5,)}
MAP_SHAPES = ((6, 3, 5), (3, 4, 4))


def on_maps(case: Case) -> Case:
    """77 samples are slow in an interpreter."""
    shapes = {77: ((3, 5),)}.get(case.samples, ((8, 3, 3), (40, 3)) if case.name in DTYPES else MAP_SHAPES)
    return replace(case, name=f"attention, {case.name}", distance="attention", shapes=shapes)


ATTENTION = (
    *(Case(f"attention, {name}", "widths, remainders, rows of several channels", distance="attention", shapes=shapes,
           teacher_channels=TEACHER_CHANNELS.get(name, ()), layouts=(layout, layout))
      for name, shapes in MAPS.items() for layout in ("contiguous", "channels last")
      if layout == "contiguous" or any(len(shape) == 3 for shape in shapes)),
    *(on_maps(case) for case in ANY_DISTANCE if case.name not in (*SHAPES, "64 pairs")),
    *(Case(f"attention, {name}, channels last", "halves, and lanes along the channels", distance="attention",
           dtypes=dtypes, shapes=((8, 3, 3), (40, 2, 5)), teacher_channels=(16, 7),
           layouts=("channels last", "channels last")) for name, dtypes in DTYPES.items()),
    Case("attention, 64 pairs", "the most", distance="attention", samples=2,
         shapes=tuple((1 + k % 3, 3 + k % 5) for k in range(64))),
    *(Case(f"attention, {values}", "a map has no size, wherever Σ_c f² is a normal number", distance="attention",
           values=values, shapes=((5, 7), (3, 4, 11)), weights="per pair", wants=FEATURES)
      for values in ("large", "small", "large and small")),
    *(Case(f"attention, {values}", "a map of zeros is one of zeros, and has no gradient", distance="attention",
           values=values, shapes=MAP_SHAPES) for values in ("zero in student", "zero in teacher")),
    Case("attention, inf in student", "no map is defined", distance="attention", shapes=MAP_SHAPES,
         values="inf in student", reduction="none", wants=FEATURES),
)  # fmt: skip

CASES = (
    *(replace(case, name=f"{distance}, {case.name}", distance=distance)
      for distance in OF_ELEMENTS for case in ANY_DISTANCE),
    Case("mse, inf in student", "an infinite distance", values="inf in student", reduction="none", wants=FEATURES),
    Case("smooth_l1, inf in student", "with a slope of 1", distance="smooth_l1", values="inf in student",
         reduction="none", wants=("student",)),
    Case("smooth_l1, differences at one", "both forms meet", distance="smooth_l1", values="differences at one"),
    *(Case(f"cosine, {values}", "a direction has no size", distance="cosine", values=values, wants=FEATURES,
           shapes=((7,), (3, 40, 11)), weights="per pair")
      for values in ("huge", "tiny", "huge and tiny", "every size")),
    *(Case(f"cosine, {values}", "no direction: cosine 0, gradient 0", distance="cosine", values=values)
      for values in ("zero in student", "zero in teacher")),
    Case("cosine, inf in student", "no direction is defined", distance="cosine", values="inf in student",
         reduction="none", wants=FEATURES),
    *ATTENTION,
)  # fmt: skip

FLOAT64_CASES = tuple(
    replace(case, name=f"{case.name} in float64", dtypes=dtypes)
    for case, dtypes in zip(
        [
            case
            for case in CASES
            if case.name.split(", ")[1] in ("around vector widths", "weights strided", "reduction none", "wide")
        ],
        [(F64, F64), (F64, F32), (F32, F64), (BF16, F64)] * (1 + len(OF_ELEMENTS)),
        strict=True,
    )
)
