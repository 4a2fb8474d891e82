"""Time and peak extra memory against the number of teachers: the figure of the README.

python -m mtkd_fast.bench.teachers [--out FOLDER]      writes teachers-<machine>.json and .png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import contenders, kd, machine, report, timing
from .contenders import COMPILE, EAGER
from .shapes import Shape

ROWS, CLASSES = 256, 32000
TEACHERS = (1, 2, 4, 8, 16)
SECONDS = 5.0
LOOKS = {EAGER: ("eager PyTorch", "#8a8f98"), COMPILE: ("torch.compile", "#e08e2b")}
OURS = "#2e8b6f"


def measure(device: str) -> dict:
    names = (EAGER, COMPILE, contenders.default_implementation(torch.empty(1, 1, device=device)))
    todo = [kd.Job(kd.Work("confidence"), Shape(ROWS, CLASSES, k, torch.float32)) for k in TEACHERS]
    return kd.run(device, todo, SECONDS, names=names)


def draw(found: dict, path: Path) -> None:
    figure, (times, peaks) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name in found["results"][0]["contenders"]:
        if name == report.FLOOR:
            continue
        label, colour = LOOKS.get(name, ("mtkd_fast", OURS))
        entries = [result["contenders"][name] for result in found["results"]]
        curve(times, [timing.median(e["seconds"]) * 1e3 for e in entries], label, colour)
        curve(peaks, [e["peak_extra_bytes"] / 2**20 for e in entries], label, colour)
    times.set(title="loss + gradient", ylabel="milliseconds", yscale="log")
    peaks.set(title="peak extra memory", ylabel="MiB", ylim=(0, None))
    peaks.axhline(ROWS * CLASSES * 4 / 2**20, color="#cccccc", linewidth=1, linestyle="--", zorder=0)
    peaks.annotate("one gradient", (TEACHERS[-1], ROWS * CLASSES * 4 / 2**20), fontsize=8, color="#888888",
                   xytext=(0, 4), textcoords="offset points", ha="right")  # fmt: skip
    times.legend(frameon=False)
    facts = found["machine"]
    figure.suptitle(
        f"CA-MKD's logit objective, {ROWS} × {CLASSES}, float32, {facts.get('device', 'this machine')}", fontsize=10
    )
    figure.savefig(path, dpi=150)


def curve(axes: Axes, values: list[float], label: str, colour: str) -> None:
    axes.plot(TEACHERS, values, marker="o", label=label, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TEACHERS, [str(k) for k in TEACHERS])
    axes.set_xlabel("teachers")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.teachers", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(device)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"teachers-{machine.slug(device)}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1))
    draw(found, stem.with_suffix(".png"))
    print(report.table(report.HEADER, report.rows(found["results"]), report.HEADER_WORDS))
    print("wrote", stem.with_suffix(".json"), stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
