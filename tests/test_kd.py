"""Every backend of the op ``kd`` on the case table: value, gradients and statistics against the oracle."""

import pytest
import torch
from cases.kd import CASES, FLOAT64_CASES, assert_matches, build, evaluate, oracle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, fused):
    got = evaluate(build(case, fused.device), fused.implementation)
    assert_matches(got, oracle(case), fused.interpreted)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, fused64):
    got = evaluate(build(case, fused64.device), fused64.implementation)
    assert got.loss.dtype == torch.float64
    assert_matches(got, oracle(case))
