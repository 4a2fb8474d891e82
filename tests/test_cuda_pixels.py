"""The CUDA kernels along the pixels of [B, C, H, W]: every one by name on pixels of many shapes, in any order of
threads, the bytes they move and the sectors that their warps touch.
"""

import functools
import math
import shutil

import pytest
import torch
from conftest import EmulatedCuda

if not shutil.which("g++"):
    pytest.skip("the CUDA emulator needs g++", allow_module_level=True)

import emulator
from cases.kd import Case, assert_matches, build, evaluate, oracle
from cases.layouts import LAYOUTS
from emulator import layout, machine
from traffic import kd_bytes, rescale_bytes

from mtkd_fast.dispatch import FUSED_DIVERGENCES
from mtkd_fast.schemas.kd import ELEMENTWISE

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RESIDENT, STREAM = "_pixels", "_stream_of_pixels"
KERNELS = pytest.mark.parametrize("variant", [RESIDENT, STREAM])
RULES = ("uniform", "per row", "confidence", "entropy")


# ---------- every kernel against the reference


def pixels(name: str, **chosen) -> Case:
    defaults = dict(
        rows=(2, 5, 7), teachers=2, student_layout="pixels", teacher_layout="pixels", labels="some ignored",
        terms=(1.0, 0.7, 0.1), temperature=3.0,
    )  # fmt: skip
    return Case(name=f"pixels, {name}", why="rows along H·W", **defaults | chosen)


# One warp a set of pixels up to 32 classes, then 3 to 12 with 16 each, 8 with 32.
EACH_DIVERGENCE = tuple(
    pixels(f"{divergence}, {weights}, C={classes}", divergence=divergence, weights=weights, classes=classes,
           dtypes=dtypes, rows=rows, teachers=teachers, temperature=temperature)
    for i, divergence in enumerate(FUSED_DIVERGENCES)
    for j, weights in enumerate(RULES)
    for classes, dtypes, rows, teachers, temperature in (
        ((5, 7)[i % 2], (F32, BF16), (2, 5, 7), (1, 3)[j % 2], 3.0),
        (21, (BF16,), (2, 8, 8), (3, 6)[j % 2], 4.0),
        ((40, 150)[(i + j) % 2], (BF16, F32, F16), (1, 5, 7), 3, 2.0),
    )
)  # fmt: skip
OTHERS = (
    pixels("16 classes", classes=16, dtypes=(BF16,), rows=(2, 4, 8), weights="confidence"),
    pixels("8 classes in lines", classes=8, rows=(1, 8, 8), divergence="reverse_kl"),
    pixels("24 classes in lines", classes=24, rows=(1, 8, 8), weights="entropy"),
    pixels("32 classes", classes=32, rows=(1, 5, 7), weights="confidence", divergence="dkd", dtypes=(F16, F32)),
    pixels("33 classes", classes=33, rows=(1, 5, 7), divergence="skew_kl"),
    pixels("the most warps", classes=192, dtypes=(BF16,), rows=(1, 5, 7), weights="entropy"),
    *(
        pixels(f"the most classes of {divergence}", classes=classes, dtypes=dtypes, rows=rows, weights="confidence",
               divergence=divergence)
        for divergence, classes, dtypes, rows in (
            ("forward_kl", 256, (F32,), (1, 5, 7)), ("reverse_kl", 255, (BF16, F32), (1, 4, 8)),
            ("jsd", 256, (BF16,), (1, 5, 7)), ("dkd", 193, (F32,), (1, 4, 8)),
        )
    ),
    pixels("one class", classes=1),
    pixels("one map", classes=11, rows=(131,)),
    pixels("more maps than blocks", classes=4, rows=(40, 3, 3), weights="confidence"),
    pixels("labels of −1", classes=19, labels="ignored by -1", row_weights="float", weights="zero entries"),
    pixels("no pixel counts", classes=21, labels="all ignored", weights="confidence"),
    pixels("no pixel kept", classes=40, row_weights="none kept", divergence="tvd"),
    pixels("poisoned pixels", classes=21, values="nan in student", weights="entropy", dtypes=(BF16,), rows=(2, 8, 8)),
    pixels("unrouted poison", classes=40, values="empty teacher row", weights="zero teacher", teachers=3),
    pixels("masked", classes=21, values="leading masked", weights="confidence", teachers=3),
    pixels("masked over warps", classes=60, values="all but a few masked", weights="confidence", divergence="dkd"),
    pixels("channels of more", classes=7, student_layout="some channels", teacher_layout="some channels"),
    pixels("contiguous teachers", classes=21, teacher_layout="contiguous", weights="confidence", rows=(2, 8, 8)),
    pixels("a teacher of each layout", classes=13, teachers=len(LAYOUTS), teacher_layout="a different one each",
           weights="confidence", rows=(2, 40)),
    pixels("64 teachers", classes=6, teachers=64, weights="entropy", dtypes=(F32, BF16, F16, F32)),
    pixels("64 teachers of many classes", classes=40, teachers=64, weights="per row", rows=(1, 4, 8)),
    pixels("without a target", classes=21, labels="none", terms=(1.0, 0.0, 0.0), divergence="jsd"),
    pixels("per pixel", classes=21, reduction="none", upstream="random"),
)  # fmt: skip
TEACHERS_WANT = tuple(
    pixels(f"gradients of {divergence}, C={classes}", divergence=divergence, classes=classes, teachers=3,
           dtypes=(F16, BF16, F32), weights="zero entries", wants=("student", "teachers"))
    for divergence in FUSED_DIVERGENCES
    for classes in (7, 60)
)  # fmt: skip


