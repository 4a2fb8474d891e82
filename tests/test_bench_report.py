"""What a run says: verdicts from made-up numbers, and the command from end to end on a tiny shape."""

import json
import re

import pytest
import torch
from mtkd_fast.bench import __main__ as command
from mtkd_fast.bench import grid, page, plots, report, results, verdicts
from mtkd_fast.bench.grid import Cell
from mtkd_fast.bench.ops.kd import KD
from mtkd_fast.bench.verdicts import MET, MISSED, OPEN, PART, Target

from mtkd_fast import dispatch

CASES = tuple(Cell(KD("confidence", 16, c, k)) for c in (10, 100) for k in (1, 3))
UNIFORM = KD("uniform", 16, 33, 2)
BUILT = "cpu" in dispatch.implementations()["cpp"].devices
MACHINE = {
    "kind": "cpu", "device": "a CPU", "cpu": "a CPU", "threads": 2, "cores": 2, "load": 0.1, "cuda": None,
    "system": "Linux", "cache": 32 << 20, "versions": {"torch": "2"}, "python": "3", "mtkd_fast": "0", "commit": "c",
    "date": "today",
}  # fmt: skip


def cell(of: Cell, **seconds: float) -> dict:
    """A cell as the runner makes it; ``ours`` and ``one`` stand for cpp and cpp ×1."""
    names = {"ours": "cpp", "one": "cpp ×1", "cross": "cross-entropy", "copy_one": "copy ×1"}
    entries = {
        names.get(name, name): {
            "kind": "floor" if name.startswith("copy") else "baseline",
            "seconds": [s] * 5,
            "stride": 8,
        }
        for name, s in seconds.items()
    }
    return {
        **of.case.facts(), "of": of.of, "shape": str(of.case), "unit": of.case.unit, "ours": "cpp", "strategy": "A",
        "gradient_bytes": of.case.gradient_bytes, "number_bytes": of.case.number_bytes, "slack_bytes": 1000,
        "input_sets": 1, "minimal_bytes": of.case.minimal_bytes(), "contenders": entries,
    }  # fmt: skip


def run_of(*cells: dict, grid: str = "full") -> dict:
    found = {"machine": MACHINE, "grid": grid, "missing": [], "dropped": [], "failures": [], "cells": list(cells)}
    return found | {"verdicts": [verdict._asdict() for verdict in verdicts.of(found)]}


def judged(target: Target, *cells: dict) -> verdicts.Verdict:
    return verdicts.judge(target, {verdicts.key(c): c for c in cells})


# ---------- verdicts


def test_a_geometric_mean_and_its_worst_cell():
    target = Target("t", verdicts.times("eager"), 15.9, CASES[:2], over=verdicts.timing.geometric_mean)
    cells = [cell(CASES[0], eager=8.0, ours=1.0), cell(CASES[1], eager=32.0, ours=1.0)]
    found = judged(target, *cells)
    assert found.number == pytest.approx(16)
    assert (found.state, found.worst_number, found.measured, found.cells) == (MET, 8.0, 2, 2)
    assert found.worst == results.title(cells[0])
    assert judged(target._replace(bound=16.1), *cells).state == MISSED


def test_every_cell_must_be_within_the_bound():
    target = Target("t", verdicts.times("compile"), 3, CASES[:2])
    found = judged(target, cell(CASES[0], compile=9.0, ours=1.0), cell(CASES[1], compile=2.9, ours=1.0))
    assert (found.state, found.number) == (MISSED, pytest.approx(2.9))


def test_a_bound_from_above():
    target = Target("t", verdicts.host_overhead, 1.5, CASES[:2], at_most=True)
    cells = [cell(CASES[0], cross=1.0, ours=1.4), cell(CASES[1], cross=1.0, ours=1.2)]
    assert judged(target, *cells).number == pytest.approx(1.4)
    assert judged(target, *cells).state == MET
    assert judged(target._replace(bound=1.3), *cells).state == MISSED


def test_scaling_is_told_beside_that_of_a_copy_from_memory():
    cold = {"input_sets": 3}
    cells = [cell(CASES[0], one=1.8, ours=1.0, copy_one=1.0, copy=1.0),
             cell(CASES[1], one=1.5, ours=1.0, copy_one=1.1, copy=1.0) | cold]  # fmt: skip
    target = Target("t", verdicts.scaling, 1.8, CASES[:2], over=verdicts.timing.geometric_mean,
                    of_copy=verdicts.scaling_of_copy)  # fmt: skip
    found = judged(target, *cells)
    assert (found.state, found.of_copy) == (MISSED, pytest.approx(1.1))
    assert "2 cells; a copy from memory 1.1×)" in found.sentence
    assert "copy" not in judged(target._replace(of_copy=None), *cells).sentence
    assert page.card(found)["over"] == "geometric mean of 2 cells; a copy from memory 1.1×"


