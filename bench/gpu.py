"""Everything that only a GPU can prove, in one command, each part within its share of the time:

1. the tests marked gpu: the case table through Triton and CUDA on the device;
2. compute-sanitizer over every CUDA kernel;
3. the benchmark, which writes bench/results/<device>.json, .md, .html and plots.

    python -m mtkd_fast.bench.gpu [--budget SECONDS] [--out FOLDER]        from the root of the repository

A part that fails does not stop the next; the exit status says whether any did. What was left out is said.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mtkd_fast import dispatch

from . import grid, machine, report, runner

BUDGET_SECONDS = 420.0  # the build before it takes the rest of nine minutes
SHARES = {"tests": 0.40, "sanitizer": 0.45}  # of the time that is left when the part begins; the benchmark has the rest
RESERVE_SECONDS = 25.0  # a benchmark that has started its last shape ends within this
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FAILED = 86  # the exit status that compute-sanitizer is told to give for what it finds
TAIL_LINES = 25


class Outcome(NamedTuple):
    part: str
    state: str  # "passed", "failed", "skipped" or "out of time"
    detail: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.state in ("failed", "out of time")

    def __str__(self) -> str:
        return f"{self.part}: {self.state} ({self.detail}) in {self.seconds:.0f} s"


class Part(NamedTuple):
    """A command under way."""

    name: str
    process: subprocess.Popen
    log: Path
    started: float


def start(name: str, command: list[str], folder: Path, **environment: str) -> Part:
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    return Part(name, process, log, time.monotonic())


def finish(part: Part, deadline: float) -> Outcome:
    """Waits until ``deadline`` (of the monotonic clock), then kills; the last line of the log is the detail."""
    try:
        status = part.process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(part.process.pid, 9)
        part.process.wait()
        status = None
    seconds = time.monotonic() - part.started
    lines = part.log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if status != 0:
        print(f"--- {part.name}, the end of its output ---", *lines[-TAIL_LINES:], sep="\n")
    state = "out of time" if status is None else "passed" if status == 0 else "failed"
    return Outcome(part.name, state, lines[-1].strip(" ="), seconds)


def tests(folder: Path, deadline: float) -> list[Outcome]:
    """The tests of the device; the others need none."""
    if not Path("tests").is_dir():
        return [Outcome("tests", "failed", "no tests/ here: run this from the root of the repository")]
    command = [*machine.PYTHON, "-m", "pytest", "tests", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time is Triton compiling
    return [finish(start("tests", command, folder), deadline)]


def sanitizers(folder: Path, deadline: float) -> list[Outcome]:
    """All four tools at once: they wait for the host most of the time."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{cuda_home()}/bin")
    if tool is None:
        return [Outcome("compute-sanitizer", "skipped", "it is neither on the PATH nor in the CUDA toolkit")]
    if dispatch._C is None or not dispatch._C.cuda:
        return [Outcome("compute-sanitizer", "skipped", "mtkd_fast is built without CUDA")]
    parts = []
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_FAILED), "--target-processes", "all"]
        if name != "initcheck":  # which must see every write, torch's too
            command += ["--kernel-name", "kns=mtkd_fast"]  # the namespace, in the mangled name
        command += [*machine.PYTHON, "-m", "mtkd_fast.bench.sanitize", "cuda"]
        # Without torch's cache every tensor is its own allocation, so that a step beyond it is seen.
        parts.append(start(f"compute-sanitizer {name}", command, folder, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return [finish(part, deadline) for part in parts]


def cuda_home() -> str:
    return os.environ.get("CUDA_HOME", "/usr/local/cuda")


def benchmark(budget: float, keep: Callable[[dict], object]) -> tuple[list[Outcome], dict]:
    started = time.monotonic()
    cells, effort = grid.gpu(), runner.Effort(runner.CELL_SECONDS["cuda"])
    run = runner.run("cuda", cells, effort, budget=max(0.0, budget - RESERVE_SECONDS), keep=keep, what="full")
    failed = runner.failures_of(run)
    detail = f"{len(run['cells'])} cells, {len(run['dropped'])} dropped, {len(failed)} failed"
    state = "failed" if failed or not run["cells"] else "passed"
    for failure in failed:
        print("FAILED:", failure)
    return [Outcome("benchmark", state, detail, time.monotonic() - started)], run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device; torch finds none", file=sys.stderr)
        return 2
    started = time.monotonic()
    end = started + options.budget
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as logs:
        for name, part in (("tests", tests), ("sanitizer", sanitizers)):
            now = time.monotonic()
            outcomes += part(Path(logs), now + SHARES[name] * (end - now))
            print(*outcomes, sep="\n", flush=True)
    device = machine.slug("cuda")
    measured, run = benchmark(end - time.monotonic(), lambda so_far: report.write_json(so_far, options.out, device))
    return conclude(outcomes + measured, run, options.out, device)


def conclude(outcomes: list[Outcome], run: dict, out: Path, name: str) -> int:
    """Writes and prints; 1 where a part failed."""
    run["parts"] = [outcome._asdict() for outcome in outcomes]
    print(report.text(run))
    print("wrote", *report.write(run, out, name))
    print(*outcomes, sep="\n")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
