"""Traps of autograd, compilation, streams and determinism."""

import pytest
import torch
from cases.kd import BF16, F16, F32, WITHOUT_TARGET, check
from torch.utils.checkpoint import checkpoint

N, C, K = 3, 40, 2
every_divergence = pytest.mark.parametrize("divergence", WITHOUT_TARGET)
every_strategy = pytest.mark.parametrize("n_classes", [C, 9000], ids=["few classes", "many classes"])


def draw(backend, n_classes=C, dtype=F32):
    student, *teachers = (torch.randn(N, n_classes, device=backend.device).to(dtype) for _ in range(K + 1))
    return student, teachers, torch.randint(n_classes, (N,), device=backend.device)


def objective(backend, student, teachers, target, **kwargs):
    kwargs = dict(weights="confidence", ce_weight=1.0, temperature=2.0) | kwargs
    return backend.loss(student, teachers, target, **kwargs)


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 3.0, 1e-4])
@every_strategy
@every_divergence
def test_trap_27_scalar_upstream(backend, divergence, n_classes, upstream):
    student, teachers, target = draw(backend, n_classes)
    up = torch.tensor(upstream, device=backend.device)
    check(backend, student, teachers, target, weights="confidence", ce_weight=1.0, upstream=up, divergence=divergence)


@pytest.mark.parametrize("form", ["random", "zero in a row", "expanded", "strided", "column"])
@every_strategy
def test_trap_27_upstream_per_row(backend, n_classes, form):
    student, teachers, target = draw(backend, n_classes)
    random = torch.randn(N, device=backend.device)
    up = {
        "random": random,
        "zero in a row": torch.where(torch.arange(N, device=backend.device) == 1, 0.0, random),
        "expanded": random[:1].expand(N),
        "strided": random.repeat_interleave(3)[::3],
        "column": torch.randn(N, 4, device=backend.device)[:, 2],
    }[form]
    wants = ("student", "teachers") if n_classes == C else ("student",)
    check(
        backend, student, teachers, target, weights="entropy", ce_weight=1.0, upstream=up, reduction="none", wants=wants
    )  # fmt: skip


def test_trap_27_upstream_of_two_dimensions_that_is_not_contiguous(backend):
    student, *teachers = (torch.randn(2, 3, C, device=backend.device) for _ in range(3))
    up = torch.randn(3, 2, device=backend.device).t()
    check(backend, student, teachers, upstream=up, reduction="none", wants=("student", "teachers"))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@every_strategy
def test_trap_28_backward_twice_gives_the_same_gradient_twice(backend, n_classes, dtype):
    student, teachers, target = draw(backend, n_classes, dtype)
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    for upstream in (1.0, 3.0):
        up = torch.tensor(upstream, device=backend.device)
        first, second = (torch.autograd.grad(loss, student, up, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
    last = torch.autograd.grad(loss, student, up)[0]
    assert torch.equal(last, first)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_trap_28_a_gradient_that_the_user_changed_in_place_is_not_handed_out_again(backend, upstream):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    up = torch.tensor(upstream, device=backend.device)
    first = torch.autograd.grad(loss, student, up, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, student, up)[0], kept)


def test_trap_28_a_loss_used_in_two_places(backend):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    once = torch.autograd.grad(objective(backend, student, teachers, target), student)[0]
    loss = objective(backend, student, teachers, target)
    twice = torch.autograd.grad(2 * loss + loss.square() / loss.detach(), student)[0]
    torch.testing.assert_close(twice, 4 * once)


def test_trap_28_gradients_accumulate_in_the_leaf(backend):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    for _ in range(3):
        objective(backend, student, teachers, target).backward()
    once = torch.autograd.grad(objective(backend, student, teachers, target), student)[0]
    torch.testing.assert_close(student.grad, 3 * once)


@every_strategy
@every_divergence
def test_trap_29_inputs_are_never_written(backend, divergence, n_classes):
    student, teachers, target = draw(backend, n_classes)
    w = torch.rand(K, N, device=backend.device)
    rows = torch.rand(N, device=backend.device)
    leaves = [student.requires_grad_(), *(t.requires_grad_() for t in teachers), w.requires_grad_()]
    everything = [*leaves, target, rows]
    before = [x.detach().clone() for x in everything]
    versions = [x._version for x in everything]
    loss = objective(backend, student, teachers, target, weights=w, row_weights=rows, divergence=divergence)
    torch.autograd.grad(loss, leaves, torch.tensor(-2.0, device=backend.device))
    assert all(torch.equal(x, old) for x, old in zip(everything, before, strict=True))
    assert [x._version for x in everything] == versions


def test_trap_29_logits_changed_before_a_backward_that_reads_them_raise(backend):
    """A teacher that wants a gradient is read again; stale logits must not pass in silence."""
    student, teachers, target = draw(backend)
    teachers[0].requires_grad_()
    right = torch.autograd.grad(objective(backend, student, teachers, target), teachers[0])[0]
    loss = objective(backend, student, teachers, target)
    student.add_(1.0)
    student[0] += 1.0
    if backend.name == "reference":  # has copies
        assert torch.equal(torch.autograd.grad(loss, teachers[0])[0], right)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_divergence
@every_strategy
def test_trap_30_only_a_teacher_requires_grad(backend, n_classes, divergence):
    student, teachers, target = draw(backend, n_classes)
    got = check(backend, student, teachers, target, weights="entropy", divergence=divergence, wants=("teachers",))
    assert all((gradient != 0).any() for gradient in got.gradients.values())


def test_trap_30_one_teacher_of_several_requires_grad(backend):
    student, teachers, target = draw(backend)
    teachers[1].requires_grad_()
    loss = objective(backend, student, teachers, target)
    loss.backward()
    assert teachers[1].grad.shape == student.shape
    assert student.grad is None
    assert teachers[0].grad is None


def test_trap_30_nothing_requires_grad(backend):
    student, teachers, target = draw(backend)
    assert not objective(backend, student, teachers, target).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_trap_30_no_grad_gives_the_same_value_without_a_graph(backend, mode):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    right = objective(backend, student, teachers, target)
    with mode():
        loss = objective(backend, student, teachers, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, right.detach(), rtol=1e-6, atol=0)


def test_trap_30_inference_tensors_as_teachers(backend):
    """Teachers are usually run under inference_mode."""
    student, _, target = draw(backend)
    with torch.inference_mode():
        teachers = [torch.randn(N, C, device=backend.device) for _ in range(K)]
    student.requires_grad_()
    objective(backend, student, teachers, target).backward()
    assert student.grad.isfinite().all()


def test_trap_30_frozen_student_and_given_weights_that_learn(backend):
    student, teachers, _ = draw(backend)
    w = torch.rand(K, N, device=backend.device)
    check(backend, student, teachers, weights=w, wants=("weights",))
    check(backend, student, teachers, weights=w[:, 0].clone(), wants=("weights",), divergence="reverse_kl")


def test_trap_31_double_backward_works_or_says_so(backend):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    if backend.name == "reference":
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        gradient.square().sum().backward()
        assert student.grad.isfinite().all()
        return
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="implementation='reference'"):
        gradient.square().sum().backward()


