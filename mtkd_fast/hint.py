"""The public function on features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks, dispatch
from mtkd_fast.reference import hint as reference


def hint_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    distance: str = "mse",
    reduction: str = "mean",
    implementation: str | None = None,
) -> Tensor:
    """Σ_k w_k · distance(f_k, g_k) per sample, over K pairs of features: one read of each, one write of each gradient.

    Args:
        student_features: K tensors [N, ...], already in the shape of their teacher's (see ``HintAdapter``).
        teacher_features: K tensors, pairwise of the same shape. Pairs whose two sides lie differently in memory are
            copied to a common layout first.
        weights: [K] or [K, N], any sign and sum; None counts as ones. A pair of weight 0 is not read in that sample.
        distance: of a sample's elements, d = f − g:
            "mse": the mean of d².
            "smooth_l1": the mean of Huber's function with δ = 1, d²/2 up to |d| = 1, |d| − 1/2 beyond.
            "cosine": 1 − cos(f, g), the sample one vector. A zero vector (its norm below the smallest normal number)
            has cosine 0 and gradient 0. Norms of any size that the dtype can hold lose no digits: samples whose
            squared norm leaves [2^-80, 2^80] (in float64 2^±600) are scaled by a power of two and read twice.
            "attention": of maps [N, C, ...], each side with a C of its own: the mean over the S positions of
            (a(f) − a(g))², a = A/(‖A‖ + 1e-6), A = Σ_c f² per position. Maps that lie contiguous or channels last are
            read in place, others copied. A map of zeros has a = 0 and gradient 0. Exact wherever A and its norm are
            normal numbers (in float32, features from about 1e-19 to 1e18); NaN where they overflow.
        reduction: over samples: "none" ([N]), "sum" or "mean".
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Returns: float32 (float64 when any feature is).

    Gradient: to the features of both sides and to the weights, where they require it. The forward writes it if only
    students of float32, bfloat16 or float64 require it, on a GPU from 4 MB a student on; else the backward pass reads
    the features again. "attention" keeps one number a position for that.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: "mse": FitNets (arXiv 1412.6550); with per-sample weights, the feature term of CA-MKD (arXiv 2201.00007;
    code: distiller_zoo/CAMKD.py, which also divides by K). "cosine" and "smooth_l1": multi-teacher distillation of
    foundation models, as in UNIC and AM-RADIO. "attention": Attention Transfer (arXiv 1612.03928), with the reductions
    of Adaptive Distillation's code.

    >>> student = [torch.randn(4, 8, 3, 3, requires_grad=True) for _ in range(2)]
    >>> teacher = [torch.randn(4, 8, 3, 3) for _ in range(2)]
    >>> hint_loss(student, teacher, weights=torch.tensor([0.25, 0.75])).backward()
    """
    checks.one_of("distance", distance, tuple(reference.DISTANCES))
    students, teachers = checks.feature_pairs(student_features, teacher_features, own_channels=distance == "attention")
    weights = checks.hint_weights(weights, students)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    chosen = dispatch.choose(implementation, *students, *teachers)
    if chosen == "reference":
        return reference.hint(students, teachers, weights, distance=distance, reduction=reduction)
    if chosen == "triton":
        from mtkd_fast.triton_ops import hint as triton_hint

        return triton_hint.hint(students, teachers, weights, distance, reduction)
    return torch.ops.mtkd_fast.hint(students, teachers, weights, distance, reduction)
