"""The emulated device: its libraries, the buffers that a launch may touch, the order of its threads."""

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from emulator.build import KERNELS, shared_library

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2, "warp by warp": 3, "last warp first": 4}
SHARED_MEMORY = 227 * 1024  # of a block, on sm_90
CLUSTER_LIMIT = 16  # blocks


class EmulatorError(RuntimeError):
    """A launcher refused, or a kernel did what no CUDA kernel may."""


@functools.cache
def library(*sources: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(shared_library(*(sources or KERNELS))))
    lib.emulator_add_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    lib.emulator_traffic.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64)]
    lib.emulator_set_order.argtypes = [ctypes.c_int, ctypes.c_uint]
    lib.emulator_sectors.restype = ctypes.c_int64
    lib.emulator_set_shared_memory(SHARED_MEMORY)
    lib.emulator_set_cluster_limit(CLUSTER_LIMIT)
    return lib


@contextmanager
def use_order(order: str, seed: int = 0, lib: ctypes.CDLL | None = None) -> Iterator[None]:
    """The order in which the threads of a block take their turns."""
    lib = lib or library()
    lib.emulator_set_order(ORDERS[order], seed)
    try:
        yield
    finally:
        lib.emulator_set_order(ORDERS["forward"], 0)


@contextmanager
def _limit(what: str, limit: int, usual: int) -> Iterator[None]:
    set_limit = getattr(library(), f"emulator_set_{what}")
    set_limit(limit)
    try:
        yield
    finally:
        set_limit(usual)


def use_shared_memory(size: int) -> AbstractContextManager[None]:
    """As on a device with ``size`` bytes of shared memory to a block."""
    return _limit("shared_memory", size, SHARED_MEMORY)


def use_clusters(limit: int) -> AbstractContextManager[None]:
    """As on a device whose clusters have at most ``limit`` blocks; 1 before sm_90."""
    return _limit("cluster_limit", limit, CLUSTER_LIMIT)


def span(x: Tensor) -> int:
    """Bytes from the first element of a view to the end of its last."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


@contextmanager
def count_sectors() -> Iterator[None]:
    """Launches inside count the sectors of 32 bytes that warps touch: an access of a warp to a line of memory, alone.

    Lanes that skip an access of their warp fall out of step with it.
    """
    library().emulator_count_sectors(1)
    try:
        yield
    finally:
        library().emulator_count_sectors(0)


_traffic: dict[str, tuple[int, int]] = {}
_sectors: dict[str, int] = {}


def traffic() -> dict[str, tuple[int, int]]:
    """Bytes (loaded, stored) of each buffer in the last launch, by the name it was launched with."""
    return dict(_traffic)


def sectors() -> dict[str, int]:
    """Sectors touched in each buffer by the last launch, access by access."""
    return dict(_sectors)


def launch(
    name: str,
    arguments: ctypes.Structure | tuple,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
    lib: ctypes.CDLL | None = None,
) -> None:
    """Calls the launcher ``name``. It may read the inputs and outputs and write the outputs."""
    lib = lib or library()
    buffers = [(n, x, writable) for group, writable in ((outputs, 1), (inputs, 0)) for n, x in group.items()]
    buffers = [(n, x, writable) for n, x, writable in buffers if x is not None]
    lib.emulator_forget_buffers()
    for _, x, writable in buffers:
        lib.emulator_add_buffer(x.data_ptr(), span(x), writable)
    function = getattr(lib, name)
    function.restype = ctypes.c_char_p
    error = function(*(arguments if isinstance(arguments, tuple) else (ctypes.byref(arguments),)))
    _traffic.clear()
    _sectors.clear()
    for i, (n, _, _) in enumerate(buffers):
        loaded, stored = ctypes.c_int64(), ctypes.c_int64()
        lib.emulator_traffic(i, ctypes.byref(loaded), ctypes.byref(stored))
        _traffic[n] = (loaded.value, stored.value)
        _sectors[n] = lib.emulator_sectors(i)
    if error is not None:
        raise EmulatorError(error.decode())


def poisoned(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """An output before its kernel has run."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def poisoned_like(x: Tensor, layout: Tensor, wanted: bool) -> Tensor:
    """The gradient of x, in the layout of the student, before its kernel has run; empty where it is not wanted."""
    return torch.full_like(layout, float("nan"), dtype=x.dtype) if wanted else poisoned((0,), x.dtype)
