"""RKD's angle and distance losses with their gradient, against the form in which they were published.

python -m mtkd_fast.bench.relation [--quick] [--device cpu|cuda] [--out FOLDER]    writes relation-<machine>.json, .md
"""

import argparse
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import rkd_angle_loss, rkd_distance_loss

from . import contenders, correctness, machine, memory, report, timing
from .contenders import EAGER, Loss
from .problem import Problem
from .progress import bar

WIDTH = 512
BATCHES = {"cpu": (64, 256), "cuda": (64, 256, 1024)}  # on a CPU, 1024 keeps the float64 oracle busy for minutes
QUICK_BATCHES = (32,)
SECONDS, QUICK_SECONDS = 6.0, 0.3
TARGET, TARGET_BATCH = 20.0, {"cpu": 256, "cuda": 1024}  # times the published angle loss
LOSSES = {"angle": rkd_angle_loss, "distance": rkd_distance_loss}
TOLERANCE = 1e-4  # of loss and gradient, the latter relative to its largest element


class Job(NamedTuple):
    relation: str
    batch: int
    width: int = WIDTH

    def __str__(self) -> str:
        return f"{self.relation} B={self.batch} D={self.width}"


# The published forms (code: github.com/lenscloth/RKD), whose teacher has no gradient.


def published_angles(x: Tensor) -> Tensor:
    """The differences [B, B, D], normalised, and their products [B, B, B]."""
    unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
    return torch.bmm(unit, unit.transpose(1, 2))


def published_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    d = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.t()).clamp(min=1e-12).sqrt()
    d = d * ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return d / d[d > 0].mean()


def published(student: Tensor, teachers: list[Tensor], _, relation: str) -> Tensor:
    relations = published_angles if relation == "angle" else published_distances
    with torch.no_grad():
        target = relations(teachers[0])
    return F.smooth_l1_loss(relations(student), target)


def fused(student: Tensor, teachers: list[Tensor], _, relation: str, implementation: str) -> Tensor:
    return LOSSES[relation](student, teachers[0], implementation=implementation)


def make(job: Job, device: str) -> tuple[dict[str, Loss], list[str]]:
    """The contenders, and a sentence on each that would not fit."""
    losses: dict[str, Loss] = {}
    missing = []
    if published_bytes(job) < free_bytes(device) // 2:
        losses[EAGER] = partial(published, relation=job.relation)
    else:
        missing.append(f"{job}: {EAGER}, which needs some {published_bytes(job) >> 30} GiB")
    for name in contenders.implementations(device):
        if name != "reference":
            losses[name] = partial(fused, relation=job.relation, implementation=name)
    return losses, missing


def published_bytes(job: Job) -> int:
    """Differences, norms and units of student and teacher with the student's gradients; angles, errors, gradients."""
    of_angles = 6 * job.batch**2 * job.width + 5 * job.batch**3
    return 4 * (of_angles if job.relation == "angle" else 12 * job.batch**2)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def inputs_of(job: Job, device: str) -> Problem:
    g = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.randn(job.batch, job.width, device=device, generator=g) for _ in range(2))
    return Problem(student, [teacher], None)


def oracle(job: Job, inputs: Problem) -> tuple[float, Tensor]:
    """(loss, gradient) in float64 by autograd, the angles one vertex after another: the reference would not fit."""
    x, y = (p.double() for p in (inputs.student, inputs.teachers[0]))
    x.requires_grad_()
    if job.relation == "distance":
        loss = F.smooth_l1_loss(published_distances(x), published_distances(y))
        return loss.item(), torch.autograd.grad(loss, x)[0]
    s, t = x @ x.t(), y @ y.t()
    leaf, total = s.detach().requires_grad_(), 0.0
    for i in range(job.batch):
        loss = F.smooth_l1_loss(cosines_at(leaf, i), cosines_at(t, i)) / job.batch
        loss.backward()
        total += loss.item()
    return total, torch.autograd.grad(s, x, leaf.grad)[0]


def cosines_at(gram: Tensor, i: int) -> Tensor:
    """[B, B], at vertex i."""
    own, row = gram[i, i], gram[i]
    squared = gram.diagonal() + own - 2 * row
    vertex = torch.arange(len(gram), device=gram.device) == i
    inverse = torch.where(vertex, 0.0, torch.where(vertex, 1.0, squared).rsqrt())
    return (gram - row[:, None] - row[None] + own) * inverse[:, None] * inverse[None]


def check(name: str, loss: Loss, inputs: Problem, exact: tuple[float, Tensor]) -> dict[str, float]:
    """Raises WrongResult, or returns the two errors that were found."""
    exact_loss, exact_gradient = exact
    leaf = inputs.leaf()
    value = loss(leaf, inputs.teachers, None)
    value.backward()
    errors = {
        "loss": abs(value.item() - exact_loss) / abs(exact_loss),
        "gradient": ((leaf.grad.double() - exact_gradient).abs().max() / exact_gradient.abs().max()).item(),
    }
    for what, error in errors.items():
        if not error <= TOLERANCE:  # a NaN is no pass
            raise correctness.WrongResult(f"{name}: relative error of the {what} {error:.1e}, allowed {TOLERANCE:.1e}")
    return errors


