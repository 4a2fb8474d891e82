"""The second page: one table of the methods, and its figure."""

import json
import textwrap
from pathlib import Path

import torch

from ... import machine, report, timing
from ...progress import bar
from .. import digits
from ..spread import mean_and_spread, plus_minus
from ..training import BATCH
from . import costs, study
from .study import Budget

FULL = Budget(splits=10)
QUICK = Budget(splits=2, student_steps=60, teacher_steps=60)
NOTE = (
    "Mean ± sd over {} paired splits; the student has 200 images, their labels and its teachers. Every method runs "
    "with its published defaults, which were chosen for other data. The loss, with its adapters, is timed from the "
    "student's outputs to their gradients, in one thread; ops: kernels launched on a GPU, operators called on a CPU, "
    "where a fused pass is one."
)


def run(quick: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = QUICK if quick else FULL
    data = digits.load(device)
    splits = [study.run_split(data, seed, budget, device) for seed in bar(range(budget.splits), "splits of methods")]
    school, lessons = study.prepared(data, data.split(0), 0, QUICK, device)
    batch = torch.arange(BATCH, device=device)
    cost = costs.measure(school, lessons.images[batch], lessons.batch(batch), quick)
    return {
        "machine": machine.facts(device),
        "quick": quick,
        "methods": [line(entry, splits) for entry in cost],
        "failures": [],
    }


def line(cost: dict, splits: list[dict[str, float]]) -> dict:
    accuracies = [found[cost["method"]] for found in splits]
    spread = mean_and_spread(accuracies)
    samples = cost.pop("samples")
    return cost | {
        "seconds": {of: found.seconds for of, found in samples.items()},
        "accuracy": spread["mean"],
        "spread": spread["sd"],
        "accuracies": accuracies,
        "ms": {of: 1e3 * timing.median(found.seconds) for of, found in samples.items()},
        "times_eager": timing.ratio(samples["eager"], samples["fused"]),
    }


def text(found: dict) -> str:
    rows = [
        [
            m["method"],
            plus_minus({"mean": m["accuracy"], "sd": m["spread"]}, 1),
            f"{m['ms']['fused']:.3f}",
            f"{m['ms']['eager']:.3f}",
            f"{m['times_eager']:.1f}x",
            str(m["operations"]["fused"]),
            str(m["operations"]["eager"]),
        ]
        for m in found["methods"]
    ]
    titles = ("student taught by", "test accuracy %", "loss ms", "eager ms", "faster", "ops", "eager ops")
    said = [
        report.machine_line(found["machine"]),
        report.table(titles, rows, words=1),
        textwrap.fill(NOTE.format(len(found["methods"][0]["accuracies"])), 110),
    ]
    if found["quick"]:
        said.append("This was --quick: two splits and half-taught teachers say nothing about the methods.")
    return "\n\n".join(["", *said])


def write(found: dict, folder: Path) -> list[Path]:
    from . import figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "methods.json", folder / "methods.png"]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    figure.draw(found, paths[1])
    return paths