def run_case(case: Case, variant: str, monkeypatch):
    """Through the public function, the forward by name; what streams writes no gradient."""
    monkeypatch.setattr(emulator, "forward", functools.partial(emulator.forward, variant=variant))
    monkeypatch.setattr(emulator, "fits_on_chip", lambda student: variant != STREAM)
    with EmulatedCuda().active():
        return evaluate(build(case), "triton")


@KERNELS
@pytest.mark.parametrize("case", EACH_DIVERGENCE + OTHERS, ids=str)
def test_every_forward_kernel(case, variant, monkeypatch):
    assert_matches(run_case(case, variant, monkeypatch), oracle(case))


@pytest.mark.parametrize("case", TEACHERS_WANT, ids=str)
def test_gradients_of_teachers(case, monkeypatch):
    assert_matches(run_case(case, RESIDENT, monkeypatch), oracle(case))


@pytest.mark.parametrize(
    ("classes", "fits"), [(1, True), (24, True), (192, True), (256, True), (257, False), (6000, False)]
)
def test_what_fits_on_chip(classes, fits):
    assert emulator.fits_on_chip(LAYOUTS["pixels"](torch.zeros(1, 2, 2, classes), "cpu")) == fits
    assert emulator.fits_on_chip(torch.zeros(4, classes))  # rows have more room


def test_pixels_that_do_not_fit_are_read_all_the_same():
    """A gradient in the forward is written by the kernels of rows."""
    student, teachers, w = maps((1, 5, 7), 300, 2)
    with pytest.raises(emulator.EmulatorError, match="too many classes"):
        run_forward(student, teachers, w, RESIDENT, True, rule="entropy")
    results = run_forward(student, teachers, w, "", True, rule="entropy")
    rows = [x.contiguous() for x in (student, *teachers)]
    right = run_forward(rows[0], rows[1:], w, "", True, rule="entropy")
    for x, y in zip(results, right, strict=True):
        torch.testing.assert_close(x, y)


# ---------- threads


def maps(rows, classes, n_teachers, dtypes=(F32,), seed=0):
    """Pixels [*rows, C] of student and teachers, and weights."""
    g = torch.Generator().manual_seed(seed)
    kinds = [dtypes[min(i, len(dtypes) - 1)] for i in range(n_teachers + 1)]
    student, *teachers = [
        LAYOUTS["pixels"]((2 * torch.randn(*rows, classes, generator=g)).to(kind), "cpu") for kind in kinds
    ]
    return student, teachers, torch.rand(n_teachers, math.prod(rows), generator=g) + 0.1


def run_forward(student, teachers, w, variant, write_gradient, target=None, **options):
    options = dict(
        rule="given", divergence="forward_kl", temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    ) | options  # fmt: skip
    return emulator.forward(
        student, teachers, target, w if options["rule"] == "given" else None, None, None, **options,
        skip_zero_weights=True, write_gradient=write_gradient, variant=variant,
    )  # fmt: skip


