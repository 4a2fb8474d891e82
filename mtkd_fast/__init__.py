"""Fused multi-teacher knowledge-distillation losses: K teachers, one pass over memory, exact."""

from mtkd_fast import losses
from mtkd_fast.dispatch import implementations
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import KDStats, multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights
from mtkd_fast.losses import *  # noqa: F403
from mtkd_fast.mutual import mutual_kd_loss
from mtkd_fast.relation import rkd_angle_loss, rkd_distance_loss

__version__ = "0.1.0"
__all__ = [
    "KDStats",
    "hint_loss",
    "implementations",
    "multi_teacher_divergence",
    "multi_teacher_kd_loss",
    "mutual_kd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "teacher_weights",
]
__all__ += losses.__all__
