"""The argument structs of the ops' headers in csrc/, field by field."""

import ctypes

import torch
from torch import Tensor

MAX_TEACHERS = 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DIVERGENCES = {
    "forward_kl": 0, "reverse_kl": 1, "dkd": 2, "jsd": 3, "tvd": 4, "skew_kl": 5, "skew_reverse_kl": 6,
}  # fmt: skip
DISTANCES = {"mse": 0, "smooth_l1": 1, "cosine": 2}
RULES = {"uniform": 0, "given": 1, "confidence": 2, "entropy": 3}

int64, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Logits(ctypes.Structure):
    _fields_ = (
        ("data", pointer),
        ("outer_stride", int64),
        ("inner_stride", int64),
        ("class_stride", int64),
        ("dtype", ctypes.c_int),
    )


class Gradient(ctypes.Structure):
    _fields_ = Logits._fields_


class KDArgs(ctypes.Structure):
    _fields_ = (
        ("rows", int64),
        ("inner", int64),
        ("classes", int64),
        ("teachers", ctypes.c_int),
        ("student", Logits),
        ("teacher", Logits * MAX_TEACHERS),
        ("target", pointer),
        ("row_weights", pointer),
        ("ignore_index", int64),
        ("divergence", ctypes.c_int),
        ("beta", real),
        ("temperature", real),
        ("kd_scale", real),
        ("ce_weight", real),
        ("label_smoothing", real),
    )


class KDForward(KDArgs):
    _fields_ = (
        ("rule", ctypes.c_int),
        ("weights", pointer),
        ("weights_teacher_stride", int64),
        ("weights_row_stride", int64),
        ("skip_zero_weights", ctypes.c_bool),
        ("items", pointer),
        ("row_loss", pointer),
        ("row_stats", pointer),
        ("keep_stats", ctypes.c_bool),
        ("gradient", Gradient),
    )


class KDBackward(KDArgs):
    _fields_ = (
        ("weights", pointer),
        ("weights_teacher_stride", int64),
        ("weights_row_stride", int64),
        ("upstream", pointer),
        ("upstream_stride", int64),
        ("row_stats", pointer),
        ("student_gradient", Gradient),
        ("teacher_gradient", pointer * MAX_TEACHERS),
    )


class KDRescale(ctypes.Structure):
    _fields_ = (
        ("rows", int64),
        ("inner", int64),
        ("classes", int64),
        ("gradient", Gradient),
        ("out", pointer),
        ("upstream", pointer),
        ("upstream_stride", int64),
        ("scale", pointer),
    )


class FeaturePair(ctypes.Structure):
    _fields_ = (
        ("student", pointer),
        ("teacher", pointer),
        ("student_stride", int64),
        ("teacher_stride", int64),
        ("elements", int64),
        ("student_dtype", ctypes.c_int),
        ("teacher_dtype", ctypes.c_int),
        ("gradient", pointer),
    )


class Hint(ctypes.Structure):
    _fields_ = (
        ("samples", int64),
        ("pairs", ctypes.c_int),
        ("pair", FeaturePair * MAX_TEACHERS),
        ("weights", pointer),
        ("weights_pair_stride", int64),
        ("weights_sample_stride", int64),
        ("distance", ctypes.c_int),
        ("kept", pointer),
    )


class HintFused(Hint):
    _fields_ = (("scale", real),)


class RelationPlanes(ctypes.Structure):
    _fields_ = (
        ("count", int64),
        ("width", int64),
        ("pitch", int64),
        ("x", pointer),
        ("gram", pointer),
        ("nearest", pointer),
        ("planes", pointer),
        ("distances", pointer),
    )


class RelationAngle(ctypes.Structure):
    _fields_ = (
        ("count", int64),
        ("pitch", int64),
        ("student", pointer),
        ("teacher", pointer),
        ("loss", pointer),
        ("pull", pointer),
    )


class RelationDistance(ctypes.Structure):
    _fields_ = (
        ("count", int64),
        ("pitch", int64),
        ("student", pointer),
        ("teacher", pointer),
        ("student_nearest", pointer),
        ("teacher_nearest", pointer),
        ("student_mean", pointer),
        ("teacher_mean", pointer),
        ("drag", pointer),
        ("loss", pointer),
        ("weighted", pointer),
        ("pull", pointer),
    )


