"""The CUDA kernels on the emulated grid: that the emulator sees faults, and what the case table (test_kd.py) cannot
see: every kernel by name, the order of threads, the bytes moved, and that everything is written.
"""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

if not shutil.which("g++"):
    pytest.skip("the CUDA emulator needs g++", allow_module_level=True)

import emulator
from emulator import attention, hint, layout, machine, mixture, mutual, relation
from traffic import kd_bytes, relation_planes_bytes

from mtkd_fast.dispatch import FUSED_DIVERGENCES
from mtkd_fast.reference import hint as hint_reference
from mtkd_fast.reference import kd as reference
from mtkd_fast.schemas.kd import ELEMENTWISE

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FAULTS = Path(emulator.__file__).parent / "faults.cpp"
ORDERS = tuple(machine.ORDERS)


# ---------- the emulator itself


@pytest.fixture(scope="module")
def faults():
    return machine.library(FAULTS)


def run(lib, kernel: str, order: str = "forward"):
    x, out = torch.arange(64.0), machine.poisoned((64,), F32)
    pointers = tuple(ctypes.c_void_p(t.data_ptr()) for t in (x, out))
    with machine.use_order(order, seed=1, lib=lib):
        machine.launch(kernel, pointers, {"in": x}, {"out": out}, lib)
    return x, out


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_pass(faults, order):
    x, out = run(faults, "sound_neighbour", order)
    assert out.equal(x.roll(-1))
    x, out = run(faults, "sound_cluster", order)
    assert out.equal(x.roll(32))
    _, out = run(faults, "sound_phases", order)
    assert (out == 12).all()
    x, out = run(faults, "sound_bulk_copy", order)
    assert out.equal(x.roll(-1))
    x, out = run(faults, "sound_copy", order)
    assert out.equal(x)
    assert machine.traffic() == {"out": (0, 256), "in": (256, 0)}


@pytest.mark.parametrize(
    ("kernel", "right"),
    [
        ("missing_barrier", lambda x: x.roll(-1)),
        ("missing_await", lambda x: x.roll(32)),
        ("missing_answer", lambda x: torch.full_like(x, 12)),
        ("missing_await_of_bulk", lambda x: x.roll(-1)),
        ("missing_look", lambda x: x.roll(-1)),
    ],
)
def test_what_a_kernel_lacks_shows_in_some_order(faults, kernel, right):
    results = [run(faults, kernel, order) for order in ORDERS]
    assert not all(out.equal(right(x)) for x, out in results)


def test_a_copy_that_nobody_awaits_leaves_nan(faults):
    _, out = run(faults, "missing_wait")
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("fault_read_out_of_bounds", "a read outside"),
        ("fault_write_to_input", "a write outside the outputs"),
        ("fault_misaligned", "misaligned"),
        ("fault_past_shared_memory", "past the end of shared memory"),
        ("fault_divergent_barrier", "divergent threads"),
        ("fault_absent_lanes", "divergent threads"),
        ("fault_early_exit", "has ended"),
        ("fault_unopened", "a mailbox that nobody has opened"),
        ("fault_unmet", "that have not begun|that nobody has opened"),
        ("fault_too_little", "nothing ends this"),
        ("fault_leaving", "threads that have ended"),
        ("fault_never_arrived", "without an arrival"),
        ("fault_unopened_for_bulk", "a mailbox that nobody has opened"),
        ("fault_off_words", "misaligned"),
        ("fault_part_of_words", "no multiple of 16"),
        ("fault_bulk_past_the_end", "goes past shared memory"),
    ],
)
def test_faults_end_the_launch(faults, kernel, message):
    for order in ORDERS:
        with pytest.raises(emulator.EmulatorError, match=message):
            run(faults, kernel, order)


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("kd_forward", layout.KDForward),
        ("kd_backward", layout.KDBackward),
        ("kd_rescale", layout.KDRescale),
        ("hint", layout.Hint),
        ("hint_fused", layout.HintFused),
        ("relation_planes", layout.RelationPlanes),
        ("relation_angle", layout.RelationAngle),
        ("relation_distance", layout.RelationDistance),
        ("mixture_forward", layout.MixtureForward),
        ("mixture_backward", layout.MixtureBackward),
        ("mixture_divergence", layout.MixtureDivergence),
        ("mutual_forward", layout.MutualForward),
        ("mutual_backward", layout.MutualBackward),
        ("attention_maps", layout.AttentionMaps),
        ("attention_pairs", layout.AttentionPairs),
    ],
)
def test_the_structs_are_those_of_the_headers(name, struct):
    size_of = getattr(machine.library(), f"size_of_{name}")
    size_of.restype = ctypes.c_int64
    assert size_of() == ctypes.sizeof(struct)
    assert size_of() < 4096 - 64  # a kernel's parameters, with what the launchers add


# ---------- kernels, by name

OPTIONS = dict(beta=0.3, ce_weight=0.7, label_smoothing=0.1, ignore_index=-100)
CHOSEN, REGISTERS, STREAM = "", "_registers", "_stream"
SHORT, SHARED = "_short", "_shared"  # a block with the registers of short rows, and of long ones
PAIRS, CLUSTERS = "_pairs", "_clusters"  # clusters of 2 and of 16 blocks


