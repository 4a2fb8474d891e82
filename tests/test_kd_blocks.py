"""Rows of one tile on the CPU, several blocks of them: a row's numbers must not tell what stands beside it or stood
before it, nor which thread had it."""

import pytest
import torch
from cases.kd import BF16, F32, F64, INF, assert_same_bits, check, loss_and_gradient
from cases.threads import using_threads

ROWS = 53  # whole blocks of every instruction set, and some rows more
ODD = torch.arange(ROWS) % 2 == 1


def draw(classes, dtype=F32, rows=ROWS):
    g = torch.Generator().manual_seed(classes)
    student, *teachers = (torch.randn(rows, classes, generator=g).mul(2).to(dtype) for _ in range(3))
    return student, teachers, torch.randint(classes, (rows,), generator=g)


@pytest.mark.parametrize("classes", [129, 300, 1001, 1025])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("value", [-INF, INF, float("nan"), 60.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_neighbours_do_not_tell(instruction_set, classes, dtype, value, divergence):
    """Every second row is swept with care, swept again, or not finite."""
    student, teachers, target = draw(classes, dtype)
    options = dict(weights="confidence", temperature=4.0, ce_weight=0.5, divergence=divergence)
    before = loss_and_gradient(instruction_set, student, teachers, target, **options)
    teachers[1][ODD, target[ODD] - 2] = value
    after = loss_and_gradient(instruction_set, student, teachers, target, **options)
    assert_same_bits(before, after, ~ODD)


@pytest.mark.parametrize("classes", [129, 257, 1001, 2048])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "dkd"])
def test_blocks_inherit_nothing(instruction_set, classes, divergence):
    """First rows that are not finite, then every second without the first teacher, then none with the second one."""
    student, teachers, target = draw(classes)
    weights = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(1)) + 0.1
    weights[0, 16:32:2] = weights[1, 32:] = 0
    options = dict(weights=weights, temperature=2.0, ce_weight=1.0, divergence=divergence)
    check(instruction_set, student, teachers, target, **options)
    before = loss_and_gradient(instruction_set, student, teachers, target, **options)
    for value, row in [(float("nan"), 3), (INF, 7), (1e30, 11), (-INF, 15)]:
        teachers[0][row], teachers[1][row, ::2], student[row, ::3] = value, value, value
    after = loss_and_gradient(instruction_set, student, teachers, target, **options)
    assert_same_bits(before, after, slice(16, None))


@pytest.mark.parametrize("classes", [129, 1001, 5000])
@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy"])
def test_threads_do_not_tell(instruction_set, classes, weights):
    student, teachers, target = draw(classes, rows=10 * ROWS)
    options = dict(weights=weights, temperature=4.0, ce_weight=0.5)
    with using_threads(1):
        alone = loss_and_gradient(instruction_set, student, teachers, target, **options)
    with using_threads(3):
        shared = loss_and_gradient(instruction_set, student, teachers, target, **options)
    assert_same_bits(alone, shared, slice(None))
