"""Every ValueError and TypeError a caller can meet: the argument, what was expected, what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast.reference.divergences import DIVERGENCES

MAX_TEACHERS = 64
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # as the kernels hold numbers
REDUCTIONS = ("none", "sum", "mean")
WEIGHT_RULES = ("uniform", "confidence", "entropy")


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def sequence(name: str, value: object, of: str) -> Sequence:
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {of}, got {type(value).__name__}")
    return value


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def number(
    name: str, value: object, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (-math.inf < value < math.inf and value > above and low <= value <= high):  # isfinite breaks a traced graph
        bounds = f" > {above:g}" if above > -math.inf else f" in [{low:g}, {high:g}]" if low > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}")


def temperature(value: object) -> None:
    number("temperature", value, above=0)
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"temperature must be in [{SMALLEST:.2g}, {LARGEST:.2g}], got {value!r}")


def divergence(name: object, beta: object, labels: Tensor | None) -> tuple[str, float]:
    """(name, beta) as the ops take them: at the ends of beta's range by the name of what it is there, 0 if unused."""
    one_of("divergence", name, tuple(DIVERGENCES))
    found = DIVERGENCES[name]
    if found.takes_target and labels is None:
        raise ValueError(f"divergence={name!r} must come with target (it needs the label of each row), got None")
    if found.beta is None:
        if beta is not None:
            raise ValueError(f"beta must be None for divergence={name!r}, which takes none, got {beta!r}")
        return name, 0.0
    beta = found.beta if beta is None else beta
    number("beta", beta)
    if not (0 <= beta < found.below and beta <= min(found.most, LARGEST)) or 0 < beta < SMALLEST:
        if found.below < math.inf:
            bounds = f"in [0, {found.below:g})"
        else:
            bounds = f"in [0, {found.most:g}]" if found.most < math.inf else "0 or more"
        raise ValueError(f"beta of divergence={name!r} must be {bounds}, in the range of float32, got {beta!r}")
    return dict(found.limits).get(beta, name), float(beta)


def divergence_without_labels(name: object, beta: object) -> tuple[str, float]:
    if name in DIVERGENCES and DIVERGENCES[name].takes_target:
        raise ValueError(
            f"divergence={name!r} needs the label of each row, which multi_teacher_divergence does not take; "
            "multi_teacher_kd_loss(..., return_stats=True) has its value per teacher and row"
        )
    return divergence(name, beta, None)


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def logits_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def student_logits(value: object, class_dim: int = -1) -> Tensor:
    """As a view with the classes last."""
    student = tensor("student_logits", value)
    logits_dtype("student_logits", student)
    rows_of_logits("student_logits", student, class_dim)
    return classes_last(student, class_dim)


def classes_last(logits: Tensor, class_dim: int) -> Tensor:
    return logits if class_dim == -1 else logits.movedim(class_dim, -1)


def rows_of_logits(name: str, value: Tensor, class_dim: int = -1) -> None:
    integer("class_dim", class_dim)
    if value.dim() and not -value.dim() <= class_dim < value.dim():
        raise ValueError(f"class_dim must be a dimension of {name} {tuple(value.shape)}, got {class_dim}")
    if value.dim() == 0 or value.shape[class_dim] == 0:
        expected = "[..., C]" if class_dim == -1 else f"[..., C, ...], C in dimension {class_dim},"
        raise ValueError(f"{name} must have shape {expected} with C >= 1, got {tuple(value.shape)}")


def teacher_sequence(
    value: object, argument: str = "teacher_logits", models: str = "teachers", fewest: int = 1
) -> list[Tensor]:
    """A sequence of K tensors, or one [K, ..., C] tensor, as a list; each a tensor of logits."""
    if isinstance(value, Tensor):
        if value.dim() < 2:
            raise ValueError(f"{argument}, as one tensor, must have shape [K, ..., C], got {tuple(value.shape)}")
        teachers = list(value.unbind(0))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        teachers = list(value)
    else:
        raise TypeError(
            f"{argument} must be a sequence of K tensors or one [K, ..., C] tensor, got {type(value).__name__}"
        )
    if not fewest <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"{argument} must hold {fewest} to {MAX_TEACHERS} {models}, got {len(teachers)}")
    for k, teacher in enumerate(teachers):
        name = f"{argument}[{k}]"
        logits_dtype(name, tensor(name, teacher))
    return teachers