def inputs(n, classes, n_teachers, dtypes=(F32,), seed=0):
    g = torch.Generator().manual_seed(seed)
    kinds = [dtypes[min(i, len(dtypes) - 1)] for i in range(n_teachers + 1)]
    student, *teachers = [(2 * torch.randn(n, classes, generator=g)).to(kind) for kind in kinds]
    target = torch.randint(classes, (n,), generator=g)
    target[n // 2] = -100
    return student, teachers, target, torch.randn(n_teachers, n, generator=g)


def exact(student, teachers, target, weights, options, n):
    """row_loss, divergences and gradient in float64."""
    s = student.double().requires_grad_()
    given = weights if options["rule"] == "given" else None
    loss, stats = reference.kd(
        s, [t.double() for t in teachers], target, given, None, None, reduction="none", **options
    )
    (loss.sum() / n).backward()
    return loss.detach(), stats, s.grad


def run_forward(student, teachers, target, weights, options, variant, write_gradient):
    given = weights if options["rule"] == "given" else None
    items = torch.tensor(float(len(target)))
    return emulator.forward(
        student, teachers, target, given, None, items, **options, skip_zero_weights=True,
        write_gradient=write_gradient, variant=variant,
    )  # fmt: skip


def assert_close(got, right, tolerance):
    assert got.isfinite().all()
    assert (got.double() - right).abs().max() <= tolerance * max(1.0, right.abs().max().item())


def assert_gradient_close(got, right):
    largest = right.abs().max()
    assert_close(got.double() / largest, right / largest, 4e-6 if got.dtype == F32 else 4e-3)


@pytest.mark.parametrize("divergence", FUSED_DIVERGENCES)
@pytest.mark.parametrize("rule", ["uniform", "given", "confidence", "entropy"])
@pytest.mark.parametrize(
    ("variant", "classes", "dtypes"),
    [
        (REGISTERS, 10, (F32,)),
        (REGISTERS, 100, (BF16,)),
        (REGISTERS, 256, (F32, BF16, F16)),
        (CHOSEN, 257, (F32, BF16, F16)),  # a warp
        (CHOSEN, 4104, (BF16, F32)),
        (SHORT, 10, (F32,)),
        (SHARED, 100, (BF16, F32)),
        (SHARED, 4099, (BF16,)),
        (PAIRS, 100, (BF16, F32)),  # most threads have no columns
        (CLUSTERS, 100, (F32,)),  # nor have the last three blocks
        (PAIRS, 9001, (F32, BF16)),
        (CLUSTERS, 33000, (BF16,)),
        (STREAM, 33, (F32, F16)),
        (STREAM, 9000, (BF16,)),
    ],
)
def test_every_forward_kernel(variant, classes, dtypes, rule, divergence):
    n = 6 if classes < 1000 else 3
    tensors = inputs(n, classes, 3, dtypes)
    options = dict(rule=rule, divergence=divergence, temperature=3.0, kd_scale=9.0, **OPTIONS)
    loss, stats, gradient = exact(*tensors, options, n)
    row_loss, row_stats, got = run_forward(*tensors, options, variant, variant != STREAM)
    assert_close(row_loss, loss, 3e-6)
    assert_close(row_stats[:3], stats.divergence, 3e-6)
    assert_close(row_stats[3:6], stats.weights, 3e-6)
    if variant == STREAM:
        student, teachers, target, _ = tensors
        got, *_ = emulator.backward(
            student, teachers, target, row_stats[3:6], None, row_stats, divergence, 0.3, 3.0, 9.0, 0.7, 0.1,
            [True, False, False, False],
        )  # fmt: skip
    assert_gradient_close(got, gradient)


@pytest.mark.parametrize(
    ("variant", "classes"),
    [(REGISTERS, 250), (SHORT, 1000), (SHARED, 3003), (SHARED, 3008), (PAIRS, 3003), (CLUSTERS, 17_000), (STREAM, 250)],
)
@pytest.mark.parametrize("dtypes", [(BF16,), (BF16, F32)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_the_order_of_threads_changes_nothing(variant, classes, divergence, dtypes):
    """Rows whose every warp has columns, more of them than the device has blocks: no place is filled before all have
    read it. (Where halves and floats come in turns, the block meets before that.)
    """
    tensors = inputs(7, classes, 3, dtypes)
    options = dict(rule="confidence", divergence=divergence, temperature=2.0, kd_scale=4.0, **OPTIONS)
    results = []
    for order in ORDERS:
        with emulator.use_order(order, seed=3):
            results.append(run_forward(*tensors, options, variant, variant != STREAM))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl", "dkd"])
@pytest.mark.parametrize("classes", [8, 130])
def test_many_teachers(classes, divergence):
    n_teachers = layout.MAX_TEACHERS
    tensors = inputs(2, classes, n_teachers, (BF16, F32, F16))
    options = dict(rule="entropy", divergence=divergence, temperature=4.0, kd_scale=16.0, **OPTIONS)
    loss, _, gradient = exact(*tensors, options, 2)
    for variant, shared_memory in ((REGISTERS, 227), (REGISTERS, 99), (SHORT, 227), (SHARED, 227), (STREAM, 227)):
        with machine.use_shared_memory(shared_memory * 1024):
            row_loss, _, got = run_forward(*tensors, options, variant, variant != STREAM)
        assert_close(row_loss, loss, 3e-6)
        if variant != STREAM:
            assert_gradient_close(got, gradient)


@pytest.mark.parametrize("variant", [REGISTERS, SHORT, SHARED, PAIRS])
@pytest.mark.parametrize("lowest", [-1e10, torch.finfo(F32).min])
@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
def test_teachers_of_far_logits(variant, lowest, divergence):
    """All of them, or all but the target's: their rounding is larger than an exponent."""
    student, teachers, target, w = inputs(4, 250, 3)
    teachers[0][0] = lowest
    others = torch.arange(250) != target[1]
    teachers[1][1, others] = lowest
    options = dict(rule="uniform", divergence=divergence, temperature=1.0, kd_scale=1.0, **OPTIONS)
    loss, _, gradient = exact(student, teachers, target, w, options, 4)
    row_loss, _, got = run_forward(student, teachers, target, w, options, variant, True)
    assert_close(row_loss, loss, 3e-6)
    assert_gradient_close(got, gradient)


@pytest.mark.parametrize("variant", [SHORT, SHARED, PAIRS, CLUSTERS])
@pytest.mark.parametrize("rule", ["uniform", "confidence", "entropy"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize("above", [20.0, 100.0])
def test_logits_far_above_those_that_come_first(variant, rule, divergence, above):
    """Sums relative to anything but the maximum would be more than a number holds: e^100."""
    classes = {SHORT: 1000, SHARED: 3003, PAIRS: 3003, CLUSTERS: 9000}[variant]
    student, teachers, target, w = inputs(5, classes, 2)
    late = classes - 5  # of the last piece of a thread
    teachers[0][0, late] += above
    teachers[1][1, late // 2 - 5] += above
    student[2, late] += above
    target[2] = target[4] = late
    for x in (student, *teachers):
        x[4, late] += above
        x[3, : classes // 2] = -float("inf")
    target[3] = classes - 1
    options = dict(rule=rule, divergence=divergence, temperature=1.0, kd_scale=1.0, **OPTIONS) | {
        "label_smoothing": 0.0
    }
    loss, _, gradient = exact(student, teachers, target, w, options, 5)
    row_loss, _, got = run_forward(student, teachers, target, w, options, variant, True)
    assert_close(row_loss, loss, 3e-6)
    assert_gradient_close(got, gradient)


@pytest.mark.parametrize("variant", [REGISTERS, SHORT, SHARED, PAIRS])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "dkd", "jsd"])
@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -1000.0])
def test_a_row_without_weights_has_no_gradient(variant, divergence, logit):
    """Whatever its student, in the forward as in the backward."""
    student, teachers, target, w = inputs(4, 100, 2)
    student[1], w[:, 1] = logit, 0
    options = dict(divergence=divergence, temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0, label_smoothing=0.0)
    row_loss, row_stats, got = run_forward(
        student, teachers, target, w, dict(rule="given", ignore_index=-100, **options), variant, True
    )
    again, *_ = emulator.backward(student, teachers, target, w, None, row_stats, **options, needs=[True, False, False])
    for x in (row_loss, got, again):
        assert (x[1] == 0).all()
        assert x.isfinite().all()
        assert (x[0] != 0).any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_few_or_many_rows_in_shared_memory_at_a_time(divergence):
    """Room for one to four of the student and 5 teachers as they come: 8 to 20 bytes a column."""
    tensors = inputs(3, 1500, 5, (BF16, F32, F16))
    options = dict(rule="confidence", divergence=divergence, temperature=4.0, kd_scale=16.0, **OPTIONS)
    results = []
    for kilobytes in (14, 20, 26, 227):
        with machine.use_shared_memory(kilobytes * 1024):
            results.append(run_forward(*tensors, options, SHARED, True))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def whole(x):
    return x


def in_wider_rows(x):
    return torch.nn.functional.pad(x, (0, 13))[:, : x.shape[1]]


def off_16_bytes(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def of_sequences(x):
    """All but the last token of each of two."""
    return torch.nn.functional.pad(x.unflatten(0, (2, -1)), (0, 0, 0, 1))[:, :-1]


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (BF16, F32)])
@pytest.mark.parametrize("classes", [3, 1001])
@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [(whole, whole), (in_wider_rows,) * 2, (of_sequences,) * 2, (off_16_bytes,) * 2, (whole, in_wider_rows)],
)
@pytest.mark.parametrize(
    ("variant", "clusters"),
    [(SHARED, 1), (SHARED, 16), (SHORT, 16), (PAIRS, 16)],
    ids=["by threads", "in bulk", "in bulk for a warp", "in bulk by two blocks"],
)
def test_rows_that_begin_anywhere(variant, of_student, of_teacher, classes, dtypes, clusters):
    """They come in whole words of 16 bytes, where all begin as far from them; else element by element. More rows than
    the device has blocks, so that each goes on to the next; some of them, or some of their teachers, are not read.
    """
    n = 12
    student, teachers, target, w = inputs(n, classes, 2, dtypes)
    target[:2], w[1, 3:5], w[:, 8] = -100, 0, 0
    used = (target != -100) & (w != 0)
    options = dict(rule="given", divergence="forward_kl", temperature=2.0, kd_scale=4.0, **OPTIONS)
    loss, _, gradient = exact(student, teachers, target, w, options, n)
    student, teachers = of_student(student), [of_teacher(t) for t in teachers]
    if of_teacher is of_sequences:
        target, w = target.view(2, -1), w.view(2, 2, -1)
    in_step = of_student is of_teacher and of_student is not off_16_bytes
    model = kd_bytes(student, teachers, counted=n - 3, used=used.sum(1).tolist(), label_of_student=True)
    counted = [(target != -100).flatten(), *used]
    right = [
        bytes + in_step * brought_along(x, rows)
        for bytes, x, rows in zip(modelled(model, 2), (student, *teachers), counted, strict=True)
    ]
    for order in ("reverse", "shuffled", "last warp first"):
        with machine.use_clusters(clusters), emulator.use_order(order, seed=3):
            items = torch.tensor(float(n))
            row_loss, _, got = emulator.forward(
                student, teachers, target, w, None, items, **options, skip_zero_weights=True, write_gradient=True,
                variant=variant,
            )  # fmt: skip
        assert_close(row_loss, loss, 3e-6)
        assert_gradient_close(got.reshape(n, classes), gradient)
        assert logits_bytes(2) == right


@pytest.mark.parametrize("variant", [SHORT, SHARED, PAIRS])
@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
@pytest.mark.parametrize("label", [-5, 1001, 2**62])
def test_a_label_out_of_range_is_nan_wherever_its_row_begins(variant, divergence, label):
    student, teachers, target, w = inputs(12, 1001, 2, (BF16,))
    target[7] = label
    options = dict(rule="uniform", divergence=divergence, temperature=2.0, kd_scale=4.0, **OPTIONS)
    row_loss, _, got = run_forward(student, teachers, target, w, options, variant, True)
    others = (torch.arange(12) != 7) & (target != -100)
    assert row_loss[7].isnan()
    assert got[7].isnan().all()
    assert row_loss[others].isfinite().all()
    assert got[others].isfinite().all()


@pytest.mark.parametrize("variant", [SHORT, SHARED, PAIRS])
def test_a_call_that_reads_nothing_writes_zeros(variant):
    student, teachers, target, w = inputs(12, 1001, 2)
    options = dict(
        rule="uniform", divergence="forward_kl", temperature=2.0, kd_scale=0.0, beta=0.0, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    row_loss, _, got = run_forward(student, teachers, target, w, options, variant, True)
    assert logits_bytes(2) == [0, 0, 0]
    assert not row_loss.any()
    assert not got.any()


@pytest.mark.parametrize("rule", ["uniform", "confidence"])
@pytest.mark.parametrize(
    ("classes", "clusters"),
    [(6500, 1), (8192, 1), (8200, 1), (8200, 2), (16384, 1), (16392, 2), (16392, 4), (40000, 8)],
)
def test_the_placement_that_a_launch_chooses(classes, clusters, rule):
    """One block or several, two or one of a multiprocessor, as clusters allow."""
    tensors = inputs(2, classes, 2, (BF16, F32))
    options = dict(rule=rule, divergence="forward_kl", temperature=4.0, kd_scale=16.0, **OPTIONS)
    loss, _, gradient = exact(*tensors, options, 2)
    with machine.use_clusters(clusters):
        row_loss, _, got = run_forward(*tensors, options, CHOSEN, True)
    assert_close(row_loss, loss, 3e-6)
    assert_gradient_close(got, gradient)


@pytest.mark.parametrize("divergence", FUSED_DIVERGENCES)
def test_teacher_gradients(divergence):
    student, teachers, target, w = inputs(4, 77, 3, (F32, BF16, F32))
    options = dict(
        rule="given", divergence=divergence, temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    leaves = [x.double().requires_grad_() for x in (student, *teachers)]
    loss, _ = reference.kd(leaves[0], leaves[1:], target, w, None, None, reduction="sum", **options)
    right = torch.autograd.grad(loss, leaves)
    _, row_stats, _ = emulator.forward(
        student, teachers, target, w, None, None, **options, skip_zero_weights=True, write_gradient=False
    )
    got = emulator.backward(
        student, teachers, target, w, None, row_stats, divergence, 0.3, 2.0, 4.0, 0.0, 0.0, [True] * 4
    )
    for x, y in zip(got, right, strict=True):
        assert_gradient_close(x, y)


# ---------- rescale


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("classes", [7, 64])
def test_rescale(dtype, classes):
    gradient = torch.randn(9, classes).to(dtype)
    scale = torch.ones(9)
    gradient[4], scale[4] = 0, 0
    upstream = torch.randn(9)
    upstream[2], upstream[4] = 1, float("nan")
    right = (gradient.float() * upstream[:, None]).masked_fill(scale[:, None] == 0, 0).to(dtype)
    assert emulator.rescale(gradient, upstream, scale).equal(right)
    emulator.rescale_(gradient, upstream, scale)
    assert gradient.equal(right)
    bytes_of_row = classes * gradient.element_size()
    assert machine.traffic()["out"] == (7 * bytes_of_row, 7 * bytes_of_row)  # not the one of 1, nor the one of scale 0


def test_an_upstream_of_one_moves_nothing():
    gradient, scale = torch.randn(9, 100), torch.ones(9)
    emulator.rescale_(gradient, torch.ones(()), scale)
    moved = machine.traffic()
    assert moved["out"] == (0, 0)
    assert moved["gradient"] == (0, 0)


# ---------- traffic

# Bytes of the logits; row_stats and weights are O(N·K).


def logits_bytes(n_teachers):
    """Bytes loaded from the student and from each teacher in the last launch."""
    moved = machine.traffic()
    return [moved[name][0] for name in ("student", *(f"teacher{k}" for k in range(n_teachers)))]


def brought_along(x, rows):
    """Bytes before the first class of these rows, from where eight columns end: of rows read in whole words."""
    places = torch.arange(x.untyped_storage().nbytes() // x.element_size())
    return x.element_size() * int((places.as_strided(x.shape[:-1], x.stride()[:-1]).flatten()[rows] % 8).sum())


def modelled(model, n_teachers):
    return [model.loads.get(name, 0) for name in ("student", *(f"teacher {k}" for k in range(n_teachers)))]


SHAPES = pytest.mark.parametrize(
    ("variant", "classes"),
    [(REGISTERS, 96), (SHORT, 1000), (SHARED, 1000), (PAIRS, 1000), (PAIRS, 9000), (STREAM, 1000)],
)


@SHAPES
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (BF16, F32)])
@pytest.mark.parametrize(
    ("rule", "divergence"),
    [
        ("entropy", "forward_kl"), ("uniform", "reverse_kl"), ("uniform", "dkd"), ("entropy", "jsd"), ("given", "tvd"),
        ("uniform", "skew_kl"), ("entropy", "skew_reverse_kl"),
    ],
)  # fmt: skip
def test_forward_reads_everything_once(variant, classes, dtypes, rule, divergence):
    student, teachers, _, w = inputs(4, classes, 3, dtypes)
    options = dict(
        rule=rule, divergence=divergence, temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    run_forward(student, teachers, torch.zeros(4).long(), w, options, variant, variant != STREAM)
    model = kd_bytes(
        student, teachers, counted=4, label_of_student=divergence == "dkd", label_of_teachers=divergence == "dkd",
        blocks=2 if variant == PAIRS else 1,
        sweeps=2 if divergence in ELEMENTWISE and variant == STREAM else 1,
        gradients=() if variant == STREAM else ("student",),
    )  # fmt: skip
    assert logits_bytes(3) == modelled(model, 3)
    assert machine.traffic()["gradient"] == (0, model.stores.get("gradient of student", 0))


@pytest.mark.parametrize("variant", [SHORT, SHARED, PAIRS, CLUSTERS])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_one_thread_of_a_row_looks_up_the_hard_label(variant, divergence):
    student, teachers, target, w = inputs(4, 1000, 2, (BF16, F32))
    options = dict(rule="given", divergence=divergence, temperature=2.0, kd_scale=4.0, **OPTIONS)
    run_forward(student, teachers, target, w, options, variant, True)
    model = kd_bytes(student, teachers, counted=3, label_of_student=True)
    assert logits_bytes(2) == modelled(model, 2)


@pytest.mark.parametrize("divergence", FUSED_DIVERGENCES)
@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_one_thread_of_a_block_that_streams_looks_up_the_labels(rule, divergence):
    student, teachers, target, _ = inputs(4, 1000, 3, (BF16, F32))
    options = dict(rule=rule, divergence=divergence, temperature=2.0, kd_scale=4.0, **OPTIONS)
    run_forward(student, teachers, target, None, options, STREAM, False)
    model = kd_bytes(
        student, teachers, counted=3, label_of_student=True,
        label_of_teachers=rule == "confidence" or divergence == "dkd", sweeps=2 if divergence in ELEMENTWISE else 1,
    )  # fmt: skip
    assert logits_bytes(3) == modelled(model, 3)


@pytest.mark.parametrize(
    ("divergence", "classes", "clusters", "stays"),
    [
        ("forward_kl", 300, 1, True), ("forward_kl", 6500, 1, True), ("forward_kl", 40000, 4, False),
        ("jsd", 6500, 1, True), ("jsd", 40000, 1, False), ("jsd", 40000, 4, True),
    ],
)  # fmt: skip
def test_rows_that_fit_on_chip_are_swept_once(divergence, classes, clusters, stays):
    """Without a gradient, what would be swept once anyhow takes no cluster."""
    student, teachers, _, w = inputs(2, classes, 2, (BF16, F32))
    options = dict(
        rule="given", divergence=divergence, temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    with machine.use_clusters(clusters):
        run_forward(student, teachers, torch.zeros(2).long(), w, options, CHOSEN, False)
    sweeps = 2 if divergence == "jsd" and not stays else 1
    model = modelled(kd_bytes(student, teachers, counted=2, sweeps=sweeps), 2)
    along = [stays * brought_along(x, slice(None)) for x in (student, *teachers)]
    assert logits_bytes(2) == [bytes + more for bytes, more in zip(model, along, strict=True)]


def test_no_cluster_larger_than_the_device_has():
    tensors = inputs(1, 100, 1)
    options = dict(rule="uniform", divergence="forward_kl", temperature=2.0, kd_scale=4.0, **OPTIONS)
    with machine.use_clusters(8), pytest.raises(emulator.EmulatorError, match="no clusters of so many blocks"):
        run_forward(*tensors, options, CLUSTERS, True)


@SHAPES
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_what_weighs_nothing_is_not_read(variant, classes, divergence):
    n = 4
    student, teachers, target, w = inputs(n, classes, 3)
    w[1], w[2, 0] = 0, 0
    target[:] = 1
    target[3] = -100
    student[3], teachers[0][3] = float("nan"), float("nan")
    teachers[1][:] = float("nan")
    options = dict(
        rule="given", divergence=divergence, temperature=2.0, kd_scale=4.0, beta=0.3, ce_weight=0.0,
        label_smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    row_loss, row_stats, gradient = run_forward(student, teachers, target, w, options, variant, variant != STREAM)
    sweeps = 2 if divergence in ELEMENTWISE and variant == STREAM else 1
    model = kd_bytes(student, teachers, counted=3, used=[3, 0, 2], sweeps=sweeps)
    assert logits_bytes(3) == modelled(model, 3)
    for x in (row_loss, row_stats, gradient):
        assert x.isfinite().all()
    assert row_loss[3] == 0
    assert (row_stats[:, 3] == 0).all()


def test_without_the_teachers_term_no_teacher_is_read():
    student, teachers, target, w = inputs(4, 100, 2)
    for divergence in ("forward_kl", "jsd", "dkd"):
        options = dict(rule="uniform", divergence=divergence, temperature=2.0, kd_scale=0.0, **OPTIONS)
        for variant in (REGISTERS, SHORT, SHARED, STREAM):
            run_forward(student, teachers, target, w, options, variant, variant != STREAM)
            assert logits_bytes(2)[1:] == [0, 0]


@pytest.mark.parametrize("divergence", FUSED_DIVERGENCES)
def test_backward_reads_everything_once(divergence):
    student, teachers, target, _ = inputs(4, 2100, 3, (BF16, F32))
    options = dict(rule="uniform", divergence=divergence, temperature=2.0, kd_scale=4.0, **OPTIONS)
    _, row_stats, _ = run_forward(student, teachers, target, None, options, STREAM, False)
    weights = row_stats[3:6].clone()
    weights[1] = 0
    target[:] = 1
    row_stats[6 * 3 + 4, 2] = 0  # a row that does not count
    ce_weight = 0.0 if divergence == "dkd" else 0.7  # whose gradient is every thread's to look up
    emulator.backward(
        student, teachers, target, weights, torch.ones(()), row_stats, divergence, 0.3, 2.0, 4.0, ce_weight, 0.1,
        [True, True, False, False],
    )  # fmt: skip
    model = kd_bytes(student, teachers, counted=3, used=[3, 0, 3], gradients=("student", "teacher 0"))
    labels = [3 * 2 * 2, 3 * 4, 0, 3 * 4] if divergence == "dkd" else [0] * 4  # the student's for each teacher
    assert logits_bytes(3) == [bytes + more for bytes, more in zip(modelled(model, 3), labels, strict=True)]
    moved = machine.traffic()
    assert moved["student_gradient"] == (0, model.stores["gradient of student"])
    assert moved["teacher_gradient0"] == (0, model.stores["gradient of teacher 0"])


# ---------- hint


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("distance", layout.DISTANCES)
@pytest.mark.parametrize("shape", [(3,), (8, 5, 5), (17, 15, 9)])
def test_hint(shape, distance, order):
    n = 5
    student = [torch.randn(n, *shape), torch.randn(n, 40).bfloat16()]
    teacher = [torch.randn(n, *shape).half(), torch.randn(n, 40)]
    weights = torch.rand(2, n)
    weights[0, 1] = 0
    student[0][1] = float("nan")
    exact = [f.double().requires_grad_() for f in student]
    right = [hint_reference.DISTANCES[distance](f, g.double()) for f, g in zip(exact, teacher, strict=True)]
    right[0] = torch.where(weights[0] == 0, 0.0, right[0])
    with machine.use_order(order, seed=3):
        kept = hint.forward(student, teacher, weights, distance)
        assert_close(kept[0], torch.stack(right).detach(), 1e-6)
        elements = student[0][0].numel()
        assert machine.traffic()["student0"] == ((n - 1) * elements * 4, 0)
        assert machine.traffic()["teacher0"] == ((n - 1) * elements * 2, 0)
        gradients = hint.backward(student, teacher, weights, kept, [True, True], distance)
    assert machine.traffic()["student0"] == ((n - 1) * elements * 4, 0)
    assert machine.traffic()["gradient0"] == (0, n * elements * 4)
    for x, of_pair, w, got in zip(exact, right, weights, gradients, strict=True):
        wanted = torch.autograd.grad(of_pair, x, w.double())[0]
        wanted[w == 0] = 0
        assert_close(got, wanted, 1e-6 if got.dtype == F32 else 4e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("distance", layout.DISTANCES)
@pytest.mark.parametrize("elements", [40, 3001])
def test_a_hint_whose_gradient_comes_with_it(elements, distance, order):
    """Each side is read once, the cosine's twice."""
    n = 5
    student = [torch.randn(n, elements), torch.randn(n, 7)]
    teacher = [torch.randn(n, elements).bfloat16(), torch.randn(n, 7)]
    weights = torch.rand(2, n)
    weights[0, 1] = 0
    kept = hint.forward(student, teacher, weights, distance)
    right = hint.backward(student, teacher, 0.25 * weights, kept, [True, False], distance)
    with machine.use_order(order, seed=3):
        distances, got = hint.fused(student, teacher, weights, distance, 0.25, [True, False])
    reads = 2 if distance == "cosine" else 1
    assert machine.traffic()["student0"] == (reads * (n - 1) * elements * 4, 0)
    assert machine.traffic()["teacher0"] == (reads * (n - 1) * elements * 2, 0)
    assert machine.traffic()["gradient0"] == (0, n * elements * 4)
    assert distances.equal(kept[0])
    assert got[0].equal(right[0])
    assert got[1].numel() == 0


def test_the_cosine_reads_a_sample_of_extreme_norm_twice():
    student, teacher = [torch.randn(4, 100)], [torch.randn(4, 100)]
    student[0][1] *= 1e-20
    hint.forward(student, teacher, None, "cosine")
    assert machine.traffic()["student0"] == machine.traffic()["teacher0"] == (5 * 100 * 4, 0)


# ---------- relation


def points(batch, width=6, seed=0):
    """Of mean 0, their Gram matrix, and what the planes are made of."""
    x = torch.randn(batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x -= x.mean(0)
    return x, x @ x.T, torch.tensor(1e-12, dtype=torch.float64)


@pytest.mark.parametrize("batch", [5, 16, 37])
def test_planes_of_relations(batch):
    x, gram, nearest = points(batch)
    planes, distances = relation.planes(x, gram, nearest)
    moved, model = machine.traffic(), relation_planes_bytes(batch, planes.shape[-1])
    d = torch.cdist(x, x)
    squared = planes[0].double() + planes[1]
    torch.testing.assert_close(squared[:batch, :batch], d.square(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(distances, d.sum(1))
    assert not planes[:, batch:].any()
    assert not planes[:, :, batch:].any()
    own = 8 * batch * (batch - 1)  # of each pair, the other end's diagonal element and this one's
    assert moved["gram"] == (model.loads["gram"] + own, 0)
    assert moved["planes"] == (0, model.stores["planes"])
    assert moved["x"] == (0, 0)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("batch", [5, 16, 37])
def test_angles_of_relations(batch, gradient):
    student, teacher = (relation.planes(*points(batch, seed=seed))[0] for seed in (1, 2))
    results = []
    for order in ORDERS:
        with emulator.use_order(order, seed=3):
            results.append(relation.angle(student, teacher, batch, gradient))
        moved = machine.traffic()
    for loss, pull in results:
        assert loss.equal(results[0][0])
        assert not gradient or (pull.equal(results[0][1]) and pull.equal(pull.T) and not pull.diagonal().any())
    pitch = student.shape[-1]
    tiles = sum(j + 8 > i for i in range(0, pitch, 16) for j in range(0, pitch, 8))
    # By lanes, which share lines: 4 pairs in 8 warps, 4 rows and a column for each k; and r of each pair once more.
    loaded = tiles * 32 * (8 * 3 * 16 + pitch * 3 * (16 + 4)) + 4 * batch * (batch - 1) // 2
    assert moved["student"] == moved["teacher"] == (loaded, 0)
    if gradient:
        assert moved["pull"] == (0, 8 * batch**2)


# ---------- mixture

SHAPES_OF_MIXTURES = pytest.mark.parametrize(
    ("classes", "stays"), [(100, True), (1000, True), (1003, True), (9000, True), (21000, False)]
)


@SHAPES_OF_MIXTURES
def test_mixture_reads_teachers_of_rows_that_stay_on_chip_once(classes, stays):
    _, teachers, _, w = inputs(4, classes, 3, (BF16, F32, F16))
    w[1], w[2, 0] = 0, 0
    teachers[1][:] = float("nan")
    probabilities, row_stats = mixture.forward(teachers, w, 2.0, True)
    assert probabilities.isfinite().all()
    times = 1 if stays else 2
    loaded = [machine.traffic()[f"teacher{k}"][0] for k in range(3)]
    assert loaded == [times * rows * classes * size for rows, size in ((4, 4), (0, 2), (3, 2))]
    assert machine.traffic()["probabilities"] == (0, 4 * classes * 4)

    upstream = torch.randn(4, classes)
    mixture.backward(teachers, w, upstream, row_stats, 2.0, True, [False] * 3)
    loaded = [machine.traffic()[f"teacher{k}"][0] for k in range(3)]
    assert loaded == [rows * classes * size for rows, size in ((4, 4), (0, 2), (3, 2))]


@SHAPES_OF_MIXTURES
@pytest.mark.parametrize("skip", [True, False])
def test_mixture_divergence_sweeps_twice_and_once_more_for_the_weights(classes, stays, skip):
    """Through memory only where the rows do not stay on chip."""
    student, teachers, _, w = inputs(4, classes, 3, (BF16, F32, F16))
    w = w.abs()
    divergence, _, gradient = mixture.divergence(student, teachers, w, 2.0, skip, True)
    assert divergence.isfinite().all()
    assert gradient.isfinite().all()
    moved = machine.traffic()
    sweeps = 1 if stays else 2
    assert moved["student"][0] == sweeps * student.numel() * 2
    sweeps = 1 if stays else 2 if skip else 3
    assert [moved[f"teacher{k}"][0] for k in range(3)] == [sweeps * t.numel() * t.element_size() for t in teachers]
    assert moved["gradient"] == (0, student.numel() * 2)


def test_what_stays_on_chip_changes_no_mixture():
    student, teachers, _, w = inputs(7, 9001, 3, (BF16, F32, F16))
    w[1, 2] = 0
    results = []
    for kilobytes in (227, 32):
        with machine.use_shared_memory(kilobytes * 1024):
            results.append(mixture.divergence(student, teachers, w.abs(), 2.0, True, True))
            results[-1] += mixture.forward(teachers, w.abs(), 2.0, True)
            assert (machine.traffic()["teacher0"][0] > 7 * 9001 * 4) == (kilobytes == 32)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_the_order_of_threads_changes_no_mixture():
    student, teachers, _, w = inputs(5, 300, 3, (BF16, F32))
    results = []
    for order in ORDERS:
        with emulator.use_order(order, seed=3):
            probabilities, row_stats = mixture.forward(teachers, w.abs(), 2.0, False)
            dots, gradients = mixture.backward(teachers, w.abs(), probabilities, row_stats, 2.0, False, [True] * 3)
            results.append(
                (probabilities, dots, *gradients, *mixture.divergence(student, teachers, w.abs(), 2.0, False, True))
            )
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


# ---------- mutual


def classroom(m, classes, n=5):
    g = torch.Generator().manual_seed(m)
    kinds = (F32, BF16, F16)
    students = [torch.randn(n, classes, generator=g).to(kinds[i % 3]) for i in range(m)]
    row_weights = torch.ones(n)
    row_weights[1] = 0
    pairs = torch.rand(m, m, generator=g)
    pairs[-1], pairs[:, -1] = 0, 0  # the last student has no pair
    return students, pairs, row_weights


@pytest.mark.parametrize(("m", "classes"), [(3, 10), (4, 1000), (4, 9000), (9, 300), (9, 2000)])
def test_mutual_reads_and_writes_everything_once_in_any_order_of_threads(m, classes):
    students, pairs, row_weights = classroom(m, classes)
    whole = mutual.fits_on_chip(m, classes)
    assert whole == (classes <= 1000)
    options = dict(temperature=2.0, scale=4.0, detach_peers=False)
    rows = len(row_weights)
    read = {f"student{i}": (rows - 1) * classes * z.element_size() for i, z in enumerate(students[:-1])}
    read[f"student{m - 1}"] = 0
    results = []
    for order in ORDERS:
        with emulator.use_order(order, seed=2):
            row_loss, row_stats, gradients = mutual.forward(
                students, pairs, row_weights, None, **options, needs=[whole] * m
            )
            assert {name: machine.traffic()[name][0] for name in read} == read
            if not whole:
                gradients = mutual.backward(students, pairs, None, row_stats, *options.values(), [True] * m)
                assert {name: machine.traffic()[name][0] for name in read} == read
            for i, z in enumerate(students):
                assert machine.traffic()[f"gradient{i}"] == (0, z.numel() * z.element_size())
        results.append((row_loss, row_stats, *gradients))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 2, 1), (70, 7, 7), (9, 33, 67), (24, 16, 16)])
def test_attention(shape, form, order):
    n, positions = 3, shape[1:]
    student = torch.randn(n, *shape).contiguous(memory_format=form)
    teacher = torch.randn(n, 5, *positions).half()
    weights = torch.rand(1, n)
    weights[0, 1] = 0
    student[1] = float("nan")
    exact = student.double().requires_grad_()
    right = torch.where(weights[0] == 0, 0.0, hint_reference.attention(exact, teacher.double()))
    per_sample = student[0].numel() * 4
    with machine.use_order(order, seed=3):
        attention.energies([student], weights)
        assert machine.traffic()["map0"] == ((n - 1) * per_sample, 0)
        distance, slopes = attention.forward([student], [teacher], weights)
        assert_close(distance[0] / right.max(), right.detach() / right.max().detach(), 2e-6)
        (gradient,) = attention.backward([student], slopes[:1], weights, [True])
    assert machine.traffic()["map0"] == ((n - 1) * per_sample, 0)
    assert machine.traffic()["gradient0"] == (0, n * per_sample)
    assert machine.traffic()["slopes0"][1] == 0
    wanted = torch.autograd.grad(right.sum(), exact, retain_graph=True)[0] * weights[0].double().view(-1, 1, 1, 1)
    wanted[1] = 0
    assert_close(gradient / wanted.abs().max(), wanted / wanted.abs().max(), 4e-6)
