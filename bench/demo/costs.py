"""What the loss costs on the demo's own work and on one large shape: time and peak extra memory, loss and gradient."""

from .. import contenders, results, runner, timing
from ..grid import Cell
from ..ops.kd import KD
from .digits import N_CLASSES
from .models import RECIPES
from .training import BATCH

K = len(RECIPES)
OWN = KD("confidence", BATCH, N_CLASSES, K)
LARGE = KD("confidence", 256, 32000, K)
LARGE_QUICK = KD("confidence", 16, 32000, K)
SECONDS = 6.0  # of timing a shape
QUICK_SECONDS = 0.5


def measure(device: str, quick: bool) -> dict:
    """The benchmark's own result for the two shapes: eager PyTorch, torch.compile, and what mtkd_fast picks here."""
    who = (contenders.EAGER, contenders.COMPILE, contenders.default_implementation(device))
    cells = [Cell(case, who=who) for case in (OWN, LARGE_QUICK if quick else LARGE)]
    effort = runner.Effort(QUICK_SECONDS if quick else SECONDS, kernels=False)
    return runner.run(device, cells, effort, what="costs")


def lines(run: dict) -> list[dict]:
    """One entry a shape and contender: milliseconds, spread, peak bytes, times faster than eager; or the error."""
    found = []
    for cell in run["cells"]:
        for name, entry in cell["contenders"].items():
            line = {"shape": cell["shape"], "loss": spoken(name, cell["ours"])}
            if "error" in entry:
                line["error"] = entry["error"].splitlines()[0]
            else:
                line |= {
                    "ms": 1e3 * timing.median(entry["seconds"]),
                    "spread": timing.spread(entry["seconds"]),
                    "peak_extra_bytes": entry.get("peak_extra_bytes"),
                    "times_eager": results.speedup(cell, name, contenders.EAGER),
                }
            found.append(line)
    return found


def spoken(name: str, default: str) -> str:
    names = {contenders.EAGER: "eager PyTorch", contenders.COMPILE: "torch.compile", default: f"mtkd_fast ({default})"}
    return names[name]
