"""The plain average of K teachers, the baseline of every multi-teacher method (AVER, MKD)."""

from collections.abc import Sequence

from torch import Tensor

from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss


class AverageKDLoss(DistillationLoss):
    """ce_weight · CE + kd_weight · τ² · mean over rows of (1/K) Σ_k KL(p_k‖q).

    Args:
        temperature: τ. The code of CA-MKD and AE-KD: 4.
        ce_weight, kd_weight: γ, α; 1 and 1 in the same code.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N].

    Gradient: to the student's logits; that of averaging the teachers' probabilities first is the same.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: the AVER baseline of CA-MKD (arXiv 2201.00007; code: train_student.py, distiller_zoo/KD.py).

    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> AverageKDLoss()(student, torch.randn(3, 8, 10), torch.randint(10, (8,))).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        *,
        implementation: str | None = None,
    ) -> None:
        numbers = dict(ce_weight=ce_weight, kd_weight=kd_weight)
        super().__init__(temperature=temperature, implementation=implementation, numbers=numbers)

    def forward(self, student_logits: Tensor, teacher_logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        return multi_teacher_kd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )
