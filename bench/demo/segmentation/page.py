"""The third page: what students of a map of labels learn, and what their loss costs."""

import json
from pathlib import Path

import torch

from ... import machine, report
from ...progress import bar
from .. import digits
from ..spread import mean_and_spread, plus_minus
from . import costs, study
from .canvases import scatter
from .study import BATCH, Budget

FULL = Budget(splits=5)
QUICK = Budget(splits=2, canvases=16, steps=20)
SECONDS, QUICK_SECONDS = 2.0, 0.2  # of timing


def run(quick: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = QUICK if quick else FULL
    data = digits.load(device)
    splits = [study.run_split(data, seed, budget, device) for seed in bar(range(budget.splits), "splits of canvases")]
    labels = scatter(data, data.split(0).student, BATCH, 0).labels
    return {
        "machine": machine.facts(device),
        "quick": quick,
        "arms": {arm: [found[arm] for found in splits] for arm in study.ARMS},
        "cost": costs.measure(labels, QUICK_SECONDS if quick else SECONDS),
        "failures": [],
    }


def text(found: dict) -> str:
    rows = [[arm, plus_minus(mean_and_spread(a), 1)] for arm, a in found["arms"].items()]
    cost, splits = found["cost"], len(found["arms"]["hard labels"])
    said = [
        report.table(("segmentation student taught by", "inked pixels named rightly %"), rows, words=1),
        f"Digits scattered over canvases, one label an inked pixel; mean ± sd over {splits} paired splits. Confidence "
        f"weights on\n[B, C, H, W] = {cost['shape']}, class_dim=1, loss and gradient: {cost['ms']['fused']:.2f} ms, "
        f"eager {cost['ms']['eager']:.2f} ms, {cost['times_eager']:.1f}x.",
    ]
    if found["quick"]:
        said.append("This was --quick: two splits and half-taught teachers say nothing about the losses.")
    return "\n\n".join(["", *said])


def write(found: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "segmentation.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return [path]
