"""The benchmark: it times nothing that is wrong, its arithmetic is right, its memory is what was allocated."""

import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from mtkd_fast.bench import (
    contenders,
    cores,
    gate,
    gpu,
    grid,
    machine,
    memory,
    passes,
    rotation,
    runner,
    timing,
    verdicts,
)
from mtkd_fast.bench.grid import Cell
from mtkd_fast.bench.ops import kd as kd_op
from mtkd_fast.bench.ops.kd import KD
from mtkd_fast.bench.timing import Call, Samples

from mtkd_fast import dispatch

TINY = KD("confidence", 16, 33, 3)
EFFORT = runner.Effort(0.02, kernels=False, memory=False)
CONFIDENCE = kd_op.OBJECTIVES["confidence"]
UNIFORM = kd_op.OBJECTIVES["uniform"]
needs_cpp = pytest.mark.skipif(
    "cpu" not in dispatch.implementations()["cpp"].devices, reason="mtkd_fast._C is not built"
)


class Planted(KD):
    """The op kd with another "implementation" in the place of ours."""

    def fused(self, implementation):
        return (
            PLANTED[0] if implementation == contenders.default_implementation("cpu") else super().fused(implementation)
        )


PLANTED = [None]


@pytest.fixture
def plant():
    def put(loss):
        PLANTED[0] = loss
        return Planted("confidence", 16, 33, 3)

    yield put
    PLANTED[0] = None


# ---------- the gate


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, t, y: kd_op.loop(s, t, y, UNIFORM),  # other weights
        lambda s, t, y: kd_op.loop(s, t[:2], y, CONFIDENCE),  # a teacher forgotten
        lambda s, t, y: kd_op.loop(s, t, y, CONFIDENCE) * (1 + 1e-3),  # a scale
        lambda s, t, y: kd_op.loop(s, t, y, CONFIDENCE) + 2e-3 * (s - s.detach()).sum(),  # only the gradient
        lambda s, t, y: kd_op.loop(s, t, y, CONFIDENCE) * float("nan"),
        lambda s, t, y: kd_op.loop(s.detach(), t, y, CONFIDENCE) + 0 * s.sum(),  # no gradient
    ],
    ids=["weights", "teacher", "scale", "gradient", "nan", "detached"],
)
def test_a_wrong_loss_is_not_timed(wrong):
    inputs = TINY.inputs("cpu")
    with pytest.raises(gate.WrongResult):
        gate.check("wrong", wrong, inputs, TINY.oracle(inputs))


def test_a_wrong_gradient_is_seen_where_only_the_gradient_is_compared():
    inputs = TINY.inputs("cpu")
    exact = TINY.oracle(inputs)
    offset = lambda s, t, y: kd_op.loop(s, t, y, CONFIDENCE) + 1.0  # noqa: E731
    assert set(gate.check("offset", offset, inputs, exact, value=False)) == {"gradient"}
    with pytest.raises(gate.WrongResult, match="of the loss"):
        gate.check("offset", offset, inputs, exact)
    with pytest.raises(gate.WrongResult, match="of the gradient"):
        gate.check("scaled", lambda *x: 1.01 * offset(*x), inputs, exact, value=False)


def test_a_planted_wrong_implementation_is_refused_and_fails_the_run(plant):
    case = plant(partial(kd_op.loop, of=UNIFORM))
    found = runner.run("cpu", [Cell(case, who=("eager", "ours"))], EFFORT)
    entry = found["cells"][0]["contenders"][found["cells"][0]["ours"]]
    assert "seconds" not in entry
    assert any("WrongResult" in failure and "relative error" in failure for failure in runner.failures_of(found))


