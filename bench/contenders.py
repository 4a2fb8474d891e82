"""Who is measured: each a function (student, teachers, target) -> loss. The same names everywhere in bench/."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import dispatch, multi_teacher_kd_loss

from . import eager
from .problem import TEMPERATURE

Loss = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]
EAGER, COMPILE = "eager", "compile"
BASELINES = {
    EAGER: eager.loop,
    "eager-stacked": eager.stacked,
    COMPILE: eager.loop,
    "compile-stacked": eager.stacked,
}


def fused(student: Tensor, teachers: Sequence[Tensor], target: Tensor, objective: str, implementation: str) -> Tensor:
    return multi_teacher_kd_loss(
        student,
        teachers,
        target,
        weights=objective,
        temperature=TEMPERATURE,
        ce_weight=1.0,
        implementation=implementation,
    )


def liger_uniform(student: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """K calls of Liger's KL, which takes one teacher and no weights, with the softmaxes it needs."""
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=False)
    student, teachers = eager.upcast(student), [eager.upcast(t) for t in teachers]
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    kd = sum(divergence(log_q, F.softmax(t / TEMPERATURE, dim=-1)) for t in teachers) / len(teachers)
    return F.cross_entropy(student, target) + TEMPERATURE**2 * kd


def implementations(device: str) -> list[str]:
    """Those of mtkd_fast that are measured on this device.

    Not Triton's interpreter, which is for tests; and the reference, which no one should train with, only where
    implementation=None finds nothing faster.
    """
    default = default_implementation(torch.empty(1, 1, device=device))
    return [
        name
        for name, found in dispatch.implementations().items()
        if name == default
        or (device in found.devices and name != "reference" and not (name == "triton" and dispatch.INTERPRETED))
    ]


def default_implementation(student: Tensor) -> str:
    """What implementation=None picks for these logits."""
    return dispatch.choose(None, student)


def make(objective: str, device: str, names: Sequence[str] | None = None) -> dict[str, Loss]:
    """The contenders of an objective by name, all of them or those named."""
    losses: dict[str, Loss] = {}
    for name, form in BASELINES.items():
        if name == "compile-stacked" and device == "cuda":
            continue  # K = 16 would compile for longer than everything else takes
        loss = partial(form, objective=objective)
        losses[name] = compiled(loss) if name.startswith(COMPILE) else loss
    if device == "cuda" and objective == "uniform" and importlib.util.find_spec("liger_kernel"):
        losses["liger"] = liger_uniform
    for name in implementations(device):
        losses[name] = partial(fused, objective=objective, implementation=name)
    return losses if names is None else {name: loss for name, loss in losses.items() if name in names}


def compiled(loss: Loss) -> Loss:
    """torch.compile as a benchmark should use it: one graph, its shapes known."""
    return torch.compile(loss, dynamic=False, fullgraph=True)