def test_what_is_not_measured_is_neither_met_nor_missed():
    target = Target("t", verdicts.times("eager"), 3, CASES)
    assert judged(target).state == OPEN
    assert judged(target, cell(CASES[0], eager=4.0, ours=1.0)).state == PART
    assert judged(target, cell(CASES[0], eager=2.0, ours=1.0)).state == MISSED
    assert "1 of 4 cells" in judged(target, cell(CASES[0], eager=4.0, ours=1.0)).sentence
    broken = cell(CASES[0], eager=4.0, ours=1.0)
    broken["contenders"]["cpp"] = {"kind": "ours", "error": "WrongResult: no"}
    assert judged(target, broken).state == OPEN


def test_cells_are_split_where_torch_compile_is_short():
    long, short = (Target("t", verdicts.times("compile"), 3, CASES[:2], only=only)
                   for only in (lambda c: not verdicts.is_short(c), verdicts.is_short))  # fmt: skip
    cells = [cell(CASES[0], compile=299e-6, ours=100e-6), cell(CASES[1], compile=301e-6, ours=50e-6)]
    assert judged(long, *cells).number == pytest.approx(6.02)
    assert judged(short, *cells).number == pytest.approx(2.99)
    assert (judged(long, *cells).cells, judged(short, *cells).cells) == (1, 1)


def test_the_measures():
    found = cell(CASES[0], copy=3.0, ours=4.0, one=7.2)
    assert verdicts.share_of_copy(found) == pytest.approx(0.75)
    assert verdicts.scaling(found) == pytest.approx(1.8)
    allowed = found["gradient_bytes"] + found["number_bytes"] + found["slack_bytes"]
    assert verdicts.memory_beyond(found) is None
    found["contenders"]["cpp"]["peak_extra_bytes"] = 2 * allowed
    assert verdicts.memory_beyond(found) == pytest.approx(2.0)


def test_the_targets_of_a_cpu_are_those_of_the_design():
    bounds = {target.name: target.bound for target in verdicts.TARGETS["cpu"]}
    assert list(bounds.values()) == [20, 8, 3, 1.5, 0.75, 1.8, 1.0, 1.5, 20]
    long = verdicts.CPU_LONG
    assert len(long) == 9
    assert all(c.case.classes >= 1000 and c.case.dtype == torch.float32 for c in long)


def test_all_verdicts_of_a_perfect_machine_are_met():
    cells = [cell(c, eager=50.0, compile=30.0, ours=1.0, one=2.0, copy=0.9, cross=1.0) for c in grid.targets()]
    for c in cells:
        c["contenders"]["cpp"]["peak_extra_bytes"] = c["gradient_bytes"]
    states = {v["name"]: v["state"] for v in run_of(*cells)["verdicts"]}
    under = "no cell below, where torch.compile takes under 300 µs"
    assert states.pop(under) == OPEN
    assert set(states.values()) == {MET}


# ---------- tables, plots and the page


def test_a_shape_that_we_lose_is_printed_like_the_others():
    said = report.text(run_of(cell(CASES[0], eager=1.0, ours=4.0)))
    assert re.search(r"cpp +4000 +0 +- +0.2x", said)


def test_a_contender_that_did_not_run_is_in_the_table_with_its_reason():
    found = cell(CASES[0], eager=2.0, ours=1.0)
    found["contenders"]["compile"] = {"kind": "baseline", "error": "RuntimeError: no compiler\nmore"}
    assert "compile: RuntimeError: no compiler" in report.text(run_of(found))
    assert "RuntimeError: no compiler" in page.html(run_of(found), [])


def test_a_missed_target_is_printed_like_a_met_one():
    run = run_of(*(cell(c, eager=10.0, compile=30.0, ours=1.0) for c in grid.targets()))
    said, shown = report.text(run), page.html(run, [])
    assert re.search(r"missed  against eager PyTorch: 10× \(geometric mean of 30 cells\), target at least 20×", said)
    assert re.search(r"met  against torch.compile: 30×", said)
    assert 'class="card missed"' in shown
    assert 'class="card met"' in shown


def test_a_run_without_a_cell_of_a_target_says_so_in_one_line():
    run = run_of(cell(CASES[0], eager=2.0, ours=1.0))
    assert report.sentences(run) == [report.NO_TARGET]
    assert 'class="card' not in page.html(run, [])


def test_a_busy_machine_is_said():
    assert "load average 3.0" in report.machine_line(MACHINE | {"load": 3.0})
    assert "load average" not in report.machine_line(MACHINE)


