"""gradient *= upstream, when the upstream turns out not to be the 1 that strategy A assumed: one read and one write.

In place, the comparison happens on the device: rows whose upstream is exactly 1 are neither read nor written.
"""

import triton
import triton.language as tl

from .logits import in_units, store_gradient
from .rows import SPECIALIZED


@triton.jit(**SPECIALIZED)
def kd_rescale(
    gradient, out, upstream, scale, n_rows, n_classes, upstream_stride,
    IN_PLACE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n_rows
    factor = tl.load(upstream + rows * upstream_stride, mask=in_rows, other=1.0)
    counted = tl.load(scale + rows, mask=in_rows, other=0.0) != 0
    write = in_rows
    if IN_PLACE:
        write = counted & (factor != 1)
        if tl.max(write.to(tl.int32), 0) == 0:
            return
    n_classes = in_units(n_classes, UNIT)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        inside = write[:, None] & (cols < n_classes)
        g = tl.load(gradient + rows[:, None] * n_classes + cols, mask=inside & counted[:, None], other=0.0)
        g = tl.where(counted[:, None], g.to(tl.float32) * factor[:, None], 0.0)
        store_gradient(out, rows, n_classes, cols, g, inside)