def run_backward(student, teachers, row_stats, w, divergence, needs, target=None, ce_weight=0.0):
    return emulator.backward(
        student, teachers, target, w, None, row_stats, divergence, 0.3, 2.0, 4.0, ce_weight, 0.0, needs
    )


@KERNELS
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize(("rows", "classes"), [((2, 5, 7), 21), ((2, 4, 8), 21), ((2, 5, 7), 50)])
def test_the_order_of_threads_changes_nothing(rows, classes, divergence, variant):
    student, teachers, _ = maps(rows, classes, 3, (BF16, F32))
    target = torch.randint(classes, rows)
    target.view(-1)[:40:3] = -100
    results = []
    for order in machine.ORDERS:
        with emulator.use_order(order, seed=3):
            options = dict(rule="confidence", divergence=divergence, ce_weight=0.7)
            row_loss, row_stats, gradient = run_forward(
                student, teachers, None, variant, variant == RESIDENT, target, **options
            )
            gradients = run_backward(student, teachers, row_stats, row_stats[3:6], divergence, [True] * 4, target, 0.7)
            results.append((row_loss, row_stats, gradient, *gradients))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kilobytes", [99, 163])
@pytest.mark.parametrize("classes", [21, 150])
@pytest.mark.parametrize("n_teachers", [3, layout.MAX_TEACHERS])
def test_less_shared_memory(classes, kilobytes, n_teachers):
    student, teachers, _ = maps((1, 4, 8), classes, n_teachers, (BF16, F32))
    for variant in (RESIDENT, STREAM):
        right = run_forward(student, teachers, None, variant, variant == RESIDENT, rule="entropy")
        with machine.use_shared_memory(kilobytes * 1024):
            if variant == RESIDENT and not emulator.fits_on_chip(student):
                continue
            got = run_forward(student, teachers, None, variant, variant == RESIDENT, rule="entropy")
            run_backward(student, teachers, got[1], got[1][n_teachers : 2 * n_teachers], "forward_kl",
                         [True] * (n_teachers + 1))  # fmt: skip
        for x, y in zip(got, right, strict=True):
            torch.testing.assert_close(x, y)


# ---------- memory


def logits_bytes(n_teachers):
    moved = machine.traffic()
    return [moved[name][0] for name in ("student", *(f"teacher{k}" for k in range(n_teachers)))]


def modelled(model, n_teachers):
    return [model.loads.get(name, 0) for name in ("student", *(f"teacher {k}" for k in range(n_teachers)))]


def assert_whole_sectors(*names):
    """No warp touched a sector of which it did not want every byte."""
    for name in names:
        assert machine.sectors()[name] * 32 == sum(machine.traffic()[name]), name


SHAPES = pytest.mark.parametrize("classes", [8, 21, 150])
DTYPES = pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (BF16, F32)])


@KERNELS
@SHAPES
@DTYPES
@pytest.mark.parametrize(("rule", "divergence"), [("given", "forward_kl"), ("entropy", "reverse_kl"), ("given", "tvd")])
def test_forward_reads_every_line_once(variant, classes, dtypes, rule, divergence):
    student, teachers, w = maps((2, 8, 16), classes, 3, dtypes)
    writes = variant == RESIDENT
    with machine.count_sectors():
        run_forward(student, teachers, w, variant, writes, rule=rule, divergence=divergence)
    model = kd_bytes(
        student, teachers, counted=256, sweeps=2 if divergence in ELEMENTWISE and variant == STREAM else 1,
        gradients=("student",) if writes else (),
    )  # fmt: skip
    assert logits_bytes(3) == modelled(model, 3)
    assert machine.traffic()["gradient"] == (0, model.stores.get("gradient of student", 0))
    assert_whole_sectors("student", "teacher0", "teacher1", "teacher2", "gradient")


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,)])
@pytest.mark.parametrize("rows", [(2, 5, 7), (2, 8, 8)])
@KERNELS
def test_what_weighs_nothing_is_not_read(variant, rows, dtypes):
    n, classes = math.prod(rows), 21
    student, teachers, w = maps(rows, classes, 3, dtypes)
    target = torch.ones(n, dtype=torch.long)
    target[:40] = target[60] = -100  # a warp and more
    w[1], w[2, 50] = 0, 0
    for x in (student, teachers[0]):
        x[(target < 0).view(rows)] = float("nan")
    teachers[1][:] = float("nan")
    row_loss, row_stats, gradient = run_forward(student, teachers, w, variant, variant == RESIDENT, target)
    model = kd_bytes(student, teachers, counted=n - 41, used=[n - 41, 0, n - 42])
    assert logits_bytes(3) == modelled(model, 3)
    for x in (row_loss, row_stats, gradient):
        assert x.isfinite().all()
    assert (row_stats[:, :40] == 0).all()
    if variant == STREAM:
        found = run_backward(student, teachers, row_stats, row_stats[3:6], "forward_kl", [True] * 4, target)
        assert logits_bytes(3) == modelled(model, 3)
        assert all(x.isfinite().all() for x in found)


