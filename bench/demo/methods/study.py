"""Paired splits: within a split all methods share the data, the teachers, the student's first weights and batches."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtkd_fast import DGKDLoss, dense_chain

from ..digits import Digits, Split
from ..training import descend, hard_labels, one_thread
from .learners import METHODS, PEER_SEED, Batch, Learner, School
from .networks import ASSISTANTS, STUDENT, TEACHER, ConvNet, Outputs

N_TEACHERS = 3
LEARNING_RATE = 5e-3


class Budget(NamedTuple):
    splits: int
    student_steps: int = 400
    teacher_steps: int = 400


class Lessons(NamedTuple):
    """What a student of one split learns from: 200 images and what its teachers say of them."""

    images: Tensor
    labels: Tensor
    teachers: list[Outputs]
    guides: list[Tensor]
    alone: list[Tensor]

    def batch(self, index: Tensor) -> Batch:
        said = [t.apply(lambda x: x[index]) for t in self.teachers]
        return Batch(self.labels[index], said, [g[index] for g in self.guides], [z[index] for z in self.alone])


def run_split(data: Digits, seed: int, budget: Budget, device: str) -> dict[str, float]:
    """Method -> test accuracy in percent."""
    split = data.split(seed)
    school, lessons = prepared(data, split, seed, budget, device)
    test = data.images[split.test], data.labels[split.test]
    found = {}
    for name, make in METHODS.items():
        learner = make(school)
        learn(learner, lessons, budget.student_steps, seed)
        found[name] = accuracy(learner.student, *test)
    return found


def prepared(data: Digits, split: Split, seed: int, budget: Budget, device: str) -> tuple[School, Lessons]:
    """Three teachers, each of a bootstrap of the training images, and two assistants by dense guidance."""
    teachers = [taught(data, split, 100 * seed + k, budget, device) for k in range(N_TEACHERS)]
    images, labels = data.images[split.student], data.labels[split.student]
    assistants = [ConvNet(channels, seed, device) for channels in ASSISTANTS]

    def train_assistant(model: nn.Module, guides) -> None:
        said = [logits_of(guide, images) for guide in guides]
        loss = DGKDLoss(kd_weight=0.7)
        train(
            model, lambda i: loss(model(images[i]).logits, [g[i] for g in said], labels[i]), len(labels),
            budget.student_steps, seed,
        )  # fmt: skip

    chain = [teachers[0], *assistants]
    dense_chain(chain, train_assistant)
    for model in (*teachers, *assistants):
        model.eval().requires_grad_(False)
    guides = [logits_of(model, images) for model in chain]
    alone = [
        taught_by_labels(ConvNet(STUDENT, seed + shift, device), images, labels, budget.student_steps, seed)
        for shift in (0, PEER_SEED)
    ]
    lessons = Lessons(images, labels, [t(images) for t in teachers], guides, [logits_of(z, images) for z in alone])
    return School(teachers, seed, device), lessons


def taught(data: Digits, split: Split, seed: int, budget: Budget, device: str) -> ConvNet:
    g = torch.Generator().manual_seed(seed)
    chosen = split.train[torch.randint(len(split.train), (len(split.train),), generator=g).to(split.train.device)]
    teacher = ConvNet(TEACHER, seed, device)
    return taught_by_labels(teacher, data.images[chosen], data.labels[chosen], budget.teacher_steps, seed)


def taught_by_labels(model: ConvNet, images: Tensor, labels: Tensor, steps: int, seed: int) -> ConvNet:
    train(model, lambda i: hard_labels(model(images[i]).logits, [], labels[i]), len(labels), steps, seed)
    return model


def learn(learner: Learner, lessons: Lessons, steps: int, seed: int) -> None:
    def loss(i: Tensor) -> Tensor:
        return learner.loss(lessons.batch(i), *learner.outputs(lessons.images[i]))

    train(learner, loss, len(lessons.labels), steps, seed)


def train(model: nn.Module, loss: Callable[[Tensor], Tensor], n_images: int, steps: int, seed: int) -> None:
    with one_thread():
        descend(model, loss, n_images, steps=steps, learning_rate=LEARNING_RATE, seed=seed)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).logits


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).logits.argmax(1) == labels).float().mean().item()
