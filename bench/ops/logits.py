"""Random logits, and what the ops on rows of logits have in common."""

import torch
from torch import Tensor

SHARP = 3.0  # teachers are three times as sharp as the student


def random_logits(rows: int, classes: int, dtype: torch.dtype, g: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, classes, device=g.device, generator=g).mul_(scale).to(dtype)


def random_weights(count: int, rows: int, g: torch.Generator) -> Tensor:
    """[K, N], float32, summing to one over K."""
    return torch.randn(count, rows, device=g.device, generator=g).softmax(0)
