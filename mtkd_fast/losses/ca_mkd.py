"""CA-MKD: confidence-aware multi-teacher knowledge distillation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import multi_teacher_kd_loss, teacher_weights
from mtkd_fast.losses.module import DistillationLoss, share_of_rows
from mtkd_fast.reference.kd import compute_dtype


class CAMKDLoss(DistillationLoss):
    """ce_weight · CE + kd_weight · τ² · mean Σ_k w_k KL(p_k‖q) + hint_weight · mean Σ_k v_k mse(f_k, g_k).

    w_k weighs teacher k by its own cross-entropy on the label, v_k by that of its head on the student's adapted
    features: (1 − softmax_k CE_k)/(K − 1), per sample, at temperature 1.

    Args:
        temperature: τ of the soft targets. Paper and code: 4.
        ce_weight, kd_weight, hint_weight: γ, α, β. The official run script: 1, 1, 50. Without features there is no
            hint term.
        official_code: False, the cleaned form above: both kinds of weights sum to one and are constants. True, the
            numbers of the official code: both sums are divided by K once more (so α and β act like α/K and β/K), and
            the feature weights v are not detached, which lets a gradient flow into the head logits.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with
        student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N], and for the hint term
        adapted_features: K tensors, the student's features in the shape of each teacher's (:class:`HintAdapter`),
        teacher_features: K tensors of those shapes,
        head_logits: K tensors [N, C], teacher k's own classifier on its adapted features.

    Gradient: to the student's logits and the adapted features; with ``official_code`` also to the head logits.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also if only some of the three
            lists of the hint term are given.

    Source: arXiv 2201.00007, section 2 (the formulas as restated in its code: github.com/Rorozhl/CA-MKD,
    distiller_zoo/CAMKD.py and helper/loops.py). The code leaves the hint term out of the first epoch: pass no features.

    >>> loss = CAMKDLoss()
    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> loss(student, torch.randn(3, 8, 10), torch.randint(10, (8,))).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        hint_weight: float = 50.0,
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
        adapted_features: Sequence[Tensor] | None = None,
        teacher_features: Sequence[Tensor] | None = None,
        head_logits: Sequence[Tensor] | None = None,
    ) -> Tensor:
        teachers = checks.teacher_sequence(teacher_logits)
        share = 1 / len(teachers) if self.official_code else 1
        loss = multi_teacher_kd_loss(
            student_logits,
            teachers,
            target,
            weights="confidence",
            temperature=self.temperature,
            kd_weight=self.kd_weight * share,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )
        hints = {
            "adapted_features": adapted_features,
            "teacher_features": teacher_features,
            "head_logits": head_logits,
        }
        missing = [name for name, value in hints.items() if value is None]
        if len(missing) == len(hints) or self.hint_weight == 0:
            return loss
        if missing:
            raise ValueError(f"the hint term needs {', '.join(hints)} together, got None for {', '.join(missing)}")
        adapted, wanted = checks.feature_pairs(adapted_features, teacher_features, "adapted_features")
        heads = checks.teacher_sequence(head_logits, "head_logits")
        if not len(adapted) == len(heads) == len(teachers):
            raise ValueError(
                f"adapted_features, teacher_features and head_logits must hold {len(teachers)} tensors like "
                f"teacher_logits, got {len(adapted)}, {len(wanted)} and {len(heads)}"
            )
        for k, head in enumerate(heads):
            checks.logits_like(f"head_logits[{k}]", head, student_logits, "student_logits")
        factor = share_of_rows(target, compute_dtype(*adapted, *wanted)) * (self.hint_weight * share)
        weights = self._feature_weights(heads, target) * factor
        return loss + hint_loss(adapted, wanted, weights=weights, reduction="sum", implementation=self.implementation)

    def _feature_weights(self, head_logits: list[Tensor], target: Tensor) -> Tensor:
        """v [K, N]."""
        if not self.official_code:
            return teacher_weights(head_logits, target, rule="confidence", implementation=self.implementation)
        ce = torch.stack([F.cross_entropy(u.to(compute_dtype(u)), target, reduction="none") for u in head_logits])
        v = (1 - ce.softmax(0)) / (len(head_logits) - 1) if len(head_logits) > 1 else torch.ones_like(ce)
        return v.masked_fill(target == -100, 0)
