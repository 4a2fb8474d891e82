"""The public functions on mixtures: the weighted mean of K teachers' probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks, dispatch
from mtkd_fast.reference import mixture as reference


def ensemble_probabilities(
    teacher_logits: Sequence[Tensor] | Tensor,
    *,
    weights: str | Tensor = "uniform",
    temperature: float = 1.0,
    class_dim: int = -1,
    implementation: str | None = None,
) -> Tensor:
    """Σ_k w_k softmax(t_k/τ) [..., C], float32 (float64 when any logits are): one read of every teacher, one write.

    Args:
        teacher_logits: K tensors [..., C], each with its own dtype and strides, or one [K, ..., C] tensor; 1 to 64
            teachers, read in place as in :func:`mtkd_fast.multi_teacher_kd_loss`.
        weights: "uniform" (1/K), or a tensor [K] or [K, ...], used as it is, any sign and sum: only weights that sum to
            one give probabilities. A teacher of weight 0 is not read, unless the weights require grad.
        temperature: τ > 0.
        class_dim: where the classes are, of the teachers and of the result: 1 for [B, C, H, W], whose rows are the
            pixels and whose weights may be [K, B, H, W]. Read in place, along the classes: slower than classes last.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`. On a GPU rows of more than 8192 classes are read
            twice, once for their sums.

    Gradient: to the weights, <G, p_k> with the upstream G, and to every teacher that requires it,
    w_k p_k ⊙ (G − <G, p_k>)/τ. A weight of 0 on a teacher without finite probabilities gets 0. Second derivatives need
    ``implementation="reference"``.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: the mixed soft target of AMTML-KD (arXiv 2103.04062).

    >>> teachers = torch.randn(3, 8, 10)
    >>> ensemble_probabilities(teachers, temperature=2.0).sum(-1).allclose(torch.ones(8))
    True
    """
    teachers = checks.teacher_sequence(teacher_logits)
    for k, teacher in enumerate(teachers):
        checks.rows_of_logits(f"teacher_logits[{k}]", teacher, class_dim)
        checks.logits_like(f"teacher_logits[{k}]", teacher, teachers[0], "teacher_logits[0]")
    teachers = [checks.classes_last(teacher, class_dim) for teacher in teachers]
    given = checks.mixture_weights(weights, teachers[0], len(teachers))
    checks.temperature(temperature)
    chosen = dispatch.choose(implementation, *teachers)
    if chosen == "reference":
        found = reference.ensemble_probabilities(teachers, given, temperature=temperature)
    elif chosen == "triton":
        from mtkd_fast.triton_ops import mixture as triton_mixture

        found = triton_mixture.mixture(teachers, given, temperature)
    else:
        found = torch.ops.mtkd_fast.mixture(teachers, given, temperature)
    return found if class_dim == -1 else found.movedim(-1, class_dim)


def mixture_divergence(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor] | Tensor,
    *,
    weights: str | Tensor = "uniform",
    temperature: float = 1.0,
    class_dim: int = -1,
    implementation: str | None = None,
) -> Tensor:
    """KL(Σ_k w_k p_k‖q) of every row [...], p_k = softmax(t_k/τ), q = softmax(s/τ): without τ², no mixture in memory.

    Args:
        student_logits: [..., C], as in :func:`mtkd_fast.multi_teacher_kd_loss`.
        teacher_logits, temperature, class_dim, implementation: as in :func:`ensemble_probabilities`.
        weights: "uniform" (1/K), or a tensor [K] or [K, ...], used as it is. With W = Σ w_k ≠ 1 the value is
            Σ_c pbar (log pbar − log q) of the pbar that sums to W: W times the divergence of pbar/W, plus W log W. A
            class whose mixture is negative, as weights below 0 can make it, gives NaN. A teacher of weight 0 is not
            read, unless the weights require grad.

    Returns: float32 (float64 when any logits are).

    Classes that no teacher of weight other than 0 allows (−inf) add 0; one that the student alone excludes makes its
    row +inf, with a finite gradient to the student. A row without a finite logit is NaN.

    Gradient: to the student, (W q − pbar)/τ, and to the weights, Σ_c p_k (log pbar − log q) + 1, by sums of logarithms,
    so that it is right for weights that have all but vanished; a weight of 0 gets 0 where that is not finite. A teacher
    that requires grad gets its gradient from ``implementation="reference"`` only and is refused elsewhere. So are
    second derivatives.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: AMTML-KD (arXiv 2103.04062); derivatives ours.

    >>> student, w = torch.randn(8, 10, requires_grad=True), torch.rand(3, 8).softmax(0).requires_grad_()
    >>> mixture_divergence(student, torch.randn(3, 8, 10), weights=w, temperature=5.0).mean().backward()
    """
    student = checks.student_logits(student_logits, class_dim)
    teachers = checks.teacher_logits(teacher_logits, student, class_dim)
    given = checks.mixture_weights(weights, student, len(teachers))
    checks.temperature(temperature)
    chosen = dispatch.choose(implementation, student, *teachers)
    if chosen == "reference":
        return reference.mixture_divergence(student, teachers, given, temperature=temperature)
    for k, teacher in enumerate(teachers):
        if teacher.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"teacher_logits[{k}] must not require grad with implementation={chosen!r}: detach() it, or take "
                "implementation='reference'"
            )
    if chosen == "triton":
        from mtkd_fast.triton_ops import mixture as triton_mixture

        return triton_mixture.mixture_divergence(student, teachers, given, temperature)
    return torch.ops.mtkd_fast.mixture_divergence(student, teachers, given, temperature)
