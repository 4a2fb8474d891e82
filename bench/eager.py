"""The losses as people write them in PyTorch today: CE + τ² Σ_k w_k KL(p_k‖q), weights of CA-MKD or 1/K.

Two forms, a loop over teachers (all official codes) and one stacked tensor. The loop is kinder than most: it takes the
student's log-softmax once, not K times. Half precision is upcast first, as autocast does for these functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import TEMPERATURE


def upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def confidence_weights(teacher_ce: Tensor) -> Tensor:
    """teacher_ce [K, N] -> [K, N] (CA-MKD, arXiv 2201.00007)."""
    n_teachers = teacher_ce.shape[0]
    return torch.ones_like(teacher_ce) if n_teachers == 1 else (1 - teacher_ce.softmax(0)) / (n_teachers - 1)


def loop(student: Tensor, teachers: list[Tensor], target: Tensor, objective: str) -> Tensor:
    student, teachers = upcast(student), [upcast(t) for t in teachers]
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    divergences = [F.kl_div(log_q, F.softmax(t / TEMPERATURE, dim=1), reduction="none").sum(1) for t in teachers]
    if objective == "confidence":
        weights = confidence_weights(torch.stack([F.cross_entropy(t, target, reduction="none") for t in teachers]))
        kd = (weights * torch.stack(divergences)).sum(0).mean()
    else:
        kd = torch.stack(divergences).mean()
    return F.cross_entropy(student, target) + TEMPERATURE**2 * kd


def stacked(student: Tensor, teachers: list[Tensor], target: Tensor, objective: str) -> Tensor:
    student, t = upcast(student), upcast(torch.stack(teachers))  # [K, N, C]
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(t / TEMPERATURE, dim=-1)
    divergence = F.kl_div(log_q.expand_as(log_p), log_p, reduction="none", log_target=True).sum(-1)  # [K, N]
    if objective == "confidence":
        labels = target.expand(t.shape[:2])
        teacher_ce = F.cross_entropy(t.flatten(0, 1), labels.flatten(), reduction="none").view(t.shape[:2])
        kd = (confidence_weights(teacher_ce) * divergence).sum(0).mean()
    else:
        kd = divergence.mean()
    return F.cross_entropy(student, target) + TEMPERATURE**2 * kd
