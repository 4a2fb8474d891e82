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
LONGEST = 16 * 16384


@pytest.mark.parametrize("case", [x for x in CASES if math.prod(x.rows) > 0 and x.classes <= LONGEST], ids=str)
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
        (16384, BF16, 1), (16385, BF16, 2), (32000, BF16, 2), (50257, F32, 4), (128256, BF16, 8), (151936, F32, 16),
        (LONGEST, F32, 16), (LONGEST + 1, BF16, None),
    ],
)  # fmt: skip
def test_the_smallest_cluster_that_holds_a_row(classes, dtype, blocks):
    """Registers of a block have room for the sums of 16384 columns."""
    row = torch.empty((1, 1), dtype=dtype).expand(1, classes)
    fitting = []
    for limit in (1, 2, 4, 8, 16):
        with machine.use_clusters(limit):
            fitting += [limit] if emulator.fits_on_chip(row) else []
    assert fitting[:1] == ([] if blocks is None else [blocks])
