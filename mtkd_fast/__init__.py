"""Fused multi-teacher knowledge-distillation losses: K teachers, one pass over memory, exact."""

from mtkd_fast.dispatch import implementations
from mtkd_fast.functional import KDStats, multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights

__version__ = "0.1.0"
__all__ = [
    "KDStats",
    "implementations",
    "multi_teacher_divergence",
    "multi_teacher_kd_loss",
    "teacher_weights",
]
