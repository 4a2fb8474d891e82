"""A run in words: aligned tables for the terminal, Markdown for the repository, and the protocol behind the numbers."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import page, plots, results
from .contenders import COMPILE, COPY, EAGER, FLOOR
from .results import title
from .timing import median, spread
from .verdicts import OPEN, Verdict

HEADER = ("case", "who", "ms", "±%", "in kernels", "vs eager", "vs compile", "of copy", "peak MB", "in units")
HEADER_WORDS = 2
NUMBERS = re.compile(r"\[[-+.,e\d\s]+\]")  # a list of numbers, which becomes one line of the JSON
NO_TARGET = "no target speaks of these cells: mtkd-fast bench --grid targets"
MUCH = 0.05  # of the processors' time, for others than the benchmark

PROTOCOL = (
    "Every contender is first held against a float64 oracle, loss and gradient; who is wrong is not timed.",
    "Times are medians of 5 to 40 samples in interleaved rounds, a sample the mean of as many calls as the clock "
    "needs; ± is half the distance of the quartiles. Ratios are medians over stretches of rounds, within which both "
    "sides saw the same machine. With --patience a cell waits for cores that do not share a way to memory, as those of "
    "a virtual machine may, and is timed once more if other work had a fifth of the processors.",
    "Cases above a quarter of the last cache rotate through inputs of their own, so that a call finds none of them in "
    "the cache; smaller ones are warm. The copy, of the minimal bytes (half read, half written), rotates likewise.",
    "eager is the loss as people write it, a loop over teachers; compile is torch.compile of that, static shapes, one "
    "graph, its first compilation excluded; ×1 is on one thread; launch is the least that a call can be.",
    "In kernels, milliseconds too, is what PyTorch's profiler sees of a call: a GPU's device time; on a CPU the time "
    "inside operators, which the profiler makes longer where they are short.",
    "Peak is the memory beyond the inputs during loss and gradient, in units of the gradients on the right (relations: "
    "of one B×B matrix); on a CPU the growth of a fresh process's resident set.",
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int, markdown: bool = False) -> str:
    """Aligned columns: the first ``words`` to the left, the numbers after them to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * w if i < words or not markdown else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def rows(cells: Sequence[dict]) -> Iterator[list[str]]:
    """One a contender, the slowest first; the case is named once."""
    for cell in cells:
        named = title(cell)
        for name in sorted(cell["contenders"], key=lambda name: -(results.seconds(cell, name) or float("inf"))):
            yield [named, *row_of(cell, name)]
            named = ""


def row_of(cell: dict, name: str) -> list[str]:
    """From the name on; a dash where a number does not exist."""
    entry = cell["contenders"][name]
    if "error" in entry:
        return [f"{name}: {entry['error'].splitlines()[0][:60]}", *["-"] * 8]
    kernels, peak = entry.get("kernel_seconds"), entry.get("peak_extra_bytes")
    computes = entry["kind"] != FLOOR
    return [
        name,
        milliseconds(median(entry["seconds"])),
        f"{spread(entry['seconds']) * 100:.0f}",
        "-" if kernels is None else milliseconds(kernels),
        *(_times(results.speedup(cell, name, baseline) if computes else None) for baseline in (EAGER, COMPILE)),
        _percent(results.share_of_floor(cell, name, COPY) if computes else None),
        "-" if peak is None else f"{peak / 2**20:.2f}" if peak < 10 << 20 else f"{peak / 2**20:.0f}",
        "-" if peak is None else f"{peak / cell['gradient_bytes']:.1f}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}x"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x * 100:.0f}%"


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


def disturbed(run: dict) -> list[str]:
    """The cells in whose time the machine had much else to do."""
    return [
        f"disturbed: {title(cell)}: other work had {_percent(cell['others'])} of the processors"
        for cell in run["cells"]
        if (cell.get("others") or 0) > MUCH
    ]


def judged(run: dict) -> list[Verdict]:
    """All verdicts, those on what was not measured too; none where no target's cell is in the run."""
    found = [Verdict(**verdict) for verdict in run["verdicts"]]
    return found if run["grid"] != "own" and any(verdict.state != OPEN for verdict in found) else []


def sentences(run: dict) -> list[str]:
    """The verdicts; a user's own shape has what became of it instead."""
    if run["grid"] == "own":
        return [own_sentence(cell) for cell in run["cells"]]
    return [verdict.sentence for verdict in judged(run)] or [NO_TARGET]


def own_sentence(cell: dict) -> str:
    """How close to the floor, and by which strategy."""
    ours = cell["ours"]
    said = [f"{title(cell)}: {ours} runs ({cell['strategy']})"]
    if results.seconds(cell, ours) is not None:
        said[0] += f", {milliseconds(results.seconds(cell, ours))} ms"
    share = results.share_of_floor(cell, ours, COPY)
    if share is not None:
        said.append(f"{_percent(share)} of the speed of copying the minimal {cell['minimal_bytes'] / 2**20:.3g} MB")
    for baseline in (EAGER, COMPILE):
        ratio = results.speedup(cell, ours, baseline)
        if ratio is not None:
            said.append(f"{_times(ratio)} {baseline}")
    return "; ".join(said)


def omissions(run: dict) -> list[str]:
    """Who did not take part, what was left out, and what the machine disturbed."""
    absent = [f"not here: {m['name']}: {m['why']}" for m in run["missing"]]
    return absent + [f"not measured: {what}" for what in run["dropped"]] + disturbed(run) + impatient(run)


def impatient(run: dict) -> list[str]:
    """The cells for which waiting was in vain."""
    return [f"on one cache: {title(cell)}: its timing began so" for cell in run["cells"] if cell.get("apart") is False]


def text(run: dict) -> str:
    blocks = [machine_line(run["machine"]), table(HEADER, list(rows(run["cells"])), HEADER_WORDS)]
    return "\n\n".join([*blocks, "\n".join(sentences(run)), "\n".join(omissions(run))]).rstrip()


def markdown(run: dict, pictures: Sequence[Path] = ()) -> str:
    lines = [f"# {run['machine']['device']}", "", machine_line(run["machine"]), ""]
    lines += [f"- {line.strip()}" for line in sentences(run)]
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures), "", *(f"* {line}" for line in PROTOCOL), ""]
    lines += [f"- {line}" for line in omissions(run)]
    lines += ["", table(HEADER, list(rows(run["cells"])), HEADER_WORDS, markdown=True), ""]
    return "\n".join(lines)


def write_json(run: dict, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    fresh = path.with_suffix(".json.part")  # a run that is killed while writing keeps the results before
    fresh.write_text(
        NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(run, indent=1, ensure_ascii=False)) + "\n"
    )
    fresh.replace(path)
    return path


def write(run: dict, folder: Path, name: str) -> list[Path]:
    """The JSON, the table in Markdown, the plots where matplotlib is installed, and the page with all of it."""
    paths = [write_json(run, folder, name), folder / f"{name}.md", folder / f"{name}.html"]
    pictures = plots.draw(run, folder, name)
    paths[1].write_text(markdown(run, pictures))
    paths[2].write_text(page.html(run, pictures))
    return paths + pictures