def teacher_logits(value: object, student: Tensor, class_dim: int = -1) -> list[Tensor]:
    """Of the shape of ``student``, whose classes are last already, and like it views with the classes last."""
    teachers = teacher_sequence(value)
    as_given = student if class_dim == -1 else student.movedim(-1, class_dim)
    for k, teacher in enumerate(teachers):
        logits_like(f"teacher_logits[{k}]", teacher, as_given, "student_logits")
    return [classes_last(teacher, class_dim) for teacher in teachers]


def mutual_students(value: object, class_dim: int = -1) -> list[Tensor]:
    """M tensors [..., C], or one [M, ..., C]: students that teach each other, as views with the classes last."""
    students = teacher_sequence(value, "student_logits", "students", fewest=2)
    rows_of_logits("student_logits[0]", students[0], class_dim)
    for i, student in enumerate(students):
        logits_like(f"student_logits[{i}]", student, students[0], "student_logits[0]")
    return [classes_last(student, class_dim) for student in students]


def pair_weights(value: object, students: list[Tensor]) -> Tensor | None:
    """Constants [M, M] for M students."""
    if value is None:
        return None
    weight = tensor("pair_weights", value)
    if not weight.is_floating_point():
        raise TypeError(f"pair_weights must be floating point, got {weight.dtype}")
    if tuple(weight.shape) != (len(students), len(students)):
        raise ValueError(f"pair_weights must have shape {(len(students),) * 2}, got {tuple(weight.shape)}")
    same_device("pair_weights", weight, students[0])
    no_gradient("pair_weights", weight)
    return weight


def logits_like(name: str, value: Tensor, other: Tensor, of: str) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} must have shape {tuple(other.shape)} like {of}, got {tuple(value.shape)}")
    same_device(name, value, other, of)


def same_device(name: str, value: Tensor, other: Tensor, of: str = "student_logits") -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {of}, got {value.device}")


def row_shape(name: str, value: Tensor, rows: torch.Size) -> None:
    if value.shape != rows:
        raise ValueError(
            f"{name} must have shape {tuple(rows)}, one number per row of logits, got {tuple(value.shape)}"
        )


def target(value: object, like: Tensor) -> Tensor | None:
    """Integer labels of shape [...] beside logits ``like`` [..., C]. Their range is the op's own check."""
    if value is None:
        return None
    labels = tensor("target", value)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"target must hold integer labels (soft labels are not supported), got {labels.dtype}")
    if labels.dtype == torch.bool:
        raise TypeError("target must hold integer labels, got torch.bool")
    row_shape("target", labels, like.shape[:-1])
    same_device("target", labels, like)
    return labels


def target_range(labels: Tensor, n_classes: int, ignore_index: int) -> None:
    """Reads the labels, so only for the CPU."""
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_classes))]
    if bad.numel():
        raise ValueError(
            f"target must hold labels in [0, {n_classes}) or ignore_index = {ignore_index}, got {bad[0].item()}"
        )


def weights(value: object, student: Tensor, n_teachers: int, labels: Tensor | None) -> tuple[str, Tensor | None]:
    """(rule, given weights [K] or [K, ...]) from the argument ``weights``."""
    if isinstance(value, str):
        one_of("weights", value, WEIGHT_RULES)
        if value == "confidence" and labels is None:
            raise ValueError('weights="confidence" must come with target (it needs the label of each row), got None')
        return value, None
    return "given", given_weights(value, student, n_teachers, WEIGHT_RULES)


def mixture_weights(value: object, like: Tensor, n_teachers: int) -> Tensor | None:
    """Given weights [K] or [K, ...] beside logits ``like`` [..., C]; None for "uniform"."""
    if isinstance(value, str):
        one_of("weights", value, ("uniform",))
        return None
    return given_weights(value, like, n_teachers, ("uniform",))