def test_a_planted_slow_implementation_is_reported_slow_and_its_verdict_is_missed(plant, monkeypatch):
    def slow(student, teachers, target):
        time.sleep(30e-3)
        return kd_op.loop(student, teachers, target, CONFIDENCE)

    cell = Cell(plant(slow), who=("eager", "ours"))
    target = verdicts.Target("planted", verdicts.times("eager"), 1.0, (cell,))
    monkeypatch.setattr(verdicts, "TARGETS", {"cpu": (target,)})
    found = runner.run("cpu", [cell], EFFORT)
    (verdict,) = found["verdicts"]
    assert verdict["state"] == verdicts.MISSED
    assert verdict["number"] < 0.5
    assert not runner.failures_of(found)  # slow is no failure


# ---------- timing


def test_interleaved_timing_gives_everyone_at_least_five_samples_and_cheap_ones_all_rounds():
    calls = {"fast": Call(lambda i: None), "slow": Call(lambda i: time.sleep(5e-3))}
    found = timing.interleaved(calls, "cpu", seconds=0.4)
    assert len(found["fast"].seconds) == timing.ROUNDS
    assert len(found["slow"].seconds) * found["slow"].stride == timing.ROUNDS
    assert found["slow"].stride > 1
    found = timing.interleaved(calls, "cpu", seconds=0.0)
    assert {len(samples.seconds) for samples in found.values()} == {5}
    assert min(found["slow"].seconds) >= 5e-3


def test_every_call_has_a_number_of_its_own():
    seen = []
    timing.batch_seconds(Call(seen.append), 4, "cpu", first=3)
    assert seen == [3, 4, 5, 6]


def test_what_is_prepared_is_not_timed():
    prepared = []

    def prepare(i):
        time.sleep(0.02)
        prepared.append(i)
        return i

    assert timing.batch_seconds(Call(lambda i: None, prepare=prepare), 3, "cpu") < 5e-3
    assert prepared == [0, 1, 2]


def test_a_contender_runs_with_its_own_threads():
    before, seen = torch.get_num_threads(), []
    timing.interleaved({"one": Call(lambda i: seen.append(torch.get_num_threads()), threads=1)}, "cpu", 0.0)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_ratio_is_taken_within_a_stretch_of_rounds():
    """A machine that slows down by ten for half of the run changes neither ratio nor verdict."""
    slow, fast = [4.0, 4.0, 40.0, 40.0], [1.0, 1.0, 10.0, 10.0]
    assert timing.ratio(Samples(slow), Samples(fast)) == 4.0
    assert timing.ratio(Samples([4.0, 40.0], stride=2), Samples(fast)) == 4.0
    assert timing.ratio(Samples(fast), Samples([4.0, 40.0], stride=2)) == 0.25


def test_spread_is_half_the_quartile_distance():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def test_the_backward_pass_alone_calls_backward_alone():
    inputs = TINY.inputs("cpu")
    forwards = []

    def loss(*arguments):
        forwards.append(1)
        return kd_op.loop(*arguments, CONFIDENCE)

    call = passes.call(passes.BACKWARD, loss, [inputs])
    state = call.prepare(0)
    assert len(forwards) == 1
    call.step(state)
    assert len(forwards) == 1


# ---------- fresh inputs


def test_large_cases_rotate_past_the_cache_and_small_ones_are_warm():
    cache = 32 << 20
    for cell in (*grid.targets(), *(Cell(case) for case in grid.GPU_LARGE)):
        case, n_sets = cell.case, rotation.n_sets(cell.case, cache)
        if case.minimal_bytes() > cache // 4:
            others = (n_sets - 1) * case.minimal_bytes(gradient=False)
            assert others >= 2 * cache
        else:
            assert n_sets == 1


def test_the_cache_is_read_where_linux_says_it():
    assert rotation.cache_bytes("cpu") >= 1 << 20
    assert [rotation._bytes(size) for size in ("48K\n", "32768K", "2M")] == [48 << 10, 32 << 20, 2 << 20]


