"""Peak extra memory of loss and gradient: everything beyond the inputs, the gradient included.

On a GPU: torch's own peak. On the CPU: the growth of the process's peak resident set (Linux's VmHWM) over one call, in
a fresh process whose malloc gives freed memory back at once, so that C++ scratch counts like tensors do. The call is
the first on its shape, after one on a few small rows, so that scratch which a thread keeps for the next call counts;
compiled code, whose first call compiles, is measured at its second. Linux counts pages in batches: see ``grain``.

    python -m mtkd_fast.bench.memory 4096 1000 3 float32 confidence      prints {contender: bytes} as JSON
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import contenders, machine, problem
from .contenders import COMPILE, Loss
from .problem import Problem
from .shapes import Shape

M_MMAP_THRESHOLD = -3  # mallopt(3): allocations of at least so many bytes get pages of their own
MMAP_BYTES = 32 << 10
CLEAR_REFS = Path("/proc/self/clear_refs")
WARM_ROWS = 8
TIMEOUT_SECONDS = 300


def grain() -> int:
    """Bytes that a reading on the CPU may be off: what the processors have counted and not yet told each other.

    A per-CPU counter of the kernel tells from ``max(32, 2·CPUs)`` pages on (lib/percpu_counter.c).
    """
    cpus = os.cpu_count() or 1
    return max(32, 2 * cpus) * cpus * os.sysconf("SC_PAGE_SIZE")


def peak_extra(shape: Shape, device: str, losses: dict[str, Loss], objective: str) -> dict[str, int]:
    """Contender -> bytes. Nothing where it cannot be measured, rather than a guess."""
    if device == "cuda":
        inputs = problem.make(shape, device)
        return {name: cuda_peak(loss, inputs) for name, loss in losses.items()}
    return _in_fresh_process(shape, objective, list(losses))


def step(loss: Loss, inputs: Problem) -> None:
    loss(inputs.leaf(), inputs.teachers, inputs.target).backward()


def cuda_peak(loss: Loss, inputs: Problem) -> int:
    step(loss, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_fresh_process(shape: Shape, objective: str, names: list[str]) -> dict[str, int]:
    if not CLEAR_REFS.exists():
        return {}
    dtype = str(shape.dtype).removeprefix("torch.")
    arguments = [str(x) for x in (shape.rows, shape.classes, shape.teachers, dtype, objective)]
    command = [*machine.PYTHON, "-m", __name__, *arguments, "--threads", str(torch.get_num_threads()), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"peak memory of {shape} not measured: {said[-1]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def warm(name: str, loss: Loss, shape: Shape, inputs: Problem) -> None:
    few = Shape(WARM_ROWS, min(shape.classes, 100), shape.teachers, shape.dtype)
    step(loss, inputs if name.startswith(COMPILE) else problem.make(few, "cpu"))


def give_memory_back_at_once() -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def cpu_peak(loss: Loss, inputs: Problem) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak is forgotten: VmHWM is VmRSS again
    before = _status("VmRSS")
    step(loss, inputs)
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def main() -> None:
    rows, classes, teachers, dtype, objective, _, threads, *names = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape = Shape(int(rows), int(classes), int(teachers), getattr(torch, dtype))
    inputs = problem.make(shape, "cpu")
    losses = contenders.make(objective, "cpu", names)
    for name, loss in losses.items():
        warm(name, loss, shape, inputs)
    give_memory_back_at_once()
    print(json.dumps({name: cpu_peak(loss, inputs) for name, loss in losses.items()}))


if __name__ == "__main__":
    main()
