"""TRL: GKDTrainer.generalized_jsd_loss, the JSD of one teacher in eager PyTorch."""

from torch import Tensor

from ..case import Case, Loss, upcast
from .peer import Entry, Peer


def jsd(case: Case) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    divergence = GKDTrainer.generalized_jsd_loss

    def loss(student: Tensor, teachers: list[Tensor], target: Tensor) -> Tensor:
        student = upcast(student)
        return sum(divergence(student, upcast(t), target, beta=0.5) for t in teachers) / len(teachers)

    return loss


PEER = Peer("trl", {"trl": Entry("jsd", jsd)}, package="trl", imports="trl.experimental.gkd")
