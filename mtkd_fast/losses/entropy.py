"""EBKD: teachers that are sure weigh more."""

from collections.abc import Sequence

from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss


class EntropyKDLoss(DistillationLoss):
    """ce_weight · CE + kd_weight · τ² · mean over rows of Σ_k w_k KL(p_k‖q), w_k = (1 − H_k/Σ_j H_j)/(K − 1).

    H_k is the entropy of teacher k's row at temperature 1.

    Args:
        temperature: τ. The code of CA-MKD: 4.
        ce_weight, kd_weight: γ, α; 1 and 1 in the same code.
        official_code: False, weights that sum to one. True, the numbers of the official code: weights 1 − H_k/Σ H,
            which sum to K − 1, and a mean over the teachers, in all (K − 1)/K of the above. (Its NaN where a
            probability underflows is not reproduced.)
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N].

    Gradient: to the student's logits; the weights are constants.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: the EBKD baseline of CA-MKD (arXiv 2201.00007; code: helper/loops.py); the formula of the original
    (Kwon et al., 2020) could not be checked.

    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> EntropyKDLoss()(student, torch.randn(3, 8, 10), torch.randint(10, (8,))).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        official_code: bool = False,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(ce_weight=ce_weight, kd_weight=kd_weight),
            switches=dict(official_code=official_code),
        )

    def forward(self, student_logits: Tensor, teacher_logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        teachers = checks.teacher_sequence(teacher_logits)
        share = (len(teachers) - 1) / len(teachers) if self.official_code else 1
        return multi_teacher_kd_loss(
            student_logits,
            teachers,
            target,
            weights="entropy",
            temperature=self.temperature,
            kd_weight=self.kd_weight * share,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )
