"""Peak extra memory: one gradient and O(N K) numbers, whatever K, strides and dtypes; nothing N x C without a gradient.

The C++ op is measured by the resident memory of the process, which also sees what PyTorch did not allocate. The others
are measured by every tensor that an op returns, since an interpreter's and an emulator's own memory is no matter here.
"""

import ctypes
import gc
import itertools
from pathlib import Path

import pytest
import torch
from cases.kd import BF16, F16, F32, LAYOUTS
from cases.threads import using_threads
from torch.utils._python_dispatch import TorchDispatchMode

from mtkd_fast import hint_loss, multi_teacher_divergence, multi_teacher_kd_loss, rkd_angle_loss, rkd_distance_loss

CLEAR_REFS = Path("/proc/self/clear_refs")
MIB = 2**20
NOISE = 6 * MIB  # threads, the allocator, code touched for the first time
N, C = 512, 32768  # 64 MiB in float32: above what malloc keeps for itself


def resident(peak: bool = False) -> int:
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_extra(run) -> int:
    """How far the process grows while ``run`` runs, in bytes; its result is kept to the end."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not be given back, or used, in the middle
    before = resident()
    CLEAR_REFS.write_text("5")  # the peak starts anew
    kept = run()
    peak = resident(peak=True)
    del kept
    return max(0, peak - before)


@pytest.fixture(autouse=True)
def measurable():
    if not CLEAR_REFS.exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Threads, code and the allocator's arenas are there before anything is measured."""
    for dtype in (F32, BF16, F16):
        student = torch.randn(64, 1000).to(dtype).requires_grad_()
        multi_teacher_kd_loss(student, [student.detach()] * 2, torch.zeros(64, dtype=torch.long), weights="confidence")


def gradient_bytes(*logits) -> int:
    return sum(x.numel() * x.element_size() for x in logits)


def loss_and_gradient(student, teachers, scale=1.0, **kwargs):
    student = student.detach().requires_grad_()
    target = torch.zeros(student.shape[:-1], dtype=torch.long)

    def run():
        loss = multi_teacher_kd_loss(student, teachers, target, implementation="cpp", **kwargs)
        return torch.autograd.grad(scale * loss, student)

    return run


def test_the_measure_sees_a_tensor_and_what_pytorch_did_not_allocate():
    assert 63 * MIB < peak_extra(lambda: torch.ones(N, C)) < 64 * MIB + NOISE
    assert 63 * MIB < peak_extra(lambda: bytearray(64 * MIB)) < 64 * MIB + NOISE
    assert peak_extra(lambda: torch.ones(N, C).sum()) > 63 * MIB, "also what is gone at the end"


def test_cpp_keeps_no_rows_of_its_own_where_many_threads_share_few():
    """What a thread keeps in cache (3.7 MB for five teachers of 131072 classes) is not to outgrow the gradient."""
    with using_threads(4):
        student, *teachers = (torch.randn(16, 131072).bfloat16() for _ in range(6))
        extra = peak_extra(loss_and_gradient(student, teachers, weights="confidence"))
    assert extra <= 9 / 8 * gradient_bytes(student) + NOISE


@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cpp_needs_one_gradient(weights, scale):
    student, *teachers = (torch.randn(N, C) for _ in range(3))
    run = loss_and_gradient(student, teachers, scale, weights=weights, ce_weight=1.0, temperature=2.0)
    assert peak_extra(run) < gradient_bytes(student) + NOISE


def test_cpp_hands_its_gradient_to_the_leaf_without_a_copy():
    student, teacher = torch.randn(N, C, requires_grad=True), torch.randn(N, C)

    def run():
        (2 * multi_teacher_kd_loss(student, [teacher], implementation="cpp")).backward()

    assert peak_extra(run) < gradient_bytes(student) + NOISE


def test_cpp_needs_one_gradient_for_many_teachers():
    student, teacher = torch.randn(N, C), torch.randn(N, C)
    run = loss_and_gradient(student, [teacher] * 16, weights="confidence")
    assert peak_extra(run) < gradient_bytes(student) + NOISE


