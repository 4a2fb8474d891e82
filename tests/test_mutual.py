"""The op ``mutual``: every backend on its case table, and what the table does not say."""

import pytest
from cases import F64
from cases.mutual import CASES, FLOAT64_CASES, assert_matches, build, evaluate, oracle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, fused):
    got = evaluate(build(case, fused.device), fused.implementation)
    assert_matches(got, oracle(case), fused.interpreted)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, fused):
    if not fused.float64:
        pytest.skip(f"{fused.name} computes in float32")
    got = evaluate(build(case, fused.device), fused.implementation)
    assert got.loss.dtype == F64
    assert_matches(got, oracle(case))
