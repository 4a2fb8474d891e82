"""Distances between feature maps by which one teacher's knowledge can travel: the paths of Adaptive Distillation.

Its other two are here by other names: the soft target is ``multi_teacher_kd_loss`` with one teacher, the distance of
logits ``hint_loss([student_logits], [teacher_logits])``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.hint import hint_loss
from mtkd_fast.reference.kd import compute_dtype

ZERO_NORM = 1e-12


def attention_transfer_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    per_stage: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Σ over stages of the mean over samples and positions of (a(f) − a(g))², a = A/(‖A‖₂ + 1e-6), A = Σ_c f².

    Args:
        student_features, teacher_features: one map [B, C, ...] a stage, before any adapter: a stage's two sides have
            channels of their own and the same positions.
        per_stage: False, a scalar. True, [stages], for a loss that weighs every stage.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Returns: float32 (float64 when any map is). Gradient: to both sides.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: Attention Transfer (arXiv 1612.03928) with p = 2, as in Adaptive Distillation (arXiv 2110.09674; code:
    github.com/wyze-AI/AdaptiveDistillation), whose hand-tuned weight is 1000.

    >>> student, teacher = torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(4, 32, 6, 6)
    >>> attention_transfer_loss([student], [teacher]).backward()
    """
    students, teachers = checks.feature_pairs(student_features, teacher_features, own_channels=True)
    checks.flag("per_stage", per_stage)
    return _over_stages(
        per_stage, students, teachers, lambda f, g: hint_loss(f, g, distance="attention", implementation=implementation)
    )


