"""flash-linear-attention: FusedKLDivLoss, the KL of one teacher with the linear heads of both sides fused in.

It takes hidden states and head weights; given the logits and an identity it computes what a loss on logits does, after
a matrix product of [N, C] and [C, C]: an anchor for few classes, where that product is small.
"""

import torch
from torch import Tensor

from ..case import Case, Loss
from .peer import Entry, Peer


def kl(case: Case) -> Loss:
    from fla.modules import FusedKLDivLoss

    criterion = FusedKLDivLoss()
    heads: dict[torch.device, Tensor] = {}

    def loss(student: Tensor, teachers: list[Tensor], _: Tensor) -> Tensor:
        if student.device not in heads:
            heads[student.device] = torch.eye(case.classes, device=student.device, dtype=student.dtype)
        head = heads[student.device]
        return sum(criterion(student, t, head, head) for t in teachers) / len(teachers)

    return loss


PEER = Peer(
    "fla",
    {"fla-kl": Entry("kl", kl, note="with its linear heads, here an identity", most_classes=1024)},
    package="flash-linear-attention",
    imports="fla.modules",
    gpu_only="its Triton kernels need a GPU",
)
