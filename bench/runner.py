"""Measures cells: correctness, then time, then the kernels' share of it, then memory. Keeps what it has after each."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import contenders, cores, gate, machine, memory, passes, rotation, timing, verdicts
from .contenders import COPY, LAUNCH, ONE_THREAD, OURS, Contender
from .grid import Cell
from .kernel_time import kernel_seconds
from .passes import BACKWARD, BOTH, FORWARD, GRAPH
from .progress import bar
from .timing import Call

CELL_SECONDS = {"cpu": 12.0, "cuda": 2.0}  # of timing a cell
QUICK_SECONDS = 0.4
TOO_MUCH = 0.2  # of the processors, for others than the benchmark
PROFILED_SECONDS, MOST_PROFILED = 0.05, 20


class Effort(NamedTuple):
    """How much of a cell is measured."""

    seconds: float
    kernels: bool = True
    memory: bool = True
    patience: float = 0  # seconds that a cell waits at most for cores that are apart (cores.py)


def run(
    device: str,
    cells: Sequence[Cell],
    effort: Effort,
    *,
    budget: float | None = None,
    keep: Callable[[dict], object] = lambda so_far: None,
    what: str = "bench",
) -> dict:
    """Measures the cells until ``budget`` seconds are over; ``keep`` is given what there is after every one."""
    started = time.monotonic()
    found = {
        "machine": machine.facts(device),
        "grid": what,
        "effort": effort._asdict(),
        "verdicts": [],
        "missing": [],
        "dropped": [],
        "failures": [],
        "cells": [],
    }
    for cell in bar(cells, f"{what} on {device}"):
        if budget is not None and time.monotonic() - started > budget:
            found["dropped"].append(f"{cell} (out of time)")
            continue
        torch.compiler.reset()  # every shape compiles anew, and none meets the limit on recompilations
        try:
            measured = measure(cell, device, effort)
        except Exception as error:  # the next cell may still run; the exit status tells
            found["failures"].append(f"{cell}: {type(error).__name__}: {error}")
        else:
            note_missing(found["missing"], measured.pop("missing"))
            found["dropped"] += measured.pop("dropped")
            found["cells"].append(measured)
        if device == "cuda":
            torch.cuda.empty_cache()
        found["seconds"] = time.monotonic() - started
        found["verdicts"] = [verdict._asdict() for verdict in verdicts.of(found)]
        keep(found)
    return found


def note_missing(known: list[dict], missing: list[contenders.Missing]) -> None:
    """Each once, with its reason."""
    for absent in missing:
        entry = {"name": absent.name, "why": absent.why}
        if entry not in known:
            known.append(entry)


def measure(cell: Cell, device: str, effort: Effort) -> dict:
    """A contender that is wrong or cannot run is there with the reason."""
    case, of, who = cell
    taking_part, missing = contenders.on(case, device, who)
    sets = rotation.sets(case, device)
    entries, calls = checked(taking_part, cell, sets)
    if "floors" in who:
        for name, floor in floors(cell, device, len(sets)).items():
            entries[name] = {"kind": contenders.FLOOR}
            calls[name] = floor
    for name, samples in (timed := patiently_timed(calls, device, effort)).samples.items():
        entries[name] |= samples._asdict()
    if effort.kernels and of != GRAPH:
        for name, call in calls.items():
            n_calls = int(PROFILED_SECONDS / timing.median(entries[name]["seconds"]))
            entries[name]["kernel_seconds"] = kernel_seconds(call, device, max(1, min(MOST_PROFILED, n_calls)))
    n_sets, dropped = len(sets), []
    del sets, calls
    if effort.memory and of == BOTH:
        losses = {c.name: c.loss for c in taking_part if "seconds" in entries[c.name] and c.threads is None}
        try:
            for name, peak in memory.peak_extra(case, device, losses).items():
                entries[name]["peak_extra_bytes"] = peak
        except memory.NotMeasured as reason:
            dropped.append(str(reason))
    ours = contenders.default_implementation(device, case.dtype)
    return {
        **case.facts(),
        "of": of,
        "shape": str(case),
        "unit": case.unit,
        "gradient_bytes": case.gradient_bytes,
        "number_bytes": case.number_bytes,
        "slack_bytes": memory.slack(device),
        "minimal_bytes": minimal_bytes(cell),
        "input_sets": n_sets,
        "others": timed.others,
        "apart": timed.apart,
        "ours": ours,
        "strategy": case.strategy(ours, device, of != FORWARD),
        "contenders": entries,
        "missing": missing,
        "dropped": dropped,
    }


class Timed(NamedTuple):
    samples: dict[str, timing.Samples]
    others: float | None  # other work's share of the processors
    apart: bool | None  # whether the cores were so when it began; None: nobody asked


def patiently_timed(calls: dict[str, Call], device: str, effort: Effort) -> Timed:
    """With patience, what much other work has disturbed is timed once more."""
    patient = effort.patience > 0 and device == "cpu" and torch.get_num_threads() > 1
    for _ in range(2):
        apart = cores.wait(effort.patience) if patient else None
        began, busy = time.monotonic(), machine.busy_seconds()
        samples = timing.interleaved(calls, device, effort.seconds)
        others = machine.share_of_others(busy, time.monotonic() - began)
        if not patient or (others or 0) < TOO_MUCH:
            break
    return Timed(samples, others, apart)


def minimal_bytes(cell: Cell) -> int | None:
    """None for a backward pass alone: what it must move depends on what the forward has kept."""
    return None if cell.of == BACKWARD else cell.case.minimal_bytes(cell.of != FORWARD)


def checked(taking_part: list[Contender], cell: Cell, sets: list) -> tuple[dict[str, dict], dict[str, Call]]:
    """Entries, with errors found or the reason, and calls of those that may be timed."""
    exact = cell.case.oracle(sets[0])
    entries: dict[str, dict] = {}
    calls: dict[str, Call] = {}
    for c in taking_part:
        entry = entries[c.name] = {"kind": c.kind} | ({"note": c.note} if c.note else {})
        try:
            with timing.threads(c.threads):
                right = c.exact(sets[0]) if c.exact else exact
                entry["errors"] = gate.check(c.name, c.loss, sets[0], right, c.value)
            calls[c.name] = passes.call(cell.of, c.loss, sets, c.threads)
        except Exception as error:  # wrong, out of memory, no compiler: a fact about the contender
            entry["error"] = f"{type(error).__name__}: {error}"
    return entries, calls


def floors(cell: Cell, device: str, n_sets: int) -> dict[str, Call]:
    """A copy of the minimal bytes, as cold as the contenders are, on one thread too, and the least a call can be."""
    found = {LAUNCH: Call(empty_launch(device))}
    moved = minimal_bytes(cell)
    if moved is not None:
        found[COPY] = Call(rotation.copies(moved, n_sets, device))
        if device == "cpu" and "one-thread" in cell.who and torch.get_num_threads() > 1:
            found[COPY + ONE_THREAD] = found[COPY]._replace(threads=1)
    return found


def empty_launch(device: str) -> Callable[[int], object]:
    """CUDA: a kernel that does nothing. CPU: an operator that computes nothing."""
    if device == "cuda":
        return lambda _: torch.cuda._sleep(0)
    return lambda _: torch.empty(0)


def failures_of(run: dict) -> list[str]:
    """What makes the exit status non-zero: a wrong result, or an implementation of ours that did not run."""
    return run["failures"] + [
        f"{cell['op']} {cell['objective']} {cell['shape']}, {cell['of']}: {name}: {entry['error']}"
        for cell in run["cells"]
        for name, entry in cell["contenders"].items()
        if "error" in entry and (entry["kind"] == OURS or gate.WrongResult.__name__ in entry["error"])
    ]
