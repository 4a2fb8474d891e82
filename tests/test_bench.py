"""The benchmark: it times nothing that is wrong, its arithmetic is right, its memory is what was allocated."""

import json
import sys
import time

import pytest
import torch
from mtkd_fast.bench import (
    contenders,
    correctness,
    eager,
    gpu,
    kd,
    memory,
    problem,
    relation,
    report,
    shapes,
    timing,
)  # fmt: skip
from mtkd_fast.bench.kd import Job, Work
from mtkd_fast.bench.shapes import Shape

from mtkd_fast import dispatch

TINY = Shape(16, 33, 3)


@pytest.fixture(params=problem.OBJECTIVES)
def objective(request):
    return request.param


def fakes(seconds: dict[str, list[float]], default: str = "cpp", work: str = "confidence") -> dict:
    """A result as the benchmark makes it, with these samples."""
    return {
        "work": work,
        "shape": "16x33 K=3 fp32",
        "gradient_bytes": TINY.gradient_bytes,
        "default": default,
        "contenders": {name: {"seconds": samples} for name, samples in seconds.items()},
    }


@pytest.mark.parametrize("form", [eager.loop, eager.stacked])
@pytest.mark.parametrize("n_teachers", [1, 3])
def test_eager_baselines_pass_the_gate(form, n_teachers, objective):
    inputs = problem.make(Shape(16, 33, n_teachers), "cpu")
    errors = correctness.check("eager", _of(form, objective), inputs, correctness.oracle(inputs, objective))
    assert max(errors.values()) < 1e-5


def _of(form, objective):
    return lambda student, teachers, target: form(student, teachers, target, objective)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, t, y: eager.loop(s, t, y, "uniform"),  # other weights
        lambda s, t, y: eager.loop(s, t[:2], y, "confidence"),  # a teacher forgotten
        lambda s, t, y: eager.loop(s, t, y, "confidence") * (1 + 1e-3),  # a scale
        lambda s, t, y: eager.loop(s, t, y, "confidence") + 2e-3 * (s - s.detach()).sum(),  # only the gradient
        lambda s, t, y: eager.loop(s, t, y, "confidence") * float("nan"),
    ],
    ids=["weights", "teacher", "scale", "gradient", "nan"],
)
def test_a_wrong_loss_is_not_timed(wrong):
    inputs = problem.make(TINY, "cpu")
    with pytest.raises(correctness.WrongResult):
        correctness.check("wrong", wrong, inputs, correctness.oracle(inputs, "confidence"))


def test_a_wrong_contender_fails_the_run(monkeypatch):
    monkeypatch.setitem(contenders.BASELINES, "eager", lambda s, t, y, objective: eager.loop(s, t, y, "uniform"))
    found = kd.run("cpu", [Job(Work("confidence"), TINY)], 0.01, names=("eager",))
    entry = found["results"][0]["contenders"]["eager"]
    assert "seconds" not in entry
    assert any("WrongResult: eager: relative error" in failure for failure in kd.failures_of(found))


def test_the_oracle_in_blocks_is_the_oracle(monkeypatch):
    inputs = problem.make(TINY, "cpu")
    whole = correctness.oracle(inputs, "confidence")
    monkeypatch.setattr(correctness, "CHUNK_ELEMENTS", 5 * TINY.classes)  # blocks of 5 rows: 5, 5, 5, 1
    blocks = correctness.oracle(inputs, "confidence")
    assert blocks[0] == pytest.approx(whole[0], rel=1e-14)
    torch.testing.assert_close(blocks[1], whole[1], rtol=1e-13, atol=1e-16)


def test_every_fast_implementation_is_measured_against_all_baselines():
    built = "cpu" in dispatch.implementations()["cpp"].devices
    names = set(contenders.make("confidence", "cpu"))
    assert names == {"eager", "eager-stacked", "compile", "compile-stacked", "cpp" if built else "reference"}


def test_bytes_of_the_floor():
    shape = Shape(10, 100, 3, torch.bfloat16)
    assert shape.minimal_bytes() == 5 * 10 * 100 * 2
    assert shape.minimal_bytes(gradient=False) == 4 * 10 * 100 * 2


