"""What follows from raw samples: of a cell, as bench/runner.py writes it, the time of a contender and ratios of two."""

from . import timing
from .timing import Samples


def samples(cell: dict, name: str) -> Samples | None:
    """None where it has no time."""
    entry = cell["contenders"].get(name, {})
    if not entry.get("seconds"):
        return None
    return Samples(entry["seconds"], entry.get("stride", 1), entry.get("calls", 1))


def seconds(cell: dict, name: str) -> float | None:
    found = samples(cell, name)
    return found and timing.median(found.seconds)


def speedup(cell: dict, name: str, baseline: str) -> float | None:
    """How many times faster ``name`` is than ``baseline``, None where one of them has no time."""
    fast, slow = samples(cell, name), samples(cell, baseline)
    return timing.ratio(slow, fast) if fast and slow else None


def share_of_floor(cell: dict, name: str, floor: str) -> float | None:
    """The floor's time as a share of the contender's: 1 at the floor."""
    inverse = speedup(cell, floor, name)
    return inverse and 1 / inverse


def peak(cell: dict, name: str) -> int | None:
    return cell["contenders"].get(name, {}).get("peak_extra_bytes")


def title(cell: dict) -> str:
    return f"{cell['op']} {cell['objective']} {cell['shape']}, {cell['of']}"
