"""Temperatures at both ends of what float32 holds: rows end in the middle of a register, logits may be −inf."""

import pytest
import torch
from cases.kd import check

OPTIONS = dict(weights="uniform", temperature_squared=False)


@pytest.mark.parametrize("classes", [7, 20, 600])
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30, 1e37, 3e38])
@pytest.mark.parametrize("masked", [False, True])
def test_temperatures_at_both_ends(instruction_set, classes, temperature, masked):
    g = torch.Generator().manual_seed(classes)
    student, *teachers = (torch.randn(18, classes, generator=g) for _ in range(3))
    if masked:
        for x in (student, *teachers):
            x[:, classes // 2] = -torch.inf
    check(instruction_set, student, teachers, None, temperature=temperature, **OPTIONS)
