"""What a batch comes down to on the CPU: labels checked, rows counted, losses summed, in wide registers whose
remainders are rows too; and short rows, which are taken a register at a time where all of them count."""

import math

import pytest
import torch
from cases.kd import check
from cases.threads import using_threads

from mtkd_fast import multi_teacher_kd_loss

C = 10
ROWS = (1, 7, 8, 15, 16, 17, 37)


def inputs(rows):
    g = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, C, generator=g) for _ in range(2))
    return student, teacher, torch.randint(C, (rows,), generator=g)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("wrong", [C, -1, -(2**40), 2**40])
def test_a_wrong_label_is_found_wherever_it_is(instruction_set, rows, wrong):
    student, teacher, target = inputs(rows)
    for row in range(rows):
        of_row = target.clone()
        of_row[row] = wrong
        with pytest.raises(ValueError, match=f"target must hold labels .*got {wrong}$"):
            instruction_set.loss(student, [teacher], of_row, ce_weight=1.0)


@pytest.mark.parametrize("rows", ROWS)
def test_a_mean_is_over_the_rows_that_count(instruction_set, rows):
    student, teacher, target = inputs(rows)
    for first in range(rows + 1):
        of_rows, weights = target.clone(), torch.ones(rows)
        of_rows[first:] = -100
        weights[: first // 2] = 0
        options = dict(ce_weight=1.0, row_weights=weights)
        each = instruction_set.loss(student, [teacher], of_rows, reduction="none", **options)
        mean = instruction_set.loss(student, [teacher], of_rows, **options)
        torch.testing.assert_close(mean, each.double().sum().div(max(first - first // 2, 1)).float())


@pytest.mark.parametrize("rows", [*ROWS, 63, 64, 65, 128, 1000])
def test_a_sum_has_the_digits_of_float64(instruction_set, rows):
    student, teacher, target = inputs(rows)
    each = instruction_set.loss(student, [teacher], target, ce_weight=1.0, reduction="none")
    total = instruction_set.loss(student, [teacher], target, ce_weight=1.0, reduction="sum")
    assert total.item() == pytest.approx(math.fsum(each.tolist()), rel=2**-24)


def test_a_sum_does_not_depend_on_the_threads(instruction_set):
    student, teacher, target = inputs(8197)
    sums = set()
    for threads in (1, 2, 3):
        with using_threads(threads):
            sums.add(instruction_set.loss(student, [teacher], target, ce_weight=1.0, reduction="sum").item())
    assert len(sums) == 1


@pytest.mark.parametrize("out", [None, 0, 15, 16, 20, 36])
@pytest.mark.parametrize("how", ["ignored", "weighted"])
def test_neighbouring_rows_and_a_row_that_does_not_count(instruction_set, out, how):
    student, teacher, target = inputs(37)
    options = dict(weights="confidence", ce_weight=1.0)
    if how == "weighted":
        options["row_weights"] = torch.rand(37).add(0.5)
    if out is not None and how == "ignored":
        target[out] = -100
    if out is not None and how == "weighted":
        options["row_weights"][out] = 0
    check(instruction_set, student, [teacher, teacher.flip(0)], target, **options)


def test_a_loss_is_the_same_on_any_number_of_threads(instruction_set):
    student, teacher, target = inputs(5000)
    losses = []
    for threads in (1, 2, 3):
        with using_threads(threads):
            losses.append(multi_teacher_kd_loss(student, [teacher], target, ce_weight=1.0).item())
    assert len(set(losses)) == 1
