"""Liger-Kernel: KL, JSD and TVD of probabilities or their logarithms, CE + TVD of logits; one teacher a call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Case, Loss, upcast
from .peer import Entry, Peer


def kl(case: Case) -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=False)

    def loss(student: Tensor, teachers: list[Tensor], _: Tensor) -> Tensor:
        log_q = F.log_softmax(upcast(student), dim=-1)
        return sum(divergence(log_q, F.softmax(upcast(t), dim=-1)) for t in teachers) / len(teachers)

    return loss


def jsd(case: Case) -> Loss:
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD(beta=0.5)

    def loss(student: Tensor, teachers: list[Tensor], _: Tensor) -> Tensor:
        log_q = F.log_softmax(upcast(student), dim=-1)
        return sum(divergence(log_q, F.log_softmax(upcast(t), dim=-1)) for t in teachers) / len(teachers)

    return loss


def tvd(case: Case) -> Loss:
    from liger_kernel.transformers.tvd import LigerTVDLoss

    divergence = LigerTVDLoss(reduction="batchmean")

    def loss(student: Tensor, teachers: list[Tensor], _: Tensor) -> Tensor:
        q = F.softmax(upcast(student), dim=-1)
        return sum(divergence(q, F.softmax(upcast(t), dim=-1)) for t in teachers) / len(teachers)

    return loss


def ce_tvd(case: Case) -> Loss:
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    terms = LigerFusedCETVDLoss()

    def loss(student: Tensor, teachers: list[Tensor], target: Tensor) -> Tensor:
        """Both terms come a row at a time; the hard label is counted once, with the first teacher."""
        found = [terms(student, t, target) for t in teachers]
        return found[0][0].mean() + torch.stack([tvd.mean() for _, tvd in found]).mean()

    return loss


PEER = Peer(
    "liger_kernel",
    {
        "liger-kl": Entry("kl", kl),
        "liger-jsd": Entry("jsd", jsd),
        "liger-tvd": Entry("tvd", tvd),
        "liger-ce-tvd": Entry("ce_tvd", ce_tvd),
    },
    package="liger-kernel",
    gpu_only="its Triton kernels need a GPU",
)