@pytest.mark.parametrize("layout", ["row stride", "misaligned", "transposed", "repeated", "all but last"])
def test_cpp_copies_no_strided_logits(layout):
    place = LAYOUTS[layout]
    student, *teachers = (place(torch.randn(8, N // 8, C), "cpu") for _ in range(3))
    assert peak_extra(loss_and_gradient(student, teachers)) < student.numel() * 4 + NOISE


@pytest.mark.parametrize("dtypes", [(BF16, F32, F16), (F16, F32, BF16), (F32, BF16, BF16)])
def test_cpp_copies_no_logits_of_another_dtype(dtypes):
    student, *teachers = (torch.randn(2 * N, C).to(dtype) for dtype in dtypes)
    assert peak_extra(loss_and_gradient(student, teachers, 2.0)) < gradient_bytes(student) + NOISE


def test_cpp_recomputes_rather_than_saves_for_teacher_gradients():
    student, *teachers = (torch.randn(N, C, requires_grad=True) for _ in range(3))

    def run():
        loss = multi_teacher_kd_loss(student, teachers, implementation="cpp")
        return torch.autograd.grad(loss, [student, *teachers])

    assert peak_extra(run) < gradient_bytes(student, *teachers) + NOISE


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_cpp_needs_one_gradient_and_two_numbers_a_position_for_attention(form):
    student, teacher = (torch.randn(64, 256, 32, 32).contiguous(memory_format=form) for _ in range(2))
    student.requires_grad_()

    def run():
        return torch.autograd.grad(hint_loss([student], [teacher], distance="attention", implementation="cpp"), student)

    assert peak_extra(run) < gradient_bytes(student) + 2 * 64 * 32 * 32 * 4 + NOISE


def test_cpp_keeps_no_pixels_of_its_own_where_many_threads_share_few():
    """A register of pixels of 10 tensors of 65536 classes is 40 MB a thread."""
    with using_threads(4):
        student, *teachers = (torch.randn(1, 65536, 8, 4).movedim(1, -1) for _ in range(9))
        extra = peak_extra(loss_and_gradient(student, teachers, weights="confidence"))
    assert extra <= 9 / 8 * gradient_bytes(student) + NOISE


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
@pytest.mark.parametrize("in_planes", [False, True])
def test_cpp_reads_no_teacher_of_weight_zero(tmp_path, divergence, in_planes):
    """Pages of a file that are read are the process's."""
    file = torch.from_file(str(tmp_path / "teacher"), shared=True, size=N * C)
    tensors = torch.randn(N * C), torch.randn(N * C), file
    student, teacher, unread = (x.reshape(1024, -1).t() if in_planes else x.reshape(N, C) for x in tensors)
    run = loss_and_gradient(student, [teacher, unread], weights=torch.tensor([1.0, 0.0]), divergence=divergence)
    assert peak_extra(run) < gradient_bytes(student) + NOISE


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cpp_allocates_nothing_of_that_size_without_a_gradient(dtype, reduction):
    student, *teachers = (torch.randn(2 * N, C).to(dtype) for _ in range(3))
    target = torch.zeros(2 * N, dtype=torch.long)

    def run():
        with torch.no_grad():
            return multi_teacher_kd_loss(
                student, teachers, target, weights="confidence", ce_weight=1.0, reduction=reduction, return_stats=True,
                implementation="cpp",
            )  # fmt: skip

    assert peak_extra(run) < NOISE


def test_cpp_divergence_allocates_nothing_of_that_size_without_a_gradient():
    student, *teachers = (torch.randn(N, C) for _ in range(3))
    with torch.no_grad():
        assert peak_extra(lambda: multi_teacher_divergence(student, teachers, implementation="cpp")) < NOISE


def test_cpp_frozen_student_with_weights_that_learn_needs_no_gradient_of_logits():
    student, *teachers = (torch.randn(N, C) for _ in range(3))
    w = torch.rand(2, N, requires_grad=True)

    def run():
        return torch.autograd.grad(multi_teacher_kd_loss(student, teachers, weights=w, implementation="cpp"), w)

    assert peak_extra(run) < NOISE


RELATIONS = pytest.mark.parametrize("relation", [rkd_angle_loss, rkd_distance_loss])


@RELATIONS
@pytest.mark.parametrize("batch", [1024, 2048])
def test_cpp_relations_need_some_matrices_of_pairs(relation, batch):
    """Fewer than 8 in float64: where the published form has B of them, and B×B differences."""
    student, teacher = torch.randn(batch, 32, requires_grad=True), torch.randn(batch, 32)
    relation(student[:16], teacher[:16], implementation="cpp").backward()
    run = lambda: torch.autograd.grad(relation(student, teacher, implementation="cpp"), student)  # noqa: E731
    assert peak_extra(run) < 64 * batch**2 + NOISE


@RELATIONS
def test_cpp_relations_of_wide_points_keep_no_points(relation):
    """Tensors alone: a page that the process keeps, or the scratch of a matrix product, is as large as these."""
    student, teacher = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512)
    run = lambda: torch.autograd.grad(relation(student, teacher, implementation="cpp"), student)  # noqa: E731
    run()
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as seen:
        run()
    changes = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    assert 16 * 256**2 < max(live) < 64 * 256**2


# By the tensors that ops return.


class LargeTensors(TorchDispatchMode):
    """Every new storage of at least ``threshold`` bytes."""

    def __init__(self, threshold: int, keep: bool = True):
        super().__init__()
        self.threshold, self.found, self.seen, self.kept = threshold, [], set(), [] if keep else None

    def ignore(self, *tensors):
        self.seen |= {x.untyped_storage().data_ptr() for x in tensors}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.threshold:
                if x.untyped_storage().data_ptr() not in self.seen:
                    self.found.append(f"{func}: {tuple(x.shape)} {x.dtype}")
                self.seen.add(x.untyped_storage().data_ptr())
                if self.kept is not None:
                    self.kept.append(x)  # so that no address is used twice
        return result


@pytest.mark.parametrize("n_classes", [1000, 9000])
@pytest.mark.parametrize(
    ("layout", "dtypes"),
    [
        ("contiguous", (F32, F32)),
        ("row stride", (BF16, F32)),
        ("transposed", (F32, BF16)),
        ("all but last", (F16, BF16)),
        ("repeated", (BF16, BF16)),
    ],
)
def test_one_tensor_of_the_size_of_the_logits(backend, layout, dtypes, n_classes):
    if backend.name == "reference":
        pytest.skip("plain PyTorch makes many")
    shape = (2, 3, n_classes)
    place = LAYOUTS[layout]
    student, *teachers = (
        place(torch.randn(shape).to(dtype), backend.device) for dtype in (dtypes[0], dtypes[1], dtypes[1])
    )
    student.requires_grad_()
    target = torch.zeros(shape[:-1], dtype=torch.long, device=backend.device)
    with LargeTensors(6 * n_classes * 2).ignore(student, *teachers) as large:
        loss = backend.loss(student, teachers, target, weights="confidence", ce_weight=1.0)
        torch.autograd.grad(loss, student)
    assert len(large.found) <= 1, large.found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(100, F32), (100, F16), (1000, F32)], ids=["in the forward", "fp16", "many classes"]
)
def test_a_leaf_of_pixels_takes_its_gradient_as_it_was_written(fused, memory_format, n_classes, dtype):
    shape = (2, n_classes, 40, 6)
    student, *teachers = (
        torch.randn(shape, device=fused.device).to(dtype, memory_format=memory_format) for _ in range(3)
    )
    student.requires_grad_()
    with LargeTensors(2 * student.numel(), keep=False).ignore(
        student, *teachers
    ) as large:  # a leaf copies what is held
        fused.loss(student, teachers, temperature=2.0, class_dim=1).backward()
    assert len(large.found) <= 1, large.found
    assert student.grad.stride() == student.stride()


