"""Fused multi-teacher knowledge-distillation losses: K teachers, one pass over memory, exact."""

from mtkd_fast import losses
from mtkd_fast.dispatch import implementations
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import KDStats, multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights
from mtkd_fast.losses import *  # noqa: F403
from mtkd_fast.mixture import ensemble_probabilities, mixture_divergence
from mtkd_fast.mutual import mutual_kd_loss
from mtkd_fast.paths import attention_transfer_loss, feature_map_loss, nst_loss, softmax_regression_loss
from mtkd_fast.relation import rkd_angle_loss, rkd_distance_loss

__version__ = "0.1.0"
__all__ = [
    "KDStats",
    "attention_transfer_loss",
    "ensemble_probabilities",
    "feature_map_loss",
    "hint_loss",
    "implementations",
    "mixture_divergence",
    "multi_teacher_divergence",
    "multi_teacher_kd_loss",
    "mutual_kd_loss",
    "nst_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "softmax_regression_loss",
    "teacher_weights",
]
__all__ += losses.__all__
