"""The time inside kernels, apart from the wall: what PyTorch's profiler sees of one call.

CUDA: the device's time. CPU: the time inside operators, calls from one to the next taken out, all that autograd, Python
and torch.compile's guards do around them left out.
"""

import os

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import Call, threads

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr whenever it starts
AROUND = ("autograd::engine", "Torch-Compiled Region", "TorchDynamo", "AOTDispatcher", "ProfilerStep", "Pregraph")


def activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])


def kernel_seconds(call: Call, device: str, n_calls: int) -> float:
    """Of one call, the mean of ``n_calls``; the profiler's own cost is in it, some 1 µs an operator."""
    with threads(call.threads):
        call.step(call.prepare(0) if call.prepare else 0)  # what ran before was someone else's
        prepared = [call.prepare(i) if call.prepare else i for i in range(n_calls)]
        with profile(activities=activities(device)) as seen:
            for state in prepared:
                call.step(state)
            if device == "cuda":
                torch.cuda.synchronize()
    events = seen.key_averages()
    if device == "cuda":
        kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        microseconds = sum(e.self_device_time_total for e in kernels)
    else:
        microseconds = sum(e.self_cpu_time_total for e in events if not e.key.startswith(AROUND))
    return microseconds * 1e-6 / n_calls
