"""The op relation."""

from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.library import declare, declare_pass


def fake_relation_forward(
    student: Tensor, teacher: Tensor, relation: str, write_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if write_gradient else (0,), dtype=dtype)


declare("relation(Tensor student, Tensor teacher, str relation) -> Tensor")
declare_pass(
    "relation_forward(Tensor student, Tensor teacher, str relation, bool write_gradient) -> "
    "(Tensor loss, Tensor gradient)",
    fake_relation_forward,
)
