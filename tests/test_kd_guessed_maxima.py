"""Rows of one tile on the CPU: their exponentials are relative to a guess at the largest logit, from the target and the
first classes, and computed again where the guess is far off."""

import pytest
import torch
from cases.kd import BF16, F16, F32, F64, INF, check

SEEN = 128  # the most classes that a guess sees beside the target, csrc/kd_sweep.h
OPTIONS = dict(weights="confidence", temperature=4.0, ce_weight=0.5, label_smoothing=0.1)


def draw(rows=13, classes=1001, dtype=F32):
    g = torch.Generator().manual_seed(rows + classes)
    student, *teachers = (torch.randn(rows, classes, generator=g).mul(2).to(dtype) for _ in range(3))
    return student, teachers, torch.randint(SEEN, classes, (rows,), generator=g)


def put(x, height):
    """One class that no guess sees, of ``height``, in every third row, so that other rows of its block stay."""
    x = x.clone()
    rows = torch.arange(0, len(x), 3)
    x[rows, SEEN + rows] = height
    return x


def a_little_larger(x):
    return put(x, 11.0)


def far_larger(x):
    return put(x, 60.0)


def below(x):
    """All that is seen lies far below, in rows whose target does too."""
    x = put(x, 3.0) - 500
    x[1::2] += 500
    return x


def masked(x):
    """All that is seen is −inf but for the target, which is so in some rows."""
    x = x.clone()
    x[:, :SEEN] = -INF
    return x


def far_away(x):
    return put(x, 20.0) + 3000


SHAPES = [a_little_larger, far_larger, below, masked, far_away]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", ["teachers", "student", "both"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_a_guess_that_is_off(instruction_set, shape, of, divergence):
    student, teachers, target = draw()
    if of != "student":
        teachers = [shape(teachers[0]), teachers[1]]
    if of != "teachers":
        student = shape(student)
    check(instruction_set, student, teachers, target, divergence=divergence, **OPTIONS)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [a_little_larger, far_larger])
def test_temperatures(instruction_set, temperature, shape):
    student, teachers, target = draw(classes=515)
    check(instruction_set, shape(student) * 0.1, [shape(t) * 0.1 for t in teachers], target,
          **OPTIONS | dict(temperature=temperature, temperature_squared=False))  # fmt: skip


def test_a_target_without_probability(instruction_set):
    student, teachers, target = draw()
    rows = torch.arange(len(target))
    teachers[0] = masked(teachers[0])
    teachers[0][rows[::2], target[::2]] = -INF
    check(instruction_set, student, teachers, target, weights="uniform", temperature=2.0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("classes", [256, 257, 2048])
def test_the_bits_of_a_row_are_its_own(instruction_set, dtype, classes):
    """Whether other rows of its block are swept again or not."""
    student, teachers, target = draw(classes=classes, dtype=dtype)
    student, teachers = far_larger(student), [a_little_larger(teachers[0]), far_larger(teachers[1])]
    check(instruction_set, student, teachers, target, **OPTIONS)

    def gradient(rows):
        leaf = student[rows].requires_grad_()
        of_rows = [t[rows] for t in teachers]
        loss = instruction_set.loss(leaf, of_rows, target[rows], reduction="sum", **OPTIONS)
        return torch.autograd.grad(loss, leaf)[0]

    together = gradient(slice(None))
    for n in range(len(student)):
        assert torch.equal(together[n : n + 1], gradient(slice(n, n + 1)))
