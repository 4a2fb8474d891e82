"""Fully convolutional teachers and a small student on the same canvases, in paired splits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtkd_fast import multi_teacher_kd_loss

from ..digits import N_CLASSES, Digits
from ..training import descend
from .canvases import IGNORED, Canvases, scatter

N_TEACHERS = 3
TEACHER, STUDENT = 16, 8  # channels
BATCH = 10
LEARNING_RATE = 1e-2
TEMPERATURE = 2.0
Objective = Callable[[Tensor, list[Tensor], Tensor], Tensor]  # logits [B, 10, 24, 24], teachers', labels -> loss


class Budget(NamedTuple):
    splits: int
    canvases: int = 200  # of a teacher
    owned: int = 50  # of the student
    steps: int = 200


def hard_labels(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels, ignore_index=IGNORED)


def distilled(weights: str) -> Objective:
    def loss(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
        return multi_teacher_kd_loss(
            student, teachers, labels, weights=weights, temperature=TEMPERATURE, ce_weight=1.0, ignore_index=IGNORED,
            class_dim=1,
        )  # fmt: skip

    return loss


ARMS: dict[str, Objective] = {
    "hard labels": hard_labels,
    "uniform average": distilled("uniform"),
    "confidence weights": distilled("confidence"),
}


def network(channels: int, seed: int, device: str) -> nn.Sequential:
    """Sees 15×15 pixels around each one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, dilation in ((1, 1), (channels, 2), (channels, 4)):
            layers += [
                nn.Conv2d(before, channels, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.Conv2d(channels, N_CLASSES, 1)).to(device)


def run_split(data: Digits, seed: int, budget: Budget, device: str) -> dict[str, float]:
    """Arm -> percent of the inked pixels of unseen digits that the student names rightly."""
    split = data.split(seed)
    teachers = []
    for k in range(N_TEACHERS):
        teacher = network(TEACHER, 100 * seed + k, device)
        lesson = scatter(data, split.train, budget.canvases, 100 * seed + k)
        train(teacher, lesson, [], hard_labels, budget.steps, seed)
        teachers.append(teacher)
    own = scatter(data, split.student, budget.owned, seed)
    test = scatter(data, split.test, 150, seed)
    with torch.no_grad():
        said = [teacher(own.images) for teacher in teachers]
    found = {}
    for arm, objective in ARMS.items():
        student = network(STUDENT, seed, device)
        train(student, own, said, objective, budget.steps, seed)
        found[arm] = accuracy(student, test)
    return found


def train(model: nn.Module, lesson: Canvases, said: list[Tensor], objective: Objective, steps: int, seed: int) -> None:
    def loss(i: Tensor) -> Tensor:
        return objective(model(lesson.images[i]), [t[i] for t in said], lesson.labels[i])

    descend(model, loss, len(lesson.labels), steps=steps, learning_rate=LEARNING_RATE, seed=seed, batch=BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, test: Canvases) -> float:
    inked = test.labels != IGNORED
    return 100 * (model(test.images).argmax(1) == test.labels)[inked].float().mean().item()
