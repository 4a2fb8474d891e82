"""torchdistill: KDLoss, CE and KL of one teacher, from dictionaries of what modules put out."""

from torch import Tensor

from ..case import Case, Loss, upcast
from ..ops.kd import OBJECTIVES
from .peer import Entry, Peer


def kd(case: Case) -> Loss:
    from torchdistill.losses.mid_level import KDLoss

    of = OBJECTIVES[case.objective]
    criterion = KDLoss("logits", "output", "logits", "output", of.temperature, alpha=of.ce_weight, beta=1.0)

    def loss(student: Tensor, teachers: list[Tensor], target: Tensor) -> Tensor:
        said = {"logits": {"output": upcast(student)}}
        heard = ({"logits": {"output": upcast(t)}} for t in teachers)
        return sum(criterion(said, teacher, target) for teacher in heard) / len(teachers)

    return loss


PEER = Peer(
    "torchdistill",
    {"torchdistill": Entry("uniform", kd, note="the hard label K times"), "torchdistill-kl": Entry("kl", kd)},
    package="torchdistill",
    imports="torchdistill.losses.mid_level",
)
