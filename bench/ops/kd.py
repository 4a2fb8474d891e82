"""The op kd: ce_weight · CE + τ² · mean over rows of Σ_k w_k D(p_k, q); student and K teachers [N, C], target [N]."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import multi_teacher_kd_loss

from ..case import Anchor, Exact, Inputs, Loss, blocks, generator, upcast
from .logits import SHARP, Ensemble, random_logits


class Objective(NamedTuple):
    weights: str
    divergence: str
    temperature: float
    ce_weight: float


OBJECTIVES = {
    "confidence": Objective("confidence", "forward_kl", 4.0, 1.0),  # CA-MKD's logit objective
    "uniform": Objective("uniform", "forward_kl", 4.0, 1.0),
    "kl": Objective("uniform", "forward_kl", 1.0, 0.0),  # these four: what single-teacher libraries offer
    "jsd": Objective("uniform", "jsd", 1.0, 0.0),
    "tvd": Objective("uniform", "tvd", 1.0, 0.0),
    "ce_tvd": Objective("uniform", "tvd", 1.0, 1.0),
}
LABEL_LOGIT = 12.0


@dataclass(frozen=True)
class KD(Ensemble):
    op = "kd"
    OBJECTIVES = tuple(OBJECTIVES)

    objective: str = "confidence"

    @property
    def number_bytes(self) -> int:
        """Statistics of rows and teachers in float32 (``RowStats`` in csrc/kd.h): at most 7 K + 5 a row."""
        return (7 * self.teachers + 5) * self.rows * 4

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Teachers sharper than the student, and sure of the label in half of the rows."""
        g = generator(device, seed)
        target = torch.randint(self.classes, (self.rows,), device=device, generator=g)
        teachers = [random_logits(self.rows, self.classes, self.dtype, g, SHARP) for _ in range(self.teachers)]
        for teacher in teachers:
            teacher[::2].scatter_(1, target[::2, None], LABEL_LOGIT)
        return Inputs((random_logits(self.rows, self.classes, self.dtype, g), teachers, target))

    def oracle(self, inputs: Inputs) -> Exact:
        student, teachers, target = inputs.arguments
        gradient, total = torch.empty_like(student, dtype=torch.float64), 0.0
        for block in blocks(self.rows, self.classes):
            leaf = student[block].double().requires_grad_()
            part = self.fused("reference")(leaf, [t[block].double() for t in teachers], target[block], self.rows)
            part.backward()
            total += part.item()
            gradient[block] = leaf.grad
        return Exact(total, [gradient])

    def eager(self) -> dict[str, Loss]:
        of = OBJECTIVES[self.objective]
        return {"eager": partial(loop, of=of), "eager-stacked": partial(stacked, of=of)}

    def fused(self, implementation: str) -> Loss:
        return partial(fused, of=OBJECTIVES[self.objective], implementation=implementation)

    def few(self) -> "KD":
        return replace(self, rows=min(8, self.rows), classes=min(100, self.classes))

    def anchors(self, device: str) -> dict[str, Anchor]:
        return {"cross-entropy": Anchor(cross_entropy, exact_cross_entropy, "F.cross_entropy of the student alone")}

    def strategy(self, implementation: str, device: str, gradient: bool) -> str:
        """As csrc/kd_autograd.cpp and triton_ops/kd.py choose for teachers that are constants."""
        if implementation == "reference":
            return "plain PyTorch"
        if not gradient:
            return "value only"
        if self.dtype == torch.float16:
            return "B, the backward reads the logits again"
        return "A, the forward writes the gradient" + (
            " (where a row fits on chip, else B)" if device == "cuda" else ""
        )


def fused(
    student: Tensor, teachers: list[Tensor], target: Tensor, items: float | None = None, *, of: Objective,
    implementation: str,
) -> Tensor:  # fmt: skip
    return multi_teacher_kd_loss(
        student,
        teachers,
        target,
        weights=of.weights,
        divergence=of.divergence,
        temperature=of.temperature,
        ce_weight=of.ce_weight,
        num_items=items,
        implementation=implementation,
    )


# As people write it: a loop over teachers (all official codes), or one stacked tensor. The loop is kinder than most: it
# takes the student's log-softmax once, not K times.


def loop(student: Tensor, teachers: list[Tensor], target: Tensor, of: Objective) -> Tensor:
    student, teachers = upcast(student), [upcast(t) for t in teachers]
    log_q = F.log_softmax(student / of.temperature, dim=1)
    divergence = DIVERGENCES[of.divergence]
    divergences = [divergence(log_q, t / of.temperature) for t in teachers]
    if of.weights == "confidence":
        weights = confidence_weights(torch.stack([F.cross_entropy(t, target, reduction="none") for t in teachers]))
        kd = (weights * torch.stack(divergences)).sum(0).mean()
    else:
        kd = torch.stack(divergences).mean()
    return with_hard_label(kd, student, target, of)


def stacked(student: Tensor, teachers: list[Tensor], target: Tensor, of: Objective) -> Tensor:
    student, t = upcast(student), upcast(torch.stack(teachers))  # [K, N, C]
    log_q = F.log_softmax(student / of.temperature, dim=-1).expand_as(t)
    divergence = DIVERGENCES[of.divergence](log_q, t / of.temperature)  # [K, N]
    if of.weights == "confidence":
        labels = target.expand(t.shape[:2])
        teacher_ce = F.cross_entropy(t.flatten(0, 1), labels.flatten(), reduction="none").view(t.shape[:2])
        kd = (confidence_weights(teacher_ce) * divergence).sum(0).mean()
    else:
        kd = divergence.mean()
    return with_hard_label(kd, student, target, of)


def with_hard_label(kd: Tensor, student: Tensor, target: Tensor, of: Objective) -> Tensor:
    soft = of.temperature**2 * kd
    return of.ce_weight * F.cross_entropy(student, target) + soft if of.ce_weight else soft


def confidence_weights(teacher_ce: Tensor) -> Tensor:
    """[K, N] -> [K, N] (CA-MKD, arXiv 2201.00007)."""
    n_teachers = teacher_ce.shape[0]
    return torch.ones_like(teacher_ce) if n_teachers == 1 else (1 - teacher_ce.softmax(0)) / (n_teachers - 1)


def kl(log_q: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(log_q, F.softmax(t, dim=-1), reduction="none").sum(-1)


def jsd(log_q: Tensor, t: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m), with log m by logaddexp, as GKD's code does."""
    log_p = F.log_softmax(t, dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_teacher, of_student = (F.kl_div(log_m, x, reduction="none", log_target=True).sum(-1) for x in (log_p, log_q))
    return 0.5 * of_teacher + 0.5 * of_student


def tvd(log_q: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (F.softmax(t, dim=-1) - log_q.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward_kl": kl, "jsd": jsd, "tvd": tvd}


def cross_entropy(student: Tensor, _: list[Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(upcast(student), target)


def exact_cross_entropy(inputs: Inputs) -> Exact:
    student, _, target = inputs.arguments
    leaf = student.double().requires_grad_()
    loss = F.cross_entropy(leaf, target)
    return Exact(loss.item(), list(torch.autograd.grad(loss, leaf)))