def test_inputs_of_a_rotation_are_drawn_one_by_one_and_calls_go_through_them():
    sets = [TINY.inputs("cpu", seed) for seed in range(2)]
    assert not sets[0].arguments[0].equal(sets[1].arguments[0])
    seen = []

    def loss(student, *_):
        seen.append(student.data_ptr())
        return student.sum()

    call = passes.call(passes.BOTH, loss, sets)
    for i in range(4):
        call.step(i)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_the_copy_rotates_and_moves_the_minimal_bytes(monkeypatch):
    moved = []
    real = torch.Tensor.copy_

    def counting(sink, source):
        moved.append((sink.data_ptr(), source.data_ptr(), sink.nbytes + source.nbytes))
        return real(sink, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    call = rotation.copies(TINY.minimal_bytes(), 3, "cpu")
    for i in range(6):
        call(i)
    assert len({sink for sink, _, _ in moved}) == len({source for _, source, _ in moved}) == 3
    assert all(TINY.minimal_bytes() - 8 < n_bytes <= TINY.minimal_bytes() for _, _, n_bytes in moved)


def test_a_cell_waits_until_the_cores_are_apart(monkeypatch):
    measured = iter([1.1, 1.2, 1.9])
    monkeypatch.setattr(cores, "speedup_of_copy", lambda: next(measured))
    monkeypatch.setattr(cores, "PAUSE_SECONDS", 0)
    assert cores.wait(60)
    assert not list(measured)


def test_a_cell_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(cores, "speedup_of_copy", lambda: 1.0)
    monkeypatch.setattr(cores, "PAUSE_SECONDS", 1e-3)
    assert not cores.wait(10e-3)


def test_how_a_copy_scales_is_measured_on_one_thread_and_on_all(monkeypatch):
    def seconds_of(call, *_):
        call.step(0)
        return 3.0 / torch.get_num_threads()

    monkeypatch.setattr(timing, "batch_seconds", seconds_of)
    with timing.threads(2):
        assert cores.speedup_of_copy() == 2.0


def timed_with(patience, threads=2):
    with timing.threads(threads):
        return runner.patiently_timed({"nothing": Call(lambda i: None)}, "cpu", runner.Effort(0.01, patience=patience))


def test_with_patience_a_disturbed_cell_is_timed_once_more(monkeypatch):
    shares, waits = iter([0.5, 0.01]), []
    monkeypatch.setattr(cores, "wait", lambda seconds: waits.append(seconds) is None)
    monkeypatch.setattr(machine, "share_of_others", lambda *_: next(shares))
    timed = timed_with(patience=3.0)
    assert (timed.others, timed.apart, waits) == (0.01, True, [3.0, 3.0])


@pytest.mark.parametrize("options", [{"patience": 0.0}, {"patience": 3.0, "threads": 1}])
def test_without_patience_or_with_one_core_nobody_waits(monkeypatch, options):
    monkeypatch.setattr(cores, "wait", None)
    monkeypatch.setattr(machine, "share_of_others", lambda *_: 0.5)
    timed = timed_with(**options)
    assert (timed.others, timed.apart) == (0.5, None)


# ---------- runs


@needs_cpp
def test_a_run_has_raw_samples_kernel_times_versions_and_the_strategy():
    with timing.threads(2):  # of one thread, one-thread would be ours again
        found = runner.run(
            "cpu", [Cell(TINY, who=("eager", "ours", "one-thread", "floors"))], runner.Effort(0.02, memory=False)
        )
    json.dumps(found)
    (cell,) = found["cells"]
    assert set(cell["contenders"]) == {"eager", "cpp", "cpp ×1", "copy", "copy ×1", "launch"}
    for entry in cell["contenders"].values():
        assert len(entry["seconds"]) >= 5
        assert entry["kernel_seconds"] >= 0
    assert cell["contenders"]["eager"]["errors"]["gradient"] < 1e-4
    assert cell["strategy"].startswith("A")
    assert found["machine"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"commit", "date", "cpu", "threads", "cache", "load"} <= set(found["machine"])


def test_a_run_keeps_what_it_has_after_every_cell():
    kept = []
    runner.run("cpu", [Cell(TINY, who=("eager",))] * 2, EFFORT, keep=lambda so_far: kept.append(len(so_far["cells"])))
    assert kept == [1, 2]


def test_a_run_without_time_says_what_it_dropped():
    found = runner.run("cpu", [Cell(TINY)], EFFORT, budget=-1.0)
    assert found["dropped"] == [f"kd confidence {TINY}, loss + gradient (out of time)"]
    assert not found["cells"]


def test_the_grid_of_the_targets():
    cells = verdicts.CPU_GRID
    assert len(cells) == len(set(cells)) == 30
    assert {(c.case.classes, c.case.teachers, c.case.dtype) for c in cells} == {
        (c, k, d) for c in (10, 100, 1000, 32000, 128256) for k in (1, 3, 8) for d in (torch.float32, torch.bfloat16)
    }
    assert {c.case.classes: c.case.rows for c in cells} == {10: 8192, 100: 40000, 1000: 4000, 32000: 125, 128256: 31}
    assert len({verdicts.key_of(c) for c in grid.cells("cpu", "full")}) == len(grid.cells("cpu", "full"))
    assert len({verdicts.key_of(c) for c in grid.gpu()}) == len(grid.gpu())


# ---------- memory


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="peak memory on the CPU is measured through Linux's /proc")
def test_peak_memory_counts_what_a_loss_allocates():
    case = KD("uniform", 4096, 1000, 1)  # 16 MB a tensor, much more than the grain
    losses = {c.name: c.loss for c in contenders.on(case, "cpu", ("eager", "ours"))[0]}
    peaks = memory.peak_extra(case, "cpu", losses)
    assert peaks["eager"] >= 4 * case.gradient_bytes  # log q, p, the divergence and the gradient at the least
    if "cpp" in peaks:
        assert case.gradient_bytes - memory.grain() <= peaks["cpp"] <= 2 * case.gradient_bytes
    assert peaks["eager"] < 20 * case.gradient_bytes


