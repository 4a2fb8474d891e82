"""The op kd: which kernel runs on which tiles, and the launchers (the twin of csrc/kd.h).

A, on chip: whole rows in registers, the gradient written in the forward, K + 2 passes over N·C.
B, streaming: tiles, O(N·K) numbers saved, the backward recomputes, 2K + 3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .divergences import DIVERGENCES
from .kd_backward import kd_backward
from .kd_on_chip import kd_on_chip
from .kd_rescale import kd_rescale
from .kd_streaming import kd_streaming
from .logits import along_pixels, as_arguments, check_dtypes, layout
from .rows import per_teacher_strides, row_stats_size
from .weights import WEIGHT_RULES

ON_CHIP_CLASSES = 8192  # of one row in the registers of a program of 8 warps
WIDE, NARROW = 1024, 512  # columns of a row per warp: 32 a thread cost the fewest instructions, 16 the fewest registers
SMALL_TILE = 256  # elements of a program of many short rows
FEW_ROWS, VERY_FEW_ROWS = 2048, 512  # below, more warps share a row, so that the machine is full
ON_CHIP_CLASSES_OF_PIXELS = 256  # of 16 pixels in as many: 32 bytes of bf16, the least that memory hands out
LINE, WIDE_LINE = 32, 256  # pixels of a program: one a thread, or of few classes 8, 128 bits of bf16
PIXEL_TILE, CLASSES_OF_PIXELS = 1024, 32  # elements, and the fewest classes, of a tile that need not hold all of them


class Choice(NamedTuple):
    """A kernel, and how it is spread out."""

    kernel: Any
    per_warp: int  # elements
    most_warps: int  # of one row
    pixels: int = 1  # PIXELS, where the threads run along them


class Tiles(NamedTuple):
    """What a program of a kernel holds."""

    kernel: Any
    block_n: int
    block_c: int
    num_warps: int


class Launch(NamedTuple):
    """A kernel with everything it is launched with, so that it can also be compiled without being run."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    num_warps: int

    def run(self) -> None:
        values = [x for value in self.arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
        with torch.cuda.device_of(next(x for x in values if isinstance(x, Tensor))):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)


def most_on_chip(student: Tensor) -> int:
    """The most classes of which the forward can write the student's gradient (strategy A)."""
    return ON_CHIP_CLASSES_OF_PIXELS if along_pixels(student) else ON_CHIP_CLASSES


def fits_on_chip(student: Tensor) -> bool:
    """For any K, rule and divergence."""
    return student.shape[-1] <= most_on_chip(student)


def strategy(student: Tensor, n_teachers: int, rule: str, divergence: str, write_gradient: bool) -> Choice:
    """The forward's kernel."""
    n_rows, n_classes, pixels = student.shape[:-1].numel(), student.shape[-1], along_pixels(student)
    if not write_gradient:
        if pixels:
            return Choice(kd_streaming, NARROW, 8)
        return Choice(kd_streaming, WIDE, 1 if n_rows >= FEW_ROWS else 4 if n_rows >= VERY_FEW_ROWS else 8)
    if not fits_on_chip(student):
        raise ValueError(f"write_gradient takes at most {most_on_chip(student)} classes in Triton, got {n_classes}")
    if divergence not in ("forward_kl", "reverse_kl"):  # probabilities and logarithms of both sides at once
        return Choice(kd_on_chip, NARROW, 16)
    two = two_accumulators(rule, n_teachers)
    crowded = n_teachers > 3 or (two and (divergence == "reverse_kl" or rule == "entropy"))
    if pixels:  # all that is known of a row is in one thread
        crowded = n_teachers > 2 or two or divergence == "reverse_kl"
    return Choice(kd_on_chip, NARROW if crowded and n_classes <= 8 * NARROW else WIDE, 8)


def two_accumulators(rule: str, n_teachers: int) -> bool:
    """Weights that are known only after the last teacher."""
    return rule in ("confidence", "entropy") and n_teachers > 1


