"""torchtune: ForwardKLLoss, −Σ p log q of one teacher, masked by the labels."""

from torch import Tensor

from ..case import Case, Loss
from .peer import Entry, Peer


def forward_kl(case: Case) -> Loss:
    from torchtune.modules.loss import ForwardKLLoss

    criterion = ForwardKLLoss()

    def loss(student: Tensor, teachers: list[Tensor], target: Tensor) -> Tensor:
        return sum(criterion(student, t, target) for t in teachers) / len(teachers)

    return loss


PEER = Peer(
    "torchtune",
    {"torchtune": Entry("kl", forward_kl, value=False, note="its value leaves out the teacher's entropy")},
    package="torchtune",
    imports="torchtune.modules.loss",
)
