"""CTSL-MKT: students that teach each other and themselves, with several kinds of knowledge."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss, relation_points
from mtkd_fast.mutual import mutual_kd_loss
from mtkd_fast.relation import relations_to_peers


class CTSLMKTLoss(DistillationLoss):
    """Σ_k α · CE(z_k, y) + β · (L_DD + β1 · L_AD + β2 · KL(k ← peers)) + γ · KL(softmax(z̄_k/t)‖softmax(z_k/t)).

    M students are trained together. z̄_k are the outputs of student k when it was trained alone; KL(k ← peers) is the
    mean over its peers of KL(p_j‖p_k) at temperature 1; L_DD and L_AD are RKD's distance and angle losses of student k
    from each peer, the mean over peers. With two students, as in the paper, each has one peer; more are ours.

    Args:
        temperature: t of the self-distillation. The paper's value could not be read; 4 is ours.
        ce_weight, mutual_weight, angle_weight, kl_weight, self_weight: α, β, β1, β2, γ. The paper's values could not be
            read; 1, 1, 2, 1, 1 are ours, but for the 2, which is RKD's. A weight of 0 leaves out its term.
        temperature_squared: multiply the self-distillation by t². False: the formula shows none.
        detach_peers: True (ours, as in deep mutual learning), a peer is a constant to those who learn from it. False:
            it gets the gradient of what it teaches too.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with
        student_logits: M tensors [N, C] or one [M, N, C], M from 2 to 64,
        target [N] (None if α = 0),
        self_logits: z̄, M tensors [N, C] (None if γ = 0),
        representations: M tensors [B, ...] on which distances and angles are taken, all B samples of them; None: the
            logits of the rows that count. The paper does not say which.
        return_losses: also return the M losses of the students, [M], detached; their sum is the loss.
    The paper's sums over samples are means over the rows that count (target not -100); what the others hold reaches no
    term, unless representations of them are given. A class that a student excludes (a logit of −inf) in every row that
    counts adds nothing to its distances and angles; one that it excludes in some of them alone is infinitely far from
    the others, and the loss is NaN: give representations there, softmax(z_k) for one.

    Gradient: to every student's logits and representation.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: arXiv 2101.08471, as restated in secondary notes; no code was published.

    >>> loss = CTSLMKTLoss()
    >>> students = [torch.randn(8, 10, requires_grad=True) for _ in range(2)]
    >>> alone = [torch.randn(8, 10) for _ in range(2)]
    >>> loss(students, torch.randint(10, (8,)), alone).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        mutual_weight: float = 1.0,
        angle_weight: float = 2.0,
        kl_weight: float = 1.0,
        self_weight: float = 1.0,
        temperature_squared: bool = False,
        detach_peers: bool = True,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(
                ce_weight=ce_weight,
                mutual_weight=mutual_weight,
                angle_weight=angle_weight,
                kl_weight=kl_weight,
                self_weight=self_weight,
            ),
            switches=dict(temperature_squared=temperature_squared, detach_peers=detach_peers),
        )

    def forward(
        self,
        student_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        self_logits: Sequence[Tensor] | Tensor | None = None,
        representations: Sequence[Tensor] | None = None,
        *,
        return_losses: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        students = checks.mutual_students(student_logits)
        target = checks.target(target, students[0])
        checks.flag("return_losses", return_losses)
        losses = self._alone(students, target, self._self_teachers(self_logits, students))
        if self.mutual_weight == 0:
            loss = torch.stack(losses).sum()
            return (loss, torch.stack(losses).detach()) if return_losses else loss

        counts = None if target is None else target != -100
        if representations is None:
            points, row_mask = self._logits_as_points(students, counts), counts
        else:
            points, row_mask = self._representations(representations, students), None
        related = self._relations(points, row_mask)
        losses = torch.stack(losses) + self.mutual_weight * related
        loss = losses.sum()
        losses = losses.detach()
        if self.kl_weight != 0:
            taught, divergences = mutual_kd_loss(
                students,
                detach_peers=self.detach_peers,
                row_weights=counts,
                return_divergences=True,
                implementation=self.implementation,
            )
            factor = self.mutual_weight * self.kl_weight
            loss = loss + factor * taught
            if return_losses:
                per_row = divergences.sum(1).flatten(1) / (len(students) - 1)
                counted = max(per_row.shape[1], 1) if counts is None else counts.sum().clamp(min=1)
                losses = losses + factor * per_row.sum(1) / counted
        return (loss, losses) if return_losses else loss

    def _alone(self, students: list[Tensor], target: Tensor | None, teachers: list[Tensor]) -> list[Tensor]:
        """α · CE + γ · KL(z̄_k ‖ z_k) of every student."""
        return [
            multi_teacher_kd_loss(
                student,
                [teacher],
                target,
                temperature=self.temperature,
                temperature_squared=self.temperature_squared,
                kd_weight=self.self_weight,
                ce_weight=self.ce_weight,
                implementation=self.implementation,
            )
            for student, teacher in zip(students, teachers, strict=True)
        ]

    def _self_teachers(self, self_logits: object, students: list[Tensor]) -> list[Tensor]:
        if self.self_weight == 0:
            return [student.detach() for student in students]  # not read
        if self_logits is None:
            raise ValueError(f"self_logits must be given, since self_weight = {self.self_weight}; got None")
        teachers = checks.teacher_sequence(self_logits, "self_logits")
        if len(teachers) != len(students):
            raise ValueError(f"self_logits must hold {len(students)} tensors like student_logits, got {len(teachers)}")
        for k, (teacher, student) in enumerate(zip(teachers, students, strict=True)):
            checks.logits_like(f"self_logits[{k}]", teacher, student, "student_logits")
        return teachers

    def _logits_as_points(self, students: list[Tensor], counts: Tensor | None) -> list[Tensor]:
        if students[0].dim() != 2:
            raise ValueError(
                "student_logits must have shape [N, C] where no representations are given, got "
                f"{tuple(students[0].shape)}"
            )
        return [relation_points(student, counts) for student in students]

    def _representations(self, representations: object, students: list[Tensor]) -> list[Tensor]:
        points = list(checks.sequence("representations", representations, "M tensors"))
        if len(points) != len(students):
            raise ValueError(
                f"representations must hold {len(students)} tensors like student_logits, got {len(points)}"
            )
        for k, x in enumerate(points):
            name = f"representations[{k}]"
            checks.same_device(name, checks.embedding(name, x), points[0], "representations[0]")
            if len(x) != len(points[0]):
                raise ValueError(
                    f"{name} must hold {len(points[0])} samples like representations[0], got {tuple(x.shape)}"
                )
        return points

    def _relations(self, points: list[Tensor], row_mask: Tensor | None) -> Tensor:
        """L_DD + β1 · L_AD of every student, the mean over its peers, [M]."""
        if len(points[0]) == 0:
            return torch.stack([x.sum() * 0 for x in points])
        losses = relations_to_peers(
            points, row_mask=row_mask, angle_weight=self.angle_weight, implementation=self.implementation
        )
        # Student and peer are interchangeable in these losses: what k teaches j has, in k, the gradient of what k
        # learns from j.
        return losses if self.detach_peers else 2 * losses - losses.detach()
