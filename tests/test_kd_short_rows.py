"""Short rows on the CPU: whole blocks of them go a straight way, blocks with something out of the ordinary another. A
row's numbers must not tell which way its block went."""

import pytest
import torch
from cases.kd import BF16, F16, F32, F64, INF, assert_same_bits, check, loss_and_gradient

ROWS = 70  # whole blocks of every instruction set, and some rows more
OPTIONS = dict(weights="confidence", temperature=4.0, ce_weight=0.5, label_smoothing=0.1)


def draw(classes, dtype=F32, n_teachers=3):
    g = torch.Generator().manual_seed(classes)
    student, *teachers = (torch.randn(ROWS, classes, generator=g).to(dtype) for _ in range(1 + n_teachers))
    return student, teachers, torch.randint(classes, (ROWS,), generator=g)


def contiguous(x):
    return x.contiguous()


def rows_apart(x):
    return torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype)[:, : x.shape[1]].copy_(x)


def planes(x):
    return x.t().contiguous().t()


@pytest.mark.parametrize("classes", [1, 2, 10, 33, 65, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("layout", [contiguous, rows_apart, planes])
@pytest.mark.parametrize("of", ["teachers", "student", "target"])
def test_neighbours_do_not_tell(instruction_set, classes, dtype, layout, of):
    """Every second row is out of the ordinary, so that no block of the second call is plain."""
    student, teachers, target = draw(classes, dtype)
    before = loss_and_gradient(instruction_set, layout(student), [layout(t) for t in teachers], target, **OPTIONS)
    odd = torch.arange(ROWS) % 2 == 1
    if of == "target":
        target = target.masked_fill(odd, -100)
    else:
        x = teachers[1] if of == "teachers" else student
        x[odd, target[odd] - 1] = -INF
    after = loss_and_gradient(instruction_set, layout(student), [layout(t) for t in teachers], target, **OPTIONS)
    assert_same_bits(before, after, ~odd)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy", "given"])
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_every_rule_and_temperature(instruction_set, classes, temperature, weights, ce_weight):
    student, teachers, target = draw(classes)
    if weights == "given":
        weights = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(1))
    options = dict(weights=weights, temperature=temperature, ce_weight=ce_weight)
    row_weights = torch.linspace(0.5, 2, ROWS)
    check(instruction_set, student, teachers, target, row_weights=row_weights, **options)
    before = loss_and_gradient(instruction_set, student, teachers, target, row_weights=row_weights, **options)
    student[::4, 1] = -INF
    after = loss_and_gradient(instruction_set, student, teachers, target, row_weights=row_weights, **options)
    assert_same_bits(before, after, torch.arange(ROWS) % 4 != 0)


def test_a_teacher_of_weight_zero_is_not_read(instruction_set):
    """Nor does it make other rows of the block differ."""
    student, teachers, target = draw(10)
    weights = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(1))
    before = loss_and_gradient(instruction_set, student, teachers, target, weights=weights)
    weights[1, ::4] = 0
    teachers[1][::4] = float("nan")
    after = loss_and_gradient(instruction_set, student, teachers, target, weights=weights)
    assert_same_bits(before, after, torch.arange(ROWS) % 4 != 0)
    for x in after:
        assert x.isfinite().all()


@pytest.mark.parametrize("value", [INF, -INF, float("nan"), 1e30])
@pytest.mark.parametrize("of", ["teacher", "student"])
def test_numbers_out_of_the_ordinary(instruction_set, value, of):
    student, teachers, target = draw(10)
    (teachers[2] if of == "teacher" else student)[20, 3] = value
    check(instruction_set, student, teachers, target, **OPTIONS)


def test_without_a_gradient(instruction_set):
    student, teachers, target = draw(10)
    expected, _ = loss_and_gradient(instruction_set, student, teachers, target, **OPTIONS)
    assert torch.equal(instruction_set.loss(student, teachers, target, reduction="none", **OPTIONS), expected)
