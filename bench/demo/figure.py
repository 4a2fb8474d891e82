"""results/demo.png: who learns best, how, whom the weights trust, and what the loss costs."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .. import plots, report
from . import experiment
from .experiment import SplitResult
from .models import RECIPES
from .training import ARMS

GREY, BLUE, ORANGE, GREEN, RED = "#8a8f98", "#3b6fb6", "#e08e2b", "#2e8b6f", "#c8553d"
ARM_COLOURS = dict(zip(ARMS, (GREY, BLUE, ORANGE, GREEN), strict=True))
LOSS_COLOURS = (GREY, BLUE, GREEN)
STYLE = {**plots.STYLE, "font.size": 10, "axes.titlesize": 11.5, "axes.titlepad": 10}


def draw(results: list[SplitResult], watch_every: int, costs: list[dict], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8.6))
        students(axes[0, 0], results)
        learning(axes[0, 1], results, watch_every)
        trust(axes[1, 0], results)
        cost(axes[1, 1], costs)
        figure.tight_layout(h_pad=2.6, w_pad=2.6)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def students(ax: Axes, results: list[SplitResult]) -> None:
    finals = [experiment.final_accuracy(results, arm) for arm in ARMS]
    for values in zip(*finals, strict=True):
        ax.plot(range(len(ARMS)), values, color="#c9cdd3", linewidth=0.9, zorder=1)
    for i, (arm, values) in enumerate(zip(ARMS, finals, strict=True)):
        ax.scatter([i] * len(values), values, color=ARM_COLOURS[arm], s=20, alpha=0.55, linewidths=0, zorder=2)
        mean, sd = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        ax.errorbar(i + 0.16, mean, yerr=sd, fmt="o", color=ARM_COLOURS[arm], markersize=8, capsize=4, zorder=3)
        ax.annotate(f"{mean:.1f}", (i + 0.16, mean), (9, -4), textcoords="offset points", weight="bold")
    ax.set_xticks(range(len(ARMS)), [arm.replace(" ", "\n", 1) for arm in ARMS])
    ax.set_xlim(-0.4, len(ARMS) - 0.3)
    ax.set_ylabel("test accuracy, %")
    ax.grid(axis="x", visible=False)
    ax.set_title(f"The student on {len(results)} paired splits (lines), mean ± sd")


def learning(ax: Axes, results: list[SplitResult], watch_every: int) -> None:
    for arm in ARMS:
        curves = [curve for result in results for curve in result.curves[arm]]
        steps = [watch_every * (i + 1) for i in range(len(curves[0]))]
        columns = list(zip(*curves, strict=True))
        means = [statistics.mean(c) for c in columns]
        quartiles = [statistics.quantiles(c, n=4, method="inclusive") if len(c) > 1 else [c[0]] * 3 for c in columns]
        ax.plot(steps, means, color=ARM_COLOURS[arm], linewidth=2, label=arm)
        low, high = [q[0] for q in quartiles], [q[2] for q in quartiles]
        ax.fill_between(steps, low, high, color=ARM_COLOURS[arm], alpha=0.13, linewidth=0)
    last = [curve[-1] for result in results for arm in ARMS for curve in result.curves[arm]]
    ax.set_ylim(bottom=min(last) - 8)
    ax.set_xlabel("training step")
    ax.set_ylabel("test accuracy, %")
    ax.legend(loc="lower right")
    ax.set_title("Learning curves, mean and quartiles")


def trust(ax: Axes, results: list[SplitResult]) -> None:
    columns = list(zip(*(result.teacher_weight for result in results), strict=True))
    means = [statistics.mean(c) for c in columns]
    sds = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    colours = [RED if recipe.poor else GREEN for recipe in RECIPES]
    ax.bar(range(len(RECIPES)), means, yerr=sds, color=colours, capsize=3, width=0.72, ecolor="#3c4048")
    uniform, ceiling = 1 / len(RECIPES), 1 / (len(RECIPES) - 1)
    for height, text in ((uniform, "uniform, 1/K"), (ceiling, "most possible, 1/(K−1)")):
        ax.axhline(height, color="#3c4048", linewidth=1, linestyle="--" if height == uniform else ":")
        ax.annotate(text, (len(RECIPES) - 0.42, height), (0, 3), textcoords="offset points", ha="right", fontsize=9)
    accuracies = [statistics.mean(c) for c in zip(*(result.teacher_accuracy for result in results), strict=True)]
    for i, accuracy in enumerate(accuracies):
        style = {"textcoords": "offset points", "ha": "center", "color": "white", "fontsize": 9}
        ax.annotate(f"{accuracy:.0f}%", (i, 0), (0, 5), **style)
    ax.set_xticks(range(len(RECIPES)), [recipe.name.replace(" ", "\n") for recipe in RECIPES])
    ax.set_ylim(0, 1.25 * ceiling)
    ax.set_ylabel("mean confidence weight")
    ax.grid(axis="x", visible=False)
    handles = [Patch(color=GREEN, label="good teacher"), Patch(color=RED, label="poor on purpose")]
    ax.legend(handles=handles, loc="upper left", ncols=2)
    ax.set_title("Whom the weights trust (in the bar: test accuracy)")


def cost(ax: Axes, costs: list[dict]) -> None:
    shapes = list(dict.fromkeys(line["shape"] for line in costs))
    ticks = []
    for s, shape in enumerate(shapes):
        lines = [line for line in costs if line["shape"] == shape]
        for i, line in enumerate(lines):
            y = -(s * (len(lines) + 1.1) + i)
            ticks.append((y, line["loss"]))
            if "error" in line:
                ax.annotate(" did not run", (0, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
                continue
            ax.barh(y, line["ms"], color=LOSS_COLOURS[i % len(LOSS_COLOURS)], height=0.78)
            ax.annotate(caption(line), (line["ms"], y), (5, 0), textcoords="offset points", va="center", fontsize=9)
        top = -(s * (len(lines) + 1.1)) + 0.75
        ax.annotate(shape, (0.01, top), xycoords=("axes fraction", "data"), va="center", weight="bold", fontsize=9.5)
    ax.set_ylim(ticks[-1][0] - 0.7 if ticks else 0, 1.15)
    times = [line["ms"] for line in costs if "ms" in line]
    if times:
        ax.set_xscale("log")
        ax.set_xlim(min(times) / 3, max(times) * 100)
    ax.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    ax.set_xlabel("milliseconds, loss and gradient (log scale)")
    ax.grid(axis="y", visible=False)
    ax.set_title("What the loss costs")


def caption(line: dict) -> str:
    parts = [f"{report.milliseconds(line['ms'] / 1e3)} ms"]
    if line["times_eager"] and line["loss"] != "eager PyTorch":
        parts.append(f"{line['times_eager']:.1f}x")
    if line["peak_extra_bytes"] is not None:
        parts.append(f"+{line['peak_extra_bytes'] / 2**20:.3g} MB")
    return ", ".join(parts)
