"""The op ``relation`` by the emulated CUDA kernels: the functions of mtkd_fast.kernels.relation."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, poisoned

F64 = torch.float64


def arguments(struct, **fields):
    """The struct; tensors by their address."""
    return struct(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in fields.items()})


def planes(x: Tensor, gram: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    count, width = x.shape
    pitch = -(-count // 16) * 16
    found, distances = poisoned((3, pitch, pitch), torch.float32), poisoned((count,), F64)
    inputs, outputs = dict(x=x, gram=gram, nearest=nearest), dict(planes=found, distances=distances)
    args = arguments(layout.RelationPlanes, count=count, width=width, pitch=pitch, **inputs, **outputs)
    launch("relation_planes", args, inputs, outputs)
    return found, distances


def angle(student: Tensor, teacher: Tensor, count: int, write_gradient: bool) -> tuple[Tensor, Tensor | None]:
    pitch = student.shape[-1]
    loss = poisoned((pitch // 16 * (pitch // 8),), F64)
    pull = poisoned((count, count), F64) if write_gradient else None
    inputs, outputs = dict(student=student, teacher=teacher), dict(loss=loss, pull=pull)
    args = arguments(layout.RelationAngle, count=count, pitch=pitch, **inputs, **outputs)
    launch("relation_angle", args, inputs, outputs)
    return loss, pull


def distance_pass(student: Tensor, teacher: Tensor, count: int, drag: Tensor | None, outputs: dict, **scalars) -> None:
    inputs = dict(
        student=student, teacher=teacher, drag=drag,
        student_nearest=scalars["nearest"], teacher_nearest=scalars["nearest_t"],
        student_mean=scalars["mean"], teacher_mean=scalars["mean_t"],
    )  # fmt: skip
    args = arguments(layout.RelationDistance, count=count, pitch=student.shape[-1], **inputs, **outputs)
    launch("relation_distance", args, inputs, outputs)


def distance(student: Tensor, teacher: Tensor, count: int, **scalars: Tensor) -> tuple[Tensor, Tensor]:
    loss, weighted = poisoned((count,), F64), poisoned((count,), F64)
    distance_pass(student, teacher, count, None, dict(loss=loss, weighted=weighted), **scalars)
    return loss, weighted


def distance_pull(student: Tensor, teacher: Tensor, count: int, drag: Tensor, **scalars: Tensor) -> Tensor:
    pull = poisoned((count, count), F64)
    distance_pass(student, teacher, count, drag, dict(pull=pull), **scalars)
    return pull
