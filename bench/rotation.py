"""Fresh inputs: a large case rotates through sets of them, so that none is in the last cache; a small one is warm.

A batch of 256 rows of 100 classes comes out of the layer before it and lies in the cache when the loss begins; the
logits of a language model do not. So what takes more than a quarter of the last cache is measured cold: between two
uses of one set of inputs others of at least twice the cache go by.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from .case import Case, Inputs

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 << 20  # where the system does not say: the last cache of a common server
LARGE_SHARE = 4  # of the last cache, the inverse
TIMES_CACHE = 2


def cache_bytes(device: str) -> int:
    """Of the last cache: the L3 of the CPU that we run on, the L2 of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [_bytes(path.read_text()) for path in CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def _bytes(size: str) -> int:
    """ "32768K" -> bytes."""
    size = size.strip()
    unit = {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
    return int(size.rstrip("KMG")) << unit


def is_cold(case: Case, cache: int) -> bool:
    return case.minimal_bytes() * LARGE_SHARE > cache


def n_sets(case: Case, cache: int) -> int:
    """Sets of inputs to rotate through: one, and for a cold case others that read twice the cache."""
    if not is_cold(case, cache):
        return 1
    return 1 + -(-TIMES_CACHE * cache // case.minimal_bytes(gradient=False))


def sets(case: Case, device: str) -> list[Inputs]:
    """Each drawn by itself."""
    return [case.inputs(device, seed) for seed in range(n_sets(case, cache_bytes(device)))]


def copies(n_bytes: int, count: int, device: str) -> Callable[[int], object]:
    """Call i copies ``n_bytes``, half of them read and half written, in pair i of ``count`` pairs of buffers."""
    n_elements = max(1, n_bytes // 8)  # of float32, half the bytes
    pairs = [(torch.full((n_elements,), 1.0, device=device), torch.zeros(n_elements, device=device).add_(1.0))
             for _ in range(count)]  # fmt: skip

    def call(i: int) -> None:
        source, sink = pairs[i % count]
        sink.copy_(source)

    return call