def tiles(kernel: Any, n_classes: int, columns_per_warp: int, most_warps: int) -> Tiles:
    """Many short rows to a program, or one row, or one row in tiles."""
    block_c = min(triton.next_power_of_2(n_classes), columns_per_warp * most_warps)
    return Tiles(kernel, max(1, SMALL_TILE // block_c), block_c, max(1, block_c // columns_per_warp))


def tiles_of_pixels(choice: Choice, n_classes: int, n_pixels: int) -> Tiles:
    """A part of ``n_pixels`` side by side, with all classes on chip, or in tiles."""
    on_chip = choice.kernel is kd_on_chip
    tile = 8 * choice.per_warp if on_chip else PIXEL_TILE
    line = min(triton.next_power_of_2(n_pixels), LINE if choice.pixels == 1 else WIDE_LINE)
    block_c = triton.next_power_of_2(n_classes)
    if not on_chip:
        block_c = min(block_c, max(CLASSES_OF_PIXELS, tile // line))
    block_n = min(line, tile // block_c)
    return Tiles(choice.kernel, block_n, block_c, max(1, block_n * block_c // choice.per_warp))


def launch(choice: Choice, arguments: dict[str, Any], pixels: bool) -> Launch:
    """On tiles that suit the arguments."""
    n_rows, n_classes, inner = (arguments[name] for name in ("n_rows", "n_classes", "inner"))
    if pixels:
        plan = tiles_of_pixels(choice, n_classes, inner)
        blocks = n_rows // inner * triton.cdiv(inner, plan.block_n)
    else:
        plan = tiles(choice.kernel, n_classes, choice.per_warp, choice.most_warps)
        blocks = triton.cdiv(n_rows, plan.block_n)
    if plan.kernel is kd_backward:
        blocks *= triton.cdiv(n_classes, plan.block_c)
    arguments |= dict(PIXELS=choice.pixels if pixels else 0, BLOCK_N=plan.block_n, BLOCK_C=plan.block_c)
    return Launch(plan.kernel, (blocks,), arguments, plan.num_warps)


def forward(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, weights: Tensor | None,
    row_weights: Tensor | None, items: Tensor | None, *,
    rule: str, divergence: str, beta: float, temperature: float, kd_scale: float, ce_weight: float,
    label_smoothing: float, ignore_index: int, skip_zero_weights: bool, write_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``KDForward``: (row_loss [N], row_stats [its size, N], the gradient for an upstream of 1, or an empty tensor)."""
    n_rows, n_teachers = student.shape[:-1].numel(), len(teachers)
    row_loss = student.new_empty(n_rows, dtype=torch.float32)
    row_stats = student.new_empty((row_stats_size(n_teachers, divergence), n_rows), dtype=torch.float32)
    gradient = torch.empty_like(student) if write_gradient else student.new_empty(0)
    if n_rows > 0:
        forward_launch(
            student, teachers, target, weights, row_weights, items, row_loss, row_stats, gradient,
            rule=rule, divergence=divergence, beta=beta, temperature=temperature, kd_scale=kd_scale,
            ce_weight=ce_weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
            skip_zero_weights=skip_zero_weights, write_gradient=write_gradient,
        ).run()  # fmt: skip
    return row_loss, row_stats, gradient


def forward_launch(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, weights: Tensor | None,
    row_weights: Tensor | None, items: Tensor | None, row_loss: Tensor, row_stats: Tensor, gradient: Tensor, *,
    rule: str, divergence: str, beta: float, temperature: float, kd_scale: float, ce_weight: float,
    label_smoothing: float, ignore_index: int, skip_zero_weights: bool, write_gradient: bool,
) -> Launch:  # fmt: skip
    given, given_strides = per_teacher_strides(weights) if rule == "given" and kd_scale != 0 else (None, None)
    arguments = common_arguments(
        student, teachers, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing,
        gradient if write_gradient else None,
    )  # fmt: skip
    arguments |= dict(
        target=None if target is None else target.reshape(-1).to(torch.int64).contiguous(),
        row_weights=None if row_weights is None else row_weights.reshape(-1).to(torch.float32).contiguous(),
        weights=given, weights_strides=given_strides,
        items=None if items is None else items.reshape(()).to(torch.float32),
        row_loss=row_loss, row_stats=row_stats, ignore_index=ignore_index,
        RULE=WEIGHT_RULES[rule], SKIP_ZERO=rule == "given" and skip_zero_weights,
    )  # fmt: skip
    if write_gradient:
        arguments |= dict(PAIR=two_accumulators(rule, len(teachers)))
    else:
        del arguments["gradient"], arguments["gradient_strides"]
    choice = strategy(student, len(teachers), rule, divergence, write_gradient)
    return launch(choice, arguments, along_pixels(student))


def common_arguments(
    student: Tensor, teachers: Sequence[Tensor], divergence: str, beta: float, temperature: float, kd_scale: float,
    ce_weight: float, label_smoothing: float, gradient: Tensor | None,
    teacher_gradients: Sequence[Tensor | None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What every kernel of the op is told. Teachers that a kd_scale of 0 leaves unread are not even looked at."""
    read = list(teachers) if kd_scale != 0 else []
    check_dtypes([student, *read])
    where = layout([student, gradient, *read, *(teacher_gradients or ())], along_pixels(student))
    of_student, of_gradient, *strides = where.strides
    table = as_arguments(read, strides[: len(read)], teacher_gradients or (), strides[len(read) :])
    arguments = dict(
        student=student, student_strides=of_student, teachers=table.pointers, teacher_strides=table.strides,
        gradient=gradient, gradient_strides=of_gradient,
        n_rows=student.shape[:-1].numel(), inner=where.inner, n_classes=student.shape[-1], n_teachers=len(teachers),
        beta=beta, inv_t=1.0 / temperature, kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing,
        DIVERGENCE=DIVERGENCES[divergence], HAS_KD=kd_scale != 0, HAS_CE=ce_weight != 0,
        TAU=int(temperature) if temperature in (1, 2, 4) else 0, K_PAD=triton.next_power_of_2(len(teachers)),
        DTYPE=table.dtype, UNIT=where.unit,
    )  # fmt: skip
    if teacher_gradients is not None:
        arguments |= dict(teacher_gradients=table.gradients, teacher_gradient_strides=table.gradient_strides)
    return arguments


def backward(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, weights: Tensor, upstream: Tensor | None,
    row_stats: Tensor, divergence: str, beta: float, temperature: float, kd_scale: float, ce_weight: float,
    label_smoothing: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """``KDBackward``: the gradients of the student and of each teacher, in the student's layout; an empty tensor where
    none is needed.
    """
    logits = zip((student, *teachers), needs, strict=True)
    gradients = [torch.empty_like(student, dtype=x.dtype) if need else x.new_empty(0) for x, need in logits]
    if kd_scale == 0:
        gradients[1:] = [torch.zeros_like(g) for g in gradients[1:]]
    if student.shape[:-1].numel() > 0 and any(needs if kd_scale != 0 else needs[:1]):
        backward_launch(
            student, teachers, target, weights, upstream, row_stats, divergence, beta, temperature, kd_scale, ce_weight,
            label_smoothing, [g if need else None for g, need in zip(gradients, needs, strict=True)],
        ).run()  # fmt: skip
    return gradients


def backward_launch(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, weights: Tensor, upstream: Tensor | None,
    row_stats: Tensor, divergence: str, beta: float, temperature: float, kd_scale: float, ce_weight: float,
    label_smoothing: float,
    gradients: Sequence[Tensor | None],
) -> Launch:  # fmt: skip
    if gradients[0] is None:
        ce_weight = 0.0
    arguments = common_arguments(
        student, teachers, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing,
        gradients[0], gradients[1:] if kd_scale != 0 else [],
    )  # fmt: skip
    given, given_strides = per_teacher_strides(weights) if kd_scale != 0 else (None, None)
    per_row, per_row_stride = upstream_rows(upstream)
    arguments |= dict(
        target=None if ce_weight == 0 and divergence != "dkd" else target.reshape(-1).to(torch.int64).contiguous(),
        weights=given, weights_strides=given_strides, upstream=per_row, upstream_stride=per_row_stride,
        row_stats=row_stats,
        TO_TEACHERS=kd_scale != 0 and any(g is not None for g in gradients[1:]),
    )  # fmt: skip
    pixels = along_pixels(student)
    light = pixels and divergence == "forward_kl" and not arguments["TO_TEACHERS"]
    choice = Choice(kd_backward, WIDE, 1, pixels=8) if light else Choice(kd_backward, NARROW, 4)
    return launch(choice, arguments, pixels)


def rescale(gradient: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    """``KDRescale`` into a new tensor: gradient [..., C] times upstream (one number, or one per row)."""
    out = torch.empty_like(gradient)
    if gradient.numel() > 0:
        rescale_launch(gradient, out, upstream, scale).run()
    return out


def rescale_(gradient: Tensor, upstream: Tensor, scale: Tensor) -> None:
    """The same in place. Rows whose upstream is exactly 1 cost nothing."""
    if gradient.numel() > 0:
        rescale_launch(gradient, gradient, upstream, scale).run()


def rescale_launch(gradient: Tensor, out: Tensor, upstream: Tensor, scale: Tensor) -> Launch:
    pixels = along_pixels(gradient)
    where = layout([gradient, out], pixels)
    factor, factor_stride = upstream_rows(upstream)
    arguments = dict(
        gradient=gradient, gradient_strides=where.strides[0], out=out, out_strides=where.strides[1],
        upstream=factor, upstream_stride=factor_stride, scale=scale,
        n_rows=gradient.shape[:-1].numel(), inner=where.inner, n_classes=gradient.shape[-1],
        IN_PLACE=out is gradient, UNIT=where.unit,
    )  # fmt: skip
    return launch(Choice(kd_rescale, WIDE, 4, pixels=8), arguments, pixels)


def upstream_rows(upstream: Tensor | None) -> tuple[Tensor | None, int]:
    """One number or one per row -> float32, and its stride from row to row."""
    if upstream is None:
        return None, 0
    upstream = upstream.to(torch.float32).reshape(-1)
    return upstream, 0 if upstream.numel() == 1 else upstream.stride(0)
