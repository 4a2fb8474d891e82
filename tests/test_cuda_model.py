"""The counts that bench/model.py predicts from, held against the machine code for sm_90a."""

import re
import shutil
import statistics
from itertools import pairwise

import pytest

if not shutil.which("nvcc"):
    pytest.skip("there is no nvcc", allow_module_level=True)

from mtkd_fast.bench import model
from sass import SOURCES, count, kernels, loops, stretches

CASES = [model.Case(1, half, computed) for half in (False, True) for computed in (False, True)]
LOAD = "LDS.128"
COLUMNS = 8


def forward_kl(case: model.Case) -> list[str]:
    """Of a cluster that shares rows in shared memory."""
    tile = "SharedTileILi64ELb1E" if case.computed else "SharedTileILi32ELb0E"
    (code,) = kernels(SOURCES["kd"], "90a", "kd_residentILNS_4KindE0E", "ClusterGroup", tile).values()
    return code


def exponentials(code: list[str]) -> int:
    return count(code, "MUFU.EX2")


def writes_shared(code: list[str]) -> bool:
    return any(re.search(r"\bSTS\b", x) for x in code)


def sums_of_teacher(case: model.Case) -> list[list[str]]:
    """Rounds of the loop that reads a chunk of a teacher, and of the student's floats: one for each dtype."""
    loads = (1 if case.half else 2) + 2
    return [x for x in loops(forward_kl(case)) if exponentials(x) == COLUMNS and count(x, LOAD) == loads]


def shares_of_teacher(case: model.Case) -> list[list[str]]:
    """Chunks, one after the other, of the sweeps that add to the sums: one load each of halves, two of floats.

    A far teacher's exponents, each a difference first, are another sweep.
    """
    found = []
    for before, x in pairwise(stretches(forward_kl(case), LOAD)):
        whole = x if case.half else before + x
        loads = count(whole, LOAD)
        of_far = count(whole, "FADD") >= COLUMNS
        if exponentials(whole) == COLUMNS and loads == (1 if case.half else 2) and len(whole) < 60 and not of_far:
            found.append(whole)
    return [x for x in found if not any(re.search(r"\bSTG\b", y) for y in x)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_teacher_takes(case):
    """The shortest way is that of τ = 1, whose sums at temperature 1 are an addition a column. Squared twice they are a
    multiplication, and another with the addition.
    """
    sums, share = model.of_teacher(case)
    rounds = sums_of_teacher(case)
    assert len(rounds) == (2 if case.half else 1)
    for x in rounds:
        assert len(x) + case.computed * COLUMNS == pytest.approx(sums.instructions, rel=0.03)
        assert exponentials(x) == sums.exponentials
        assert not writes_shared(x)

    chunks = sorted(shares_of_teacher(case), key=len)  # and the ways from one sweep to the next
    pieces = (8 if case.computed else 4) * (2 if case.half else 1)  # of a thread, for each dtype
    assert len(chunks) >= pieces
    assert statistics.median(len(x) for x in chunks[:pieces]) == pytest.approx(share.instructions, rel=0.03)
    assert not any(writes_shared(x) for x in chunks[:pieces])


def test_what_bounds_a_case():
    """Of five units of floats, 20 bytes a column, a copy of 4.3 TB/s leaves 4.65 ps."""
    took = model.seconds_of_column(model.Case(3, half=False, computed=False))
    assert took["memory"] == pytest.approx(20 / 4.3e12)
    assert max(took, key=took.get) == "memory"
    found = model.seconds(100, 1000, model.Case(3, half=False, computed=False))
    assert found == pytest.approx(1e5 * 20 / 4.3e12 + 2 * model.H200.launch)
    took = model.seconds_of_column(model.Case(16, half=True, computed=True))
    assert max(took, key=took.get) == "instructions"
    found = model.seconds(100, 32000, model.Case(16, half=True, computed=True))
    assert found == pytest.approx(3.2e6 * took["instructions"] + 2 * model.H200.launch)


def test_the_model_prints_every_case(capsys):
    model.main()
    printed = capsys.readouterr().out
    assert printed.count("| bf16 | computed |") == 2 * 5
    assert f"| {model.CLASSES[-1]} |" in printed
