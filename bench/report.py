"""From raw samples to tables: aligned text for the terminal, markdown for the repository, and the geometric means."""

import json
from collections.abc import Sequence
from pathlib import Path

from .contenders import COMPILE, EAGER
from .timing import geometric_mean, median, ratio, spread

FLOOR = "floor"
TARGETS = {EAGER: {"cpu": 10.0, "cuda": 10.0}, COMPILE: {"cpu": 4.0, "cuda": 3.0}}
HEADER = ("work", "shape", "who", "ms", "±%", "vs eager", "vs compile", "of copy", "peak MB", "in N·C")
HEADER_WORDS = 3


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int, markdown: bool = False) -> str:
    """Aligned columns: the first ``words`` to the left, the numbers after them to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * w if i < words or not markdown else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def row_of(result: dict, name: str) -> list[str]:
    """One contender on one shape; a dash where a number does not exist."""
    entry = result["contenders"][name]
    start = [result["work"], result["shape"], name]
    if "seconds" not in entry:
        return [*start, entry["error"].splitlines()[0][:60], *["-"] * 6]
    seconds, peak = entry["seconds"], entry.get("peak_extra_bytes")
    return [
        *start,
        milliseconds(median(seconds)),
        f"{spread(seconds) * 100:.0f}",
        *(_times(speedup(result, name, baseline)) for baseline in (EAGER, COMPILE)),
        _percent(speedup(result, FLOOR, name, inverse=True)),
        "-" if peak is None else f"{peak / 2**20:.2f}" if peak < 10 << 20 else f"{peak / 2**20:.0f}",
        "-" if peak is None else f"{peak / result['gradient_bytes']:.1f}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def speedup(result: dict, name: str, baseline: str, inverse: bool = False) -> float | None:
    """How many times faster ``name`` is than ``baseline``, None where one of them has no time."""
    fast, slow = (result["contenders"].get(who, {}).get("seconds") for who in (name, baseline))
    if not fast or not slow:
        return None
    return 1 / ratio(slow, fast) if inverse else ratio(slow, fast)


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}x"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x * 100:.0f}%"


def rows(results: Sequence[dict]) -> list[list[str]]:
    return [row_of(result, name) for result in results for name in result["contenders"]]


def summary(results: Sequence[dict], device: str) -> list[dict]:
    """Per kind of work: the geometric mean over shapes of the default implementation against each baseline."""
    means = []
    for work in dict.fromkeys(result["work"] for result in results):
        of_work = [result for result in results if result["work"] == work]
        for baseline in (EAGER, "eager-stacked", COMPILE, "compile-stacked", "liger"):
            ratios = [speedup(result, result["default"], baseline) for result in of_work]
            known = [r for r in ratios if r is not None]
            if known:
                means.append({
                    "work": work,
                    "against": baseline,
                    "geometric_mean": geometric_mean(known),
                    "worst": min(known),
                    "shapes": len(known),
                    "of_shapes": len(of_work),
                    "target": TARGETS.get(baseline, {}).get(device),
                })  # fmt: skip
    return means


def sentences(means: Sequence[dict]) -> list[str]:
    """The geometric means in words, met or missed."""
    lines = []
    for m in means:
        some = "" if m["shapes"] == m["of_shapes"] else f" of {m['of_shapes']}"
        line = f"{m['work']}: {m['geometric_mean']:.1f}x {m['against']} (geometric mean of {m['shapes']}{some} shapes"
        line += f", worst {m['worst']:.1f}x)"
        if m["target"]:
            line += f"; target {m['target']:g}x, {'met' if m['geometric_mean'] >= m['target'] else 'missed'}"
        lines.append(line)
    return lines


def machine_line(facts: dict) -> str:
    where = facts["device"] if facts["device"] == facts["cpu"] else f"{facts['device']}, {facts['cpu']}"
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v)
    return (
        f"{where}, {facts['threads']} threads; {versions}, Python {facts['python']}; "
        f"commit {facts['commit']}; {facts['date']}"
    ) + busy(facts)


def busy(facts: dict) -> str:
    """A warning where more ran than the machine has cores: threads that wait for one another then wait very long."""
    load, cores = facts["load"], facts["cores"]
    if load is None or load <= cores:
        return ""
    return f"\nNOTE: load average {load:.1f} on {cores} cores when the run began: other work disturbs these times"


NOTES = (
    "Loss and gradient unless the work says forward; confidence is CA-MKD's logit objective (τ = 4, hard label "
    "included), uniform the plain average of K KLs. Medians of interleaved rounds; ± is half the distance of the "
    "quartiles; ratios are taken within a round. Eager is the loop over teachers, compile is torch.compile of it, its "
    "first compilation excluded; of copy is the time of a copy of the minimal bytes as a share of the contender's. "
    "Peak is the memory beyond the inputs, in units of one N×C tensor on the right (one is the gradient)."
)


def markdown(run: dict) -> str:
    lines = [f"# {run['machine']['device']}", "", machine_line(run["machine"]), "", NOTES, ""]
    lines += [f"- {line}" for line in sentences(run["summary"])]
    lines += [f"- not measured: {what}" for what in run["dropped"]]
    lines += ["", table(HEADER, rows(run["results"]), HEADER_WORDS, markdown=True), ""]
    return "\n".join(lines)


def write(run: dict, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(run, indent=1) + "\n")
    paths[1].write_text(markdown(run))
    return paths
