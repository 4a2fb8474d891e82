"""The public functions on logits. Rows are any leading dimensions [...], classes last, teachers first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mtkd_fast import checks, dispatch
from mtkd_fast.reference import kd as reference
from mtkd_fast.reference.kd import KDStats

# The short way on the CPU (csrc/kd_python.cpp): the loss, or None for a call that wants what follows.
_kd_at_once = getattr(dispatch._C, "kd_at_once", None)


def _is_plain(beta, row_weights, num_items, class_dim, return_stats, implementation) -> bool:
    """Whether the arguments that the short way does not take have their defaults, and nothing traces the call."""
    return (
        beta is None
        and row_weights is None
        and num_items is None
        and type(class_dim) is int
        and class_dim == -1
        and return_stats is False
        and (implementation is None or implementation == "cpp")
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
    )


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor] | Tensor,
    target: Tensor | None = None,
    *,
    weights: str | Tensor = "uniform",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    divergence: str = "forward_kl",
    beta: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    class_dim: int = -1,
    return_stats: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, KDStats]:
    """Distils K teachers into one student: kd_weight · τ² · Σ_k w_k D(p_k, q) + ce_weight · CE, in one pass.

    Args:
        student_logits: [..., C], float32, bfloat16, float16 or float64. Read in place: any stride along the classes,
            and rows that two strides reach (all of a contiguous tensor, `logits[:, :-1]`, expanded rows).
        teacher_logits: K tensors [..., C], each with its own dtype and strides, or one [K, ..., C] tensor. 1 to 64
            teachers. A teacher that requires grad gets its gradient.
        target: [...] integer labels. Needed for ``weights="confidence"``, ``divergence="dkd"`` and ``ce_weight``.
        weights: "uniform" (1/K), "confidence" (CA-MKD: (1 − softmax_k CE_k)/(K−1)), "entropy" (EBKD:
            (1 − H_k/ΣH)/(K−1)), or a tensor [K] or [K, ...] used as it is, any sign and sum. Rules are constants; a
            tensor that requires grad gets D_k times its row's factors; one that does not lets a teacher of weight 0 go
            unread.
        temperature: τ > 0, of the divergence only: the weights and the hard label live at temperature 1.
        temperature_squared: multiply the divergences by τ², so that gradients keep their size (Hinton et al., 2015).
        divergence: p the teacher, q the student, both at temperature τ.
            "forward_kl": KL(p‖q). "reverse_kl": KL(q‖p).
            "jsd": β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q (GKD, arXiv 2306.13649).
            "skew_kl": KL(p‖βp + (1 − β)q). "skew_reverse_kl": KL(q‖(1 − β)p + βq) (DistiLLM, arXiv 2402.03898).
            "tvd": ½ Σ |p − q|; classes with p = q have subgradient 0.
            "dkd": TCKD + β·NCKD, the binary KL of (p_y, 1 − p_y) and the KL among the other classes (DKD, arXiv
            2203.08679); needs ``target``. Its α is ``kd_weight``.
        beta: β of "jsd" in [0, 1] (None: 0.5; 0 means forward KL and 1 reverse KL), of the skew divergences in [0, 1)
            (None: 0.1, DistiLLM's; 0 means the KL itself), of "dkd" >= 0 (None: 8, the default of the official
            code). The others take none.
        kd_weight, ce_weight: 0 removes the term; what it would have read is not read.
        label_smoothing: of the hard label, in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows with this label do not count: they give 0, whatever they hold.
        row_weights: [...] bool or float. A row of weight 0 is neither read nor counted.
        reduction: "none" ([...]), "sum", or "mean" over the rows that count (not over C, nor the sum of weights).
        num_items: replaces the denominator of "mean"; a number or a one-element tensor on the same device.
        class_dim: where the classes are. 1 for dense prediction, [B, C, H, W]: the rows are the pixels, read in place,
            and every [...] here, of target, weights, row_weights and the statistics, is [B, H, W].
        return_stats: also return the per-row numbers that the pass has anyway, detached.
        implementation: None (the best available), "cpp", "triton" or "reference".

    Returns:
        The loss, float32 (float64 when any logits are), or (loss, :class:`KDStats`).

    Gradient: to the student, to teachers and weights that require it. Second derivatives need
    ``implementation="reference"``; elsewhere asking for them raises.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. A label out of range raises on
            the CPU; on a GPU, where looking would stall the stream, it makes the loss of its row NaN.

    Source: the weighted KL of CA-MKD (arXiv 2201.00007; code: distiller_zoo/CAMKD.py, without its extra 1/K).

    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> teachers = [torch.randn(8, 10) for _ in range(3)]
    >>> target = torch.randint(10, (8,))
    >>> loss = multi_teacher_kd_loss(student, teachers, target, weights="confidence", temperature=4.0, ce_weight=1.0)
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([8, 10])
    """
    if _kd_at_once is not None and _is_plain(beta, row_weights, num_items, class_dim, return_stats, implementation):
        loss = _kd_at_once(
            student_logits, teacher_logits, target, weights, temperature, temperature_squared, divergence, kd_weight,
            ce_weight, label_smoothing, ignore_index, reduction,
        )  # fmt: skip
        if loss is not None:
            return loss
    student = checks.student_logits(student_logits, class_dim)
    teachers = checks.teacher_logits(teacher_logits, student, class_dim)
    labels = checks.target(target, student)
    rule, given = checks.weights(weights, student, len(teachers), labels)
    checks.temperature(temperature)
    checks.flag("temperature_squared", temperature_squared)
    divergence, beta = checks.divergence(divergence, beta, labels)
    checks.number("kd_weight", kd_weight)
    checks.number("ce_weight", ce_weight)
    checks.number("label_smoothing", label_smoothing, low=0, high=1)
    checks.integer("ignore_index", ignore_index)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    row_weights = checks.row_weights(row_weights, student)
    items = checks.num_items(num_items, student, reduction)
    if ce_weight != 0 and labels is None:
        raise ValueError(f"target must be given for the hard label, since ce_weight = {ce_weight}; got None")
    chosen = dispatch.choose(implementation, student, *teachers, divergence=divergence)

    kd_scale = kd_weight * temperature**2 if temperature_squared else kd_weight
    if isinstance(items, float):
        kd_scale, ce_weight, reduction, items = kd_scale / items, ce_weight / items, "sum", None
    arguments = (student, teachers, labels, given, row_weights, items)
    options = (rule, divergence, beta, temperature, kd_scale, ce_weight, label_smoothing, ignore_index, reduction)
    loss, stats = _KD[chosen](arguments, options, return_stats)
    return (loss, stats()) if return_stats else loss


def multi_teacher_divergence(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor] | Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    class_dim: int = -1,
    implementation: str | None = None,
) -> Tensor:
    """The divergence of every teacher from the student, per row: [K, ...], without τ² and without weights.

    Args: as in :func:`multi_teacher_kd_loss`. "dkd" is refused, since it needs labels: that function's
        ``return_stats`` has its value per teacher and row.

    Gradient: to the student, and to every teacher that requires it.

    >>> student, teachers = torch.randn(8, 10), torch.randn(3, 8, 10)
    >>> multi_teacher_divergence(student, teachers, temperature=2.0).shape
    torch.Size([3, 8])
    """
    student = checks.student_logits(student_logits, class_dim)
    teachers = checks.teacher_logits(teacher_logits, student, class_dim)
    divergence, beta = checks.divergence_without_labels(divergence, beta)
    checks.temperature(temperature)
    chosen = dispatch.choose(implementation, student, *teachers, divergence=divergence)
    if chosen == "reference":
        return reference.divergences(student, teachers, divergence=divergence, beta=beta, temperature=temperature)
    if chosen == "triton":
        from mtkd_fast.triton_ops import kd as triton_kd

        return triton_kd.divergence(student, teachers, divergence, beta, temperature)
    return torch.ops.mtkd_fast.kd_divergence(student, teachers, divergence, beta, temperature)


def teacher_weights(
    teacher_logits: Sequence[Tensor] | Tensor,
    target: Tensor | None = None,
    *,
    rule: str,
    ignore_index: int = -100,
    class_dim: int = -1,
    implementation: str | None = None,
) -> Tensor:
    """The weights [K, ...] that ``multi_teacher_kd_loss(weights=rule)`` gives the teachers; they sum to one over K.

    Rows whose target is ``ignore_index`` have weight 0. No gradient: the rules are constants.

    >>> teachers, target = torch.randn(3, 8, 10), torch.randint(10, (8,))
    >>> teacher_weights(teachers, target, rule="confidence").sum(0).allclose(torch.ones(8))
    True
    """
    teachers = [t.detach() for t in checks.teacher_sequence(teacher_logits)]
    for k, teacher in enumerate(teachers):
        checks.rows_of_logits(f"teacher_logits[{k}]", teacher, class_dim)
        checks.logits_like(f"teacher_logits[{k}]", teacher, teachers[0], "teacher_logits[0]")
    checks.one_of("rule", rule, checks.WEIGHT_RULES)
    if rule == "confidence" and target is None:
        raise ValueError('rule="confidence" must come with target (it needs the label of each row), got None')
    _, stats = multi_teacher_kd_loss(
        teachers[0],  # any logits do for a student; these are read anyway
        teachers,
        target,
        weights=rule,
        ignore_index=ignore_index,
        class_dim=class_dim,
        reduction="sum",
        return_stats=True,
        implementation=implementation,
    )
    return stats.weights


def _reference_kd(arguments: tuple, options: tuple, _: bool):
    student, _, labels, *_ = arguments
    names = (
        "rule", "divergence", "beta", "temperature", "kd_scale", "ce_weight", "label_smoothing", "ignore_index",
        "reduction",
    )  # fmt: skip
    named = dict(zip(names, options, strict=True))
    if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.target_range(labels, student.shape[-1], named["ignore_index"])
    loss, stats = reference.kd(*arguments, **named)
    return loss, lambda: stats


def _cpp_kd(arguments: tuple, options: tuple, return_stats: bool):
    loss, row_stats = torch.ops.mtkd_fast.kd(*arguments, *options, return_stats)
    return loss, lambda: _stats(row_stats, arguments, options)


def _triton_kd(arguments: tuple, options: tuple, _: bool):
    student, _, labels, *_ = arguments
    ignore_index = options[7]
    if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.target_range(labels, student.shape[-1], ignore_index)
    from mtkd_fast.triton_ops import kd as triton_kd

    loss, row_stats = triton_kd.kd(*arguments, *options)
    return loss, lambda: _stats(row_stats, arguments, options)


_KD = {"reference": _reference_kd, "cpp": _cpp_kd, "triton": _triton_kd}


def _stats(row_stats: Tensor, arguments: tuple, options: tuple) -> KDStats:
    """Views of the op's buffer (``RowStats`` in csrc/kd.h)."""
    student, teachers, *_ = arguments
    rule, _, _, _, kd_scale, ce_weight, *_ = options
    n_teachers, rows = len(teachers), student.shape[:-1]

    def block(i: int, computed: bool) -> Tensor | None:
        return row_stats[i * n_teachers : (i + 1) * n_teachers].view(n_teachers, *rows) if computed else None

    return KDStats(
        divergence=block(0, kd_scale != 0),
        weights=block(1, kd_scale != 0),
        teacher_ce=block(4, kd_scale != 0 and rule == "confidence"),
        teacher_entropy=block(5, kd_scale != 0 and rule == "entropy"),
        student_ce=row_stats[6 * n_teachers + 3].view(rows) if ce_weight != 0 else None,
    )
