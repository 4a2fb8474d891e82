"""The op relation."""

from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare, declare_pass


def fake_relation_forward(
    student: Tensor, teacher: Tensor, relation: str, write_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    return loss, student.new_empty(student.shape if write_gradient else (0,))


declare("relation(Tensor student, Tensor teacher, str relation) -> Tensor")
declare_pass(
    "relation_forward(Tensor student, Tensor teacher, str relation, bool write_gradient) -> "
    "(Tensor loss, Tensor gradient)",
    fake_relation_forward,
    triton=False,
)
