"""AMTML-KD: adaptive multi-teacher multi-level knowledge distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtkd_fast import checks
from mtkd_fast.hint import hint_loss
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss, relation_points, share_of_rows
from mtkd_fast.mixture import ensemble_probabilities, mixture_divergence
from mtkd_fast.paths import unit
from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.relation import rkd_angle_loss, rkd_distance_loss

REDUCTIONS = ("batchmean", "mean")
RELATION_INPUTS = ("logits", "log_probabilities", "probabilities")


class InstanceWeights(nn.Module):
    """mu[k, n] = softmax over k of Σ_j h[n, j] θ[k, j] W[j]: how much sample n listens to teacher k.

    Args:
        n_teachers, feature_dim: K and d.
        seed: of the initial values, N(0, 1) for both; None draws from the global generator. The code: 1.
        detach_features: no gradient to the student's feature. False as in the code, where the student learns to be
            taught by the teachers that suit it.

    Parameters: theta [K, d], a latent vector for each teacher, and W [d].

    Called with features [N, d], or maps [N, d, ...], whose maximum over space is taken as in the code. Returns [K, N].

    >>> InstanceWeights(3, 64)(torch.randn(8, 64)).sum(0).allclose(torch.ones(8))
    True
    """

    def __init__(
        self, n_teachers: int, feature_dim: int, *, seed: int | None = None, detach_features: bool = False
    ) -> None:
        super().__init__()
        checks.integer("n_teachers", n_teachers)
        checks.number("n_teachers", n_teachers, low=1, high=checks.MAX_TEACHERS)
        checks.integer("feature_dim", feature_dim)
        checks.number("feature_dim", feature_dim, above=0)
        checks.flag("detach_features", detach_features)
        generator = None
        if seed is not None:
            checks.integer("seed", seed)
            generator = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(torch.randn(n_teachers, feature_dim, generator=generator))
        self.W = nn.Parameter(torch.randn(feature_dim, generator=generator))
        self.detach_features = detach_features

    def forward(self, feature: Tensor) -> Tensor:
        h = checks.tensor("feature", feature)
        checks.logits_dtype("feature", h)
        if h.dim() < 2 or h.shape[1] != len(self.W):
            raise ValueError(
                f"feature must have shape [N, {len(self.W)}] or [N, {len(self.W)}, ...], got {tuple(h.shape)}"
            )
        if self.detach_features:
            h = h.detach()
        if h.dim() > 2:
            h = h.flatten(2).amax(2)
        with torch.autocast(h.device.type, enabled=False):
            scores = h.to(self.theta.dtype) @ (self.theta * self.W).T
        return scores.softmax(1).T

    def squared_norm(self) -> Tensor:
        """‖W‖² + Σ_k ‖θ_k‖²"""
        return self.W.square().sum() + self.theta.square().sum()

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.theta.shape))}, detach_features={self.detach_features}"


class GroupHints(nn.Module):
    """Σ_j λ_j · mse(U_j(f_g(j) / ‖f_g(j)‖), g_j / ‖g_j‖): taps of the student against one feature map of each teacher.

    The norms are Euclidean, over the channels of every pixel; a pixel whose norm is at most 1e-12 counts as zero and
    gets no gradient, where the published form multiplies it by 1e12. U_j is a trainable 1×1 convolution without bias. A
    teacher's map of one pixel (pooled; [N, C] is one) is compared with every pixel of the student's.

    Args:
        student_channels: the channels of the student's taps, from shallow to deep.
        teacher_channels: of the J teachers' maps.
        groups: g, for each teacher the index of its tap. By default the J deepest taps in order. One tap may serve
            several teachers; the notebook LR_adaptive_learning takes the same middle one for all.

    Called with the taps [N, C, H, W], the J maps, and weights λ [J] or [J, N] (None: 1). Returns a scalar, the mean
    over samples. Features may be narrower than the adapters, as bfloat16 ones of an autocast student are: norms are
    taken in float32, and the convolution in the adapters' dtype (autocast's where that is on).

    Gradient: to the taps, the teachers' maps where they require one, and U. The initial U is uniform in ±0.005 and
    never reaches an optimizer in the official code, so that its student matches a fixed random projection; leave U out
    of the optimizer for that.

    >>> hints = GroupHints([16, 32, 64], [32, 64])
    >>> taps = [torch.randn(4, c, 8, 8, requires_grad=True) for c in (16, 32, 64)]
    >>> hints(taps, [torch.randn(4, 32, 8, 8), torch.randn(4, 64, 1, 1)]).backward()
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], groups: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            for k, count in enumerate(checks.sequence(name, channels, "numbers of channels")):
                checks.integer(f"{name}[{k}]", count)
                checks.number(f"{name}[{k}]", count, above=0)
        taps, wanted = len(student_channels), len(teacher_channels)
        if groups is None:
            groups = range(taps - wanted, taps)
        self.groups = tuple(checks.sequence("groups", groups, "indices"))
        for j, group in enumerate(self.groups):
            checks.integer(f"groups[{j}]", group)
        if wanted == 0 or len(self.groups) != wanted or not all(0 <= g < taps for g in self.groups):
            raise ValueError(
                f"groups must hold one index below {taps}, of a student's tap, for each of the {wanted} teachers, one "
                f"or more, got {self.groups}"
            )
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels[g], c, kernel_size=1, bias=False)
            for g, c in zip(self.groups, teacher_channels, strict=True)
        )
        for adapter in self.adapters:
            nn.init.uniform_(adapter.weight, -0.005, 0.005)

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        weights: Tensor | None = None,
        *,
        implementation: str | None = None,
    ) -> Tensor:
        checks.sequence("student_features", student_features, "taps")
        checks.sequence("teacher_features", teacher_features, "maps")
        if len(student_features) <= max(self.groups) or len(teacher_features) != len(self.groups):
            raise ValueError(
                f"student_features must hold {max(self.groups) + 1} taps or more and teacher_features "
                f"{len(self.groups)} maps, got {len(student_features)} and {len(teacher_features)}"
            )
        adapted, wanted = [], []
        for j, (group, adapter) in enumerate(zip(self.groups, self.adapters, strict=True)):
            tap = _map(f"student_features[{group}]", student_features[group], adapter.in_channels)
            teacher = _map(f"teacher_features[{j}]", teacher_features[j], adapter.out_channels, or_pooled=True)
            own = adapter.weight.dtype
            if torch.promote_types(tap.dtype, own) != own:
                raise TypeError(
                    f"student_features[{group}] must be {own} like the adapter, or narrower, got {tap.dtype}; .to() "
                    "takes the adapters to another dtype"
                )
            f = adapter(unit(tap.to(compute_dtype(tap)), dim=1).to(own))
            g = unit(teacher.to(compute_dtype(teacher)), dim=1)
            adapted.append(f)
            wanted.append(g.expand(*g.shape[:2], *f.shape[2:]) if g.shape[2:].numel() == 1 else g)
        return hint_loss(adapted, wanted, weights=weights, implementation=implementation)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


