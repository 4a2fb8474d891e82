"""Deliberate breaks: the suite's own comparison must notice each of them."""

import pytest
import torch
from cases.kd import BF16, CASES, F32, F64, Case, assert_matches, build, evaluate, oracle
from tolerance import assert_numbers_close, assert_rows_close, ulp

from mtkd_fast import multi_teacher_kd_loss

FULL = Case(
    "a case with everything", "every break shows here", rows=(6,), teachers=3, weights="confidence",
    labels="some ignored", row_weights="float", temperature=4.0, terms=(0.7, 0.5, 0.1), reduction="mean",
    wants=("student", "teachers"), upstream="random",
)  # fmt: skip
PER_ROW = Case("per row", "an upstream a row", reduction="none", upstream="random", rows=(6,))
GIVEN = Case("given", "weights that learn", weights="per row", wants=("student", "weights"), divergence="reverse_kl")
HALF = Case("half", "rounding", dtypes=(BF16,), classes=1000, weights="entropy")
POISONED = Case("poisoned", "one NaN in the student", values="nan in student", reduction="none")
INFINITE = Case("infinite", "the student excludes what a teacher does not", values="masked in student", rows=(3,))


def altered(**changes):
    """A call with some arguments replaced, each by a value or by a function of the old one."""

    def broken(student, teachers, target, **kwargs):
        for name, change in changes.items():
            kwargs[name] = change(kwargs[name]) if callable(change) else change
        return multi_teacher_kd_loss(student, teachers, target, **kwargs)

    return broken


def returning(change):
    """A loss changed afterwards, gradient and all."""

    def broken(*args, return_stats, **kwargs):
        loss, stats = multi_teacher_kd_loss(*args, return_stats=True, **kwargs)
        return (change(loss), stats) if return_stats else change(loss)

    return broken


