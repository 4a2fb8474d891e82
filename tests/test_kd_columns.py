"""Fewer long rows than threads: the columns of a row are shared out, and nothing but the time changes."""

import pytest
import torch

from mtkd_fast import multi_teacher_divergence, multi_teacher_kd_loss

pytestmark = pytest.mark.usefixtures("instruction_set")

CLASSES = 4 * 8192 + 1029  # four parts of whole tiles, and the last longer
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "dkd")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(rows, dtype=torch.float32, classes=CLASSES):
    g = torch.Generator().manual_seed(rows)
    student, *teachers = (torch.randn(rows, classes, generator=g).mul(3).to(dtype) for _ in range(4))
    return student, teachers, torch.randint(classes, (rows,), generator=g)


def run(student, teachers, target, n_threads, **options):
    """(loss, gradients of student and teachers that want one)."""
    torch.set_num_threads(n_threads)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in (student, *teachers)]
    loss = multi_teacher_kd_loss(leaves[0], leaves[1:], target, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum() * 0.5, [x for x in leaves if x.requires_grad])


def assert_same(student, teachers, target, n_threads=4, **options):
    student.requires_grad_()
    shared, alone = (run(student, teachers, target, n, **options) for n in (n_threads, 1))
    torch.testing.assert_close(shared[0], alone[0], rtol=2e-6, atol=1e-6, equal_nan=True)
    for mine, theirs in zip(shared[1], alone[1], strict=True):
        scale = theirs.nan_to_num(0, 0, 0).abs().max()
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}.get(mine.dtype, 2**-7)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=float(scale) * tolerance, equal_nan=True)
    return shared


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy"])
@pytest.mark.parametrize("rows", [1, 3])
def test_shared_columns_give_the_same_numbers(divergence, weights, rows):
    options = {"divergence": divergence, "weights": weights, "temperature": 4.0, "ce_weight": 0.5}
    assert_same(*inputs(rows), label_smoothing=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 3.7])
def test_dtypes_and_temperatures(dtype, temperature):
    assert_same(*inputs(1, dtype), weights="confidence", temperature=temperature, ce_weight=1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_teachers(divergence):
    student, teachers, target = inputs(2)
    for teacher in teachers[::2]:
        teacher.requires_grad_()
    assert_same(student, teachers, target, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("place", [0, 8192, 16384, CLASSES - 1])
def test_the_label_is_in_one_part(place):
    student, teachers, target = inputs(1)
    options = {"weights": "confidence", "temperature": 2.0, "ce_weight": 1.0}
    loss, (gradient,) = assert_same(student, teachers, target.fill_(place), **options)
    exact = multi_teacher_kd_loss(
        student.double(), [t.double() for t in teachers], target, implementation="reference", **options
    )
    (exact_gradient,) = torch.autograd.grad(exact * 0.5, student)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-4, atol=1e-8)


def _first_part(x):
    x[:, :9000] = float("-inf")


def _scattered(x):
    x[:, ::7] = float("-inf")


def _all(x):
    x.fill_(float("-inf"))


def _nan(x):
    x[:, 20000] = float("nan")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("change", [_first_part, _scattered, _all, _nan])
def test_hard_logits(divergence, whose, change):
    student, teachers, target = inputs(1)
    for x in {"student": [student], "teacher": teachers[:1], "both": [student, *teachers]}[whose]:
        change(x)
    assert_same(student, teachers, target, divergence=divergence, temperature=4.0)


def test_rows_and_teachers_that_do_not_count():
    student, teachers, target = inputs(3)
    target[1] = -100
    student[1] = teachers[0][:] = float("nan")
    loss, (gradient,) = assert_same(
        student, teachers, target, weights=torch.tensor([0.0, 0.5, 2.0]), temperature=4.0, ce_weight=1.0
    )
    assert loss[1] == 0
    assert gradient[1].count_nonzero() == 0
    assert loss.isfinite().all()


def test_a_row_of_padded_logits_and_large_offsets():
    student, teachers, target = inputs(2, classes=CLASSES + 77)
    assert_same(
        student[:, :CLASSES] + 5000, [t[:, :CLASSES] - 300 for t in teachers], target % CLASSES, temperature=4.0
    )


def test_divergences_by_themselves():
    student, teachers, _ = inputs(1)
    torch.set_num_threads(4)
    shared = multi_teacher_divergence(student, teachers, temperature=2.0)
    torch.set_num_threads(1)
    torch.testing.assert_close(shared, multi_teacher_divergence(student, teachers, temperature=2.0), rtol=2e-6, atol=0)