@every_divergence
def test_trap_31_gradcheck_in_float64(backend64, divergence):
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teachers = [torch.randn(4, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    w = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, -100, 3])

    def loss(s, w, *t):
        return backend64.loss(
            s, t, target, weights=w, divergence=divergence, temperature=3.7, ce_weight=0.5, label_smoothing=0.1,
            reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, w, *teachers))


@pytest.mark.parametrize("rule", ["uniform", "confidence", "entropy"])
def test_trap_31_gradcheck_of_the_gradient_written_in_the_forward(backend64, rule):
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teachers = [torch.randn(4, 7, dtype=torch.float64) for _ in range(2)]
    target = torch.tensor([0, 6, 1, 3])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: backend64.loss(
                s, teachers, target, weights=rule, temperature=4.0, ce_weight=0.5, reduction=r
            ),
            (student,),
        )  # fmt: skip


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trap_33_activation_checkpointing(backend, use_reentrant):
    student, teachers, target = draw(backend)
    student.requires_grad_()
    right = torch.autograd.grad(objective(backend, student, teachers, target), student)[0]
    loss = checkpoint(lambda s: objective(backend, 1.0 * s, teachers, target), student, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close(student.grad, right)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_gpu
@pytest.mark.gpu
def test_trap_33_no_host_synchronisation(backend):
    if backend.device != "cuda" or backend.name == "reference":
        pytest.skip("a matter of fused GPU kernels")
    student, teachers, target = draw(backend)
    student.requires_grad_()
    objective(backend, student, teachers, target).backward()  # compiled and loaded
    items = torch.tensor(N, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(backend, student, teachers, target, num_items=items).backward()
        objective(backend, student, teachers, target).backward()
        objective(backend, student, teachers, target, reduction="none").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("times", [1, 3])  # from five teachers on, Triton reads them through a table
@every_strategy
def test_trap_33_cuda_graph_capture(backend, n_classes, times):
    if backend.device != "cuda" or backend.name == "reference":
        pytest.skip("a matter of fused GPU kernels")
    student, teachers, target = draw(backend, n_classes)
    teachers = [t.clone() for t in teachers * times]
    student.requires_grad_()

    def step():
        loss = objective(backend, student, teachers, target)
        return loss, torch.autograd.grad(loss, student)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
        teachers[0].copy_(torch.randn_like(student))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b)


@needs_gpu
@pytest.mark.gpu
def test_trap_33_a_stream_that_is_not_the_default(backend):
    if backend.device != "cuda":
        pytest.skip("a matter of GPU backends")
    student, teachers, target = draw(backend, 9000)
    right = objective(backend, student, teachers, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        moved = student + 0.0
        loss = objective(backend, moved, teachers, target)
    stream.synchronize()
    assert torch.equal(loss, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.gpu
def test_trap_33_another_device_is_current(backend):
    if backend.device != "cuda":
        pytest.skip("a matter of GPU backends")
    student, teachers, target = draw(backend)
    right = objective(backend, student, teachers, target)
    with torch.cuda.device(1):
        assert torch.equal(objective(backend, student, teachers, target), right)


@pytest.mark.parametrize("dtype", [F32, BF16])
@every_strategy
def test_trap_34_the_same_bits_every_time(backend, n_classes, dtype):
    student, teachers, target = draw(backend, n_classes, dtype)
    student.requires_grad_()

    def once():
        loss = objective(backend, student, teachers, target)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    first = once()
    assert all(map(torch.equal, first, once()))
