"""The second page as one picture: how well the students do, and what their losses cost."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..figure import GREEN, GREY, STYLE


def draw(found: dict, path: Path) -> None:
    methods = found["methods"][::-1]  # the first on top
    rows = range(len(methods))
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.42 * len(methods)), sharey=True)
        for y, m in zip(rows, methods, strict=True):
            left.scatter(m["accuracies"], [y] * len(m["accuracies"]), color=GREEN, s=18, alpha=0.45, linewidths=0)
            left.errorbar(m["accuracy"], y, xerr=m["spread"] or 0, fmt="o", color=GREEN, markersize=8, capsize=4)
            for shift, of, colour in ((0.2, "eager", GREY), (-0.2, "fused", GREEN)):
                right.barh(y + shift, m["ms"][of], height=0.38, color=colour, label=of if y == 0 else None)
            at = (max(m["ms"].values()), y)
            right.annotate(f"{m['times_eager']:.1f}x", at, (5, 0), textcoords="offset points", va="center", fontsize=9)
        left.set_yticks(rows, [m["method"] for m in methods])
        left.set_xlabel("test accuracy, %")
        left.set_title("Students on paired splits, mean ± sd")
        right.set_xscale("log")
        right.set_xlabel("milliseconds, loss and gradient (log scale)")
        right.set_title("What the loss costs")
        right.legend(loc="upper right")
        fig.tight_layout()
        fig.savefig(path)
        plt.close(fig)
