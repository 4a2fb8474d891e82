"""The hard label's cross-entropy at temperature 1, smoothed as in PyTorch, from row states."""

import triton
import triton.language as tl

from .weights import cross_entropy


@triton.jit
def smoothed_cross_entropy(sum1, max, label_logit, total, n_classes, label_smoothing):
    """(1 − ε)·(−log q[y]) + ε·mean_c(−log q[c]); `total` is Σ (s − max). A part of factor 0 is not formed."""
    label_part = tl.where(label_smoothing < 1, (1 - label_smoothing) * cross_entropy(sum1, max, label_logit), 0.0)
    mean_part = tl.where(label_smoothing > 0, label_smoothing * (tl.log(sum1) - total / n_classes), 0.0)
    return label_part + mean_part


@triton.jit
def hard_gradient(factor, e1, sum1, cols, label, n_classes, label_smoothing):
    """factor·∂CE/∂s [R, C], ∂CE/∂s = q − (1 − ε)·[c = y] − ε/C with q = e1/sum1 at temperature 1."""
    everywhere = e1 * (factor / sum1)[:, None] - (factor * label_smoothing / n_classes)[:, None]
    at_label = cols == label.to(tl.int32)[:, None]
    return tl.where(at_label, everywhere - (factor * (1 - label_smoothing))[:, None], everywhere)
