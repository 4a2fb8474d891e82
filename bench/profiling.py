"""One case under PyTorch's profiler: a trace for chrome://tracing or Perfetto, with ranges around what was asked for.

On CUDA the ranges are NVTX ranges too, which Nsight Systems shows.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from . import contenders, rotation
from .case import Case, Inputs
from .contenders import Contender
from .kernel_time import activities

WARM_CALLS, CALLS = 3, 5
TABLE_ROWS = 15


def trace(case: Case, device: str, who: tuple[str, ...], folder: Path) -> list[tuple[str, Path, str]]:
    """(contender, the trace that was written, the operators that took longest), one a contender."""
    folder.mkdir(parents=True, exist_ok=True)
    taking_part, missing = contenders.on(case, device, who)
    if not taking_part:
        known = [c.name for c in contenders.on(case, device)[0]]
        reasons = "".join(f"; {m.name}: {m.why}" for m in missing)
        raise ValueError(f"who must be of {', '.join(known)} on {case.title}, got {', '.join(who)}{reasons}")
    sets = rotation.sets(case, device)
    return [(c.name, *_trace(c, case, device, sets, folder)) for c in taking_part]


def _trace(contender: Contender, case: Case, device: str, sets: list[Inputs], folder: Path) -> tuple[Path, str]:
    for i in range(WARM_CALLS):
        contender.loss(*sets[i % len(sets)].fresh()).backward()
    with profile(activities=activities(device), record_shapes=True, profile_memory=True) as seen:
        for i in range(CALLS):
            arguments = sets[i % len(sets)].fresh()
            with named(f"{contender.name} forward", device):
                loss = contender.loss(*arguments)
            with named(f"{contender.name} backward", device):
                loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    path = folder / f"{file_name(f'{case.title} {contender.name} {device}')}.trace.json"
    seen.export_chrome_trace(str(path))
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return path, seen.key_averages().table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=60)


@contextmanager
def named(name: str, device: str):
    """A range in the profiler's trace, and on CUDA in NVTX."""
    with record_function(name):
        if device == "cuda":
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.nvtx.range_pop()


def file_name(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("×", "x")).strip("-")
