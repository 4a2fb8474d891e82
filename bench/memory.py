"""Peak extra memory of loss and gradient: everything beyond the inputs, the gradient included.

On a GPU: torch's own peak. On the CPU: the growth of the process's peak resident set (Linux's VmHWM) over one call, in
a fresh process whose malloc gives freed memory back at once, so that C++ scratch counts like tensors do. The call is
the first on its shape, after one on a few small rows, so that scratch which a thread keeps for the next call counts;
compiled code, whose first call compiles, is measured at its second. Linux counts pages in batches: see ``grain``.

    python -m mtkd_fast.bench.memory '{"op": "kd", "rows": 4096, "classes": 1000}' --threads 2 -- eager cpp
    prints {contender: bytes} as JSON
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import contenders, machine, ops
from .case import Case, Inputs, Loss

M_MMAP_THRESHOLD = -3  # mallopt(3): allocations of at least so many bytes get pages of their own
MMAP_BYTES = 32 << 10
THREAD_SCRATCH = 256 << 10  # a block of rows in its cache
CUDA_SLACK = 64 << 10  # counters, and an allocator that rounds up
CLEAR_REFS = Path("/proc/self/clear_refs")
TIMEOUT_SECONDS = 300


class NotMeasured(RuntimeError):
    """Why there is no number, rather than a guess."""


def grain() -> int:
    """Bytes that a reading on the CPU may be off: what the processors have counted and not yet told each other.

    A per-CPU counter of the kernel tells from ``max(32, 2·CPUs)`` pages on (lib/percpu_counter.c).
    """
    cpus = os.cpu_count() or 1
    return max(32, 2 * cpus) * cpus * os.sysconf("SC_PAGE_SIZE")


def slack(device: str) -> int:
    """Bytes that a case may take beside what its sizes explain: a block of rows a thread, and what a reading is off."""
    return CUDA_SLACK if device == "cuda" else torch.get_num_threads() * THREAD_SCRATCH + grain()


def peak_extra(case: Case, device: str, losses: dict[str, Loss]) -> dict[str, int]:
    """Contender -> bytes."""
    if device == "cuda":
        inputs = case.inputs(device)
        return {name: cuda_peak(loss, inputs) for name, loss in losses.items()}
    return _in_fresh_process(case, list(losses))


def step(loss: Loss, inputs: Inputs) -> None:
    loss(*inputs.fresh()).backward()


def cuda_peak(loss: Loss, inputs: Inputs) -> int:
    step(loss, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_fresh_process(case: Case, names: Sequence[str]) -> dict[str, int]:
    if not CLEAR_REFS.exists():
        raise NotMeasured("peak memory on the CPU is measured through Linux's /proc")
    threads = ("--threads", str(torch.get_num_threads()))
    command = [*machine.PYTHON, "-m", __name__, json.dumps(case.facts()), *threads, "--", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NotMeasured(f"peak memory of {case.title}: {said[-1]}") from error
    return json.loads(done.stdout.splitlines()[-1])


def warm(name: str, loss: Loss, case: Case, inputs: Inputs) -> None:
    step(loss, inputs if name.startswith(contenders.COMPILE) else case.few().inputs("cpu"))


def give_memory_back_at_once() -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def cpu_peak(loss: Loss, inputs: Inputs) -> int:
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
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("case", type=json.loads)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = ops.make(**options.case)
    inputs = case.inputs("cpu")
    losses = {c.name: c.loss for c in contenders.on(case, "cpu", options.names)[0]}
    for name, loss in losses.items():
        warm(name, loss, case, inputs)
    case.settle()
    give_memory_back_at_once()
    print(json.dumps({name: cpu_peak(loss, inputs) for name, loss in losses.items()}), file=sys.stdout)


if __name__ == "__main__":
    main()
