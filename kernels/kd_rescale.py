"""gradient *= upstream, when the upstream turns out not to be the 1 that strategy A assumed: one read and one write.

In place, the comparison happens on the device: rows whose upstream is exactly 1 are neither read nor written (pixels:
blocks in which every upstream is).
"""

import triton
import triton.language as tl

from .logits import in_units, load_logits, read_mask, rows_of_program, store_gradient
from .rows import SPECIALIZED


@triton.jit(**SPECIALIZED)
def kd_rescale(
    gradient, gradient_strides, out, out_strides, upstream, scale, n_rows, inner, n_classes, upstream_stride,
    IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, place = rows_of_program(tl.program_id(0), inner, n_rows, UNIT, PIXELS, BLOCK_N)
    in_rows = place[2]
    factor = tl.load(upstream + rows * upstream_stride, mask=in_rows, other=1.0)
    counted = tl.load(scale + rows, mask=in_rows, other=0.0) != 0
    write = in_rows
    if IN_PLACE:
        write = counted & (factor != 1)
        if tl.max(write.to(tl.int32), 0) == 0:
            return
    n_classes = in_units(n_classes, 1 if PIXELS else UNIT)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        in_cols = cols < n_classes
        mask = read_mask(write & counted, place, in_cols, PIXELS)
        g = load_logits(gradient, gradient_strides, place, cols, mask, UNIT, PIXELS)
        g = tl.where(counted[:, None], g.to(tl.float32) * factor[:, None], 0.0)
        store_gradient(out, out_strides, place, cols, g, read_mask(write, place, in_cols, PIXELS), UNIT, PIXELS)
