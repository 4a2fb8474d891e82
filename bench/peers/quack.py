"""quack: the cross-entropy of the student alone at the speed of light, an anchor."""

from torch import Tensor

from ..case import Case, Loss
from ..ops.kd import exact_cross_entropy
from .peer import Entry, Peer


def cross_entropy(case: Case) -> Loss:
    from quack import cross_entropy

    def loss(student: Tensor, _: list[Tensor], target: Tensor) -> Tensor:
        return cross_entropy(student, target, reduction="mean")

    return loss


PEER = Peer(
    "quack",
    {
        "quack-ce": Entry(
            "confidence", cross_entropy, exact=exact_cross_entropy, note="the cross-entropy of the student alone"
        )
    },
    package="quack-kernels",
    gpu_only="its CuTe kernels need a Hopper or Blackwell GPU",
)
