"""Which implementation runs: a function of the device, the dtype and what is built. Nothing falls back silently."""

import importlib.util
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mtkd_fast import schemas  # noqa: F401  (the ops must be declared before the extension adds to them)

try:
    from mtkd_fast import _C
except ImportError as error:
    if importlib.util.find_spec("mtkd_fast._C") is not None:
        raise ImportError(
            "mtkd_fast._C is there but does not load; rebuild it with: pip install --no-build-isolation -e ."
        ) from error
    _C = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # fixed when a Triton kernel is decorated, so read once
NAMES = ("cpp", "triton", "reference")
FUSED_DIVERGENCES = (  # every fused implementation has a kernel for them; others are the reference's
    "forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "dkd",
)  # fmt: skip
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Implementation(NamedTuple):
    """Where an implementation runs, and a sentence on how, or why not elsewhere."""

    devices: tuple[str, ...]
    note: str


def implementations() -> dict[str, Implementation]:
    """What runs here, and for what does not, why not.

    >>> import mtkd_fast
    >>> mtkd_fast.implementations()["reference"].devices
    ('cpu', 'cuda')
    """
    return dict(_AVAILABLE)


def _cpp() -> Implementation:
    if _C is None:
        return Implementation((), "not built: reinstall with MTKD_FAST_BUILD=cpu or cuda (needs g++)")
    on_cpu = f"CPU code for {_C.cpu_capability()}"
    if _C.cuda:
        return Implementation(("cpu", "cuda"), f"{on_cpu}; CUDA code for {_C.cuda_architectures}")
    return Implementation(("cpu",), f"{on_cpu}; built without CUDA")


def _triton() -> Implementation:
    if not HAS_TRITON:
        return Implementation((), "triton is not installed (it exists for Linux only)")
    if INTERPRETED:
        return Implementation(("cpu", "cuda"), "in Triton's interpreter (TRITON_INTERPRET=1)")
    return Implementation(("cuda",), "CPU tensors need TRITON_INTERPRET=1 before the import")


_AVAILABLE = {
    "cpp": _cpp(),
    "triton": _triton(),
    "reference": Implementation(("cpu", "cuda"), "plain PyTorch, any device, double backward"),
}


def choose(implementation: str | None, *tensors: Tensor, divergence: str | None = None) -> str:
    """The name of the implementation that runs on these tensors (all on one device)."""
    device = tensors[0].device.type
    if implementation is None:
        return _best(device, tensors, divergence)
    if implementation not in NAMES:
        raise ValueError(f"implementation must be one of {', '.join(map(repr, NAMES))} or None, got {implementation!r}")
    reason = _why_not(implementation, device, tensors, divergence)
    if reason:
        raise ValueError(f"implementation={implementation!r} cannot run on {device} tensors: {reason}")
    return implementation


def _why_not(implementation: str, device: str, tensors: tuple[Tensor, ...], divergence: str | None) -> str | None:
    if implementation == "reference":
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives need implementation='reference'"
    if divergence is not None and divergence not in FUSED_DIVERGENCES:
        return f"divergence={divergence!r} has no fused kernel"
    available = _AVAILABLE[implementation]
    if device not in available.devices:
        return available.note
    if device == "cuda" or implementation == "triton":
        for x in tensors:
            if x.dtype not in GPU_DTYPES:
                return f"its GPU kernels take float32, bfloat16 and float16, got {x.dtype}"
    return None


def _best(device: str, tensors: tuple[Tensor, ...], divergence: str | None) -> str:
    """CPU: C++. GPU: Triton, until measurements say otherwise. The reference elsewhere, with a warning on a GPU."""
    for implementation in ("cpp",) if device == "cpu" else ("triton", "cpp"):
        if _why_not(implementation, device, tensors, divergence) is None:
            return implementation
    if device != "cpu":
        _warn_reference(device)
    return "reference"


def _warn_reference(device: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"mtkd_fast runs the plain PyTorch reference on {device} tensors; "
            "mtkd_fast.implementations() says why the fused kernels do not",
            stacklevel=5,
        )