@KERNELS
def test_without_the_teachers_term_no_teacher_is_read(variant):
    student, teachers, w = maps((2, 5, 7), 40, 2)
    target = torch.zeros(70).long()
    for divergence in ("forward_kl", "jsd", "dkd"):
        run_forward(student, teachers, w, variant, variant == RESIDENT, target, kd_scale=0.0, ce_weight=1.0,
                    divergence=divergence)  # fmt: skip
        assert logits_bytes(2)[1:] == [0, 0]


@SHAPES
@DTYPES
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_backward_reads_and_writes_every_line_once(classes, dtypes, divergence):
    student, teachers, w = maps((2, 8, 16), classes, 3, dtypes)
    _, row_stats, _ = run_forward(student, teachers, w, STREAM, False, divergence=divergence)
    w[1] = 0
    with machine.count_sectors():
        run_backward(student, teachers, row_stats, w, divergence, [True, True, True, False])
    model = kd_bytes(
        student, teachers, counted=256, used=[256, 0, 256], gradients=("student", "teacher 0", "teacher 1")
    )
    assert logits_bytes(3) == modelled(model, 3)
    for name, of in (("student_gradient", "student"), ("teacher_gradient0", "teacher 0"),
                     ("teacher_gradient1", "teacher 1")):  # fmt: skip
        assert machine.traffic()[name] == (0, model.stores[f"gradient of {of}"])
        assert_whole_sectors(name)
    assert_whole_sectors("student", "teacher0", "teacher2")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("rows", "classes"), [((2, 5, 7), 7), ((2, 8, 16), 150)])
def test_rescale(rows, classes, dtype):
    gradient, _, _ = maps(rows, classes, 0, (dtype,))
    n = math.prod(rows)
    scale, upstream = torch.ones(n), torch.randn(n)
    scale[4], upstream[4], upstream[2] = 0, float("nan"), 1
    flat = gradient.reshape(n, classes).float()
    flat[4] = 0
    gradient.copy_(flat.view(gradient.shape))
    right = (flat * upstream[:, None]).masked_fill(scale[:, None] == 0, 0).to(dtype).view(gradient.shape)
    model = rescale_bytes(gradient, counted=n - 1, changed=n - 2, in_place=False)
    got = emulator.rescale(gradient, upstream, scale)
    assert got.equal(right)
    assert got.stride() == gradient.stride()
    assert machine.traffic()["gradient"] == (model.loads["gradient"], 0)
    assert machine.traffic()["out"] == (0, model.stores["out"])
    emulator.rescale_(gradient, upstream, scale)
    assert gradient.equal(right)
    model = rescale_bytes(gradient, counted=n - 1, changed=n - 2, in_place=True)
    assert machine.traffic()["out"] == (model.loads["gradient"], model.stores["gradient"])


def test_rescale_touches_whole_sectors():
    gradient, _, _ = maps((2, 8, 16), 40, 0, (BF16,))
    with machine.count_sectors():
        emulator.rescale_(gradient, torch.full((256,), 2.0), torch.ones(256))
    assert machine.traffic()["out"] == (gradient.numel() * 2, gradient.numel() * 2)
    assert_whole_sectors("out")


def test_an_upstream_of_one_moves_nothing():
    gradient, _, _ = maps((2, 5, 7), 7, 0)
    emulator.rescale_(gradient, torch.ones(()), torch.ones(70))
    assert machine.traffic()["out"] == (0, 0)
