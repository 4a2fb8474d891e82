"""The op mutual: M students [N, C] that teach each other, every pair of them (deep mutual learning), M gradients."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import mutual_kd_loss

from ..case import Case, Exact, Inputs, Loss, blocks, generator, upcast
from .logits import SHARP, random_logits

TEMPERATURE = 3.0


@dataclass(frozen=True)
class Mutual(Case):
    op = "mutual"
    OBJECTIVES = ("peers",)

    objective: str = "peers"
    rows: int = 256
    classes: int = 100
    students: int = 3
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.classes} M={self.students}"

    @property
    def gradient_bytes(self) -> int:
        return self.students * self.rows * self.classes * self.dtype.itemsize

    @property
    def number_bytes(self) -> int:
        """Of every pair its divergence, of every student its sums."""
        return (self.students**2 + 4 * self.students + 4) * self.rows * 4

    def minimal_bytes(self, gradient: bool = True) -> int:
        """M logits read, M gradients written."""
        return (1 + gradient) * self.gradient_bytes

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        g = generator(device, seed)
        return Inputs(([random_logits(self.rows, self.classes, self.dtype, g, SHARP) for _ in range(self.students)],))

    def oracle(self, inputs: Inputs) -> Exact:
        (students,) = inputs.arguments
        gradients, total = [torch.empty_like(z, dtype=torch.float64) for z in students], 0.0
        for block in blocks(self.rows, self.classes):
            leaves = [z[block].double().requires_grad_() for z in students]
            part = mutual_kd_loss(leaves, temperature=TEMPERATURE, num_items=self.rows, implementation="reference")
            part.backward()
            total += part.item()
            for gradient, leaf in zip(gradients, leaves, strict=True):
                gradient[block] = leaf.grad
        return Exact(total, gradients)

    def eager(self) -> dict[str, Loss]:
        return {"eager": loop}

    def fused(self, implementation: str) -> Loss:
        return partial(mutual_kd_loss, temperature=TEMPERATURE, implementation=implementation)

    def few(self) -> "Mutual":
        return replace(self, rows=min(8, self.rows), classes=min(100, self.classes))


def loop(students: list[Tensor]) -> Tensor:
    """Every student's log-softmax once; a KL for every ordered pair."""
    log_p = [F.log_softmax(upcast(z) / TEMPERATURE, dim=1) for z in students]
    pairs = [(i, j) for i in range(len(students)) for j in range(len(students)) if i != j]
    kls = [F.kl_div(log_p[i], log_p[j].detach(), reduction="batchmean", log_target=True) for i, j in pairs]
    return TEMPERATURE**2 * sum(kls) / (len(students) - 1)
