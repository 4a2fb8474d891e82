"""The public functions on relations between the samples of a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks, dispatch
from mtkd_fast.reference import relation as reference


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, row_mask: Tensor | None = None, implementation: str | None = None
) -> Tensor:
    """RKD's distance loss: (1/B²) Σ_ij Huber(d^S_ij/μ_S − d^T_ij/μ_T), μ the mean distance of distinct samples.

    Args:
        student: [B, ...] embeddings, flattened to [B, D].
        teacher: [B, ...] embeddings of the same samples; its D may be another.
        row_mask: [B] bool, the samples that count. The others are left out, whatever they hold: the loss is that of the
            batch without them, B and μ included, and they get a zero gradient. None: all count.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Returns: a scalar, float32 (float64 when either is). 0 for B < 2. Samples closer than 1e-6 count as 1e-6 apart.

    Gradient: to the student. A teacher that requires grad is refused: detach it.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068; code: github.com/lenscloth/RKD). Computed in float64.

    >>> student = torch.randn(16, 64, requires_grad=True)
    >>> rkd_distance_loss(student, torch.randn(16, 128)).backward()
    """
    return _relation(student, teacher, row_mask, "distance", implementation)


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, *, row_mask: Tensor | None = None, implementation: str | None = None
) -> Tensor:
    """RKD's angle loss: (1/B³) Σ_ijk Huber(c^S_ijk − c^T_ijk), c the cosine at sample i between j and k.

    Arguments, gradient and errors as in :func:`rkd_distance_loss`. Where j or k coincides with i the cosine is 0 and
    has no gradient. Needs O(B²) memory and O(B² D + B³) time: neither the B×B×D differences nor the B×B×B angles of the
    published form exist. From distances in float64, on a GPU through a centred Gram matrix, so that tight clusters lose
    no digits; there the B³ cosines are float32, of distances that two float32 numbers hold.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068; code: github.com/lenscloth/RKD).

    >>> student = torch.randn(16, 64, requires_grad=True)
    >>> rkd_angle_loss(student, torch.randn(16, 128)).backward()
    """
    return _relation(student, teacher, row_mask, "angle", implementation)


def _relation(
    student: Tensor, teacher: Tensor, row_mask: Tensor | None, name: str, implementation: str | None
) -> Tensor:
    student, teacher = checks.embeddings(student, teacher)
    row_mask = checks.row_mask(row_mask, student)
    chosen = dispatch.choose(implementation, student, teacher)
    if chosen == "reference":
        return reference.relation(student, teacher, row_mask, name)
    if chosen == "triton":
        from mtkd_fast.triton_ops import relation as triton_relation

        return triton_relation.relation(student, teacher, row_mask, name)
    return torch.ops.mtkd_fast.relation(student, teacher, row_mask, name)


def relations_to_peers(
    points: Sequence[Tensor], *, row_mask: Tensor | None, angle_weight: float, implementation: str | None
) -> Tensor:
    """M times [B, ...] -> [M]: of each student, distance + angle_weight · angle loss, the mean over its peers.

    The peers are constants. As by the two functions above, with one Gram matrix a student in place of one a loss,
    pair and side.
    """
    points = [x.flatten(1) for x in points]
    chosen = dispatch.choose(implementation, *points)
    if chosen == "reference":
        return reference.relation_peers(points, row_mask, angle_weight)
    if chosen == "triton":
        from mtkd_fast.triton_ops import relation as triton_relation

        return triton_relation.relation_peers(points, row_mask, angle_weight)
    return torch.ops.mtkd_fast.relation_peers(points, row_mask, angle_weight)