def feature_map_loss(
    adapted_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    per_stage: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Σ over stages of the mean over samples and channels of (f − g)², f and g averaged over their positions first.

    Args:
        adapted_features: one map [B, C, ...] a stage, the student's in the channels of the teacher's
            (:class:`HintAdapter`).
        teacher_features: one map of the same shape a stage.
        per_stage: False, a scalar. True, [stages].
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Returns: float32 (float64 when any map is). Gradient: to both sides.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: Adaptive Distillation (arXiv 2110.09674), its code's FeatureMap loss.

    >>> feature_map_loss([torch.randn(4, 8, 6, 6, requires_grad=True)], [torch.randn(4, 8, 6, 6)]).backward()
    """
    adapted, teachers = _maps(adapted_features, teacher_features)
    checks.flag("per_stage", per_stage)
    pooled = [[_pooled(x, compute_dtype(x)) for x in side] for side in (adapted, teachers)]
    return _over_stages(per_stage, *pooled, lambda f, g: hint_loss(f, g, implementation=implementation))


def nst_loss(
    adapted_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, per_stage: bool = False
) -> Tensor:
    """Σ over stages of the mean over samples and pairs of channels of (X Xᵀ − Y Yᵀ)², rows of X and Y of norm 1.

    X [C, S] are a sample's channels over its S positions, each divided by its norm. A channel whose norm is at most
    1e-12 counts as zero and gets no gradient, where the published form multiplies it by 1e12.

    Args:
        adapted_features, teacher_features, per_stage: as in :func:`feature_map_loss`.

    Returns: float32 (float64 when any map is), from matrix products in that dtype. No C×C matrix exists where S < C.
    Gradient: to both sides; of any order, but for channels of zero.

    With D = X − Y and P = X + Y, X Xᵀ − Y Yᵀ is the symmetric part of D Pᵀ, and the sum of its squares is
    (⟨DᵀD, PᵀP⟩ + ⟨PᵀD, (PᵀD)ᵀ⟩)/2, S×S matrices alone. Nothing large is subtracted as X approaches Y. It is
    where X approaches Y Q, Q a rotation of the positions, whose Gram matrix is the same: there it ends at rounding.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: Adaptive Distillation (arXiv 2110.09674), its code's NST: a match of Gram matrices rather than the
    polynomial kernel of Neuron Selectivity Transfer (arXiv 1707.01219).

    >>> nst_loss([torch.randn(4, 32, 3, 3, requires_grad=True)], [torch.randn(4, 32, 3, 3)]).backward()
    """
    adapted, teachers = _maps(adapted_features, teacher_features)
    checks.flag("per_stage", per_stage)
    return _over_stages(per_stage, adapted, teachers, lambda f, g: _mean_squared_gram_difference(f[0], g[0]))


def softmax_regression_loss(
    adapted_feature: Tensor,
    teacher_logits: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    *,
    implementation: str | None = None,
) -> Tensor:
    """The mean over samples and classes of (teacher_head(f averaged over its positions) − teacher_logits)².

    Args:
        adapted_feature: [B, C, ...], the student's last map in the channels of the teacher's (:class:`HintAdapter`).
        teacher_logits: [B, classes].
        teacher_head: the teacher's classifier, [B, C] -> [B, classes]. The gradient flows through it; freeze it
            (``requires_grad_(False)``), or its own parameters get a gradient too.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Returns: float32 (float64 when any tensor is). Gradient: to the adapted feature and the teacher's logits.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: Softmax Regression Representation Learning (ICLR 2021), as in Adaptive Distillation (arXiv 2110.09674).

    >>> head, feature = torch.nn.Linear(32, 10).requires_grad_(False), torch.randn(4, 32, 3, 3, requires_grad=True)
    >>> softmax_regression_loss(feature, torch.randn(4, 10), head).backward()
    """
    feature = checks.tensor("adapted_feature", adapted_feature)
    checks.logits_dtype("adapted_feature", feature)
    logits = checks.tensor("teacher_logits", teacher_logits)
    if feature.dim() < 3 or feature.shape[1:].numel() == 0:
        raise ValueError(f"adapted_feature must be a map [B, C, ...] with positions, got {tuple(feature.shape)}")
    checks.logits_dtype("teacher_logits", logits)
    if logits.dim() != 2 or len(logits) != len(feature) or logits.shape[1] == 0:
        raise ValueError(f"teacher_logits must have shape [{len(feature)}, classes], got {tuple(logits.shape)}")
    checks.same_device("teacher_logits", logits, feature, "adapted_feature")
    if not callable(teacher_head):
        raise TypeError(f"teacher_head must be callable, got {type(teacher_head).__name__}")
    found = checks.tensor("teacher_head's result", teacher_head(_pooled(feature, feature.dtype)))
    checks.logits_dtype("teacher_head's result", found)
    checks.logits_like("teacher_head's result", found, logits, "teacher_logits")
    return hint_loss([found], [logits], implementation=implementation)


def _maps(adapted: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    adapted, teachers = checks.feature_pairs(adapted, teacher, "adapted_features")
    for k, f in enumerate(adapted):
        if f.dim() < 3:
            raise ValueError(f"adapted_features[{k}] must be a map [B, C, ...] with positions, got {tuple(f.shape)}")
    return adapted, teachers


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, ...] -> [B, C]"""
    return x.mean(tuple(range(2, x.dim())), dtype=dtype)


def _over_stages(
    per_stage: bool,
    students: list[Tensor],
    teachers: list[Tensor],
    loss: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> Tensor:
    stages = torch.stack([loss([f], [g]) for f, g in zip(students, teachers, strict=True)])
    return stages if per_stage else stages.sum()


def _mean_squared_gram_difference(f: Tensor, g: Tensor) -> Tensor:
    with torch.autocast(f.device.type, enabled=False):  # sums of S² products leave float16's range
        return _in_full_precision(f, g)


def _in_full_precision(f: Tensor, g: Tensor) -> Tensor:
    dtype = compute_dtype(f, g)
    x, y = unit(f.to(dtype).flatten(2), dim=2), unit(g.to(dtype).flatten(2), dim=2)
    d, p = x - y, x + y
    b, c, s = d.shape
    entries = max(b, 1) * c * c
    if s < c:
        cross = p.mT.bmm(d)
        return (d.mT.bmm(d) * p.mT.bmm(p) + cross * cross.mT).sum() / (2 * entries)
    half = d.bmm(p.mT)
    return (half + half.mT).square().sum() / (4 * entries)


def unit(x: Tensor, dim: int) -> Tensor:
    """x over its norm along ``dim``; what has a norm of at most 1e-12 is 0 and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.masked_fill(norm <= ZERO_NORM, torch.inf)
