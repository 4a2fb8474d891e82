"""Fused multi-teacher knowledge-distillation losses: K teachers, one pass over memory, exact."""

from mtkd_fast.dispatch import implementations
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import KDStats, multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights
from mtkd_fast.losses import CAMKDLoss, HintAdapter

__version__ = "0.1.0"
__all__ = [
    "CAMKDLoss",
    "HintAdapter",
    "KDStats",
    "hint_loss",
    "implementations",
    "multi_teacher_divergence",
    "multi_teacher_kd_loss",
    "teacher_weights",
]
