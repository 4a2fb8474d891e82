"""The counts that bench/model.py predicts from, held against the machine code for sm_90a."""

import re
import shutil
import statistics
from collections import Counter
from itertools import chain

import pytest
import torch

if not shutil.which("nvcc"):
    pytest.skip("there is no nvcc", allow_module_level=True)

import emulator
from mtkd_fast.bench import model
from sass import SOURCES, count, kernels, loops, stretches

CASES = [model.Case(1, half, computed) for half in (False, True) for computed in (False, True)]
LOAD = "LDS.128"
COLUMNS, PIECES = 8, 8  # of a chunk; of a thread


def forward_kl(case: model.Case) -> list[str]:
    """Of a cluster that shares rows in shared memory."""
    tile = f"SharedTileILi64ELb{int(case.computed)}E"
    (code,) = kernels(SOURCES["kd"], "90a", "kd_residentILNS_4KindE0E", "ClusterGroup", tile).values()
    return code


def exponentials(code: list[str]) -> int:
    return count(code, "MUFU.EX2")


def opcodes(code: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, x)) for x in code)


def rounds(code: list[str], loads: int) -> list[list[str]]:
    """Of loops, and of what is written out chunk after chunk: from each load to the one so many after it."""
    between = stretches(code, LOAD)
    written_out = (list(chain(*between[i : i + loads])) for i in range(len(between)))
    return [x for x in (*loops(code), *written_out) if count(x, LOAD) == loads and len(x) < 200]


def largest_of_chunk(case: model.Case) -> list[list[str]]:
    """Of student and teacher: halves two at a time."""
    found = rounds(forward_kl(case), 1 if case.half else 2)
    kind, maxima = (r"\bHMNMX2", 4) if case.half else (r"\bFMNMX", 8)
    return [x for x in found if opcodes(x, kind) == maxima == opcodes(x, r"MNMX") and exponentials(x) == 0]


def sums_of_teacher(case: model.Case) -> list[list[str]]:
    """One load of the teacher's halves, or two of floats, and two of the student's floats."""
    found = rounds(forward_kl(case), (1 if case.half else 2) + 2)
    return [x for x in found if exponentials(x) == COLUMNS and not opcodes(x, r"MNMX|\bST[SG]\b|\bBAR\b")]


def shares_of_teacher(case: model.Case) -> list[list[str]]:
    """Chunks, one after the other, of the sweeps that add to the sums.

    A far teacher's exponents, each a difference first, are another sweep.
    """
    found = rounds(forward_kl(case), 1 if case.half else 2)
    of_far = [count(x, "FADD") >= COLUMNS for x in found]
    return [
        x
        for x, far in zip(found, of_far, strict=True)
        if exponentials(x) == COLUMNS and len(x) < 60 and not far and not opcodes(x, r"\bST[SG]\b")
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_teacher_takes(case):
    """The shortest way is that of τ = 1, whose sums at temperature 1 are an addition a column. Squared twice they are a
    multiplication, and another with the addition.
    """
    largest, sums, share = model.of_teacher(case)
    found = largest_of_chunk(case)
    assert len(found) >= 2 * PIECES  # the student's and a teacher's
    assert statistics.median(len(x) for x in found) == pytest.approx(largest.instructions, abs=1)

    found = sums_of_teacher(case)
    assert len(found) >= (1 if case.computed else PIECES) * (2 if case.half else 1)
    assert statistics.median(len(x) for x in found) + case.computed * COLUMNS == pytest.approx(
        sums.instructions, rel=0.03
    )
    assert sums.exponentials == COLUMNS

    if case.computed:
        chunks = sorted(shares_of_teacher(case), key=len)  # and the ways from one sweep to the next
        pieces = PIECES * (2 if case.half else 1)  # of a thread, for each dtype
        assert len(chunks) >= pieces
        assert statistics.median(len(x) for x in chunks[:pieces]) == pytest.approx(share.instructions, rel=0.03)
    else:
        assert share.exponentials == share.shared_bytes == 0
        assert len(adding_what_is_kept(forward_kl(case))) / PIECES == pytest.approx(share.instructions, rel=0.1)


def adding_what_is_kept(code: list[str]) -> list[str]:
    """The way on which chunk after chunk goes into the sums, by multiply-adds: nothing is exponentiated or read."""
    runs, run = [], []
    for x in code:
        if re.search(r"MUFU|\bLDS|\bSTS|\bLDG|\bSTG|\bSHFL|\bBAR", x):
            runs, run = [*runs, run], []
        else:
            run.append(x)
    (adds,) = (x for x in [*runs, run] if count(x, "FFMA") >= PIECES * COLUMNS)
    factors = [set(re.findall(r"\bR\d+", x)[1:3]) if count([x], "FFMA") else set() for x in adds]
    ((factor, _),) = Counter(chain(*factors)).most_common(1)
    uses = [i for i, x in enumerate(factors) if factor in x]
    return adds[uses[0] : uses[PIECES * COLUMNS - 1] + 1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_student_takes(case):
    """Without its statistics at temperature 1, which the shortest way passes by."""
    _, sums, shift, _ = model.of_student(case)
    loads = 1 if case.half else 2
    found = [x for x in loops(forward_kl(case)) if count(x, LOAD) == loads]
    of_sums = [len(x) for x in found if exponentials(x) == COLUMNS and not opcodes(x, r"MNMX|\bST[SG]\b")]
    assert of_sums == [pytest.approx(sums.instructions - model.SQUARES, rel=0.03)] * (2 if case.half else 1)
    of_shift = [len(x) for x in found if exponentials(x) == 0 and count(x, "STS.128") == 2]
    assert of_shift == [pytest.approx(shift.instructions, rel=0.03)] * (2 if case.half else 1)


def test_what_bounds_a_case():
    """Of five units of floats, 20 bytes a column, a copy of 4.3 TB/s leaves 4.65 ps."""
    case = model.Case(3, half=False, computed=False)
    took = model.seconds_of_row(1000, case)
    assert took["memory"] == pytest.approx(1000 * 20 / 4.3e12)
    assert max(took, key=took.get) == "memory"
    assert model.seconds(100, 1000, case) == pytest.approx(1e5 * 20 / 4.3e12 + 2 * model.H200.launch)
    took = model.seconds_of_row(32000, model.Case(16, half=True, computed=True))
    assert max(took, key=took.get) == "instructions"
    found = model.seconds(100, 32000, model.Case(16, half=True, computed=True))
    assert found == pytest.approx(100 * took["instructions"] + 2 * model.H200.launch)


@pytest.mark.parametrize("rule", ["uniform", "confidence"])
@pytest.mark.parametrize(
    "classes", [257, 1017, 1018, 1023, 1024, 4096, 6000, 8185, 8186, 16381, 32000, 50257, 128256, 131072, 151936]
)
def test_the_model_lays_rows_out_as_the_kernels_do(classes, rule):
    at, found = model.layout(classes), emulator.placement(classes, torch.bfloat16, 3, rule, "forward_kl")
    assert (at.blocks, at.threads) == (found.blocks, found.threads)


def test_the_model_prints_every_case(capsys):
    model.main()
    printed = capsys.readouterr().out
    assert printed.count("| bf16 | computed |") == 2 * 5
    assert f"| {model.CLASSES[-1]} |" in printed
