"""How rows lie in memory: (values [..., C], device) -> the same values. What lies between the rows is NaN."""

import torch

from cases import NAN


def nan_buffer(shape, like, device):
    return torch.full(tuple(shape), NAN, dtype=like.dtype, device=device)


def contiguous(x, device):
    return x.clone().to(device)


def row_stride(x, device):
    return nan_buffer((*x.shape[:-1], x.shape[-1] + 3), x, device)[..., : x.shape[-1]].copy_(x)


def misaligned(x, device):
    return nan_buffer((x.numel() + 1,), x, device)[1:].view(x.shape).copy_(x)


def transposed(x, device):
    return nan_buffer((x.shape[-1], *x.shape[:-1]), x, device).movedim(0, -1).copy_(x)


def pixels(x, device):
    """[B, H, W, C] as [B, C, H, W] gives it."""
    return x.movedim(-1, 1).contiguous().to(device).movedim(1, -1) if x.dim() > 2 else transposed(x, device)


def some_channels(x, device):
    """The first C of more channels."""
    if x.dim() < 3:
        return row_stride(x, device)
    batch, *positions, classes = x.shape
    return nan_buffer((batch, classes + 3, *positions), x, device)[:, :classes].movedim(1, -1).copy_(x)


def repeated(x, device):
    """The first row in every row, with stride 0."""
    return x.reshape(-1, x.shape[-1])[0].clone().to(device).expand(x.shape) if x.numel() else contiguous(x, device)


def all_but_last(x, device):
    """logits[:, :-1] of a language model."""
    if x.dim() == 1:
        return contiguous(x, device)
    *batch, length, classes = x.shape
    return nan_buffer((*batch, length + 1, classes), x, device)[..., :-1, :].copy_(x)


def every_other_row(x, device):
    if x.dim() == 1:
        return contiguous(x, device)
    *batch, length, classes = x.shape
    return nan_buffer((*batch, 2 * length, classes), x, device)[..., ::2, :].copy_(x)


LAYOUTS = {
    "contiguous": contiguous,
    "row stride": row_stride,
    "misaligned": misaligned,
    "transposed": transposed,
    "pixels": pixels,
    "some channels": some_channels,
    "repeated": repeated,
    "all but last": all_but_last,
    "every other row": every_other_row,
}
