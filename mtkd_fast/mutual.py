"""The public function on students that teach each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks, dispatch
from mtkd_fast.reference import mutual as reference


def mutual_kd_loss(
    student_logits: Sequence[Tensor] | Tensor,
    *,
    pair_weights: Tensor | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    detach_peers: bool = True,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    class_dim: int = -1,
    return_divergences: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """M students teach each other: τ² · Σ_{i≠j} a_ij KL(p_j‖p_i), all pairs in one read of the M logits.

    Args:
        student_logits: M tensors [..., C], each with its own dtype and strides, or one [M, ..., C] tensor. 2 to 64
            students. Read in place, as in :func:`mtkd_fast.multi_teacher_kd_loss`. Those that do not require grad only
            teach.
        pair_weights: a [M, M], constants: a_ij is how much student i learns from peer j. The diagonal is not used. A
            pair of weight 0 has no term, and a student without a pair is not read. None: 1/(M − 1), each student learns
            from the mean over its peers (DML).
        temperature: τ > 0. DML and CTSL-MKT: 1; OKDDip's code for DML: 3.
        temperature_squared: multiply by τ², so that gradients keep their size (Hinton et al., 2015).
        detach_peers: True, the peers are constants and student i gets the gradient of what it learns, Σ_j a_ij
            (p_i − p_j)/τ (DML, where the networks take turns). False: also that of what it teaches, Σ_j a_ji
            p_i ⊙ (log p_i − log p_j − KL(p_i‖p_j))/τ (OKDDip's code).
        row_weights: [...] bool or float. A row of weight 0 is neither read nor counted: ``target != -100`` leaves out
            what ``multi_teacher_kd_loss`` ignores.
        reduction: "none" ([...]), "sum", or "mean" over the rows that count (not over C, M, nor a sum of weights).
        num_items: replaces the denominator of "mean"; a number or a one-element tensor on the same device.
        class_dim: where the classes are, as in :func:`mtkd_fast.multi_teacher_kd_loss`; every [...] here is the shape
            without them. Read in place, along the classes: slower than classes last.
        return_divergences: also return every KL(p_j‖p_i), [M, M, ...] at [i, j], detached and without τ²; 0 for rows
            that do not count and pairs of weight 0.
        implementation: None (the best available), "cpp", "triton" or "reference".

    Returns:
        The loss, float32 (float64 when any logits are), or (loss, divergences).

    Gradient: to every student that requires it. Where student i excludes a class (a logit of −inf) that peer j allows,
    the divergence is +inf; its gradient in i is finite. Second derivatives need ``implementation="reference"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: deep mutual learning (arXiv 1706.00384): L_i = CE_i + 1/(M − 1) Σ_j KL(p_j‖p_i), here without the CE.

    >>> students = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]
    >>> mutual_kd_loss(students).backward()
    >>> [z.grad.shape for z in students]
    [torch.Size([8, 10]), torch.Size([8, 10]), torch.Size([8, 10])]
    """
    students = checks.mutual_students(student_logits, class_dim)
    first = students[0]
    pair_weights = checks.pair_weights(pair_weights, students)
    checks.temperature(temperature)
    checks.flag("temperature_squared", temperature_squared)
    checks.flag("detach_peers", detach_peers)
    row_weights = checks.row_weights(row_weights, first)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    items = checks.num_items(num_items, first, reduction)
    checks.flag("return_divergences", return_divergences)
    chosen = dispatch.choose(implementation, *students)

    scale = temperature**2 if temperature_squared else 1.0
    if isinstance(items, float):
        scale, reduction, items = scale / items, "sum", None
    tensors = (students, pair_weights, row_weights, items)
    if chosen == "reference":
        loss, divergences = reference.mutual(
            *tensors, temperature=temperature, scale=scale, detach_peers=detach_peers, reduction=reduction
        )
        return (loss, divergences) if return_divergences else loss
    options = (temperature, scale, detach_peers, reduction, return_divergences)
    if chosen == "triton":
        from mtkd_fast.triton_ops import mutual as triton_mutual

        loss, row_stats = triton_mutual.mutual(*tensors, *options)
    else:
        loss, row_stats = torch.ops.mtkd_fast.mutual(*tensors, *options)
    if not return_divergences:
        return loss
    m = len(students)
    return loss, row_stats[: m * m].view(m, m, *first.shape[:-1])
