"""The op relation: of one student to one teacher, and of M students to one another."""

from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare, declare_pass


def fake_relation_forward(
    student: Tensor, teacher: Tensor, row_mask: Tensor | None, relation: str, write_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if write_gradient else (0,), dtype=dtype)


def fake_relation_peers_forward(
    points: list[Tensor], row_mask: Tensor | None, angle_weight: float, needs: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    dtype = compute_dtype(*points)
    gradients = [x.new_empty(x.shape if need else (0,), dtype=dtype) for x, need in zip(points, needs, strict=True)]
    return points[0].new_empty(len(points), dtype=dtype), gradients


declare("relation(Tensor student, Tensor teacher, Tensor? row_mask, str relation) -> Tensor")
declare_pass(
    "relation_forward(Tensor student, Tensor teacher, Tensor? row_mask, str relation, bool write_gradient) -> "
    "(Tensor loss, Tensor gradient)",
    fake_relation_forward,
)
declare("relation_peers(Tensor[] points, Tensor? row_mask, float angle_weight) -> Tensor")
declare_pass(
    "relation_peers_forward(Tensor[] points, Tensor? row_mask, float angle_weight, bool[] needs) -> "
    "(Tensor losses, Tensor[] gradients)",
    fake_relation_peers_forward,
)
