"""The rows that a cluster of blocks shares: the case table, and which rows they are."""

import functools
import math
import shutil

import pytest
import torch
from conftest import EmulatedCuda

if not shutil.which("g++"):
    pytest.skip("the CUDA emulator needs g++", allow_module_level=True)

import emulator
from cases.kd import CASES, assert_matches, build, evaluate, oracle
from emulator import machine

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("case", [case for case in CASES if math.prod(case.rows) > 0], ids=str)
def test_case(case, monkeypatch):
    """Two blocks, which of more than eight classes have a part each, or 16."""
    variant = "_pairs" if case.classes < 30_000 else "_clusters"
    monkeypatch.setattr(emulator, "forward", functools.partial(emulator.forward, variant=variant))
    monkeypatch.setattr(emulator, "fits_on_chip", lambda student: True)
    with EmulatedCuda().active():
        assert_matches(evaluate(build(case), "triton"), oracle(case))


@pytest.mark.parametrize(
    ("classes", "dtype", "blocks"),
    [
        (16000, BF16, 1), (17000, BF16, 2), (32000, BF16, 2), (50257, BF16, 4), (128256, BF16, 8), (151936, BF16, 16),
        (262144, BF16, 16), (263000, BF16, None),
        (28672, F32, 2), (29000, F32, 4), (229000, F32, 16), (230000, F32, None),
    ],
)  # fmt: skip
def test_the_smallest_cluster_that_holds_a_row(classes, dtype, blocks):
    """Student, a float32 teacher and two sums a column: 14 or 16 bytes, beside 64 teachers' numbers."""
    row = torch.empty((1, 1), dtype=dtype).expand(1, classes)
    fitting = []
    for limit in (1, 2, 4, 8, 16):
        with machine.use_clusters(limit):
            fitting += [limit] if emulator.fits_on_chip(row) else []
    assert fitting[:1] == ([] if blocks is None else [blocks])