@pytest.mark.parametrize("layout", ["contiguous", "all but last"])
@pytest.mark.parametrize("n_classes", [1000, 9000])
def test_no_tensor_of_the_size_of_the_logits_without_a_gradient(backend, layout, n_classes):
    if backend.name == "reference":
        pytest.skip("plain PyTorch makes many")
    place = LAYOUTS[layout]
    student, *teachers = (place(torch.randn(2, 3, n_classes), backend.device) for _ in range(3))
    student.requires_grad_()
    with torch.no_grad(), LargeTensors(6 * n_classes * 2).ignore(student, *teachers) as large:
        backend.loss(student, teachers, weights="entropy")
        backend.divergence(student, teachers)
    assert not large.found


@pytest.mark.parametrize("n_classes", [1000, 9000])
def test_a_mixture_divergence_makes_no_mixture(backend, n_classes):
    if backend.name == "reference":
        pytest.skip("plain PyTorch makes many")
    student, *teachers = (torch.randn(4, n_classes, device=backend.device) for _ in range(4))
    student.requires_grad_()
    w = torch.rand(3, 4, device=backend.device).requires_grad_()
    with LargeTensors(4 * n_classes * 4).ignore(student, *teachers) as large:
        torch.autograd.grad(backend.mixture_divergence(student, teachers, weights=w).sum(), (student, w))
    assert len(large.found) <= 1, large.found


def test_the_graph_holds_no_logits_when_the_gradient_is_written_in_the_forward(backend):
    """So that the teachers' logits can be freed before backward; strategy B has to keep them."""
    if backend.name == "reference" or backend.device == "cuda":
        pytest.skip("a matter of the strategy")
    student, *teachers = (torch.randn(4, 100, device=backend.device) for _ in range(3))
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        backend.loss(student, teachers, weights="entropy")
    held = {x.untyped_storage().data_ptr() for x in saved if x.numel()}
    assert not held & {x.untyped_storage().data_ptr() for x in (student, *teachers)}
    assert sum(x.numel() == student.numel() for x in saved) == 1


@RELATIONS
def test_relations_make_no_tensor_larger_than_the_planes(relation, backend):
    """16 B² bytes on the CPU, 12 B² on a GPU, or the points in float64; nothing of B²·D or B³."""
    if backend.name == "reference":
        pytest.skip("plain PyTorch makes many")
    batch, width = 32, 100
    student, teacher = (torch.randn(batch, width, device=backend.device) for _ in range(2))
    with LargeTensors(17 * batch**2 + 8 * batch * width).ignore(student, teacher) as large:
        loss = relation(student.requires_grad_(), teacher, implementation=backend.implementation)
        torch.autograd.grad(loss, student)
    assert not large.found
