"""What the loss of each method costs, from the student's outputs to their gradients: fused against eager PyTorch.

Adapters and heads are part of it on both sides. Nothing is timed before the two agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ...gate import WrongResult
from ...timing import Call, interleaved
from ..training import one_thread
from .eager import LOSSES
from .learners import METHODS, Batch, Learner, School
from .networks import Outputs

SECONDS = 2.0  # of timing a method
QUICK_SECONDS = 0.2
TOLERANCE = 1e-4  # of float32 arithmetic, relative
HOST_ONLY = ("aten::empty", "aten::detach")


def measure(school: School, images: Tensor, batch: Batch, quick: bool) -> list[dict]:
    """One entry a method: samples and the number of operations, "fused" and "eager"."""
    with one_thread():
        return [measured(name, make(school).train(), images, batch, quick) for name, make in METHODS.items()]


def measured(name: str, learner: Learner, images: Tensor, batch: Batch, quick: bool) -> dict:
    with torch.no_grad():
        students = [said.apply(lambda x: x.requires_grad_()) for said in learner.outputs(images)]

    def fused() -> Tensor:
        return learner.loss(batch, *students)

    def eager() -> Tensor:
        return LOSSES[name](learner, batch, *students)

    agree(name, fused().item(), eager().item())
    device = images.device.type
    calls = {"fused": Call(step(fused, learner, students)), "eager": Call(step(eager, learner, students))}
    return {
        "method": name,
        "operations": {of: count(call.step, device) for of, call in calls.items()},
        "samples": interleaved(calls, device, QUICK_SECONDS if quick else SECONDS),
    }


def agree(name: str, ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
        raise WrongResult(f"{name}: {ours} where its eager form gives {theirs}")


def step(loss: Callable[[], Tensor], learner: Learner, students: list[Outputs]) -> Callable[[int], None]:
    """One forward and backward."""

    def forget(leaf: Tensor) -> Tensor:
        leaf.grad = None
        return leaf

    def call(_: int) -> None:
        learner.zero_grad()
        for said in students:
            said.apply(forget)
        loss().backward()

    return call


def count(call: Callable[[int], None], device: str) -> int:
    """Kernels launched on a GPU; on a CPU the operators called that are no views, a fused pass being one."""
    call(0)
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call(0)
        return sum(event.device_type == DeviceType.CUDA for event in seen.events())
    with Operators() as seen:
        call(0)
    return seen.count


class Operators(TorchDispatchMode):
    """Counts what computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not (operator.is_view or operator.name().startswith(HOST_ONLY))
        return operator(*args, **(kwargs or {}))
