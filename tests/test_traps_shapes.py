"""Traps of shapes, strides and sizes."""

import pytest
import torch
from cases.kd import BF16, F32, INF, LAYOUTS, WITHOUT_TARGET, check

CLASSES = (1, 2, 3, 7, 31, 32, 33, 1000, 1271, 50257, 65535, 65536, 65537, 131071, 131072, 131073, 151936)


def draw(backend, *shape, n=2, dtype=F32):
    return [torch.randn(*shape, device=backend.device).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("n_classes", CLASSES)
def test_trap_21_class_counts_around_every_limit(backend, n_classes):
    student, teacher = draw(backend, 1, n_classes, dtype=BF16)
    target = torch.tensor([n_classes - 1], device=backend.device)
    check(backend, student, [teacher], target, weights="confidence", ce_weight=1.0, temperature=2.0)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 77, 127, 2049])
def test_trap_22_row_counts_that_fill_no_block(backend, n_rows):
    student, teacher = draw(backend, n_rows, 10)
    check(backend, student, [teacher], reduction="none", upstream=torch.randn(n_rows, device=backend.device))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_trap_23_rows_further_apart_than_two_to_the_31_elements(backend, side, sparse_memory):
    """The offset of a row overflows 32 bits; pages in between are never touched."""
    student, teacher = draw(backend, 3, 40, dtype=BF16)
    far = torch.empty(2**31 + 200, dtype=BF16, device=backend.device).as_strided((3, 40), (2**30 + 7, 1))
    far.copy_(student if side == "student" else teacher)
    pair = (far, teacher) if side == "student" else (student, far)
    check(backend, pair[0], [pair[1]], weights="entropy")


def test_trap_23_classes_further_apart_than_two_to_the_31_elements(backend, sparse_memory):
    student, teacher = draw(backend, 2, 3)
    far = torch.empty(2**31 + 200, dtype=BF16, device=backend.device).as_strided((2, 3), (1, 2**30 + 7)).copy_(student)
    check(backend, far, [teacher])


def test_trap_23_more_than_two_to_the_31_elements(backend, sparse_memory):
    """N x C past 2^31 without a gradient, all rows the same memory, most of them masked."""
    if backend.interpreted or "emulated" in backend.name:
        pytest.skip("16400 programs one by one in Python or in fibers take minutes; the GPU runs this")
    if backend.name == "reference":
        pytest.skip("plain PyTorch upcasts 2^31 elements to 9 GB")
    n_rows, n_classes = 16400, 131072
    student, teacher = (x.expand(n_rows, n_classes) for x in draw(backend, 1, n_classes, dtype=BF16))
    keep = torch.zeros(n_rows, dtype=torch.bool, device=backend.device)
    keep[[0, -1]] = True
    rows = backend.loss(student, [teacher], row_weights=keep, reduction="none")
    alone = backend.loss(student[:1], [teacher[:1]], reduction="none")
    assert torch.equal(rows[[0, -1]], alone.expand(2))
    assert (rows[1:-1] == 0).all()


@pytest.fixture
def sparse_memory():
    """Let torch.empty leave its pages alone."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_trap_24_any_strides(backend, side, layout):
    """Row stride above C, stride 0, class stride above 1, an offset that breaks alignment; one side only."""
    student, teacher = draw(backend, 3, 4, 33, dtype=BF16)
    if side == "student":
        student = LAYOUTS[layout](student, backend.device)
    else:
        teacher = LAYOUTS[layout](teacher, backend.device)
    check(backend, student, [teacher], temperature=2.0, wants=("student", "teachers"))


@pytest.mark.parametrize(("n_classes", "step"), [(128, 64), (100, 36), (100, 64), (40, 8), (10, 3)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd"])
def test_trap_24_rows_that_overlap(backend, n_classes, step, divergence):
    """A sliding window: row n + 1 begins within row n, perhaps where a tile of it ends."""
    (track,) = draw(backend, step * 32 + n_classes, n=1, dtype=BF16)
    (student,) = draw(backend, 33, n_classes, n=1)
    check(backend, student, [track.unfold(0, n_classes, step)], divergence=divergence)


def test_trap_24_every_class_the_same_memory(backend):
    student, teacher = draw(backend, 5, 33)
    check(backend, student, [teacher[:, :1].expand(5, 33)])
    check(backend, student[:, :1].expand(5, 33), [teacher])


def test_trap_24_leading_strides_that_no_two_numbers_describe(backend):
    student, teacher = (x[:, :2, ::2] for x in draw(backend, 3, 4, 6, 9))
    assert student.stride()[:3] == (216, 54, 18)
    check(backend, student, [teacher], wants=("student", "teachers"))


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (2, 3, 2), (1, 2, 1, 3)])
@pytest.mark.parametrize("divergence", WITHOUT_TARGET)
def test_trap_25_any_number_of_leading_dimensions(backend, rows, divergence):
    student, *teachers = draw(backend, *rows, 12, n=3)
    got = check(backend, student, teachers, reduction="none", divergence=divergence)
    assert got.loss.shape == rows
    assert got.stats.divergence.shape == (2, *rows)
    flat = backend.loss(student.reshape(-1, 12), [t.reshape(-1, 12) for t in teachers], divergence=divergence)
    torch.testing.assert_close(backend.loss(student, teachers, divergence=divergence), flat)


def test_trap_25_dense_predictions_are_read_in_place_after_movedim(backend):
    """[B, C, H, W] of a segmentation network."""
    student, teacher = draw(backend, 2, 7, 4, 5)
    check(backend, student.movedim(1, -1), [teacher.movedim(1, -1)])


@pytest.mark.parametrize("n_classes", [9, 11])
def test_trap_26_another_vocabulary_is_refused(backend, n_classes):
    student, good = draw(backend, 4, 10)
    with pytest.raises(ValueError, match=rf"teacher_logits\[1\] must have shape \(4, 10\).*got \(4, {n_classes}\)"):
        backend.loss(student, [good, torch.randn(4, n_classes, device=backend.device)])


def test_trap_26_padding_with_minus_infinity_is_the_documented_way(backend):
    """Padding with zeros would give the padding real probability."""
    student, teacher = draw(backend, 4, 10)
    padded = torch.nn.functional.pad(teacher[:, :8], (0, 2), value=-INF)
    right = backend.loss(student, [padded])
    p, log_q = teacher[:, :8].softmax(-1), student.log_softmax(-1)[:, :8]
    torch.testing.assert_close(right, (p * (p.log() - log_q)).sum(-1).mean())