def test_the_shapes_that_the_targets_speak_of():
    wanted = {(256, 100), (4096, 100), (4096, 1000), (512, 32000), (128, 128256)}
    assert {(s.rows, s.classes) for s in shapes.CPU} == wanted
    assert all(s.teachers == 3 and s.dtype == torch.float32 for s in shapes.CPU)
    large = {(s.classes, s.teachers) for s in shapes.GPU_LARGE}
    assert large == {(c, k) for c in (1000, 32000, 128256) for k in (1, 3, 8, 16)}
    assert all(s.dtype == torch.bfloat16 for s in shapes.GPU_LARGE)
    assert len(shapes.GPU) == len(set(shapes.GPU)) == len(shapes.GPU_LARGE) + len(shapes.GPU_SMALL)


def test_large_gpu_inputs_rotate_past_the_cache_and_small_ones_do_not():
    for shape in shapes.GPU_LARGE:
        assert shapes.cold_sets(shape, "cuda") * shape.minimal_bytes() >= shapes.COLD_BYTES
    assert {shapes.cold_sets(shape, "cuda") for shape in shapes.GPU_SMALL} == {1}


def test_gpu_jobs_replay_graphs_of_the_small_shapes_only():
    graphs = [job.shape for job in kd.jobs("cuda", quick=False) if job.work.graph]
    assert set(graphs) == set(shapes.GPU_SMALL)


def test_interleaved_timing_gives_every_contender_the_same_rounds():
    calls: dict[str, list[int]] = {"a": [], "b": []}
    samples = timing.interleaved({name: seen.append for name, seen in calls.items()}, "cpu", budget=0.0, least=7)
    assert {len(s) for s in samples.values()} == {7}
    assert all(seen for seen in calls.values())
    assert all(second >= 0 for s in samples.values() for second in s)


def test_ratio_is_taken_within_a_round():
    """A machine that slows down by ten for half of the run changes neither ratio nor verdict."""
    slow, fast = [4.0, 4.0, 40.0, 40.0], [1.0, 1.0, 10.0, 10.0]
    assert timing.ratio(slow, fast) == 4.0


def test_spread_is_half_the_quartile_distance():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def test_geometric_means_and_targets():
    results = [
        fakes({"eager": [8.0, 8.0], "compile": [2.0, 2.0], "cpp": [1.0, 1.0]}),
        fakes({"eager": [32.0, 32.0], "compile": [4.0, 4.0], "cpp": [1.0, 1.0]}),
    ]
    by_baseline = {m["against"]: m for m in report.summary(results, "cpu")}
    assert by_baseline["eager"]["geometric_mean"] == pytest.approx(16.0)
    assert by_baseline["eager"]["worst"] == pytest.approx(8.0)
    assert by_baseline["compile"]["geometric_mean"] == pytest.approx(8**0.5)
    met, missed = report.sentences(report.summary(results, "cpu"))
    assert met.endswith("target 10x, met")
    assert missed.endswith("target 4x, missed")


def test_a_baseline_that_did_not_run_is_in_the_table_and_in_no_mean():
    result = fakes({"eager": [2.0, 2.0], "cpp": [1.0, 1.0]})
    result["contenders"]["compile"] = {"error": "RuntimeError: no compiler\nmore"}
    assert [m["against"] for m in report.summary([result], "cpu")] == ["eager"]
    assert "RuntimeError: no compiler" in report.table(report.HEADER, report.rows([result]), report.HEADER_WORDS)


def test_a_shape_that_we_lose_is_printed_like_the_others():
    row = report.row_of(fakes({"eager": [1.0, 1.0], "cpp": [4.0, 4.0]}), "cpp")
    assert "0.2x" in row


def test_run_writes_raw_samples_versions_and_table(tmp_path):
    found = kd.run("cpu", [Job(Work("confidence"), TINY)], 0.02, names=("eager", "cpp"))
    paths = report.write(found, tmp_path, "machine")
    saved = json.loads(paths[0].read_text())
    entry = saved["results"][0]["contenders"]["eager"]
    assert len(entry["seconds"]) >= 5
    assert entry["errors"]["gradient"] < 1e-4
    assert saved["machine"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"commit", "date", "cpu", "threads"} <= set(saved["machine"])
    assert "| eager" in paths[1].read_text()


