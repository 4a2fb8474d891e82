"""What is measured: rows, classes, teachers, dtype; and the fewest bytes that the work can move."""

from typing import NamedTuple

import torch

COLD_BYTES = 192 << 20  # more than the L2 of any GPU (50 MB on an H200, 126 MB on a B200)


class Shape(NamedTuple):
    rows: int
    classes: int
    teachers: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"{self.rows}x{self.classes} K={self.teachers} {name}"

    @property
    def gradient_bytes(self) -> int:
        """One N×C tensor, the unit in which memory is reported."""
        return self.rows * self.classes * self.dtype.itemsize

    def minimal_bytes(self, gradient: bool = True) -> int:
        """Read the student and K teachers once, write the gradient, if wanted, once: (K+2)·N·C elements, or K+1."""
        return (self.teachers + 1 + gradient) * self.gradient_bytes


CPU = tuple(Shape(n, c, 3) for n, c in ((256, 100), (4096, 100), (4096, 1000), (512, 32000), (128, 128256)))
CPU_QUICK = tuple(Shape(n, c, 3) for n, c in ((256, 100), (1024, 1000), (16, 32000)))

_GPU_ROWS = {1000: 4096, 32000: 4096, 128256: 2048}
GPU_SMALL = tuple(Shape(n, c, 3) for c in (100, 1000) for n in (64, 256, 1024, 4096))
GPU_LARGE = tuple(Shape(n, c, k, torch.bfloat16) for k in (3, 8, 1, 16) for c, n in _GPU_ROWS.items())
GPU = GPU_LARGE[:6] + GPU_SMALL + GPU_LARGE[6:]  # in the order of what a run short of time should keep
GPU_QUICK = (Shape(256, 100, 3), Shape(256, 32000, 3, torch.bfloat16))


def for_device(device: str, quick: bool) -> tuple[Shape, ...]:
    if device == "cuda":
        return GPU_QUICK if quick else GPU
    return CPU_QUICK if quick else CPU


def cold_sets(shape: Shape, device: str) -> int:
    """How many copies of the inputs to rotate through, so that a call finds none of its own in a GPU's L2.

    Only for the large shapes: a small batch comes warm out of the layer before it. A CPU has no fixed answer either:
    its large shapes exceed the caches, its small ones are measured warm.
    """
    if device != "cuda" or shape in GPU_SMALL:
        return 1
    return -(-COLD_BYTES // shape.minimal_bytes())