def test_the_plots_of_a_whole_grid(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [cell(c, eager=50e-3, compile=20e-3, ours=1e-3, copy=8e-4) for c in grid.targets()]
    for c in cells:
        c["contenders"]["cpp"]["peak_extra_bytes"] = c["gradient_bytes"]
    lone = Cell(KD("confidence", 16, 100, 3))  # a smaller batch of a point of the grid
    cells.append(cell(lone, eager=9.0, ours=9.0, copy=9.0))
    assert len(plots.main_cells(run_of(*cells))) == 30
    names = [path.name for path in plots.draw(run_of(*cells), tmp_path, "cpu")]
    assert names == ["cpu-time-teachers.png", "cpu-time-classes.png", "cpu-memory-teachers.png", "cpu-floor.png"]


# ---------- the command


OWN = ("--rows", "16", "--classes", "33", "--teachers", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.runner.CELL_SECONDS, "cpu", 0.05)
        patch.setattr(grid, "EVERYONE", tuple(g for g in grid.EVERYONE if "compile" not in g))
        patch.setattr(grid, "SOME", tuple(g for g in grid.SOME if "compile" not in g))
        status = command.main(["bench", *OWN, "--out", str(folder)])
    return status, folder


def test_an_own_shape_from_end_to_end(own):
    status, folder = own
    assert status == 0
    found = json.loads((folder / "cpu-own.json").read_text())
    assert [c["of"] for c in found["cells"]] == ["loss + gradient", "forward", "backward"]
    for c in found["cells"]:
        assert (c["rows"], c["classes"], c["teachers"], c["dtype"]) == (16, 33, 2, "fp32")
        assert len(c["contenders"]["eager"]["seconds"]) >= 5
    assert found["cells"][0]["minimal_bytes"] == 16 * 33 * 4 * 4
    assert "copy" not in found["cells"][2]["contenders"]
    assert {"commit", "versions", "date", "device"} <= set(found["machine"])
    assert not list(folder.glob("*.part"))


def test_an_own_shape_is_told_its_strategy_and_its_share_of_the_floor(own):
    said = (own[1] / "cpu-own.md").read_text()
    ours = "cpp" if "cpu" in dispatch.implementations()["cpp"].devices else "reference"
    assert re.search(rf"{ours} runs \(.+\), .+ ms; \d+% of the speed of copying the minimal", said)


def test_the_page_needs_no_network(own):
    pytest.importorskip("matplotlib")
    html = (own[1] / "cpu-own.html").read_text()
    assert all(source.startswith("data:") for source in re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]*)", html))
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert html.count("data:image/png;base64,") == len(list(own[1].glob("*.png"))) >= 1


def test_a_report_is_drawn_again_from_its_results(own, tmp_path, capsys):
    copy = tmp_path / "cpu-own.json"
    copy.write_text((own[1] / "cpu-own.json").read_text())
    assert command.main(["report", str(copy)]) == 0
    assert "kd confidence 16×33 K=2 fp32, backward" in capsys.readouterr().out
    assert (tmp_path / "cpu-own.html").exists()


@pytest.mark.skipif(not BUILT, reason="mtkd_fast._C is not built")
def test_a_wrong_implementation_fails_the_command(tmp_path, monkeypatch, capsys):
    real = KD.fused
    monkeypatch.setattr(grid, "EVERYONE", ("eager", "ours"))
    monkeypatch.setattr(grid, "SOME", ("eager", "ours"))
    monkeypatch.setitem(command.runner.CELL_SECONDS, "cpu", 0.02)
    monkeypatch.setattr(KD, "fused", lambda case, name: real(case if name == "reference" else Cell(UNIFORM).case, name))
    assert command.main(["bench", *OWN, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAILED: kd confidence 16×33 K=2 fp32, loss + gradient: cpp: WrongResult" in said.err
    assert "cpp: WrongResult" in said.out
    assert "mtkd_fast" in (tmp_path / "cpu-own.html").read_text()


def test_a_bad_argument_is_named(capsys):
    assert command.main(["bench", "--op", "relation", "--classes", "3"]) == 2
    assert "classes is no size of the op relation" in capsys.readouterr().err


def test_profile_writes_a_trace_with_our_op_in_it(tmp_path, capsys):
    assert command.main(["profile", *OWN, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.trace.json")
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    ours = "cpp" if "cpu" in dispatch.implementations()["cpp"].devices else "reference"
    assert {f"{ours} forward", f"{ours} backward"} <= names
    if ours == "cpp":
        assert any(name.startswith("mtkd_fast::kd") for name in names)
        assert "mtkd_fast::kd" in capsys.readouterr().out


def test_profiling_someone_unknown_is_refused_by_name(tmp_path, capsys):
    assert command.main(["profile", *OWN, "--who", "nobody", "--out", str(tmp_path)]) == 2
    assert "who must be of eager" in capsys.readouterr().err


def test_a_cell_that_waited_for_the_cores_in_vain_is_named():
    first, second = cell(CASES[0], ours=1.0), cell(CASES[1], ours=1.0)
    found = report.omissions(run_of(first | {"apart": True}, second | {"apart": False}))
    assert found == [f"on one cache: {results.title(second)}: its timing began so"]


def test_a_disturbed_cell_is_named():
    found = cell(CASES[0], eager=2.0, ours=1.0)
    assert not report.disturbed(run_of(found | {"others": 0.01}))
    assert "other work had 40% of the processors" in report.text(run_of(found | {"others": 0.4}))
