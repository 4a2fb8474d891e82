"""The op mixture. Its divergence keeps the ``row_stats`` of the op kd, with ∂KL/∂w_k in place of D_k, and is finished
by kd_rescale and kd_backward.
"""

from torch import Tensor

from mtkd_fast.reference.kd import compute_dtype
from mtkd_fast.schemas.kd import n_rows, row_stats_size
from mtkd_fast.schemas.library import declare, declare_pass


def fake_mixture_forward(teachers: list[Tensor], *arguments: object) -> tuple[Tensor, Tensor]:
    """Probabilities [..., C]; of every teacher the largest logit and Σ e^{(t−max)/τ}, [2K, N]."""
    dtype, first = compute_dtype(*teachers), teachers[0]
    return first.new_empty(first.shape, dtype=dtype), first.new_empty((2 * len(teachers), n_rows(first)), dtype=dtype)


def fake_mixture_backward(
    teachers: list[Tensor], weights: Tensor | None, upstream: Tensor, *arguments: object
) -> tuple[Tensor, list[Tensor]]:
    """<upstream, p_k> [K, N], and the gradients of the teachers, an empty one where none is needed."""
    needs = arguments[-1]
    dots = upstream.new_empty((len(teachers), n_rows(upstream)), dtype=compute_dtype(*teachers))
    return dots, [t.new_empty(t.shape if need else (0,)) for t, need in zip(teachers, needs, strict=True)]


def fake_mixture_divergence_forward(
    student: Tensor, teachers: list[Tensor], *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    write_gradient = arguments[-1]
    dtype = compute_dtype(student, *teachers)
    divergence = student.new_empty(student.shape[:-1], dtype=dtype)
    row_stats = student.new_empty((row_stats_size(len(teachers), "forward_kl"), n_rows(student)), dtype=dtype)
    return divergence, row_stats, student.new_empty(student.shape if write_gradient else (0,))


declare("mixture(Tensor[] teachers, Tensor? weights, float temperature) -> Tensor")
declare("mixture_divergence(Tensor student, Tensor[] teachers, Tensor? weights, float temperature) -> Tensor")
declare_pass(
    "mixture_forward(Tensor[] teachers, Tensor? weights, float temperature, bool skip_zero_weights) -> "
    "(Tensor probabilities, Tensor row_stats)",
    fake_mixture_forward,
)
declare_pass(
    "mixture_backward(Tensor[] teachers, Tensor? weights, Tensor upstream, Tensor row_stats, float temperature, "
    "bool skip_zero_weights, bool[] needs) -> (Tensor dots, Tensor[] gradients)",
    fake_mixture_backward,
)
declare_pass(
    "mixture_divergence_forward(Tensor student, Tensor[] teachers, Tensor? weights, float temperature, "
    "bool skip_zero_weights, bool write_gradient) -> (Tensor divergence, Tensor row_stats, Tensor gradient)",
    fake_mixture_divergence_forward,
)
