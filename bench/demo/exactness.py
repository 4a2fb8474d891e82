"""In float64 the fused and the reference loss must train to the same student."""

from functools import partial

import torch

from mtkd_fast import implementations

from . import experiment, models, training
from .digits import Digits, Split
from .experiment import Budget
from .models import RECIPES, STUDENT_HIDDEN

TOLERANCE = 1e-10
FUSED = "cpp"  # the fused implementation that takes float64, on the CPU


def check(data: Digits, split: Split, teachers: list[torch.Tensor], steps: int, fused=None) -> dict:
    """The largest difference of any weight of the two students; ``teachers`` are logits on the student's images."""
    found = implementations()[FUSED]
    if fused is None and "cpu" not in found.devices:
        return {"checked": False, "why_not": found.note}
    images, labels = data.images[split.student].cpu().double(), data.labels[split.student].cpu()
    logits = [t.cpu().double() for t in teachers]
    objectives = (
        fused or partial(training.distil, weights="confidence", implementation=FUSED),
        partial(training.distil, weights="confidence", implementation="reference"),
    )
    students = []
    for objective in objectives:
        student = models.mlp(STUDENT_HIDDEN, 0, "cpu").double()
        training.train(student, images, labels, logits, objective, steps=steps, learning_rate=1e-2, seed=0)
        students.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    difference = (students[0] - students[1]).abs().max().item()
    passed = difference <= TOLERANCE  # False for NaN
    return {"checked": True, "steps": steps, "difference": difference, "tolerance": TOLERANCE, "passed": passed}


def check_first_split(data: Digits, budget: Budget, device: str, steps: int) -> dict:
    """On the demo's own data: split 0, its eight teachers, the student of the first seed."""
    split = data.split(0)
    teachers = [experiment.taught(k, data, split, 0, budget, device) for k in range(len(RECIPES))]
    with torch.no_grad():
        logits = [teacher(data.images[split.student]) for teacher in teachers]
    return check(data, split, logits, steps)


def sentence(result: dict) -> str:
    if not result["checked"]:
        return f"float64: not checked, since the fused loss takes float64 in the C++ build only ({result['why_not']})"
    outcome = "the same student" if result["passed"] else "NOT the same student"
    return (
        f"float64: after {result['steps']} steps the fused and the reference loss have trained {outcome} "
        f"(largest difference of a weight {result['difference']:.1e}, allowed {result['tolerance']:.0e})"
    )
