"""FitNet-MKD: the average of K teachers, and K hints."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss, share_of_rows
from mtkd_fast.reference.kd import compute_dtype


class FitNetKDLoss(DistillationLoss):
    """ce_weight · CE + kd_weight · τ² · mean (1/K) Σ_k KL(p_k‖q) + hint_weight · (1/K) Σ_k mse(f_k, g_k).

    Args:
        temperature: τ. The code of CA-MKD: 4.
        ce_weight, kd_weight, hint_weight: γ, α, β; 1, 1 and 100 in the same code.
        official_code: False, the hints teach. True, as in the official code, whose hint term is a fresh tensor of K
            numbers and so gives no gradient: it trains exactly like ``AverageKDLoss``, with another printed value.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with
        student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N],
        adapted_features: K tensors, the student's features in the shape of each teacher's (:class:`HintAdapter`),
        teacher_features: K tensors of those shapes. Rows whose target is ignored (-100) count in no term, and with a
        hint_weight of 0 no feature is read.

    Gradient: to the student's logits and, without ``official_code``, to the adapted features (with it, the adapters'
    parameters get none: DistributedDataParallel needs ``find_unused_parameters=True``).

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: FitNets (arXiv 1412.6550), for K teachers as in the FitNet-MKD baseline of CA-MKD (arXiv 2201.00007; code:
    helper/loops.py).

    >>> student, feature = torch.randn(8, 10, requires_grad=True), torch.randn(8, 16, 4, 4, requires_grad=True)
    >>> loss = FitNetKDLoss()
    >>> target, wanted = torch.randint(10, (8,)), torch.randn(3, 8, 16, 4, 4)
    >>> loss(student, torch.randn(3, 8, 10), target, [feature] * 3, list(wanted)).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        hint_weight: float = 100.0,
        official_code: bool = False,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(ce_weight=ce_weight, kd_weight=kd_weight, hint_weight=hint_weight),
            switches=dict(official_code=official_code),
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        adapted_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
    ) -> Tensor:
        teachers = checks.teacher_sequence(teacher_logits)
        loss = multi_teacher_kd_loss(
            student_logits,
            teachers,
            target,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )
        if self.hint_weight == 0:
            return loss
        adapted, wanted = checks.feature_pairs(adapted_features, teacher_features, "adapted_features")
        if len(adapted) != len(teachers) or len(adapted[0]) != target.numel():
            raise ValueError(
                f"adapted_features must hold {len(teachers)} tensors of {target.numel()} samples like teacher_logits, "
                f"got {len(adapted)} of {len(adapted[0])}"
            )
        share = share_of_rows(target, compute_dtype(*adapted, *wanted)) / len(teachers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.official_code):
            hint = hint_loss(
                adapted,
                wanted,
                weights=(share * self.hint_weight).expand(len(teachers), -1),
                reduction="sum",
                implementation=self.implementation,
            )
        return loss + hint
