"""The op mutual. ``row_stats`` is one [M² + 2M + 1, N] buffer, N the flattened rows: see ``MutualStats`` in
csrc/mutual.h. Without ``keep_stats`` only its last row, the scale, is defined.
"""

from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.kd import n_rows
from mtkd_fast.schemas.library import declare, declare_pass

_LOSS = (
    "Tensor[] students, Tensor? pair_weights, Tensor? row_weights, Tensor? num_items, float temperature, float scale, "
    "bool detach_peers, str reduction, bool keep_stats"
)


def row_stats_size(n_students: int) -> int:
    return n_students * n_students + 2 * n_students + 1


def empty_gradients(students: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [z.new_empty(z.shape if need else (0,)) for z, need in zip(students, needs, strict=True)]


def fake_mutual_forward(
    students: list[Tensor], *arguments: object
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *_, reduction, _, needs = arguments
    first, dtype = students[0], compute_dtype(*students)
    loss = first.new_empty(first.shape[:-1] if reduction == "none" else (), dtype=dtype)
    row_stats = first.new_empty((row_stats_size(len(students)), n_rows(first)), dtype=dtype)
    return loss, row_stats, empty_gradients(students, needs)


def fake_mutual_backward(students: list[Tensor], *arguments: object) -> list[Tensor]:
    return empty_gradients(students, arguments[-1])


declare(f"mutual({_LOSS}) -> (Tensor loss, Tensor row_stats)")
declare_pass(
    f"mutual_forward({_LOSS}, bool[] needs) -> (Tensor loss, Tensor row_stats, Tensor[] gradients)",
    fake_mutual_forward,
)
declare_pass(
    "mutual_backward(Tensor[] students, Tensor? pair_weights, Tensor? upstream, Tensor row_stats, float temperature, "
    "float scale, bool detach_peers, bool[] needs) -> Tensor[]",
    fake_mutual_backward,
)
