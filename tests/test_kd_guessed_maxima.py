"""Rows of one tile on the CPU: their exponentials are relative to a guess at the largest logit, from the target and the
first classes, and computed again where the guess is far off."""

import pytest
import torch
from cases.kd import BF16, F16, F32, F64, INF, check, check_rows_alone

SEEN = 128  # the most classes that a guess sees beside the target: 8 registers of floats, csrc/kd_block.h
OPTIONS = dict(weights="confidence", temperature=4.0, ce_weight=0.5, label_smoothing=0.1)


def draw(rows=13, classes=1001, dtype=F32):
    """With targets that are not among the first classes."""
    g = torch.Generator().manual_seed(rows + classes)
    student, *teachers = (torch.randn(rows, classes, generator=g).mul(2).to(dtype) for _ in range(3))
    return student, teachers, torch.randint(SEEN, classes - SEEN, (rows,), generator=g)


def put(x, height):
    """One class that no guess sees, of ``height``, in every third row, so that other rows of its block stay."""
    x = x.clone()
    rows = torch.arange(0, len(x), 3)
    x[rows, -1 - rows] = height
    return x


def a_little_larger(x):
    return put(x, 11.0)


def far_larger(x):
    return put(x, 60.0)


def below(x):
    """The first classes lie far below the others."""
    x = x.clone()
    x[:, :SEEN] -= 100
    return x


def masked(x):
    """The first classes are −inf."""
    x = x.clone()
    x[:, :SEEN] = -INF
    return x


def far_away(x):
    return put(x, 20.0) + 3000


SHAPES = [a_little_larger, far_larger, below, masked, far_away]


def lower_targets(x, target, by):
    """In every second row, so that nothing is left of a guess there."""
    x = x.clone()
    rows = torch.arange(0, len(x), 2)
    x[rows, target[rows]] -= by
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", ["teachers", "student", "both"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl"])
def test_a_guess_that_is_off(instruction_set, shape, of, divergence):
    student, teachers, target = draw()
    if of != "student":
        teachers = [lower_targets(shape(teachers[0]), target, 100), teachers[1]]
    if of != "teachers":
        student = shape(student)
    check(instruction_set, student, teachers, target, divergence=divergence, **OPTIONS)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [a_little_larger, far_larger])
def test_temperatures(instruction_set, temperature, shape):
    student, teachers, target = draw(classes=515)
    scale = min(1.0, temperature)
    options = OPTIONS | dict(temperature=temperature, temperature_squared=False)
    check(instruction_set, shape(student) * scale, [shape(t) * scale for t in teachers], target, **options)


def test_entropies_of_peaked_rows(instruction_set):
    """Of a few thousandths: a reference 8 below the largest logit would take their digits."""
    rows, classes = 16, 1001
    student, _, target = draw(rows, classes)
    teachers = [torch.full((rows, classes), -60.0) for _ in range(2)]
    for k, teacher in enumerate(teachers):
        teacher[:, 0] = 0
        teacher[:, 500 + k] = torch.linspace(7.5, 7.9, rows) - 0.2 * k
    check(instruction_set, student, teachers, target, weights="entropy", temperature=1.0)


@pytest.mark.parametrize("poison", [INF, float("nan")])
@pytest.mark.parametrize("at_target", [True, False])
def test_what_is_not_finite_is_seen(instruction_set, poison, at_target):
    student, teachers, target = draw()
    teachers[1] = teachers[1].clone()
    teachers[1][4, target[4] if at_target else -1] = poison
    check(instruction_set, student, teachers, target, weights="confidence", temperature=4.0)


def test_teachers_that_some_rows_do_not_read(instruction_set):
    student, teachers, target = draw()
    weights = torch.rand(2, len(student), generator=torch.Generator().manual_seed(1))
    weights[0, ::2] = weights[1, 1::4] = 0
    teachers = [far_larger(teachers[0]), a_little_larger(teachers[1])]
    check(instruction_set, student, teachers, target, weights=weights, temperature=2.0, ce_weight=1.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_backward_starts_from_the_guess_too(instruction_set, divergence):
    student, teachers, target = draw()
    teachers = [far_larger(teachers[0]), a_little_larger(teachers[1])]
    check(instruction_set, a_little_larger(student), teachers, target, divergence=divergence,
          wants=("student", "teachers"), **OPTIONS | dict(weights="uniform"))  # fmt: skip


def test_a_target_without_probability(instruction_set):
    student, teachers, target = draw()
    rows = torch.arange(0, len(target), 2)
    teachers[0] = masked(teachers[0])
    teachers[0][rows, target[rows]] = -INF
    check(instruction_set, student, teachers, target, weights="uniform", temperature=2.0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("classes", [256, 257, 2048])
def test_the_bits_of_a_row_are_its_own(instruction_set, dtype, classes):
    """Whether other rows of its block are swept again or not."""
    student, teachers, target = draw(classes=classes + SEEN, dtype=dtype)
    student, *teachers = (x[:, :classes] for x in (student, *teachers))
    target = target.clamp(max=classes - SEEN // 2)
    student, teachers = far_larger(student), [a_little_larger(teachers[0]), far_larger(teachers[1])]
    check(instruction_set, student, teachers, target, **OPTIONS)
    check_rows_alone(instruction_set, student, teachers, target, **OPTIONS)
