"""The methods as learners: a student, what its method trains beside it, and the loss of a batch.

Every loss runs with the defaults of its class, which are those of its paper or its code.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtkd_fast import (
    AdaptiveDistillationLoss,
    AEKDLoss,
    AMTMLKDLoss,
    AverageKDLoss,
    CAMKDLoss,
    CTSLMKTLoss,
    DGKDLoss,
    EntropyKDLoss,
    FitNetKDLoss,
    GroupHints,
    HintAdapter,
    attention_transfer_loss,
    hint_loss,
    multi_teacher_kd_loss,
    nst_loss,
)

from .networks import STUDENT, TEACHER, ConvNet, Outputs

PEER_SEED = 7919


class Batch(NamedTuple):
    labels: Tensor
    teachers: list[Outputs]  # three of one size
    guides: list[Tensor]  # logits of DGKD's chain: the first teacher and its assistants
    alone: list[Tensor]  # logits of CTSL-MKT's two students when they were taught by labels alone


class School(NamedTuple):
    """What a split has before its student learns."""

    teachers: list[ConvNet]
    seed: int
    device: str


class Learner(nn.Module):
    def __init__(self, school: School, implementation: str | None = None) -> None:
        super().__init__()
        self.student = ConvNet(STUDENT, school.seed, school.device)
        self.prepare(school, implementation)
        self.to(school.device)

    def prepare(self, school: School, implementation: str | None) -> None:
        """Makes the loss and what it trains."""

    def outputs(self, images: Tensor) -> tuple[Outputs, ...]:
        """Of the student, and of those who learn beside it."""
        return (self.student(images),)

    def loss(self, batch: Batch, *students: Outputs) -> Tensor:
        raise NotImplementedError


class HardLabels(Learner):
    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        return F.cross_entropy(student.logits, batch.labels)


def on_logits(criterion: type[nn.Module]) -> type[Learner]:
    """The methods that see logits alone."""

    class OnLogits(Learner):
        def prepare(self, school: School, implementation: str | None) -> None:
            self.criterion = criterion(implementation=implementation)

        def loss(self, batch: Batch, student: Outputs) -> Tensor:
            return self.criterion(student.logits, [t.logits for t in batch.teachers], batch.labels)

    return OnLogits


class FitNet(Learner):
    def prepare(self, school: School, implementation: str | None) -> None:
        self.criterion = FitNetKDLoss(implementation=implementation)
        self.adapters = adapters(school, stage=0)

    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        wanted = [t.maps[0] for t in batch.teachers]
        adapted = [adapt(student.maps[0], g) for adapt, g in zip(self.adapters, wanted, strict=True)]
        return self.criterion(student.logits, [t.logits for t in batch.teachers], batch.labels, adapted, wanted)


class CAMKD(Learner):
    def prepare(self, school: School, implementation: str | None) -> None:
        self.criterion = CAMKDLoss(implementation=implementation)
        self.adapters = adapters(school, stage=1)
        self.heads = [teacher.head for teacher in school.teachers]

    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        wanted = [t.maps[1] for t in batch.teachers]
        adapted = [adapt(student.maps[1], g) for adapt, g in zip(self.adapters, wanted, strict=True)]
        heads = [head(f) for head, f in zip(self.heads, adapted, strict=True)]
        return self.criterion(student.logits, [t.logits for t in batch.teachers], batch.labels, adapted, wanted, heads)


class DGKD(Learner):
    """λ = 0.7 rather than the script's 1, which leaves the labels out."""

    def prepare(self, school: School, implementation: str | None) -> None:
        self.criterion = DGKDLoss(kd_weight=0.7, implementation=implementation)

    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        return self.criterion(student.logits, batch.guides, batch.labels)


class AMTML(Learner):
    """Hints at the last stage; the first of the method's two stages."""

    def prepare(self, school: School, implementation: str | None) -> None:
        k = len(school.teachers)
        hints = GroupHints(STUDENT, [TEACHER[1]] * k, groups=[1] * k)
        self.criterion = AMTMLKDLoss(k, STUDENT[1], hints, seed=1, implementation=implementation)

    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        return self.criterion(
            student.logits, [t.logits for t in batch.teachers], batch.labels, student.pooled,
            student.maps, [t.maps[1] for t in batch.teachers],
        )  # fmt: skip


class Adaptive(Learner):
    """The code's four paths from the first teacher."""

    def prepare(self, school: School, implementation: str | None) -> None:
        self.criterion = AdaptiveDistillationLoss(
            ("NST", "logits", "attention", "soft target"), implementation=implementation
        )
        pairs = zip(STUDENT, TEACHER, strict=True)
        self.adapters = nn.ModuleList(HintAdapter(*pair, bias=False, relu=False) for pair in pairs)
        self.implementation = implementation

    def loss(self, batch: Batch, student: Outputs) -> Tensor:
        teacher, how = batch.teachers[0], dict(implementation=self.implementation)
        adapted = [adapt(f, g) for adapt, f, g in zip(self.adapters, student.maps, teacher.maps, strict=True)]
        paths = {
            "NST": nst_loss(adapted, teacher.maps),
            "logits": hint_loss([student.logits], [teacher.logits], **how),
            "attention": attention_transfer_loss(student.maps, teacher.maps, **how),
            "soft target": multi_teacher_kd_loss(student.logits, [teacher.logits], temperature=4.0, **how),
        }
        return self.criterion(student.logits, batch.labels, paths)


class CTSLMKT(Learner):
    """The student and a peer of its size, from other first weights."""

    def prepare(self, school: School, implementation: str | None) -> None:
        self.criterion = CTSLMKTLoss(implementation=implementation)
        self.peer = ConvNet(STUDENT, school.seed + PEER_SEED, school.device)

    def outputs(self, images: Tensor) -> tuple[Outputs, ...]:
        return self.student(images), self.peer(images)

    def loss(self, batch: Batch, *students: Outputs) -> Tensor:
        return self.criterion([s.logits for s in students], batch.labels, batch.alone)


def adapters(school: School, stage: int) -> nn.ModuleList:
    """One a teacher; every method's are drawn from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(school.seed)
        return nn.ModuleList([HintAdapter(STUDENT[stage], TEACHER[stage]) for _ in school.teachers])


METHODS: dict[str, Callable[..., Learner]] = {
    "hard labels": HardLabels,
    "AVER": on_logits(AverageKDLoss),
    "EBKD": on_logits(EntropyKDLoss),
    "AE-KD": on_logits(AEKDLoss),
    "FitNet-MKD": FitNet,
    "CA-MKD": CAMKD,
    "AMTML-KD": AMTML,
    "DGKD": DGKD,
    "Adaptive Distillation": Adaptive,
    "CTSL-MKT": CTSLMKT,
}
