"""The op mixture: τ² · mean over rows of KL(Σ_k w_k p_k‖q), AMTML-KD's soft target, to student and weights."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import mixture_divergence

from ..case import Exact, Inputs, Loss, blocks, generator, upcast
from .logits import SHARP, Ensemble, random_logits, random_weights

TEMPERATURE = 5.0


@dataclass(frozen=True)
class Mixture(Ensemble):
    op = "mixture"
    OBJECTIVES = ("divergence",)

    objective: str = "divergence"

    @property
    def number_bytes(self) -> int:
        """Weights, their gradient, and the sums of rows and teachers, in float32."""
        return (6 * self.teachers + 8) * self.rows * 4

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        g = generator(device, seed)
        teachers = [random_logits(self.rows, self.classes, self.dtype, g, SHARP) for _ in range(self.teachers)]
        student = random_logits(self.rows, self.classes, self.dtype, g)
        return Inputs((student, teachers, random_weights(self.teachers, self.rows, g)), learns=(0, 2))

    def oracle(self, inputs: Inputs) -> Exact:
        student, teachers, weights = inputs.arguments
        gradients, total = [torch.empty_like(x, dtype=torch.float64) for x in (student, weights)], 0.0
        for block in blocks(self.rows, self.classes):
            s, w = student[block].double().requires_grad_(), weights[:, block].double().requires_grad_()
            found = mixture_divergence(
                s, [t[block].double() for t in teachers], weights=w, temperature=TEMPERATURE, implementation="reference"
            )
            part = TEMPERATURE**2 * found.sum() / self.rows
            part.backward()
            total += part.item()
            gradients[0][block], gradients[1][:, block] = s.grad, w.grad
        return Exact(total, gradients)

    def eager(self) -> dict[str, Loss]:
        return {"eager": loop}

    def fused(self, implementation: str) -> Loss:
        return partial(fused, implementation=implementation)

    def few(self) -> "Mixture":
        return replace(self, rows=min(8, self.rows), classes=min(100, self.classes))


def loop(student: Tensor, teachers: list[Tensor], weights: Tensor) -> Tensor:
    """The mixture in memory, as AMTML-KD's code has it."""
    probabilities = sum(
        w[:, None] * F.softmax(upcast(t) / TEMPERATURE, dim=1) for w, t in zip(weights, teachers, strict=True)
    )
    log_q = F.log_softmax(upcast(student) / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * F.kl_div(log_q, probabilities, reduction="batchmean")


def fused(student: Tensor, teachers: list[Tensor], weights: Tensor, implementation: str) -> Tensor:
    rows = mixture_divergence(
        student, teachers, weights=weights, temperature=TEMPERATURE, implementation=implementation
    )
    return TEMPERATURE**2 * rows.mean()