def test_a_run_without_time_says_what_it_dropped():
    found = kd.run("cpu", [Job(Work("confidence"), TINY)], 0.01, budget=-1.0)
    assert found["dropped"] == [f"confidence {TINY} (out of time)"]
    assert not found["results"]


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="peak memory on the CPU is measured through Linux's /proc")
def test_peak_memory_counts_what_a_loss_allocates():
    shape = Shape(4096, 1000, 1)  # 16 MB a tensor, much more than the grain
    peaks = memory.peak_extra(shape, "cpu", dict.fromkeys(("eager", "cpp")), "uniform")
    assert peaks["eager"] >= 4 * shape.gradient_bytes  # log q, p, the divergence and the gradient at the least
    if "cpp" in peaks:
        assert peaks["cpp"] >= shape.gradient_bytes - memory.grain()
    assert peaks["eager"] < 20 * shape.gradient_bytes


def test_a_part_of_the_gpu_run_that_fails_or_hangs_is_reported(tmp_path):
    now = time.monotonic()
    good = gpu.start("good", [sys.executable, "-c", "print('3 passed')"], tmp_path)
    bad = gpu.start("bad", [sys.executable, "-c", "print('1 error'); raise SystemExit(86)"], tmp_path)
    slow = gpu.start("slow", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    outcomes = [gpu.finish(part, now + 10) for part in (good, bad)] + [gpu.finish(slow, now)]
    assert [o.state for o in outcomes] == ["passed", "failed", "out of time"]
    assert outcomes[0].detail == "3 passed"
    assert [o.failed for o in outcomes] == [False, True, True]


@pytest.mark.parametrize(("state", "status"), [("passed", 0), ("skipped", 0), ("failed", 1), ("out of time", 1)])
def test_the_gpu_run_ends_with_the_status_of_its_parts(state, status, tmp_path):
    found = kd.run("cpu", [], 0.01)
    found["results"] = [fakes({"eager": [2.0, 2.0], "cpp": [1.0, 1.0]})]
    assert gpu.conclude([gpu.Outcome("tests", state, "")], found, tmp_path, "gpu") == status
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["state"] == state


@pytest.mark.skipif("cpu" not in dispatch.implementations()["cpp"].devices, reason="mtkd_fast._C is not built")
def test_the_inputs_for_the_sanitizer_run_on_the_cpu_too():
    from mtkd_fast.bench import sanitize

    few = [s for s in sanitize.SHAPES if s[1] <= 1000]
    assert len(list(sanitize.launches("cpu", few))) == 2 * len(few)


# ---------- relation

FEW = [relation.Job(name, 12, 5) for name in relation.LOSSES]


@pytest.mark.parametrize("job", FEW, ids=str)
def test_the_published_relations_and_ours_pass_the_gate(job):
    inputs, (losses, missing) = relation.inputs_of(job, "cpu"), relation.make(job, "cpu")
    assert not missing
    exact = relation.oracle(job, inputs)
    student, teacher = inputs.student.double(), inputs.teachers[0].double()
    reference = relation.LOSSES[job.relation](student, teacher, implementation="reference")
    assert exact[0] == pytest.approx(reference.item(), rel=1e-12)
    for name, loss in losses.items():
        assert max(relation.check(name, loss, inputs, exact).values()) < 1e-5


@pytest.mark.parametrize("job", FEW, ids=str)
def test_a_wrong_relation_is_not_timed(job):
    inputs = relation.inputs_of(job, "cpu")
    exact = relation.oracle(job, inputs)
    for wrong in ("angle", "distance"):
        loss = relation.make(relation.Job(wrong, 12, 5), "cpu")[0]["eager"]
        if wrong != job.relation:
            with pytest.raises(correctness.WrongResult, match="relative error of the loss"):
                relation.check("eager", loss, inputs, exact)


def test_a_form_that_would_not_fit_is_named():
    losses, missing = relation.make(relation.Job("angle", 100_000), "cpu")
    assert "eager" not in losses
    assert "angle B=100000 D=512: eager, which needs some" in missing[0]


def test_the_run_on_relations_writes_samples_and_a_table(tmp_path):
    found = relation.run("cpu", FEW, 0.02)
    paths = relation.write(found, "cpu", tmp_path, "relation")
    saved = json.loads(paths[0].read_text())
    assert [result["work"] for result in saved["results"]] == list(relation.LOSSES)
    for result in saved["results"]:
        for entry in result["contenders"].values():
            assert len(entry["seconds"]) >= 5
            assert entry["errors"]["gradient"] < relation.TOLERANCE
    table = paths[1].read_text()
    assert "| angle" in table
    assert "x the published form" in table
