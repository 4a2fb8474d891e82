"""One training loop for teachers and students, and the four ways to teach a student."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtkd_fast import multi_teacher_kd_loss

BATCH = 64
WATCH_EVERY = 20  # steps
TEMPERATURE = 4.0
Objective = Callable[[Tensor, list[Tensor], Tensor], Tensor]  # student [B, C], K teachers [B, C], labels [B] -> loss


def hard_labels(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels)


def one_teacher(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    """The first teacher, a good one."""
    return distil(student, teachers[:1], labels, "uniform")


def uniform_average(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    return distil(student, teachers, labels, "uniform")


def confidence_weights(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
    """CA-MKD: a teacher counts less on an image whose label it finds unlikely."""
    return distil(student, teachers, labels, "confidence")


def distil(
    student: Tensor, teachers: list[Tensor], labels: Tensor, weights: str, implementation: str | None = None
) -> Tensor:
    """CE + τ² Σ_k w_k KL(p_k‖q)"""
    return multi_teacher_kd_loss(
        student,
        teachers,
        labels,
        weights=weights,
        temperature=TEMPERATURE,
        ce_weight=1.0,
        implementation=implementation,
    )


ARMS: dict[str, Objective] = {
    "hard labels": hard_labels,
    "one good teacher": one_teacher,
    "uniform average": uniform_average,
    "confidence weights": confidence_weights,
}


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    teachers: list[Tensor],
    objective: Objective,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    watch: Callable[[nn.Module], float] | None = None,
    watch_every: int = WATCH_EVERY,
) -> list[float]:
    """Adam on random batches; the same seed draws the same batches. Returns what ``watch`` saw along the way.

    ``teachers`` are the K teachers' logits on all the images: a teacher is run once, not at every step.
    """

    def loss(batch: Tensor) -> Tensor:
        return objective(model(images[batch]), [t[batch] for t in teachers], labels[batch])

    seen = []

    def look(step: int) -> None:
        if watch is not None and step % watch_every == 0:
            seen.append(watch(model))

    with one_thread():
        descend(model, loss, len(labels), steps=steps, learning_rate=learning_rate, seed=seed, after_step=look)
    return seen


def descend(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    n_images: int,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch: int = BATCH,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Adam on ``loss`` of random indices; the same seed draws the same ones. Leaves the model in evaluation mode."""
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=learning_rate, fused=True)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        index = torch.randint(n_images, (min(batch, n_images),), generator=g).to(learned[0].device)
        optimizer.zero_grad()
        loss(index).backward()
        optimizer.step()
        after_step(step)
    model.eval()


@contextmanager
def one_thread():
    """Layers this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()
