"""Real digits scattered over a canvas; the label of an inked pixel is its digit, the others are ignored."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..digits import Digits

SIDE, CELL, DIGIT = 24, 12, 8  # pixels of a canvas, of the cell a digit has to itself, of a digit
PER_SIDE = SIDE // CELL
INK = 0.25
IGNORED = 255


class Canvases(NamedTuple):
    images: Tensor  # [N, 1, 24, 24]
    labels: Tensor  # [N, 24, 24]


def scatter(data: Digits, source: Tensor, count: int, seed: int) -> Canvases:
    """``count`` canvases of four digits drawn from the images ``source``, each somewhere in its cell."""
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.zeros(count, 1, SIDE, SIDE), torch.full((count, SIDE, SIDE), IGNORED)
    shape = (count, PER_SIDE**2)
    chosen = source.cpu()[torch.randint(len(source), shape, generator=g)]
    shifts = torch.randint(CELL - DIGIT + 1, (*shape, 2), generator=g)
    digits, names = data.images.cpu()[chosen].unflatten(-1, (DIGIT, DIGIT)), data.labels.cpu()[chosen]
    for n, cell in product(range(count), range(PER_SIDE**2)):
        row, column = (CELL * at + int(by) for at, by in zip(divmod(cell, PER_SIDE), shifts[n, cell], strict=True))
        place, digit = (n, slice(row, row + DIGIT), slice(column, column + DIGIT)), digits[n, cell]
        images[:, 0][place] = digit
        labels[place] = torch.where(digit > INK, names[n, cell], IGNORED)
    return Canvases(images.to(data.images.device), labels.to(data.images.device))
