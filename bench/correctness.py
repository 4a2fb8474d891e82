"""Nothing is timed before it is right: loss and gradient against the float64 reference, row by row."""

import torch
from torch import Tensor

from mtkd_fast import multi_teacher_kd_loss

from .contenders import Loss
from .problem import TEMPERATURE, Problem

# Largest error of the loss, relative, and of a row's gradient, relative to the row's largest element. float32: what
# three float32 softmaxes may lose. Half precision: the gradient is rounded once, to 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float64: 1e-12}
LOSS_TOLERANCE = 1e-5
CHUNK_ELEMENTS = 1 << 22  # of float64 oracle at a time: [N, C] in float64 and K times over would not fit everywhere


class WrongResult(AssertionError):
    """A contender that computes something else; its time would mean nothing."""


def oracle(problem: Problem, objective: str) -> tuple[float, Tensor]:
    """(loss, gradient) of the reference in float64, a block of rows at a time (rows are independent)."""
    n_rows, n_classes = problem.student.shape
    step = max(1, CHUNK_ELEMENTS // n_classes)
    loss, gradient = 0.0, torch.empty(n_rows, n_classes, dtype=torch.float64, device=problem.student.device)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        student = problem.student[rows].double().requires_grad_()
        teachers = [t[rows].double() for t in problem.teachers]
        part = multi_teacher_kd_loss(
            student,
            teachers,
            problem.target[rows],
            weights=objective,
            temperature=TEMPERATURE,
            ce_weight=1.0,
            num_items=n_rows,
            implementation="reference",
        )
        part.backward()
        loss += part.item()
        gradient[rows] = student.grad
    return loss, gradient


def check(name: str, loss: Loss, problem: Problem, exact: tuple[float, Tensor]) -> dict[str, float]:
    """Raises WrongResult, or returns the two errors that were found."""
    exact_loss, exact_gradient = exact
    leaf = problem.leaf()
    value = loss(leaf, problem.teachers, problem.target)
    value.backward()
    loss_error = abs(value.item() - exact_loss) / abs(exact_loss)
    largest = exact_gradient.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    gradient_error = ((leaf.grad.double() - exact_gradient).abs().amax(1) / largest).max().item()
    loss_limit, gradient_limit = min(LOSS_TOLERANCE, TOLERANCE[leaf.dtype]), TOLERANCE[leaf.dtype]
    for what, error, limit in (("loss", loss_error, loss_limit), ("gradient", gradient_error, gradient_limit)):
        if not error <= limit:  # a NaN is no pass
            raise WrongResult(f"{name}: relative error of the {what} {error:.1e}, allowed {limit:.1e}")
    return {"loss": loss_error, "gradient": gradient_error}
