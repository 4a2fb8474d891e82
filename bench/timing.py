"""Interleaved timing: contenders take turns round by round, so that a slow minute of the machine hits them all.

A sample is the mean time of one call over a batch of calls long enough for the clock. On a GPU the batch lies between
two CUDA events, so that a sample is the larger of the device's time and the host's; a replayed CUDA graph shows the
device alone.

There are 40 rounds. A contender that is cheap enough runs in each; one that would use up more than its share of the
time runs in every second, fourth or eighth, hence at least 5 times, spread over the whole run. Ratios pair each sample
of the one that ran less often with the median of the other's samples from the same stretch of rounds, and are the
median of those: what disturbed a stretch disturbed both sides of its ratio.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

SAMPLE_SECONDS = {"cpu": 4e-3, "cuda": 2e-3}
SHORT_CALL_SECONDS = 0.05
WARM_SECONDS = 10e-3  # before a sample: clocks, caches and threads forget the contender before
MAX_CALLS = 512
ROUNDS, STRIDES = 40, (1, 2, 4, 8)


class Call(NamedTuple):
    """``step(i)`` is timed, i the number of the call, so that it can rotate through inputs.

    With ``prepare``, ``step(prepare(i))`` is: every call is then timed by itself and its preparation is not.
    """

    step: Callable
    prepare: Callable[[int], object] | None = None
    threads: int | None = None  # of PyTorch, while it runs; None: as many as the others


class Samples(NamedTuple):
    """Seconds of a call; sample j was taken in round ``j · stride``, the mean over ``calls`` calls."""

    seconds: list[float]
    stride: int = 1
    calls: int = 1


def batch_seconds(call: Call, n_calls: int, device: str, first: int = 0) -> float:
    """Seconds of one call, the mean of ``n_calls``; the first has number ``first``."""
    numbers = range(first, first + n_calls)
    if call.prepare is None:
        return _elapsed(lambda: _run(call.step, numbers), device) / n_calls
    total = 0.0
    for i in numbers:
        state = call.prepare(i)
        total += _elapsed(lambda state=state: call.step(state), device)
    return total / n_calls


def _run(step: Callable[[int], object], numbers: range) -> None:
    for i in numbers:
        step(i)


def _elapsed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def calls_per_sample(call: Call, device: str) -> tuple[int, float]:
    """How many calls make a sample, and the seconds of one, after warming up."""
    with threads(call.threads):
        batch_seconds(call, 1, device)
        seconds = batch_seconds(call, 1, device, first=1)
        if seconds < SHORT_CALL_SECONDS:
            seconds = min(seconds, batch_seconds(call, 1, device, first=2))
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS[device] / max(seconds, 1e-7)))), seconds


def calls_to_warm(seconds: float) -> int:
    """Untimed ones before a sample."""
    return 0 if seconds >= SHORT_CALL_SECONDS else max(1, min(MAX_CALLS, round(WARM_SECONDS / seconds)))


def stride_for(sample_seconds: float, share: float) -> int:
    """The smallest stride with which a contender's samples take no more than its share of the time, or the largest."""
    for stride in STRIDES:
        if ROUNDS // stride * sample_seconds <= share:
            return stride
    return STRIDES[-1]


def interleaved(calls: dict[str, Call], device: str, seconds: float) -> dict[str, Samples]:
    """Name -> samples, in some ``seconds``, unless the fewest samples of a contender take longer."""
    n_calls, one = {}, {}
    for name, call in calls.items():
        n_calls[name], one[name] = calls_per_sample(call, device)
    share = seconds / max(1, len(calls))
    warm = {name: calls_to_warm(one[name]) for name in calls}
    strides = {name: stride_for((warm[name] + n_calls[name]) * one[name], share) for name in calls}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    with no_garbage_collection():
        for turn in range(ROUNDS):
            shuffle(order)  # nobody always runs after the same neighbour
            for name in order:
                if turn % strides[name]:
                    continue
                call, first = calls[name], len(taken[name]) * n_calls[name]
                with threads(call.threads):
                    if warm[name]:
                        batch_seconds(call, warm[name], device, first - warm[name])
                    taken[name].append(batch_seconds(call, n_calls[name], device, first))
    return {name: Samples(taken[name], strides[name], n_calls[name]) for name in calls}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median(seconds: Iterable[float]) -> float:
    return statistics.median(seconds)


def spread(seconds: Iterable[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    ordered = list(seconds)
    if len(ordered) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return (high - low) / 2 / middle


def ratio(slow: Samples, fast: Samples) -> float:
    """How many times faster: the median over stretches of rounds of the ratio of medians within a stretch."""
    stretch = max(slow.stride, fast.stride)
    sides = [_stretches(samples, stretch) for samples in (slow, fast)]
    return statistics.median(a / b for a, b in zip(*sides, strict=True))


def _stretches(samples: Samples, rounds: int) -> list[float]:
    per = rounds // samples.stride
    seconds = samples.seconds
    return [statistics.median(seconds[i : i + per]) for i in range(0, len(seconds), per)]


def geometric_mean(ratios: Iterable[float]) -> float:
    return statistics.geometric_mean(ratios)
