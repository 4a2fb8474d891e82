"""Pictures of a run: time against teachers, time against classes, memory against teachers, and the share of the floor.

Each is drawn where a run has at least two points of it. Nothing is drawn without matplotlib, which is said.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import results
from .contenders import ANCHOR, COMPILE, COPY, EAGER, FLOOR, OURS, PEER
from .passes import BOTH

GREY, ORANGE, GREEN, BLUE, PALE = "#8a8f98", "#e08e2b", "#2e8b6f", "#3b6fb6", "#c9ccd1"
LOOKS = {EAGER: ("eager PyTorch", GREY), COMPILE: ("torch.compile", ORANGE), OURS: ("mtkd_fast", GREEN),
         COPY: ("copy of the minimal bytes", PALE)}  # fmt: skip
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b66",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}
BARS_UP_TO = 8  # cells; beyond, bars would be a second table
COLOUR_OF_KIND = {OURS: GREEN, FLOOR: PALE, ANCHOR: PALE, PEER: BLUE}
DTYPE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def draw(run: dict, folder: Path, name: str) -> list[Path]:
    """Writes ``<name>-<picture>.png``; returns those that were drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'mtkd_fast[bench]')", file=sys.stderr)
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    grid = main_cells(run)
    for picture, make in PICTURES.items():
        with plt.rc_context(STYLE):
            figure = make(plt, run, grid)
            if figure is None:
                continue
            paths.append(folder / f"{name}-{picture}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def main_cells(run: dict) -> list[dict]:
    """What the pictures against K and C show: loss and gradient of the first objective of kd that the run has.

    One cell a (C, K, dtype): of two batches the larger.
    """
    cells = [cell for cell in run["cells"] if cell["op"] == "kd" and cell["of"] == BOTH]
    found: dict[tuple, dict] = {}
    for cell in sorted(cells, key=lambda cell: cell["rows"]):
        if cell["objective"] == cells[0]["objective"]:
            found[cell["classes"], cell["teachers"], cell["dtype"]] = cell
    return list(found.values())


def along(cells: Sequence[dict], axis: str, other: str) -> dict[int, list[dict]]:
    """Values of ``other`` -> cells along ``axis`` in its order, float32; only where there are two or more."""
    found: dict[int, list[dict]] = {}
    for cell in sorted((c for c in cells if c["dtype"] == "fp32"), key=lambda c: c[axis]):
        found.setdefault(cell[other], []).append(cell)
    return {value: line for value, line in sorted(found.items()) if len(line) > 1}


def of(name: str, cell: dict) -> str:
    return cell["ours"] if name == OURS else name


def panels(plt, lines: dict[int, list[dict]], axis: str, said: str, value: Callable[[dict, str], float | None],
           names: Sequence[str]):  # fmt: skip
    """One panel a line of cells; in each a curve a contender. None where there is no panel."""
    if not lines:
        return None
    figure, axes = plt.subplots(1, len(lines), figsize=(1.2 + 2.5 * len(lines), 3.3), sharey=True, squeeze=False)
    for ax, (other, cells) in zip(axes[0], lines.items(), strict=True):
        for name in names:
            points = [(cell[axis], value(cell, of(name, cell))) for cell in cells]
            points = [(x, y) for x, y in points if y is not None]
            label, colour = LOOKS[name]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=4, label=label,
                    color=colour, linestyle="--" if name == COPY else "-")  # fmt: skip
        ax.set_title(f"{said} {other}")
        ax.set_xscale("log", base=2 if axis == "teachers" else 10)
        ticks = sorted({cell[axis] for cell in cells})
        ax.set_xticks(ticks, [short(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(axis)
    return figure


def finished(figure, run: dict, title: str, columns: int):
    """A legend below and the machine above."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="lower center", ncols=columns)
    figure.suptitle(f"{title}, {run['machine']['device']}, {run['machine']['threads']} threads", fontsize=10)
    figure.tight_layout(rect=(0, 0.08 if labels else 0, 1, 1))
    return figure


def short(number: int) -> str:
    return f"{number / 1000:.3g}k" if number >= 1000 else str(number)


def milliseconds(cell: dict, name: str) -> float | None:
    seconds = results.seconds(cell, name)
    return seconds and 1e3 * seconds


def gradients(cell: dict, name: str) -> float | None:
    peak = results.peak(cell, name)
    return peak and peak / cell["gradient_bytes"]


def time_against(plt, run: dict, cells: Sequence[dict], axis: str, other: str, said: str):
    figure = panels(plt, along(cells, axis, other), axis, said, milliseconds, (EAGER, COMPILE, OURS, COPY))
    if figure is None:
        return None
    figure.axes[0].set(yscale="log", ylabel="milliseconds")
    return finished(figure, run, f"Loss + gradient against the number of {axis}, float32", 4)


def memory_against_teachers(plt, run: dict, cells: Sequence[dict]):
    lines = along([c for c in cells if results.peak(c, c["ours"])], "teachers", "classes")
    figure = panels(plt, lines, "teachers", "C =", gradients, (EAGER, COMPILE, OURS))
    if figure is None:
        return None
    for ax in figure.axes:
        ax.axhline(1, color=PALE, linewidth=1, linestyle="--", zorder=0)
    figure.axes[0].set(yscale="log", ylabel="gradients")
    return finished(figure, run, "Peak extra memory in units of one gradient, float32", 3)


def share_of_the_floor(plt, run: dict, cells: Sequence[dict]):
    """Bars a class count, one a number of teachers, a panel a dtype."""
    known = [cell for cell in cells if results.share_of_floor(cell, cell["ours"], COPY) is not None]
    dtypes = [dtype for dtype in DTYPE_WORDS if any(cell["dtype"] == dtype for cell in known)]
    if len(known) < 2:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(1 + 4.5 * len(dtypes), 3.3), sharey=True, squeeze=False)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        of_dtype = [cell for cell in known if cell["dtype"] == dtype]
        classes = sorted({cell["classes"] for cell in of_dtype})
        teachers = sorted({cell["teachers"] for cell in known})
        for i, k in enumerate(teachers):
            bars = {cell["classes"]: cell for cell in of_dtype if cell["teachers"] == k}
            at = [classes.index(c) + (i - (len(teachers) - 1) / 2) * 0.8 / len(teachers) for c in bars]
            high = [100 * results.share_of_floor(cell, cell["ours"], COPY) for cell in bars.values()]
            shade = 0.35 + 0.65 * (i + 1) / len(teachers)
            ax.bar(at, high, 0.75 / len(teachers), color=GREEN, alpha=shade, label=f"K = {k}")
        ax.axhline(100, color=GREY, linewidth=1, linestyle="--")
        ax.set_xticks(range(len(classes)), [short(c) for c in classes])
        ax.set(title=DTYPE_WORDS[dtype], xlabel="classes")
        ax.grid(axis="x", visible=False)
    axes[0][0].set(ylabel="% of a copy's speed")
    return finished(figure, run, "Speed as a share of copying the minimal bytes", 4)


def contenders(plt, run: dict, _: Sequence[dict]):
    """Everyone's time, a panel a cell."""
    cells = run["cells"]
    if not 1 <= len(cells) <= BARS_UP_TO:
        return None
    most = max(len(cell["contenders"]) for cell in cells)
    height = 0.8 + len(cells) * (0.7 + 0.24 * most)
    figure, axes = plt.subplots(len(cells), 1, figsize=(8, height), squeeze=False, sharex=True)
    for ax, cell in zip(axes[:, 0], cells, strict=True):
        times = {name: milliseconds(cell, name) for name in cell["contenders"]}
        times = {name: t for name, t in sorted(times.items(), key=lambda entry: -(entry[1] or 0)) if t}
        kinds = [cell["contenders"][name]["kind"] for name in times]
        colours = [COLOUR_OF_KIND.get(kind) or LOOKS.get(name, LOOKS[name.split("-")[0]])[1]
                   for name, kind in zip(times, kinds, strict=True)]  # fmt: skip
        bars = ax.barh(list(times), list(times.values()), color=colours, height=0.7)
        ax.bar_label(bars, [f"{t:.3g}" for t in times.values()], padding=3, fontsize=8)
        ax.set(title=results.title(cell), xscale="log")
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("milliseconds")
    return finished(figure, run, "Time of a call", 1)


PICTURES = {
    "time-teachers": partial(time_against, axis="teachers", other="classes", said="C ="),
    "time-classes": partial(time_against, axis="classes", other="teachers", said="K ="),
    "memory-teachers": memory_against_teachers,
    "floor": share_of_the_floor,
    "contenders": contenders,
}