class WithGradient(torch.autograd.Function):
    """The identity, whose gradient is changed."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient.clone()), None


def student_gradient(change):
    def broken(student, teachers, target, **kwargs):
        return multi_teacher_kd_loss(WithGradient.apply(student, change), teachers, target, **kwargs)

    return broken


def teacher_gradient(change):
    def broken(student, teachers, target, **kwargs):
        teachers = [WithGradient.apply(teachers[0], change), *teachers[1:]]
        return multi_teacher_kd_loss(student, teachers, target, **kwargs)

    return broken


def weights_gradient(change):
    def broken(student, teachers, target, weights, **kwargs):
        return multi_teacher_kd_loss(student, teachers, target, weights=WithGradient.apply(weights, change), **kwargs)

    return broken


def swapped(student, teachers, target, **kwargs):
    kwargs["divergence"] = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}[kwargs["divergence"]]
    return multi_teacher_kd_loss(student, teachers, target, **kwargs)


def teachers_in_another_order(student, teachers, target, weights, **kwargs):
    return multi_teacher_kd_loss(student, teachers[1:] + teachers[:1], target, weights=weights, **kwargs)


def upstream_forgotten(student, teachers, target, **kwargs):
    """The gradient that the forward wrote, handed out as it is."""
    alone = student.detach().requires_grad_()
    right, _ = multi_teacher_kd_loss(alone, [t.detach() for t in teachers], target, **kwargs)
    (written,) = torch.autograd.grad(right.sum(), alone)
    return multi_teacher_kd_loss(WithGradient.apply(student, lambda _: written), teachers, target, **kwargs)


def statistics(**changes):
    def broken(*args, **kwargs):
        loss, stats = multi_teacher_kd_loss(*args, **kwargs)
        return loss, stats._replace(**{name: change(getattr(stats, name)) for name, change in changes.items()})

    return broken


def ignored_rows_counted(student, teachers, target, **kwargs):
    return multi_teacher_kd_loss(student, teachers, target.clamp(min=0), **kwargs)


def drop_last(gradient):
    gradient[..., -1] = 0
    return gradient


def drop_row(gradient):
    gradient[-1] = 0
    return gradient


def unwritten(gradient):
    gradient.view(-1)[5] = float("nan")
    return gradient


BREAKS = {
    "loss off by 1e-5": (FULL, returning(lambda loss: loss * (1 + 1e-5))),
    "twice the loss": (FULL, returning(lambda loss: 2 * loss)),
    "no T squared": (FULL, altered(temperature_squared=False)),
    "T instead of T squared": (FULL, altered(kd_weight=lambda x: x / 4)),
    "another temperature": (FULL, altered(temperature=lambda x: x * (1 + 1e-4))),
    "uniform weights": (FULL, altered(weights="uniform")),
    "the other rule": (FULL, altered(weights="entropy")),
    "teachers in another order": (FULL, teachers_in_another_order),
    "weights used squared": (GIVEN, altered(weights=lambda w: w * w)),
    "weights normalised": (GIVEN, altered(weights=lambda w: w / w.sum(0))),
    "ignored rows counted": (FULL, ignored_rows_counted),
    "row weights as a mask": (FULL, altered(row_weights=lambda r: r != 0)),
    "row weights forgotten": (FULL, altered(row_weights=None)),
    "the sum for the mean": (FULL, altered(reduction="sum")),
    "the mean over all rows": (FULL, altered(num_items=6)),
    "no label smoothing": (FULL, altered(label_smoothing=0.0)),
    "no hard label": (FULL, altered(ce_weight=0.0)),
    "the other direction": (FULL, swapped),
    "the other direction, reverse": (GIVEN, swapped),
    "student gradient off by 1e-4": (FULL, student_gradient(lambda g: g * (1 + 1e-4))),
    "student gradient negated": (FULL, student_gradient(torch.neg)),
    "student gradient zero": (FULL, student_gradient(torch.zeros_like)),
    "last class unwritten": (FULL, student_gradient(drop_last)),
    "last row unwritten": (PER_ROW, student_gradient(drop_row)),
    "an element never written": (FULL, student_gradient(unwritten)),
    "upstream forgotten": (FULL, upstream_forgotten),
    "upstream per row forgotten": (PER_ROW, upstream_forgotten),
    "one teacher's gradient zero": (FULL, teacher_gradient(torch.zeros_like)),
    "one teacher's gradient off by 1e-4": (FULL, teacher_gradient(lambda g: g * (1 + 1e-4))),
    "weight gradient off by 1e-4": (GIVEN, weights_gradient(lambda g: g * (1 + 1e-4))),
    "half precision gradient off by 3%": (HALF, student_gradient(lambda g: g * 1.03)),
    "half precision gradient zero": (HALF, student_gradient(torch.zeros_like)),
    "NaN masked away": (POISONED, returning(lambda loss: loss.nan_to_num(0.0))),
    "infinity capped": (INFINITE, returning(lambda loss: loss.clamp(max=1e9))),
    "infinity turned into NaN": (INFINITE, returning(lambda loss: loss * 0 + float("nan"))),
    "statistics of another teacher": (FULL, statistics(divergence=lambda d: d.roll(1, 0))),
    "scaled statistics": (FULL, statistics(divergence=lambda d: 16 * d)),
    "weights of ignored rows": (FULL, statistics(weights=lambda w: w.clamp(min=0.1))),
    "missing statistics": (FULL, statistics(teacher_ce=lambda _: None)),
}


@pytest.mark.parametrize("case", [FULL, PER_ROW, GIVEN, HALF, POISONED, INFINITE], ids=str)
def test_unbroken_is_accepted(case, implementation):
    assert_matches(evaluate(build(case), implementation), oracle(case), implementation == "triton")


@pytest.mark.parametrize(("case", "broken"), BREAKS.values(), ids=BREAKS)
def test_break_is_noticed(case, broken, implementation):
    got = evaluate(build(case), implementation, broken)
    with pytest.raises(AssertionError):
        assert_matches(got, oracle(case), implementation == "triton")


ORDINARY = [case for case in CASES if case.values == "normal" and case.dtypes == (F32,) and case.wants]


def test_a_relative_error_of_1e_5_is_noticed_wherever_logits_are_ordinary():
    """Gradients of one class are 0, and a loss of 0 has no relative error."""
    missed = []
    for case in ORDINARY:
        expected = oracle(case)
        if case.classes == 1 or expected.exact.loss.abs().sum() == 0:
            continue
        got = evaluate(build(case), "reference", returning(lambda loss: loss * (1 + 1e-5)))
        try:
            assert_matches(got, expected)
        except AssertionError:
            continue
        missed.append(case.name)
    assert not missed
    assert len(ORDINARY) > 30


def test_a_kernel_that_computes_in_half_precision_is_noticed():
    """Measured against plain PyTorch in bfloat16 it would pass, and so would one that returns 0."""
    case = Case("near in half", "a difference of close numbers", values="near", dtypes=(BF16,), temperature=1.0)

    def half_precision(student, teachers, target, **kwargs):
        mixture = sum(t.softmax(-1) for t in teachers) / len(teachers)
        gradient = (student.softmax(-1) - mixture) / len(student)
        return multi_teacher_kd_loss(WithGradient.apply(student, lambda _: gradient), teachers, target, **kwargs)

    assert_matches(evaluate(build(case), "reference"), oracle(case))
    for broken in (half_precision, student_gradient(torch.zeros_like)):
        with pytest.raises(AssertionError, match="gradient of student"):
            assert_matches(evaluate(build(case), "reference", broken), oracle(case))


# The rule itself.

ROW = torch.tensor([1.0, -0.5, 0.25], dtype=F64)


def rows(got, exact=ROW, plain=ROW, terms=None, interpreted=False):
    terms = torch.zeros(()) if terms is None else terms
    assert_rows_close("row", got, exact, plain, terms=terms, arithmetic=F32, interpreted=interpreted)


def test_four_ulp_of_the_largest_number_of_the_row_pass_and_five_do_not():
    for dtype in (F32, BF16):
        step = ulp(torch.tensor(1.0), dtype)
        assert step == torch.finfo(dtype).eps
        rows((ROW + torch.tensor([0, 0, 4], dtype=F64) * step).to(dtype))
        with pytest.raises(AssertionError, match="off"):
            rows((ROW + torch.tensor([0, 0, 5], dtype=F64) * step).to(dtype))


def test_one_more_ulp_for_truncated_stores_in_the_interpreter_and_only_of_bfloat16():
    for dtype, accepted in ((BF16, True), (F32, False)):
        got = (ROW + torch.tensor([0, 0, 5], dtype=F64) * ulp(torch.tensor(1.0), dtype)).to(dtype)
        if accepted:
            rows(got, interpreted=True)
        else:
            with pytest.raises(AssertionError):
                rows(got, interpreted=True)


def test_twice_the_error_of_plain_pytorch_passes_and_three_times_does_not():
    plain = ROW + 1e-3
    rows((ROW + 1.9e-3).float(), plain=plain)
    with pytest.raises(AssertionError, match="off"):
        rows((ROW + 3e-3).float(), plain=plain)


def test_the_error_of_one_row_is_no_excuse_for_another():
    exact = torch.stack([ROW, ROW])
    plain = exact + torch.tensor([[1e-2], [0.0]])
    with pytest.raises(AssertionError, match=r"1 of 2, first at \(1,\)"):
        rows((exact + torch.tensor([[0.0], [1e-3]])).float(), exact, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_must_be_so_and_of_that_kind(value):
    number = torch.tensor([1.0, value], dtype=F64)
    ones = torch.ones(2)
    assert_numbers_close("loss", number.float(), number, number, terms=ones)
    for other in (2.0, float("nan"), float("inf"), -float("inf")):
        if str(other) != str(value):
            with pytest.raises(AssertionError, match="is right"):
                assert_numbers_close("loss", torch.tensor([1.0, other]), number, number, terms=ones)
    with pytest.raises(AssertionError, match="not finite"):
        rows(torch.tensor([1.0, value, 0.25]))
    with pytest.raises(AssertionError, match="should not be"):
        rows(ROW.float(), exact=torch.tensor([1.0, value, 0.25], dtype=F64))


def test_another_shape_is_noticed():
    with pytest.raises(AssertionError, match="shape"):
        rows(ROW.float()[None])