def _map(name: str, value: object, channels: int, or_pooled: bool = False) -> Tensor:
    """[N, channels, H, W], for ``or_pooled`` of [N, channels] too."""
    x = checks.tensor(name, value)
    checks.logits_dtype(name, x)
    if x.dim() not in ((2, 4) if or_pooled else (4,)) or x.shape[1] != channels:
        expected = f"[N, {channels}] or " if or_pooled else ""
        raise ValueError(f"{name} must have shape {expected}[N, {channels}, H, W], got {tuple(x.shape)}")
    return x[:, :, None, None] if x.dim() == 2 else x


class AMTMLKDLoss(DistillationLoss):
    """2 a τ² · KL(Σ_k mu_k p_k‖q) + (1 − a) · CE + RKD distance + RKD angle + hints + regulariser, mu learnt.

    p_k = softmax(t_k/τ), q = softmax(s/τ), mu = :class:`InstanceWeights` of the student's last pooled feature. The
    relation terms compare the student with the mixture Σ_k mu_k p_k, which is a constant to them.

    Args:
        n_teachers, feature_dim: K, and d, the width of the student's last pooled feature.
        hints: a :class:`GroupHints`, or None: no hint term.
        temperature: τ. The official runs: 5 (its argument parser: 20).
        kd_share: a. The official code: 0.7.
        distance_weight, angle_weight, hint_weight: of those terms; the official code: 1 each. 0 removes the term.
        regularisation: times ‖W‖² + Σ_k ‖θ_k‖². The official code: 0.1.
        reduction: of the KL: "batchmean" (over rows) or "mean" (over rows and classes, C times smaller). None:
            "batchmean", with ``official_code`` "mean".
        ce_temperature: of the hard label. None: 1, with ``official_code`` τ (its logits are overwritten by
            log_softmax(s/τ) before both the cross-entropy and the relations).
        relation_on: what of the student is compared: "logits", "log_probabilities", log softmax(s/τ), or
            "probabilities", softmax(s/τ) (ours: what is compared of the teachers). None: "logits", with
            ``official_code`` "log_probabilities". In the first two a class that the student excludes (a logit of −inf)
            in every row that counts adds nothing; one that it excludes in some of them alone is infinitely far from
            the others, and the loss is NaN: take "probabilities" there.
        weigh_hints: λ_j is the mean of mu_j over the batch, a constant, instead of 1. The official code computes it and
            leaves it unused: False.
        detach_features_for_weights, seed: as in :class:`InstanceWeights`.
        official_code: the exact scaling of the notebook LR_adaptive_learning: the three defaults named above. The other
            notebooks disagree with it, and the paper states no coefficients that could be checked.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`; of every term.

    Called with student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N], feature [N, d] (or a map),
    and, with hints in stage 1, student_features (taps) and teacher_features (a map each). Rows whose target is ignored
    (-100) count in no term, and what they hold reaches none.

    Stages: 1, the default, trains student, mu and adapters together. ``set_stage(2)`` freezes theta, W and the adapters
    (``requires_grad`` is False, so wrap in DistributedDataParallel after it), and leaves out hints and regulariser. The
    stage is part of the state_dict. The official run: 80 epochs, then 200; SGD, without weight decay on theta and W.

    Gradient: to the student's logits, to theta and W, to the adapters, to the taps, and through mu to the feature, in
    both stages as in the code (unless detached). Teachers are constants; one that requires grad is refused by the fused
    implementations.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: arXiv 2103.04062; code: github.com/FLHonker/AMTML-KD-code.

    >>> loss = AMTMLKDLoss(n_teachers=3, feature_dim=64)
    >>> student, feature = torch.randn(8, 10, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    >>> loss(student, torch.randn(3, 8, 10), torch.randint(10, (8,)), feature).backward()
    >>> loss.weights.theta.grad.shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        n_teachers: int,
        feature_dim: int,
        hints: GroupHints | None = None,
        *,
        temperature: float = 5.0,
        kd_share: float = 0.7,
        distance_weight: float = 1.0,
        angle_weight: float = 1.0,
        hint_weight: float = 1.0,
        regularisation: float = 0.1,
        reduction: str | None = None,
        ce_temperature: float | None = None,
        relation_on: str | None = None,
        weigh_hints: bool = False,
        detach_features_for_weights: bool = False,
        seed: int | None = None,
        official_code: bool = False,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(
                kd_share=kd_share,
                distance_weight=distance_weight,
                angle_weight=angle_weight,
                hint_weight=hint_weight,
                regularisation=regularisation,
            ),
            switches=dict(weigh_hints=weigh_hints, official_code=official_code),
        )
        self.reduction = reduction or ("mean" if official_code else "batchmean")
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        self.relation_on = relation_on or ("log_probabilities" if official_code else "logits")
        checks.one_of("relation_on", self.relation_on, RELATION_INPUTS)
        self.ce_temperature = (temperature if official_code else 1.0) if ce_temperature is None else ce_temperature
        checks.number("ce_temperature", self.ce_temperature, above=0)
        self._options |= {name: getattr(self, name) for name in ("reduction", "ce_temperature", "relation_on")}
        if hints is not None and not isinstance(hints, GroupHints):
            raise TypeError(f"hints must be GroupHints or None, got {type(hints).__name__}")
        if weigh_hints and hints is not None and len(hints.groups) != n_teachers:
            raise ValueError(f"weigh_hints needs a hint for each of the {n_teachers} teachers, got {len(hints.groups)}")
        self.weights = InstanceWeights(n_teachers, feature_dim, seed=seed, detach_features=detach_features_for_weights)
        self.hints = hints
        self.stage = 1

    def set_stage(self, stage: int) -> None:
        """1: everything learns. 2: the student alone."""
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage!r}")
        if stage != self.stage:
            self.stage = stage
            self.requires_grad_(stage == 1)

    def get_extra_state(self) -> dict[str, int]:
        return {"stage": self.stage}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.set_stage(state["stage"])

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        feature: Tensor,
        student_features: Sequence[Tensor] | None = None,
        teacher_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        student = checks.student_logits(student_logits)
        teachers = checks.teacher_logits(teacher_logits, student)
        if student.dim() != 2:
            raise ValueError(f"student_logits must have shape [N, C], got {tuple(student.shape)}")
        labels = checks.target(checks.tensor("target", target), student)
        if len(teachers) != len(self.weights.theta):
            raise ValueError(f"teacher_logits must hold {len(self.weights.theta)} teachers, got {len(teachers)}")
        mu = self.weights(without_ignored(feature, labels))
        if mu.shape[1] != len(student):
            raise ValueError(f"feature must hold {len(student)} samples like student_logits, got {mu.shape[1]}")
        loss = self._on_logits(student, teachers, labels, mu) + self._relations(student, teachers, labels, mu)
        if self.stage == 2:
            return loss
        return (
            loss
            + self.regularisation * self.weights.squared_norm()
            + self._hints(student_features, teacher_features, labels, mu)
        )

    def _on_logits(self, student: Tensor, teachers: list[Tensor], target: Tensor, mu: Tensor) -> Tensor:
        """a · soft + (1 − a) · hard; a share of 0 removes its term."""
        if self.kd_share == 1:
            return self._soft(student, teachers, target, mu)
        tempered = student if self.ce_temperature == 1 else student.to(compute_dtype(student)) / self.ce_temperature
        hard = multi_teacher_kd_loss(
            tempered, teachers, target, kd_weight=0.0, ce_weight=1 - self.kd_share, implementation=self.implementation
        )
        return hard if self.kd_share == 0 else hard + self.kd_share * self._soft(student, teachers, target, mu)

    def _soft(self, student: Tensor, teachers: list[Tensor], target: Tensor, mu: Tensor) -> Tensor:
        counted = target != -100
        rows = mixture_divergence(
            student,
            teachers,
            weights=mu.masked_fill(~counted, 0),
            temperature=self.temperature,
            implementation=self.implementation,
        )
        classes = student.shape[1] if self.reduction == "mean" else 1
        return 2 * self.temperature**2 / classes * rows.sum() / counted.sum().clamp(min=1)

    def _relations(self, student: Tensor, teachers: list[Tensor], target: Tensor, mu: Tensor) -> Tensor | float:
        if self.distance_weight == self.angle_weight == 0 or len(student) == 0:
            return 0.0
        with torch.no_grad():
            mixture = ensemble_probabilities(
                teachers, weights=mu, temperature=self.temperature, implementation=self.implementation
            )
        if self.relation_on != "logits":
            tempered = without_ignored(student, target).to(compute_dtype(student)) / self.temperature
            logarithms = self.relation_on == "log_probabilities"
            student = tempered.log_softmax(-1) if logarithms else tempered.softmax(-1)
        options = dict(row_mask=target != -100, implementation=self.implementation)
        student = relation_points(student, options["row_mask"])
        loss = 0.0
        if self.distance_weight != 0:
            loss = loss + self.distance_weight * rkd_distance_loss(student, mixture, **options)
        if self.angle_weight != 0:
            loss = loss + self.angle_weight * rkd_angle_loss(student, mixture, **options)
        return loss

    def _hints(
        self,
        student_features: Sequence[Tensor] | None,
        teacher_features: Sequence[Tensor] | None,
        target: Tensor,
        mu: Tensor,
    ) -> Tensor | float:
        if self.hints is None or self.hint_weight == 0:
            return 0.0
        if student_features is None or teacher_features is None:
            raise ValueError("student_features and teacher_features must be there for the hints of stage 1, got None")
        checks.sequence("student_features", student_features, "taps")
        share = share_of_rows(target, mu.dtype)
        by_teacher = mu.new_ones(len(self.hints.groups))
        if self.weigh_hints:
            by_teacher = (mu.detach() * share).sum(1)
        weights = by_teacher[:, None] * share * len(target)  # hint_loss takes the mean over all samples
        student_features = [without_ignored(f, target) for f in student_features]
        hint = self.hints(student_features, teacher_features, weights, implementation=self.implementation)
        return self.hint_weight * hint


def without_ignored(feature: Tensor, target: Tensor) -> Tensor:
    """0 in the samples whose label is -100, so that what they hold reaches no parameter. Shapes are checked later."""
    if not isinstance(feature, Tensor) or feature.shape[:1] != target.shape:
        return feature
    return torch.where((target != -100).view(-1, *[1] * (feature.dim() - 1)), feature, 0.0)
