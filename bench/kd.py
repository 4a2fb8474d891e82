"""The benchmark of the op kd: mtkd_fast, eager PyTorch, torch.compile and the copy floor, side by side in one run.

python -m mtkd_fast.bench.kd [--quick] [--device cpu|cuda] [--budget SECONDS] [--out FOLDER]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import contenders, correctness, machine, memory, problem, report, shapes, timing
from .contenders import Loss
from .problem import Problem
from .progress import bar
from .shapes import Shape
from .timing import Call

SHAPE_SECONDS = {"cpu": 8.0, "cuda": 2.0}  # of timing, for one work on one shape
QUICK_SECONDS = 0.5


class Work(NamedTuple):
    objective: str
    gradient: bool = True
    graph: bool = False  # replay of a CUDA graph

    def __str__(self) -> str:
        return self.objective + ("" if self.gradient else " forward") + (" graph" if self.graph else "")


class Job(NamedTuple):
    work: Work
    shape: Shape

    def __str__(self) -> str:
        return f"{self.work} {self.shape}"


def jobs(device: str, quick: bool) -> list[Job]:
    """In the order of what a run short of time should keep."""
    works = [Work("confidence")] if quick else [Work("confidence"), Work("uniform"), Work("confidence", gradient=False)]
    found = [Job(work, shape) for work in works for shape in shapes.for_device(device, quick)]
    if device == "cuda":
        launches = [job.shape for job in found if job.work == works[0] and job.shape in shapes.GPU_SMALL]
        after = sum(job.work == works[0] for job in found)
        found[after:after] = [Job(Work("confidence", graph=True), shape) for shape in launches]
    return found


def measure(job: Job, device: str, losses: dict[str, Loss], seconds: float) -> dict:
    """Correctness, then time, then memory; a contender that is wrong or cannot run is there with the reason."""
    work, shape = job
    inputs = [problem.make(shape, device, seed) for seed in range(shapes.cold_sets(shape, device))]
    exact = correctness.oracle(inputs[0], work.objective)
    entries: dict[str, dict] = {}
    calls: dict[str, Call] = {}
    for name, loss in losses.items():
        try:
            entries[name] = {"errors": correctness.check(name, loss, inputs[0], exact)}
            calls[name] = as_call(loss, inputs, work)
        except Exception as error:  # wrong, out of memory, no compiler: a fact about the contender
            entries[name] = {"error": f"{type(error).__name__}: {error}"}
    del exact
    entries[report.FLOOR] = {}
    calls[report.FLOOR] = copy_call(shape.minimal_bytes(work.gradient), device)
    for name, samples in timing.interleaved(calls, device, seconds).items():
        entries[name]["seconds"] = samples
    if work.gradient and not work.graph:
        running = {name: loss for name, loss in losses.items() if name in calls}
        del calls, inputs
        for name, peak in memory.peak_extra(shape, device, running, work.objective).items():
            entries[name]["peak_extra_bytes"] = peak
    return {
        "work": str(work),
        "shape": str(shape),
        "rows": shape.rows,
        "classes": shape.classes,
        "teachers": shape.teachers,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gradient_bytes": shape.gradient_bytes,
        "minimal_bytes": shape.minimal_bytes(work.gradient),
        "default": contenders.default_implementation(torch.empty(1, 1, dtype=shape.dtype, device=device)),
        "contenders": entries,
    }


def as_call(loss: Loss, inputs: list[Problem], work: Work) -> Call:
    def with_gradient(i: int) -> None:
        p = inputs[i % len(inputs)]
        loss(p.leaf(), p.teachers, p.target).backward()

    def forward(i: int) -> None:
        p = inputs[i % len(inputs)]
        with torch.no_grad():
            loss(p.student, p.teachers, p.target)

    if work.graph:
        return graph_call(loss, inputs[0])
    return with_gradient if work.gradient else forward


def graph_call(loss: Loss, inputs: Problem) -> Call:
    """Loss and gradient captured once, replayed at every call: the device's time without the host's."""
    leaf = inputs.leaf()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(leaf, inputs.teachers, inputs.target), leaf)
    torch.cuda.current_stream().wait_stream(side)
    (plain,) = torch.autograd.grad(loss(leaf, inputs.teachers, inputs.target), leaf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(loss(leaf, inputs.teachers, inputs.target), leaf)
    captured.zero_()
    graph.replay()
    if not torch.allclose(captured, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item()):
        raise correctness.WrongResult("the replayed graph gives another gradient")

    def call(_: int, kept=(graph, captured)) -> None:  # the graph writes to ``captured``, which must stay alive
        graph.replay()

    return call


def copy_call(n_bytes: int, device: str) -> Call:
    """Moves ``n_bytes``, half of them read and half written."""
    source = torch.zeros(max(1, n_bytes // 8), device=device)
    sink = torch.empty_like(source)
    return lambda _: sink.copy_(source)


def run(
    device: str,
    todo: list[Job],
    seconds: float,
    budget: float | None = None,
    names: tuple[str, ...] | None = None,
    keep: Callable[[dict], object] = lambda so_far: None,
) -> dict:
    """Measures the jobs, ``seconds`` of timing each, until ``budget`` seconds are over.

    ``names`` are the contenders, all by default; ``keep`` is given what there is after every job.
    """
    started = time.monotonic()
    found = {"machine": machine.facts(device), "summary": [], "dropped": [], "failures": [], "results": []}
    for job in bar(todo, f"kd on {device}"):
        if budget is not None and time.monotonic() - started > budget:
            found["dropped"].append(f"{job} (out of time)")
            continue
        torch.compiler.reset()  # every shape compiles anew, and none meets the limit on recompilations
        try:
            losses = contenders.make(job.work.objective, device, names)
            found["results"].append(measure(job, device, losses, seconds))
        except Exception as error:  # the next job may still run; the exit status tells
            found["failures"].append(f"{job}: {type(error).__name__}: {error}")
        if device == "cuda":
            torch.cuda.empty_cache()
        found["summary"] = report.summary(found["results"], device)
        keep(found)
    return found


def failures_of(run: dict) -> list[str]:
    """What makes the exit status non-zero: a wrong result, or an implementation of ours that did not run."""
    ours = run["machine"]["implementations"]
    return run["failures"] + [
        f"{result['work']} {result['shape']}: {name}: {entry['error']}"
        for result in run["results"]
        for name, entry in result["contenders"].items()
        if "error" in entry and (name in ours or correctness.WrongResult.__name__ in entry["error"])
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.kd", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few small shapes, seconds rather than minutes")
    parser.add_argument("--budget", type=float, help="start no measurement after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON and the table")
    options = parser.parse_args(arguments)

    seconds = QUICK_SECONDS if options.quick else SHAPE_SECONDS[options.device]
    measured = run(options.device, jobs(options.device, options.quick), seconds, options.budget)
    print(report.machine_line(measured["machine"]))
    print(report.table(report.HEADER, report.rows(measured["results"]), report.HEADER_WORDS))
    print(*report.sentences(measured["summary"]), sep="\n")
    for what in measured["dropped"]:
        print("not measured:", what)
    name = machine.slug(options.device) + ("-quick" if options.quick else "")
    print("wrote", *report.write(measured, options.out, name))
    failed = failures_of(measured)
    for failure in failed:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
