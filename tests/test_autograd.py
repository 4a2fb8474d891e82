"""Autograd as training loops use it: scalers, autocast, hooks, optimizers, data parallel."""

import pytest
import torch
import torch.nn.functional as F
from cases.kd import BF16, F16, F32, F64, WITHOUT_TARGET, check
from ddp_rank import MODELS, train_one_rank

from mtkd_fast import hint_loss, multi_teacher_divergence, multi_teacher_kd_loss
from mtkd_fast.reference.divergences import DIVERGENCES

N, C, K = 8, 50, 3


@pytest.fixture
def logits(backend):
    student, *teachers = (torch.randn(N, C, device=backend.device) for _ in range(K + 1))
    return student, teachers, torch.randint(C, (N,), device=backend.device)


def objective(backend, student, teachers, target, **kwargs):
    return backend.loss(student, teachers, target, weights="confidence", ce_weight=1.0, temperature=4.0, **kwargs)


def test_fp16_under_a_gradient_scaler_keeps_small_gradients(backend):
    """Unscaled and divided by the rows of a whole epoch, most of them are below what float16 can hold."""
    rows, classes, scale = 8, 2000, 2.0**16
    student, teacher = (torch.randn(rows, classes, device=backend.device).half() for _ in range(2))
    student.requires_grad_()
    loss = backend.loss(student, [teacher], num_items=float(2**14))
    (gradient,) = torch.autograd.grad(scale * loss, student)
    exact = (student.detach().double().softmax(-1) - teacher.double().softmax(-1)) * scale / 2**14
    unscaled = (exact / scale).half()
    assert (unscaled == 0).double().mean() > 0.5, "without a scaler most would be lost"
    assert (gradient == 0).double().mean() < 0.01
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-9, atol=2.0**-23)


def test_the_gradient_scaler_of_pytorch(backend, logits):
    _, teachers, target = logits
    layer = torch.nn.Linear(16, C, device=backend.device)
    features = torch.randn(N, 16, device=backend.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    before = layer.weight.detach().clone()
    with torch.autocast(backend.device, dtype=F16 if backend.device == "cuda" else BF16):
        student = layer(features)
        loss = objective(backend, student, [t.to(student.dtype) for t in teachers], target)
    assert loss.dtype == F32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.weight.grad.isfinite().all()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_leaves_float32_logits_in_float32(backend, logits, dtype):
    student, teachers, target = logits
    student.requires_grad_()
    right = objective(backend, student, teachers, target)
    with torch.autocast(backend.device, dtype=dtype):
        loss = objective(backend, student, teachers, target)
    assert torch.equal(loss, right)
    assert torch.autograd.grad(loss, student)[0].dtype == F32


def test_a_student_in_the_middle_of_a_graph(backend, logits):
    """Its gradient goes on into a layer, and a second use of the same logits adds to it."""
    _, teachers, target = logits
    layer = torch.nn.Linear(16, C, device=backend.device)
    features = torch.randn(N, 16, device=backend.device)

    def train(loss_of):
        student = layer(features)
        return torch.autograd.grad(loss_of(student) + 0.1 * student.square().mean(), layer.weight)[0]

    got = train(lambda s: objective(backend, s, teachers, target))
    right = train(
        lambda s: multi_teacher_kd_loss(
            s, teachers, target, weights="confidence", ce_weight=1.0, temperature=4.0, implementation="reference"
        )
    )
    torch.testing.assert_close(got, right)


def test_one_tensor_as_student_and_teacher(backend, logits):
    """Self-distillation: the same leaf on both sides gets the sum of both gradients, which is 0 at equality."""
    student, *_ = logits
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(backend.loss(student, [student]), student)
    assert gradient.abs().max() < 1e-6


def test_hooks_see_the_gradient_once(backend, logits):
    student, teachers, target = logits
    student.requires_grad_()
    seen = []
    student.register_hook(seen.append)
    objective(backend, student, teachers, target).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], student.grad)


def test_saved_tensors_may_be_packed_elsewhere(backend, logits):
    """Offloading hooks hand back copies."""
    student, teachers, target = logits
    student.requires_grad_()
    right = torch.autograd.grad(3 * objective(backend, student, teachers, target), student)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        loss = objective(backend, student, teachers, target)
    got = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
    assert torch.equal(got, right)
    assert torch.equal(torch.autograd.grad(3 * loss, student)[0], right)


def test_the_graph_is_freed_after_backward(backend, logits):
    student, teachers, target = logits
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time|already been freed"):
        loss.backward()


def test_retained_then_released(backend, logits):
    """The last backward may finish the stored gradient in place; the ones before it may not."""
    student, teachers, target = logits
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    found = [
        torch.autograd.grad(loss, student, torch.tensor(u, device=backend.device), retain_graph=kept)[0]
        for u, kept in ((1.0, True), (2.0, True), (1.0, True), (2.0, False))
    ]
    torch.testing.assert_close(found[1], 2 * found[0], rtol=0, atol=0)
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[3], found[1])


def test_backward_over_several_losses_at_once(backend, logits):
    student, teachers, target = logits
    student.requires_grad_()
    losses = [objective(backend, student, teachers, target), backend.loss(student, teachers, divergence="reverse_kl")]
    apart = sum(torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses)
    torch.autograd.backward(losses)
    torch.testing.assert_close(student.grad, apart)