def test_memory_that_cannot_be_measured_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    found = runner.run("cpu", [Cell(TINY, who=("eager",))], EFFORT._replace(memory=True))
    assert "/proc" in found["dropped"][0]
    assert "peak_extra_bytes" not in found["cells"][0]["contenders"]["eager"]


# ---------- the run on a GPU machine


def test_a_part_of_the_gpu_run_that_fails_or_hangs_is_reported(tmp_path):
    now = time.monotonic()
    good = gpu.start("good", [sys.executable, "-c", "print('3 passed')"], tmp_path)
    bad = gpu.start("bad", [sys.executable, "-c", "print('1 error'); raise SystemExit(86)"], tmp_path)
    slow = gpu.start("slow", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    outcomes = [gpu.finish(part, now + 10) for part in (good, bad)] + [gpu.finish(slow, now)]
    assert [o.state for o in outcomes] == ["passed", "failed", "out of time"]
    assert outcomes[0].detail == "3 passed"
    assert [o.failed for o in outcomes] == [False, True, True]


@pytest.fixture(scope="module")
def one_cell():
    return runner.run("cpu", [Cell(TINY, who=("eager", "floors"))], EFFORT)


@pytest.mark.parametrize(("state", "status"), [("passed", 0), ("skipped", 0), ("failed", 1), ("out of time", 1)])
def test_the_gpu_run_ends_with_the_status_of_its_parts(state, status, tmp_path, one_cell):
    assert gpu.conclude([gpu.Outcome("tests", state, "")], dict(one_cell), tmp_path, "gpu") == status
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["state"] == state


def test_the_machine_is_a_file_name():
    assert machine.slug("cpu") == "cpu"


@needs_cpp
def test_the_inputs_for_the_sanitizer_run_on_the_cpu_too():
    from mtkd_fast.bench import sanitize

    few = [s for s in sanitize.SHAPES if s[1] <= 1000]
    assert len(list(sanitize.launches("cpu", few))) == 2 * len(few)


def test_other_work_on_the_processors_is_seen():
    before = machine.busy_seconds()
    if before is None:
        pytest.skip("Linux counts it")
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.5)
    share = machine.share_of_others(before, 0.5)
    child.kill()
    child.wait()
    assert 0.5 / os.cpu_count() < share
