"""The report as one page of HTML: verdicts, pictures, every number; nothing outside the file."""

import base64
from collections.abc import Sequence
from pathlib import Path

from . import report, results, verdicts

TEMPLATE = Path(__file__).parent / "page.html"
CLASS_OF_STATE = {verdicts.MET: "met", verdicts.MISSED: "missed", verdicts.PART: "part", verdicts.OPEN: "open"}


def html(run: dict, pictures: Sequence[Path]) -> str:
    """``pictures``: files whose bytes become part of the page."""
    import jinja2  # with torch

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        run=run,
        machine=run["machine"],
        versions={name: v for name, v in run["machine"]["versions"].items() if v},
        busy=report.busy(run["machine"]),
        verdicts=[card(verdict) for verdict in report.judged(run)],
        sentences=report.sentences(run) if run["grid"] == "own" else [],
        pictures=[(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in pictures],
        protocol=report.PROTOCOL,
        header=report.HEADER[1:],
        cells=[block(cell) for cell in run["cells"]],
        omissions=report.omissions(run),
    )


def card(verdict: verdicts.Verdict) -> dict:
    """What a card says of a verdict."""

    def unit(number: float | None) -> str:
        return "–" if number is None else verdicts.in_unit(number, verdict.unit)

    return {
        "css": CLASS_OF_STATE[verdict.state],
        "state": verdict.state,
        "name": verdict.name,
        "number": unit(verdict.number),
        "bound": f"{'at most' if verdict.at_most else 'at least'} {unit(verdict.bound)}",
        "over": verdict.found_in,
        "worst": f"worst: {verdict.worst}, {unit(verdict.worst_number)}" if verdict.worst else "",
    }


def block(cell: dict) -> dict:
    """A cell of the table: its title, how it was run, and its rows."""
    fresh = f"{cell['input_sets']} sets of inputs, cold" if cell["input_sets"] > 1 else "one set of inputs, warm"
    moved = cell["minimal_bytes"]
    floor = "" if moved is None else f", minimal traffic {moved / 2**20:.3g} MB"
    others = f"; other work had {cell['others']:.0%} of the processors" if cell.get("others") else ""
    rows = [
        (cell["contenders"][row[0].split(":")[0]]["kind"], row)
        for row in (row[1:] for row in report.rows([cell]))
    ]  # fmt: skip
    return {
        "title": results.title(cell),
        "about": f"{cell['ours']}: {cell['strategy']}; {fresh}{floor}; memory in {cell['unit']}{others}",
        "rows": rows,
    }