def test_no_grad_inside_a_graph_leaves_it_alone(backend, logits):
    student, teachers, target = logits
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    with torch.no_grad():
        objective(backend, student, teachers, target, reduction="none")
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_double_backward_through_the_reference_is_the_second_derivative(divergence):
    student = torch.randn(3, 5, dtype=F64, requires_grad=True)
    teachers, target = [torch.randn(3, 5, dtype=F64) for _ in range(2)], torch.randint(5, (3,))
    assert torch.autograd.gradgradcheck(
        lambda s: multi_teacher_kd_loss(s, teachers, target, divergence=divergence, implementation="reference"),
        (student,),
    )


def test_double_backward_elsewhere_names_the_way_out(backend, logits):
    if backend.name == "reference":
        pytest.skip("the reference has second derivatives")
    student, teachers, target = logits
    student.requires_grad_()
    for loss in (objective(backend, student, teachers, target), backend.divergence(student, teachers).sum()):
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="implementation='reference'"):
            gradient.sum().backward()


def test_second_derivatives_are_not_silently_zero(backend, logits):
    """A gradient penalty whose gradient vanished would train on without a word."""
    if backend.name == "reference":
        pytest.skip("the reference has second derivatives")
    student, teachers, target = logits
    student.requires_grad_()
    loss = objective(backend, student, teachers, target)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert gradient.requires_grad, "a constant here would be the silent zero"


def test_gradient_of_the_gradient_of_weights(backend, logits):
    """The gradient to weights is D, and D has a gradient of its own through the reference only."""
    student, teachers, _ = logits
    w = torch.rand(K, device=backend.device, requires_grad=True)
    loss = backend.loss(student, teachers, weights=w)
    (gradient,) = torch.autograd.grad(loss, w)
    d = backend.divergence(student, teachers).mean(1)
    torch.testing.assert_close(gradient, d)


def test_functorch_transforms_of_the_reference():
    """torch.func works on plain PyTorch; for the fused implementations it is not promised."""
    student, teachers = torch.randn(N, C), [torch.randn(N, C) for _ in range(2)]
    target = torch.randint(C, (N,))

    def loss(s):
        return multi_teacher_kd_loss(s, teachers, ce_weight=0.0, implementation="reference")

    leaf = student.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(student), torch.autograd.grad(loss(leaf), leaf)[0])
    assert target.shape == (N,)


def test_training_reaches_the_same_student_in_float64(implementation):
    """The fused and the reference loss, ten steps of each from the same start."""
    if implementation == "triton":
        pytest.skip("float32 only")
    features, target = torch.randn(32, 6, dtype=F64), torch.randint(4, (32,))
    teachers = [torch.randn(32, 4, dtype=F64) for _ in range(K)]

    def train(which):
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 4, dtype=F64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            multi_teacher_kd_loss(
                layer(features), teachers, target, weights="confidence", temperature=4.0, ce_weight=1.0,
                implementation=which,
            ).backward()  # fmt: skip
            optimizer.step()
        return layer.weight

    torch.testing.assert_close(train(implementation), train("reference"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_distributed_data_parallel_on_two_processes(name, implementation, tmp_path):
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(train_one_rank, (f"file://{tmp_path}/store", name, implementation, found), nprocs=2)
        found = dict(found)
    assert found[0] == found[1]
    for parameter, gradient in found["whole"].items():
        ours, right = torch.tensor(found[0][parameter]), torch.tensor(gradient)
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_hints_and_divergences_join_one_backward(backend, logits):
    """CA-MKD's whole objective: logits and features in one graph."""
    student, teachers, target = logits
    student.requires_grad_()
    feature, w = torch.randn(N, 12, device=backend.device, requires_grad=True), torch.rand(1, N, device=backend.device)
    hint = hint_loss([feature], [torch.zeros(N, 12, device=backend.device)], weights=w)
    (objective(backend, student, teachers, target) + hint).backward()
    torch.testing.assert_close(feature.grad, 2 * feature.detach() * w[0][:, None] / (12 * N))
    check(backend, student.detach(), teachers, target, weights="confidence", ce_weight=1.0, temperature=4.0)


def test_kl_div_of_pytorch_is_matched_in_gradient(backend, logits):
    student, (teacher, *_), _ = logits
    student.requires_grad_()
    (got,) = torch.autograd.grad(backend.loss(student, [teacher], temperature=2.0), student)
    right = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(got, torch.autograd.grad(right, student)[0])


def test_divergence_is_differentiable_under_gradcheck_in_float64(backend64):
    leaves = [torch.randn(3, 5, dtype=F64, requires_grad=True) for _ in range(3)]
    for divergence in WITHOUT_TARGET:
        assert torch.autograd.gradcheck(
            lambda s, *t, d=divergence: backend64.divergence(s, t, divergence=d, temperature=2.0), leaves
        )
    assert multi_teacher_divergence(leaves[0], leaves[1:]).dtype == F64


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_forward_mode_is_refused_where_it_is_not_computed(name):
    """A silent zero tangent would be a wrong derivative."""
    student, teachers = torch.randn(N, C), [torch.randn(N, C)]
    with pytest.raises(ValueError, match="reference"):
        torch.func.jvp(
            lambda s: multi_teacher_kd_loss(s, teachers, implementation=name), (student,), (torch.randn(N, C),)
        )


def test_forward_mode_by_default_is_that_of_the_reference():
    student, direction, teachers = torch.randn(N, C), torch.randn(N, C), [torch.randn(N, C)]
    _, tangent = torch.func.jvp(lambda s: multi_teacher_kd_loss(s, teachers), (student,), (direction,))
    leaf = student.clone().requires_grad_()
    multi_teacher_kd_loss(leaf, teachers).backward()
    torch.testing.assert_close(tangent, (leaf.grad * direction).sum(), rtol=1e-4, atol=1e-6)
