"""The CUDA kernels of csrc/ on a CPU: a grid of fibers, behind the functions of mtkd_fast.kernels.kd (and .hint).

    import emulator
    row_loss, row_stats, gradient = emulator.forward(...)

A fault of a kernel (see emulator.h) raises ``EmulatorError``.
"""

from emulator.kd import backward, fits_on_chip, forward, placement, rescale, rescale_
from emulator.machine import EmulatorError, traffic, use_order

__all__ = [
    "EmulatorError", "backward", "fits_on_chip", "forward", "placement", "rescale", "rescale_", "traffic", "use_order",
]  # fmt: skip
