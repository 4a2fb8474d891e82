"""Launches every CUDA kernel of mtkd_fast once or more, on few rows, for compute-sanitizer to look on:

    compute-sanitizer --tool memcheck python -m mtkd_fast.bench.sanitize [cuda|cpu]

Shapes straddle what the kernels choose between: rows in the registers of a warp, in the shared memory of a warp, of a
block or of a cluster of them, and longer ones; odd ends, one teacher and many, aligned and not.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mtkd_fast import (
    ensemble_probabilities,
    hint_loss,
    mixture_divergence,
    multi_teacher_divergence,
    multi_teacher_kd_loss,
    mutual_kd_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)

SHAPES = (
    (3, 10, 1), (33, 100, 3), (5, 1000, 8), (2, 1023, 2), (3, 4096, 3), (2, 8001, 3), (2, 32001, 3), (1, 131073, 2),
    (1, 400001, 2),
)  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)
RULES = ("uniform", "confidence", "entropy", "given")
DIVERGENCES = ("forward_kl", "reverse_kl")


class Rows:
    """Inputs made on the host and copied, so that no kernel but ours runs where it can be avoided."""

    def __init__(self, rows: int, classes: int, teachers: int, dtype: torch.dtype, device: str):
        g = torch.Generator().manual_seed(0)
        self.device = device
        logits = 3 * torch.randn(teachers + 1, rows, classes, generator=g)
        self.student, *self.teachers = (x.clone().to(dtype).to(device) for x in logits)
        target = torch.randint(classes, (rows,), generator=g)
        target[0] = -100 if rows > 2 else target[0]
        self.target = target.to(device)
        self.weights = torch.rand(teachers, rows, generator=g).to(device)


def finite(name: str, x: Tensor) -> None:
    if not x.detach().cpu().isfinite().all():
        raise AssertionError(f"{name}: not finite")


def loss_and_gradient(x: Rows, rule: str, divergence: str, upstream: float, **options) -> None:
    """``upstream`` 1 finds the gradient finished; another number makes backward rescale it."""
    student = x.student.detach().requires_grad_()
    loss = multi_teacher_kd_loss(
        student,
        x.teachers,
        x.target,
        weights=x.weights if rule == "given" else rule,
        divergence=divergence,
        temperature=4.0,
        ce_weight=1.0,
        implementation="cpp",
        **options,
    )
    loss.backward(torch.full(loss.shape, upstream).to(x.device))
    finite(f"gradient, {rule} {divergence}", student.grad)


def teacher_gradients(x: Rows, divergence: str) -> None:
    """The pass that recomputes (strategy B), with gradients to all logits and to the weights."""
    student, weights = x.student.detach().requires_grad_(), x.weights.detach().requires_grad_()
    teachers = [t.detach().requires_grad_() for t in x.teachers]
    loss = multi_teacher_kd_loss(student, teachers, weights=weights, divergence=divergence, implementation="cpp")
    loss.backward()
    for tensor in (student, weights, *teachers):
        finite(f"gradients of {divergence}", tensor.grad)


def divergences(x: Rows, divergence: str) -> None:
    student = x.student.detach().requires_grad_()
    found = multi_teacher_divergence(student, x.teachers, divergence=divergence, implementation="cpp")
    found.backward(torch.ones(found.shape).to(x.device))
    finite(divergence, student.grad)


def value_only(x: Rows, rule: str) -> None:
    with torch.no_grad():
        weights = x.weights if rule == "given" else rule
        finite(rule, multi_teacher_kd_loss(x.student, x.teachers, x.target, weights=weights, implementation="cpp"))


def as_they_are(x: Tensor) -> Tensor:
    return x


def one_channel(x: Tensor) -> Tensor:
    return x[:, None]


def one_position(x: Tensor) -> Tensor:
    return x[..., None]


def five_channels(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 5 * 5].unflatten(1, (5, -1))


FEATURES = {
    "mse": (as_they_are,),
    "smooth_l1": (as_they_are,),
    "cosine": (as_they_are,),
    "attention": (one_channel, one_position, five_channels),
}


def hints(x: Rows, distance: str, features: Callable[[Tensor], Tensor]) -> None:
    student = [features(t).detach().requires_grad_() for t in x.teachers]
    weights = x.weights.detach().requires_grad_()
    teacher = [features(x.student)] * len(student)
    hint_loss(student, teacher, weights=weights, distance=distance, implementation="cpp").backward()
    finite(f"hint {distance}", student[0].grad)
    finite(f"hint {distance} weights", weights.grad)


def relations(x: Rows) -> None:
    for loss in (rkd_angle_loss, rkd_distance_loss):
        student = x.student.detach().requires_grad_()
        loss(student, x.teachers[0], implementation="cpp").backward()
        finite(loss.__name__, student.grad)
        with torch.no_grad():
            finite(loss.__name__, loss(student, x.teachers[0], implementation="cpp"))


def mixtures(x: Rows) -> None:
    student, weights = x.student.detach().requires_grad_(), x.weights.detach().softmax(0).requires_grad_()
    teachers = [t.detach().requires_grad_() for t in x.teachers]
    ensemble_probabilities(teachers, weights=weights, implementation="cpp").square().sum().backward()
    mixture_divergence(student, x.teachers, weights=weights, implementation="cpp").sum().backward()
    for tensor in (student, weights, *teachers):
        finite("gradients of mixtures", tensor.grad)


def mutual(x: Rows) -> None:
    for detach_peers in (True, False):
        students = [z.detach().requires_grad_() for z in (x.student, *x.teachers)]
        mutual_kd_loss(students, temperature=2.0, detach_peers=detach_peers, implementation="cpp").backward()
        for z in students:
            finite("gradients of mutual learning", z.grad)


def inputs(shapes=SHAPES) -> list[tuple[tuple[int, int, int], torch.dtype]]:
    """Every shape in float32 and in one of the half precisions, by turns: the tools are slow."""
    halves = zip(shapes, itertools.cycle(HALVES), strict=False)
    return [(shape, torch.float32) for shape in shapes] + list(halves)


def launches(device: str, shapes=SHAPES) -> Iterator[str]:
    """Runs everything; yields what it has just run."""
    for shape, dtype in inputs(shapes):
        x = Rows(*shape, dtype, device)
        for rule, divergence in itertools.product(RULES, DIVERGENCES):
            upstream = 0.5 if rule == "uniform" else 1.0
            loss_and_gradient(x, rule, divergence, upstream, reduction="none" if rule == "entropy" else "mean")
        for divergence in DIVERGENCES:
            teacher_gradients(x, divergence)
            divergences(x, divergence)
        for rule in RULES:
            value_only(x, rule)
        for distance, forms in FEATURES.items():
            for form in forms:
                hints(x, distance, form)
        relations(x)
        mixtures(x)
        mutual(x)
        yield f"{dtype} {shape}"


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    done = list(launches(device))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(done)} inputs through every kernel on {device}")


if __name__ == "__main__":
    main()
