"""Rows of several tiles on the CPU: their maximum is found on the way, and their exponentials are kept in the memory of
gradients still to be written, or computed again. And gradients that go past the caches."""

import pytest
import torch
from cases.kd import BF16, F16, F32, F64, INF, check, check_rows_alone

TILE = 2048  # columns, csrc/tile.h
C = 4 * TILE + 37
OPTIONS = dict(weights="confidence", temperature=4.0, ce_weight=0.5, label_smoothing=0.1)


@pytest.fixture(autouse=True)
def one_thread():
    """So that all but the last rows keep their exponentials."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(rows, classes=C, n_teachers=2, dtype=F32):
    g = torch.Generator().manual_seed(rows)
    student, *teachers = (torch.randn(rows, classes, generator=g).mul(2).to(dtype) for _ in range(1 + n_teachers))
    return student, teachers, torch.randint(classes, (rows,), generator=g)


def climb(x):
    """Every tile's maximum is above that of the tile before, by little in some rows and by far in others."""
    steps = torch.arange(x.shape[1]) // TILE
    return x + steps * torch.linspace(0.5, 30, x.shape[0])[:, None]


def peak(x):
    """One class far above the rest, late in the row."""
    x = x.clone()
    x[torch.arange(len(x)), torch.arange(len(x)) + 3 * TILE] = 40.0
    return x


def masked(x):
    """Tiles of nothing but −inf, the first among them."""
    x = x.clone()
    x[:, :TILE] = x[:, 2 * TILE : 3 * TILE] = -INF
    return x


def far_below(x):
    """The first tile holds nothing that counts."""
    x = x.clone()
    x[:, :TILE] -= 500
    return x


def far_away(x):
    return x + 3000


@pytest.mark.parametrize("shape", [climb, peak, masked, far_below, far_away])
@pytest.mark.parametrize("of", ["teachers", "student", "both"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_a_maximum_that_comes_late(instruction_set, shape, of, divergence):
    student, teachers, target = draw(4)
    target = 3 * TILE + target % 37  # a class that no shape takes away
    if of != "student":
        teachers = [shape(teachers[0]), teachers[1]]
    if of != "teachers":
        student = shape(student)
    check(instruction_set, student, teachers, target, divergence=divergence, **OPTIONS)


@pytest.mark.parametrize("temperature", [0.04, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_late_maximum_that_is_a_little_larger(instruction_set, temperature, divergence):
    """e^{x/τ} of what lies 4 above the first tile would overflow at a low temperature."""
    student = torch.randn(2, 2 * TILE, generator=torch.Generator().manual_seed(0)) * 0.1
    teacher = student.clone()
    student[:, 0] = teacher[:, 0] = 0.5
    teacher[:, TILE + 900] = student[:, TILE + 1400] = 4.4
    student[1] -= 12
    student[1, 0] = 0
    options = dict(divergence=divergence, temperature=temperature, temperature_squared=False)
    check(instruction_set, student, [teacher], wants=("student", "teachers"), **options)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy"])
def test_rows_that_keep_their_exponentials_and_rows_that_do_not(instruction_set, dtype, weights):
    """The last of 8 rows has no gradient behind it; alone, every row is a last one. The bits are the same."""
    student, teachers, target = draw(8, dtype=dtype)
    teachers[0] = peak(teachers[0])
    options = OPTIONS | {"weights": weights}
    check(instruction_set, student, teachers, target, **options)
    check_rows_alone(instruction_set, student, teachers, target, **options)


def test_rows_that_do_not_count_lie_between(instruction_set):
    student, teachers, target = draw(9)
    target[[0, 3, 4, 8]] = -100
    check(instruction_set, student, teachers, target, **OPTIONS)


@pytest.mark.parametrize("classes", [10, 100, 515, 1001, TILE + 1])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_gradients_past_the_caches(instruction_set, classes, dtype):
    """Of many rows: the same bits as those of few."""
    rows = (9 << 20) // dtype.itemsize // classes
    student, teachers, target = draw(rows, classes, n_teachers=1, dtype=dtype)

    def gradient(some):
        leaf = student[some].requires_grad_()
        loss = instruction_set.loss(
            leaf, [teachers[0][some]], target[some], reduction="sum", ce_weight=1.0, temperature=4.0
        )
        return torch.autograd.grad(loss, leaf)[0]

    many = gradient(slice(None))
    for first in (0, rows // 3, rows - 64):
        some = slice(first, first + 64)
        assert torch.equal(many[some], gradient(some))
