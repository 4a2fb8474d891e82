"""The first page: eight teachers, three of them poor on purpose, four ways to learn from them."""

import json
from pathlib import Path

import torch

from .. import machine, report
from ..progress import bar
from . import costs, digits, exactness, experiment
from .experiment import PAIRS, Budget, SplitResult
from .models import RECIPES
from .spread import mean_and_spread, plus_minus
from .training import ARMS, WATCH_EVERY

FULL = Budget(splits=10, seeds=3)
QUICK = Budget(splits=2, seeds=1, student_steps=200, teacher_effort=0.25)
EXACT_STEPS = {FULL: 400, QUICK: 100}


def run(quick: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = QUICK if quick else FULL
    data = digits.load(device)
    results = [experiment.run_split(data, seed, budget, device) for seed in bar(range(budget.splits), "paired splits")]
    exact = exactness.check_first_split(data, budget, device, EXACT_STEPS[budget])
    cost = costs.measure(device, quick)
    failures = list(cost["failures"])
    if exact["checked"] and not exact["passed"]:
        failures.append(exactness.sentence(exact))
    return {
        "machine": machine.facts(device),
        "quick": quick,
        "students": students(results),
        "teachers": teachers(results),
        "differences": [experiment.paired_difference(results, arm, than) for arm, than in PAIRS],
        "float64": exact,
        "costs": costs.lines(cost),
        "cost_samples": cost["cells"],
        "splits": [result._asdict() for result in results],
        "failures": failures,
    }


def students(results: list[SplitResult]) -> dict:
    return {arm: mean_and_spread(experiment.final_accuracy(results, arm)) for arm in ARMS}


def teachers(results: list[SplitResult]) -> list[dict]:
    accuracies = zip(*(result.teacher_accuracy for result in results), strict=True)
    weights = zip(*(result.teacher_weight for result in results), strict=True)
    return [
        {"name": recipe.name, "poor": recipe.poor, "accuracy": mean_and_spread(a), "weight": mean_and_spread(w)}
        for recipe, a, w in zip(RECIPES, accuracies, weights, strict=True)
    ]


def text(found: dict) -> str:
    """What was measured, in tables and sentences; every conclusion is computed."""
    blocks = [report.machine_line(found["machine"])]
    rows = [
        [t["name"], "poor" if t["poor"] else "", plus_minus(t["accuracy"], 1), plus_minus(t["weight"], 3)]
        for t in found["teachers"]
    ]
    blocks.append(report.table(("teacher", "", "test accuracy %", "mean weight"), rows, words=2))
    rows = [[arm, plus_minus(accuracy, 2)] for arm, accuracy in found["students"].items()]
    blocks.append(report.table(("student taught by", "test accuracy %"), rows, words=1))
    blocks.append("\n".join(map(experiment.sentence, found["differences"])))
    rows = [cost_row(line) for line in found["costs"]]
    blocks.append(report.table(("loss and gradient", "of", "ms", "±%", "vs eager", "peak extra MB"), rows, words=2))
    blocks.append(exactness.sentence(found["float64"]))
    if found["quick"]:
        blocks.append("This was --quick: two splits and half-taught teachers say nothing about the methods.")
    return "\n\n".join(["", *blocks])


def cost_row(line: dict) -> list[str]:
    if "error" in line:
        return [line["shape"], line["loss"], line["error"][:60], "-", "-", "-"]
    times, peak = line["times_eager"], line["peak_extra_bytes"]
    return [
        line["shape"],
        line["loss"],
        report.milliseconds(line["ms"] / 1e3),
        f"{100 * line['spread']:.0f}",
        "-" if times is None else f"{times:.1f}x",
        "-" if peak is None else f"{peak / 2**20:.3g}",
    ]


def write(found: dict, folder: Path) -> list[Path]:
    from . import figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "demo.json", folder / "demo.png"]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    splits = [SplitResult(**split) for split in found["splits"]]
    figure.draw(splits, WATCH_EVERY, found["costs"], paths[1])
    return paths
