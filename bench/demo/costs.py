"""What the loss costs on the demo's own work and on one large shape: time and peak extra memory, loss and gradient."""

import torch

from .. import contenders, kd, report
from ..shapes import Shape
from .digits import N_CLASSES
from .models import RECIPES
from .training import BATCH

K = len(RECIPES)
OWN = Shape(BATCH, N_CLASSES, K)
LARGE = Shape(256, 32000, K)
LARGE_QUICK = Shape(16, 32000, K)
SECONDS = 6.0  # of timing a shape
QUICK_SECONDS = 0.5


def measure(device: str, quick: bool) -> dict:
    """The benchmark's own result for the two shapes: eager PyTorch, torch.compile, and what mtkd_fast picks here."""
    default = contenders.default_implementation(torch.empty(1, 1, device=device))
    names = (contenders.EAGER, contenders.COMPILE, default)
    todo = [kd.Job(kd.Work("confidence"), shape) for shape in (OWN, LARGE_QUICK if quick else LARGE)]
    return kd.run(device, todo, QUICK_SECONDS if quick else SECONDS, names=names)


def lines(run: dict) -> list[dict]:
    """One entry a shape and contender: milliseconds, spread, peak bytes, times faster than eager; or the error."""
    found = []
    for result in run["results"]:
        for name, entry in result["contenders"].items():
            if name == report.FLOOR:
                continue
            line = {"shape": result["shape"], "loss": spoken(name, result["default"])}
            if "error" in entry:
                line["error"] = entry["error"].splitlines()[0]
            else:
                line |= {
                    "ms": 1e3 * report.median(entry["seconds"]),
                    "spread": report.spread(entry["seconds"]),
                    "peak_extra_bytes": entry.get("peak_extra_bytes"),
                    "times_eager": report.speedup(result, name, contenders.EAGER),
                }
            found.append(line)
    return found


def spoken(name: str, default: str) -> str:
    names = {contenders.EAGER: "eager PyTorch", contenders.COMPILE: "torch.compile", default: f"mtkd_fast ({default})"}
    return names[name]
