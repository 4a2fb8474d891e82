"""What the loss on maps of logits costs: fused, and in eager PyTorch as segmentation code writes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import timing
from ..digits import N_CLASSES
from ..methods.costs import agree
from .canvases import IGNORED, SIDE
from .study import ARMS, BATCH, N_TEACHERS, TEMPERATURE


def eager(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    """Confidence weights a pixel, masks applied last."""
    counted = labels != IGNORED
    ce = torch.stack([F.cross_entropy(t, labels, ignore_index=IGNORED, reduction="none") for t in teachers])
    weights = (1 - ce.softmax(0)) / (len(teachers) - 1)
    log_q = F.log_softmax(student / TEMPERATURE, 1)
    p = [F.softmax(t / TEMPERATURE, 1) for t in teachers]
    kd = sum(w * F.kl_div(log_q, p_k, reduction="none").sum(1) for w, p_k in zip(weights, p, strict=True))
    soft = TEMPERATURE**2 * (kd * counted).sum() / counted.sum()
    return F.cross_entropy(student, labels, ignore_index=IGNORED) + soft


def measure(labels: Tensor, seconds: float) -> dict:
    """On random logits for one batch of ``labels``."""
    shape = (BATCH, N_CLASSES, SIDE, SIDE)
    student = torch.randn(shape, device=labels.device, requires_grad=True)
    teachers = [torch.randn(shape, device=labels.device) for _ in range(N_TEACHERS)]
    losses = {"fused": ARMS["confidence weights"], "eager": eager}
    agree("segmentation", *(loss(student, teachers, labels).item() for loss in losses.values()))

    def call(loss):
        def step(_: int) -> None:
            student.grad = None
            loss(student, teachers, labels).backward()

        return step

    samples = timing.interleaved(
        {name: timing.Call(call(loss)) for name, loss in losses.items()}, labels.device.type, seconds
    )
    return {
        "shape": list(shape),
        "seconds": {name: found.seconds for name, found in samples.items()},
        "ms": {name: 1e3 * timing.median(found.seconds) for name, found in samples.items()},
        "times_eager": timing.ratio(samples["eager"], samples["fused"]),
    }