def given_weights(value: object, student: Tensor, n_teachers: int, rules: Sequence[str]) -> Tensor:
    if not isinstance(value, Tensor):
        expected = ", ".join(map(repr, rules))
        raise TypeError(f"weights must be {expected} or a tensor [K] or [K, ...], got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"weights must be floating point, got {value.dtype}")
    per_row = (n_teachers, *student.shape[:-1])
    if tuple(value.shape) not in ((n_teachers,), per_row):
        raise ValueError(f"weights must have shape ({n_teachers},) or {per_row}, got {tuple(value.shape)}")
    same_device("weights", value, student)
    return value


def row_weights(value: object, student: Tensor) -> Tensor | None:
    if value is None:
        return None
    weight = tensor("row_weights", value)
    if not (weight.is_floating_point() or weight.dtype == torch.bool):
        raise TypeError(f"row_weights must be bool or floating point, got {weight.dtype}")
    row_shape("row_weights", weight, student.shape[:-1])
    same_device("row_weights", weight, student)
    no_gradient("row_weights", weight)
    return weight


def row_mask(value: object, samples: Tensor) -> Tensor | None:
    """[B] bool beside ``samples`` [B, ...]."""
    if value is None:
        return None
    mask = tensor("row_mask", value)
    if mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool, got {mask.dtype}")
    if tuple(mask.shape) != (len(samples),):
        raise ValueError(f"row_mask must have shape ({len(samples)},), one a sample, got {tuple(mask.shape)}")
    same_device("row_mask", mask, samples, "student")
    return mask


def num_items(value: object, student: Tensor, reduction: str) -> float | Tensor | None:
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f'num_items replaces the denominator of reduction="mean", got reduction={reduction!r}')
    if not isinstance(value, Tensor):
        number("num_items", value, above=0)
        return float(value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"num_items must hold an integer or a floating point number, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"num_items must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    same_device("num_items", value, student)
    no_gradient("num_items", value)
    return value


def no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad, since it gets none here, got a tensor that does: detach() it")


def feature_pairs(
    student: object, teacher: object, argument: str = "student_features", *, own_channels: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """K pairs of features of the same shape [N, ...], pairwise; N is common to all pairs.

    ``own_channels``: of maps [N, C, ...], whose C may differ.
    """
    students = list(sequence(argument, student, "K tensors"))
    teachers = list(sequence("teacher_features", teacher, "K tensors"))
    if not 1 <= len(students) <= MAX_TEACHERS:
        raise ValueError(f"{argument} must hold 1 to {MAX_TEACHERS} tensors, got {len(students)}")
    if len(students) != len(teachers):
        raise ValueError(f"teacher_features must hold {len(students)} tensors like {argument}, got {len(teachers)}")
    for k, (f, g) in enumerate(zip(students, teachers, strict=True)):
        for name, feature in ((f"{argument}[{k}]", f), (f"teacher_features[{k}]", g)):
            logits_dtype(name, tensor(name, feature))
            if feature.dim() == 0 or feature.shape[1:].numel() == 0:
                raise ValueError(
                    f"{name} must have shape [N, ...], one or more numbers a sample, got {tuple(feature.shape)}"
                )
            if feature.device != students[0].device:
                raise ValueError(f"{name} must be on {students[0].device} like the others, got {feature.device}")
        wanted = tuple(f.shape)
        if own_channels:
            if f.dim() < 3:
                raise ValueError(f"{argument}[{k}] must be a map [N, C, ...] with positions, got {wanted}")
            wanted = (f.shape[0], g.shape[1] if g.dim() > 1 else f.shape[1], *f.shape[2:])
        if tuple(g.shape) != wanted:
            raise ValueError(
                f"teacher_features[{k}] must have shape {wanted} like {argument}[{k}], got {tuple(g.shape)}"
            )
        if f.shape[0] != students[0].shape[0]:
            raise ValueError(
                f"{argument}[{k}] must hold {students[0].shape[0]} samples like {argument}[0], got {f.shape[0]}"
            )
    return students, teachers


def hint_weights(value: object, students: list[Tensor]) -> Tensor | None:
    if value is None:
        return None
    weight = tensor("weights", value)
    if not weight.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weight.dtype}")
    shapes = ((len(students),), (len(students), students[0].shape[0]))
    if tuple(weight.shape) not in shapes:
        raise ValueError(f"weights must have shape {shapes[0]} or {shapes[1]}, got {tuple(weight.shape)}")
    if weight.device != students[0].device:
        raise ValueError(f"weights must be on {students[0].device} like the features, got {weight.device}")
    return weight


def embedding(name: str, value: object) -> Tensor:
    """[B, ...]"""
    x = tensor(name, value)
    logits_dtype(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [B, ...], embeddings of B samples, got {tuple(x.shape)}")
    return x


def embeddings(student: object, teacher: object) -> tuple[Tensor, Tensor]:
    """[B, ...] each, one B -> [B, D]."""
    pair = embedding("student", student), embedding("teacher", teacher)
    if len(pair[0]) != len(pair[1]) or len(pair[0]) == 0:
        raise ValueError(
            f"teacher must hold as many samples as student, one or more, got {len(pair[1])} and {len(pair[0])}"
        )
    same_device("teacher", pair[1], pair[0], "student")
    no_gradient("teacher", pair[1])
    return pair[0].flatten(1), pair[1].flatten(1)
