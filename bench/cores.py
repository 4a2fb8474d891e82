"""Whether the cores reach memory each by a way of its own. The host of a virtual machine decides, and again any minute:
cores that it puts on one last cache share that cache's link to memory, and copy hardly faster than one of them."""

import time

import torch

from . import timing

APART = 1.5  # a copy on all cores is this many times as fast as on one
COPIED_BYTES = 64 << 20
COPIES = 3  # the best of so many
PAUSE_SECONDS = 0.5


def speedup_of_copy() -> float:
    """How many times faster a copy is on all of PyTorch's threads than on one."""
    source = torch.ones(COPIED_BYTES // 4)
    sink = torch.ones_like(source)
    best = {}
    for count in (None, 1):
        with timing.threads(count):
            copy = timing.Call(lambda _: sink.copy_(source))
            best[count] = min(timing.batch_seconds(copy, 1, "cpu") for _ in range(COPIES))
    return best[1] / best[None]


def wait(seconds: float) -> bool:
    """Until the cores are apart, at most so many seconds; whether they are."""
    until = time.monotonic() + seconds
    while not (apart := speedup_of_copy() >= APART) and time.monotonic() < until:
        time.sleep(PAUSE_SECONDS)
    return apart