class Mixture(ctypes.Structure):
    _fields_ = (
        ("rows", int64),
        ("inner", int64),
        ("classes", int64),
        ("teachers", ctypes.c_int),
        ("teacher", Logits * MAX_TEACHERS),
        ("weights", pointer),
        ("weights_teacher_stride", int64),
        ("weights_row_stride", int64),
        ("skip_zero_weights", ctypes.c_bool),
        ("temperature", real),
    )


class MixtureForward(Mixture):
    _fields_ = (("probabilities", pointer), ("row_stats", pointer))


class MixtureBackward(Mixture):
    _fields_ = (
        ("row_stats", pointer),
        ("upstream", Logits),
        ("dots", pointer),
        ("teacher_gradient", pointer * MAX_TEACHERS),
    )


class MixtureDivergence(Mixture):
    _fields_ = (("student", Logits), ("divergence", pointer), ("row_stats", pointer), ("gradient", pointer))


class MutualArgs(ctypes.Structure):
    _fields_ = (
        ("rows", int64),
        ("inner", int64),
        ("classes", int64),
        ("students", ctypes.c_int),
        ("student", Logits * MAX_TEACHERS),
        ("gradient", pointer * MAX_TEACHERS),
        ("pair_weights", pointer),
        ("temperature", real),
        ("scale", real),
        ("detach_peers", ctypes.c_bool),
    )


class MutualForward(MutualArgs):
    _fields_ = (
        ("row_weights", pointer),
        ("items", pointer),
        ("row_loss", pointer),
        ("row_stats", pointer),
        ("keep_stats", ctypes.c_bool),
    )


class MutualBackward(MutualArgs):
    _fields_ = (
        ("upstream", pointer),
        ("upstream_stride", int64),
        ("row_stats", pointer),
    )


class FeatureMap(ctypes.Structure):
    _fields_ = (
        ("data", pointer),
        ("gradient", pointer),
        ("of_positions", pointer),
        ("channels", int64),
        ("positions", int64),
        ("dtype", ctypes.c_int),
        ("channels_last", ctypes.c_bool),
    )


class AttentionMaps(ctypes.Structure):
    _fields_ = (
        ("samples", int64),
        ("pairs", ctypes.c_int),
        ("map", FeatureMap * MAX_TEACHERS),
        ("weights", pointer),
        ("weights_pair_stride", int64),
        ("weights_sample_stride", int64),
    )


class EnergyPair(ctypes.Structure):
    _fields_ = (("student", pointer), ("teacher", pointer), ("positions", int64))


class AttentionPairs(ctypes.Structure):
    _fields_ = (
        ("samples", int64),
        ("pairs", ctypes.c_int),
        ("pair", EnergyPair * MAX_TEACHERS),
        ("weights", pointer),
        ("weights_pair_stride", int64),
        ("weights_sample_stride", int64),
        ("distance", pointer),
    )


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """[..., C] each as [outer, inner, C], in place: `inner` takes as many rows as one stride of every tensor finds."""
    shape = tensors[0].shape
    for split in range(len(shape)):
        rows = shape[:split].numel(), shape[split:-1].numel(), shape[-1]
        try:
            return [x.view(rows) for x in tensors]
        except RuntimeError:
            continue
    raise ValueError(f"rows that two strides do not find: {[(x.shape, x.stride()) for x in tensors]}")


def logits(x: Tensor) -> Logits:
    """Of [outer, inner, C]."""
    return Logits(x.data_ptr(), *x.stride(), DTYPES[x.dtype])


def gradient(x: Tensor) -> Gradient:
    """Of [outer, inner, C]."""
    return Gradient(x.data_ptr(), *x.stride(), DTYPES[x.dtype])


def per_row(x: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """A number or [...] -> its flat tensor and its stride, 0 for one number."""
    if x is None:
        return None, 0
    x = x.to(dtype)
    if x.numel() == 1:
        return x.reshape(1), 0
    x = x.reshape(-1)
    return x, x.stride(0)


def per_teacher(x: Tensor | None, rows: int) -> tuple[Tensor | None, int, int]:
    """[K] or [K, ...] -> [K, rows] float32 and its two strides."""
    if x is None:
        return None, 0, 0
    x = x.float().reshape(x.shape[0], -1)
    x = x.expand(-1, rows)
    return x, *x.stride()
