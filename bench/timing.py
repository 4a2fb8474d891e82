"""Interleaved timing: in every round each contender runs once, so that a slow minute of the machine hits them all.

A sample is the mean time of one call over a batch of calls long enough for the clock. On a GPU the batch lies between
two CUDA events, so that a sample is the larger of the device's time and the host's; a replayed CUDA graph shows the
device alone.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

Call = Callable[[int], object]  # given the number of the call, so that it can rotate through inputs
SAMPLE_SECONDS = {"cpu": 4e-3, "cuda": 2e-3}
SHORT_CALL_SECONDS = 0.05
MAX_CALLS = 512


def batch_seconds(call: Call, n_calls: int, device: str) -> float:
    """Seconds of one call, the mean of ``n_calls`` in a row."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(n_calls):
            call(i)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / n_calls
    begin = time.perf_counter()
    for i in range(n_calls):
        call(i)
    return (time.perf_counter() - begin) / n_calls


def calls_per_sample(call: Call, device: str) -> tuple[int, float]:
    """How many calls make a sample, and the seconds of one, after warming up."""
    call(0)
    seconds = min(batch_seconds(call, 1, device) for _ in range(2))
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS[device] / max(seconds, 1e-7)))), seconds


def interleaved(calls: dict[str, Call], device: str, budget: float, least: int = 5, most: int = 40) -> dict[str, list]:
    """Seconds of a call, name -> samples; ``least`` to ``most`` rounds, as many as ``budget`` seconds allow."""
    n_calls, seconds = {}, {}
    for name, call in calls.items():
        n_calls[name], seconds[name] = calls_per_sample(call, device)
    short = {name for name, s in seconds.items() if s < SHORT_CALL_SECONDS}
    round_seconds = sum(n_calls[name] * s for name, s in seconds.items())
    rounds = max(least, min(most, int(budget / max(round_seconds, 1e-6))))
    samples: dict[str, list] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    with no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)  # nobody always runs after the same neighbour
            for name in order:
                if name in short:
                    calls[name](0)  # untimed: the neighbour's threads go to sleep, ours wake up
                samples[name].append(batch_seconds(calls[name], n_calls[name], device))
    return samples


@contextmanager
def no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median(samples: Iterable[float]) -> float:
    return statistics.median(samples)


def spread(samples: Iterable[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    ordered = list(samples)
    if len(ordered) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return (high - low) / 2 / middle


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds of the ratio within a round, where both saw the same machine."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def geometric_mean(ratios: Iterable[float]) -> float:
    return statistics.geometric_mean(ratios)
