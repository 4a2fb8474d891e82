"""The demo: it writes what it promises, its conclusions follow from its numbers, and it notices a wrong loss."""

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

from mtkd_fast.bench.demo import __main__ as demo
from mtkd_fast.bench.demo import digits, exactness, experiment, models, training
from mtkd_fast.bench.demo.methods import costs, eager, learners, study
from mtkd_fast.bench.demo.segmentation import canvases
from mtkd_fast.bench.gate import WrongResult

from mtkd_fast import implementations

needs_cpp = pytest.mark.skipif("cpu" not in implementations()["cpp"].devices, reason="mtkd_fast._C is not built")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    status = demo.main(["--quick", "--out", str(folder)])
    return status, json.loads((folder / "demo.json").read_text()), folder


def test_quick_demo_succeeds_and_writes_both_pages(quick):
    status, found, folder = quick
    assert status == 0, found["failures"]
    for picture in ("demo.png", "methods.png"):
        assert (folder / picture).stat().st_size > 20_000


def test_quick_demo_trains_and_times_every_method(quick):
    found = json.loads((quick[2] / "methods.json").read_text())
    assert [m["method"] for m in found["methods"]] == list(learners.METHODS)
    for m in found["methods"]:
        assert len(m["accuracies"]) == 2
        assert all(0 <= a <= 100 for a in m["accuracies"])
        assert min(m["ms"].values()) > 0
        assert 0 < m["operations"]["fused"] <= m["operations"]["eager"]


def test_quick_demo_segments_digits(quick):
    found = json.loads((quick[2] / "segmentation.json").read_text())
    assert list(found["arms"]) == ["hard labels", "uniform average", "confidence weights"]
    assert all(0 <= a <= 100 for accuracies in found["arms"].values() for a in accuracies)
    assert min(found["cost"]["ms"].values()) > 0


def test_the_label_of_an_inked_pixel_is_its_digit():
    data = digits.load("cpu")
    found = canvases.scatter(data, torch.arange(len(data.labels)), 3, seed=1)
    inked = found.labels != canvases.IGNORED
    assert inked.equal(found.images[:, 0] > canvases.INK)
    assert all(len(found.labels[n][inked[n]].unique()) <= canvases.PER_SIDE**2 for n in range(3))
    assert found.labels[inked].max() < 10


def test_a_method_that_differs_from_its_eager_form_is_not_timed(monkeypatch):
    data = digits.load("cpu")
    school, lessons = study.prepared(data, data.split(0), 0, study.Budget(1, 1, 1), "cpu")
    monkeypatch.setitem(eager.LOSSES, "AVER", lambda *arguments: 1.001 * eager.average(*arguments))
    with pytest.raises(WrongResult, match="AVER"):
        costs.measure(school, lessons.images[:8], lessons.batch(torch.arange(8)), quick=True)


def test_quick_demo_compares_the_four_students(quick):
    _, found, _ = quick
    assert list(found["students"]) == ["hard labels", "one good teacher", "uniform average", "confidence weights"]
    for accuracy in found["students"].values():
        assert len(accuracy["values"]) == 2
        assert 50 < accuracy["mean"] < 100
    assert all(len(d["differences"]) == 2 for d in found["differences"])


def test_quick_demo_has_three_poor_teachers_of_eight(quick):
    _, found, _ = quick
    poor = [t for t in found["teachers"] if t["poor"]]
    good = [t for t in found["teachers"] if not t["poor"]]
    assert (len(poor), len(good)) == (3, 5)
    assert max(t["accuracy"]["mean"] for t in poor) < min(t["accuracy"]["mean"] for t in good)
    assert sum(t["weight"]["mean"] for t in found["teachers"]) == pytest.approx(1, abs=1e-5)


def test_quick_demo_measures_time_and_memory_of_three_losses_on_two_shapes(quick):
    _, found, _ = quick
    assert [line["loss"].split()[0] for line in found["costs"]] == ["eager", "torch.compile", "mtkd_fast"] * 2
    for line in found["costs"]:
        if line["loss"] == "torch.compile" and "error" in line:
            continue  # no compiler here: said in the table
        assert line["ms"] > 0
        assert line["peak_extra_bytes"] is None or line["peak_extra_bytes"] >= 0


@needs_cpp
def test_quick_demo_trains_the_same_student_in_float64(quick):
    _, found, _ = quick
    assert found["float64"]["checked"]
    assert found["float64"]["difference"] <= 1e-10


@needs_cpp
@pytest.mark.parametrize("break_by", [1e-6, float("nan")])
def test_a_wrong_loss_does_not_train_the_same_student(break_by):
    def wrong(student, teachers, labels):
        return training.distil(student, teachers, labels, "confidence", "cpp") + break_by * student.square().sum()

    data = digits.load("cpu")
    split = data.split(0)
    teachers = [torch.randn(len(split.student), digits.N_CLASSES) for _ in models.RECIPES]
    result = exactness.check(data, split, teachers, steps=10, fused=wrong)
    assert not result["passed"]
    assert "NOT the same student" in exactness.sentence(result)


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (1.0, 0.5, "better"),
        (-1.0, 0.5, "worse"),
        (0.4, 0.5, "no difference beyond the spread"),
        (1.0, float("nan"), "no difference beyond the spread"),
    ],
)
def test_verdict_follows_from_the_interval(mean, half, expected):
    assert experiment.verdict(mean, half) == expected


def test_arms_are_paired_within_a_split():
    """The same seed gives the same first weights and batches: an arm against itself differs by nothing."""
    data = digits.load("cpu")
    split = data.split(3)
    images, labels = data.images[split.student], data.labels[split.student]
    test = data.images[split.test], data.labels[split.test]
    budget = experiment.Budget(splits=1, seeds=1, student_steps=40)
    curves = [experiment.student_curve("hard labels", images, labels, [], test, 7, budget, "cpu") for _ in range(2)]
    assert curves[0] == curves[1]


def test_a_split_tests_on_images_that_nobody_trained_on():
    data = digits.load("cpu")
    split = data.split(1)
    assert set(split.student.tolist()) <= set(split.train.tolist())
    assert not set(split.train.tolist()) & set(split.test.tolist())
    assert len(split.train) + len(split.test) == len(data.labels) == 1797