def measure(job: Job, device: str, losses: dict[str, Loss], seconds: float) -> dict:
    """Correctness, then time, then memory."""
    inputs = inputs_of(job, device)
    exact = oracle(job, inputs)
    entries: dict[str, dict] = {name: {"errors": check(name, loss, inputs, exact)} for name, loss in losses.items()}
    calls = {name: lambda _, loss=loss: memory.step(loss, inputs) for name, loss in losses.items()}
    for name, samples in timing.interleaved(calls, device, seconds).items():
        entries[name]["seconds"] = samples
    for name, loss in losses.items():
        peak = memory.cuda_peak(loss, inputs) if device == "cuda" else cpu_peak(job, name)
        if peak is not None:
            entries[name]["peak_extra_bytes"] = peak
    return {
        "work": job.relation,
        "shape": f"B={job.batch} D={job.width}",
        "batch": job.batch,
        "gradient_bytes": 4 * job.batch**2,  # the unit of memory: one B×B matrix
        "default": contenders.default_implementation(inputs.student),
        "contenders": entries,
    }


def cpu_peak(job: Job, name: str) -> int | None:
    """In a fresh process, as bench/memory.py does; None where it cannot be measured."""
    if not memory.CLEAR_REFS.exists():
        return None
    command = [*machine.PYTHON, "-m", "mtkd_fast.bench.relation", "--peak", name, *map(str, job)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=memory.TIMEOUT_SECONDS, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(name: str, relation: str, batch: str, width: str) -> None:
    job = Job(relation, int(batch), int(width))
    loss = make(job, "cpu")[0][name]
    memory.step(loss, inputs_of(Job(relation, 8), "cpu"))
    multiply_matrices(job)
    memory.give_memory_back_at_once()
    print(json.dumps(memory.cpu_peak(loss, inputs_of(job, "cpu"))))


def multiply_matrices(job: Job) -> None:
    """PyTorch's products of the job's sizes: the packing buffers of its BLAS, some 3 MB, stay with the process."""
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(job.batch, job.width, dtype=dtype)
        (x @ x.t()) @ x


def run(device: str, todo: list[Job], seconds: float) -> dict:
    found = {"machine": machine.facts(device), "dropped": [], "results": []}
    for job in bar(todo, f"relation on {device}"):
        losses, missing = make(job, device)
        found["dropped"] += missing
        found["results"].append(measure(job, device, losses, seconds))
    return found


def sentences(found: dict, device: str) -> list[str]:
    """How many times faster than the published form, and the target, met or missed."""
    lines = []
    for result in found["results"]:
        ratio = report.speedup(result, result["default"], EAGER)
        if ratio is None:
            continue
        line = f"{result['work']} {result['shape']}: {ratio:.1f}x the published form"
        if result["work"] == "angle" and result["batch"] == TARGET_BATCH[device]:
            line += f"; target {TARGET:g}x, {'met' if ratio >= TARGET else 'missed'}"
        lines.append(line)
    return lines


HEADER = ("loss", "shape", "who", "ms", "±%", "vs eager", "peak MB", "in B²")
NOTES = (
    "Loss and gradient, float32. Medians of interleaved rounds; ± is half the distance of the quartiles; ratios are "
    "taken within a round. Eager is the published form: B×B×D differences and B×B×B angles, or a float32 Gram matrix. "
    "Peak is the memory beyond the inputs, on the right in units of one B×B matrix of float32; the packing buffers of "
    "PyTorch's matrix products, which a process keeps, were there before."
)


def rows(results: list[dict]) -> list[list[str]]:
    """Those of report.py, without its columns on compiled code and on a copy."""
    return [row[:6] + row[8:] for row in report.rows(results)]


def write(found: dict, device: str, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# Relations, {found['machine']['device']}", "", report.machine_line(found["machine"]), "", NOTES, ""]
    lines += [f"- {line}" for line in sentences(found, device)] + [f"- not measured: {x}" for x in found["dropped"]]
    lines += ["", report.table(HEADER, rows(found["results"]), report.HEADER_WORDS, markdown=True), ""]
    paths[1].write_text("\n".join(lines))
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.relation", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small batch, seconds rather than minutes")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON and the table")
    parser.add_argument("--peak", nargs=4, metavar=("WHO", "LOSS", "B", "D"), help="print the bytes of one, on the CPU")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(*options.peak)
        return
    todo = [Job(name, b) for b in (QUICK_BATCHES if options.quick else BATCHES[options.device]) for name in LOSSES]
    found = run(options.device, todo, QUICK_SECONDS if options.quick else SECONDS)
    print(report.machine_line(found["machine"]))
    print(report.table(HEADER, rows(found["results"]), report.HEADER_WORDS))
    print(*sentences(found, options.device), *(f"not measured: {x}" for x in found["dropped"]), sep="\n")
    name = f"relation-{machine.slug(options.device)}" + ("-quick" if options.quick else "")
    print("wrote", *write(found, options.device, options.out, name))


if __name__ == "__main__":
    main()
