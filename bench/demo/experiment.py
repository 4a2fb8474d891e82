"""Paired splits: within a split and a seed all arms share the data, the teachers, the first weights and the batches."""

import statistics
from typing import NamedTuple

import torch

from mtkd_fast import teacher_weights

from . import models, training
from .digits import Digits, Split
from .models import RECIPES, STUDENT_HIDDEN, TEACHER_HIDDEN
from .training import ARMS, BATCH, accuracy

STUDENT_STEPS, STUDENT_RATE = 400, 1e-2
TEACHER_RATE = 5e-3
PAIRS = (  # what is compared with what
    ("one good teacher", "hard labels"),
    ("uniform average", "hard labels"),
    ("uniform average", "one good teacher"),
    ("confidence weights", "uniform average"),
    ("confidence weights", "one good teacher"),
)


class Budget(NamedTuple):
    splits: int
    seeds: int  # students per arm and split
    student_steps: int = STUDENT_STEPS
    teacher_effort: float = 1.0  # of the epochs in the recipes


class SplitResult(NamedTuple):
    teacher_accuracy: list[float]  # K, percent on the test images
    teacher_weight: list[float]  # K, the mean confidence weight over the student's images
    curves: dict[str, list[list[float]]]  # arm -> seeds -> test accuracy along the training


def run_split(data: Digits, seed: int, budget: Budget, device: str) -> SplitResult:
    split = data.split(seed)
    teachers = [taught(k, data, split, seed, budget, device) for k in range(len(RECIPES))]
    test = data.images[split.test], data.labels[split.test]
    images, labels = data.images[split.student], data.labels[split.student]
    with torch.no_grad():
        logits = [teacher(images) for teacher in teachers]
    curves = {
        arm: [
            student_curve(arm, images, labels, logits, test, 100 * seed + s, budget, device)
            for s in range(budget.seeds)
        ]
        for arm in ARMS
    }
    weights = teacher_weights(logits, labels, rule="confidence").mean(1)
    return SplitResult([accuracy(teacher, *test) for teacher in teachers], weights.tolist(), curves)


def taught(k: int, data: Digits, split: Split, seed: int, budget: Budget, device: str) -> torch.nn.Module:
    recipe, own_seed = RECIPES[k], 1000 * seed + k
    images, labels = models.lesson(recipe, data, split, own_seed)
    teacher = models.mlp(TEACHER_HIDDEN, own_seed, device)
    epoch = -(-len(labels) // BATCH)
    steps = max(1, round(recipe.epochs * epoch * budget.teacher_effort))
    training.train(
        teacher, images, labels, [], training.hard_labels, steps=steps, learning_rate=TEACHER_RATE, seed=own_seed
    )
    return teacher


def student_curve(arm, images, labels, logits, test, seed: int, budget: Budget, device: str) -> list[float]:
    student = models.mlp(STUDENT_HIDDEN, seed, device)
    return training.train(
        student,
        images,
        labels,
        logits,
        ARMS[arm],
        steps=budget.student_steps,
        learning_rate=STUDENT_RATE,
        seed=seed,
        watch=lambda model: accuracy(model, *test),
    )


def final_accuracy(results: list[SplitResult], arm: str) -> list[float]:
    """One number a split: the mean over its seeds at the end of training."""
    return [statistics.mean(curve[-1] for curve in result.curves[arm]) for result in results]


def paired_difference(results: list[SplitResult], arm: str, than: str) -> dict:
    """arm − than over splits, with the 95% interval of its mean (Student's t).

    The splits overlap, since there are only 1797 images: the interval is somewhat too narrow.
    """
    from scipy.stats import t

    pairs = zip(final_accuracy(results, arm), final_accuracy(results, than), strict=True)
    differences = [a - b for a, b in pairs]
    n, mean = len(differences), statistics.mean(differences)
    half = float("nan") if n < 2 else float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return {
        "arm": arm,
        "than": than,
        "differences": differences,
        "mean": mean,
        "half_interval": None if n < 2 else half,
        "better_in": sum(d > 0 for d in differences),
        "splits": n,
        "verdict": verdict(mean, half),
    }


def verdict(mean: float, half: float) -> str:
    """What the numbers allow to be said; nothing where the interval holds zero."""
    if not abs(mean) > half:  # also when there is no interval
        return "no difference beyond the spread"
    return "better" if mean > 0 else "worse"


def sentence(difference: dict) -> str:
    half = difference["half_interval"]
    interval = "one split, no interval" if half is None else f"95% ± {half:.2f}"
    return (
        f"{difference['arm']} vs {difference['than']}: {difference['mean']:+.2f} points ({interval}; "
        f"higher in {difference['better_in']} of {difference['splits']} splits): {difference['verdict']}"
    )
