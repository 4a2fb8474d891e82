"""torch.compile, torch.export and the registered ops: one graph, no recompilation, fakes that tell the truth."""

import importlib

import pytest
import torch
from cases.kd import BF16, F16, F32
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from mtkd_fast import (
    dispatch,
    ensemble_probabilities,
    hint_loss,
    mixture_divergence,
    multi_teacher_divergence,
    multi_teacher_kd_loss,
    mutual_kd_loss,
)
from mtkd_fast.schemas import mutual
from mtkd_fast.schemas.kd import row_stats_size
from mtkd_fast.schemas.library import FUSED, PASSES

N, C, K = 6, 20, 3


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(n=N, dtype=F32):
    student, *teachers = (torch.randn(n, C).to(dtype) for _ in range(K + 1))
    return student.requires_grad_(), teachers, torch.randint(C, (n,))


def objective(implementation, **kwargs):
    def loss(student, teachers, target):
        return multi_teacher_kd_loss(
            student, teachers, target, weights="confidence", temperature=4.0, ce_weight=1.0,
            implementation=implementation, **kwargs,
        )  # fmt: skip

    return loss


def assert_same_as_eager(compiled, eager, student, *rest):
    losses = [f(student, *rest) for f in (compiled, eager)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(2 * loss.sum(), student)[0] for loss in losses))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_trap_32_one_graph(implementation, reduction):
    eager = objective(implementation, reduction=reduction)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    assert_same_as_eager(compiled, eager, *draw())
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_op_is_one_node_among_others(implementation, dtype):
    """A layer before and a penalty after, as in a training step."""
    layer = torch.nn.Linear(5, C).to(dtype)
    features = torch.randn(N, 5).to(dtype)
    _, teachers, target = draw(dtype=dtype)
    loss_of = objective(implementation)

    def step(features):
        student = layer(features)
        return loss_of(student, teachers, target) + 0.1 * student.float().square().mean()

    right = torch.autograd.grad(step(features), layer.weight)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(features), layer.weight)[0], right)


def test_trap_32_another_batch_size_needs_no_other_graph(implementation):
    eager = objective(implementation)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    assert_same_as_eager(compiled, eager, *draw(4))
    first = counter.frame_count
    for n in (9, 17):
        assert_same_as_eager(compiled, eager, *draw(n))
    assert counter.frame_count == first


def test_a_temperature_is_not_baked_in(implementation):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(student, teachers, temperature):
        return multi_teacher_kd_loss(student, teachers, temperature=temperature, implementation=implementation)

    student, teachers, _ = draw()
    for temperature in (1.5, 2.5, 3.5):
        right = multi_teacher_kd_loss(student, teachers, temperature=temperature, implementation=implementation)
        torch.testing.assert_close(loss(student, teachers, temperature), right)


def test_given_weights_and_teachers_that_learn(implementation):
    student, teachers, _ = draw()
    w = torch.rand(K, N, requires_grad=True)
    leaves = [student, w, *(t.requires_grad_() for t in teachers)]

    def loss(student, w, *teachers):
        return multi_teacher_kd_loss(
            student, teachers, weights=w, divergence="reverse_kl", implementation=implementation
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, right = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pixels_in_one_graph(implementation, dtype, memory_format):
    """With the gradient written in the forward, and (fp16) computed in the backward."""
    eager = objective(implementation, class_dim=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for b in (2, 3, 5):
        student, *teachers = (torch.randn(b, C, 4, 7).to(dtype, memory_format=memory_format) for _ in range(K + 1))
        assert_same_as_eager(compiled, eager, student.requires_grad_(), teachers, torch.randint(C, (b, 4, 7)))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("divergence", ["jsd", "tvd", "skew_reverse_kl", "dkd"])
def test_divergences_beyond_the_kls_in_one_graph(implementation, divergence):
    beta = None if divergence == "tvd" else 0.25
    eager = objective(implementation, divergence=divergence, beta=beta)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(compiled, eager, *draw())


def test_divergence_in_one_graph(implementation):
    student, teachers, _ = draw()

    def mean(student, teachers):
        return multi_teacher_divergence(student, teachers, temperature=2.0, implementation=implementation).mean()

    assert_same_as_eager(torch.compile(mean, fullgraph=True, backend="aot_eager"), mean, student, teachers)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine", "attention"])
def test_hints_in_one_graph(implementation, distance):
    student, teacher = torch.randn(N, 4, 3, requires_grad=True), torch.randn(N, 4, 3)

    def loss(student, teacher, w):
        return hint_loss([student], [teacher], weights=w, distance=distance, implementation=implementation)

    assert_same_as_eager(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, student, teacher, torch.rand(1, N)
    )


def test_mixtures_in_one_graph(implementation):
    student, teachers, _ = draw()
    w = torch.rand(K, N, requires_grad=True)
    leaves = [student, w]

    def loss(student, w):
        options = dict(weights=w, temperature=2.0, implementation=implementation)
        return (
            mixture_divergence(student, teachers, **options).mean()
            + (student * ensemble_probabilities(teachers, **options)).sum()
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_mutual_learning_in_one_graph(implementation, dtype):
    """With gradients written in the forward, and (fp16) computed in the backward."""
    students = [torch.randn(N, C).to(dtype).requires_grad_() for _ in range(3)]

    def loss(*students):
        return mutual_kd_loss(students, temperature=2.0, detach_peers=False, implementation=implementation)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (4, 9, 17):
        students = [torch.randn(rows, C).to(dtype).requires_grad_() for _ in range(3)]
        found, right = (torch.autograd.grad(2 * f(*students), students) for f in (compiled, loss))
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_without_a_gradient(implementation):
    student, teachers, target = draw()
    eager = objective(implementation)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teachers, target), eager(student, teachers, target))


@pytest.mark.skipif(dispatch._C is None, reason="mtkd_fast._C is not built")
def test_trap_32_inductor():
    """The real compiler, once; python scalars reach the op as float64 under it."""
    eager = objective("cpp")
    assert_same_as_eager(torch.compile(eager, fullgraph=True), eager, *draw())


def test_trap_32_export(implementation):
    student, teachers, target = draw()

    class Loss(torch.nn.Module):
        def forward(self, student, teachers, target):
            return objective(implementation)(student, teachers, target)

    with torch.no_grad():
        exported = torch.export.export(Loss(), (student.detach(), teachers, target))
        right = Loss()(student, teachers, target)
        torch.testing.assert_close(exported.module()(student.detach(), teachers, target), right)


# The registered ops.


def values(requires_grad: bool, divergence: str) -> dict:
    """One value for every argument name of the schemas."""
    student, teachers, target = draw()
    features = [torch.randn(N, 4, requires_grad=requires_grad), torch.randn(N, 3, 2, requires_grad=requires_grad)]
    options = dict(
        student=student.detach().requires_grad_(requires_grad), teachers=teachers, target=target,
        row_weights=torch.rand(N), num_items=torch.tensor(5.0), weights=torch.rand(K, N), upstream=torch.randn(N),
        rule="given", divergence=divergence, beta=0.5, temperature=2.0, kd_scale=4.0, ce_weight=0.5,
        label_smoothing=0.1, ignore_index=-100, reduction="mean", needs=[True, False, True, True],
        skip_zero_weights=False, write_gradient=True, keep_stats=True, stats=True,
        gradient=torch.randn(N, C), scale=torch.rand(N), row_stats=torch.rand(row_stats_size(K, divergence), N),
    )  # fmt: skip
    hints = dict(
        student=features, teacher=[f.detach() + 1 for f in features], weights=torch.rand(2, N), reduction="mean",
        needs=[True, True], distance="cosine", kept=torch.rand(3, 2, N),
    )  # fmt: skip
    student_logits = student
    student, teacher = torch.randn(N, 4, requires_grad=requires_grad), torch.randn(N, 3)
    relations = dict(
        student=student, teacher=teacher, row_mask=torch.arange(N) % 3 != 1, relation="angle", write_gradient=True,
        points=[student, torch.randn(N, 2)], angle_weight=0.5, needs=[True, False],
    )  # fmt: skip
    students = [z.detach().requires_grad_(requires_grad) for z in (student_logits, *teachers)]
    mutuals = dict(
        students=students, pair_weights=torch.rand(4, 4), row_weights=torch.rand(N), num_items=torch.tensor(5.0),
        temperature=2.0, scale=4.0, detach_peers=False, reduction="none" if requires_grad else "mean", keep_stats=True,
        needs=[True, False, True, True], upstream=torch.randn(N), row_stats=torch.rand(mutual.row_stats_size(4), N),
    )  # fmt: skip
    mixtures = options | dict(upstream=torch.randn(N, C), row_stats=torch.rand(2 * K, N) + 1, needs=[True, False, True])
    student, teacher = [torch.randn(N, 4, 3), torch.randn(N, 2, 2, 2)], [torch.randn(N, 5, 3), torch.randn(N, 2, 2, 2)]
    attention = dict(
        student=student, teacher=teacher, features=student, weights=torch.rand(2, N), needs=[True, False],
        slopes=[torch.rand(N, 3), torch.rand(N, 4)],
    )  # fmt: skip
    return {
        "kd": options, "hint": hints, "attention": attention, "relation": relations, "mixture": mixtures,
        "mutual": mutuals,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "divergence"),
    [(name, "forward_kl") for name in (*FUSED, *PASSES)]
    + [(name, "jsd") for name in ("kd", "kd_divergence", "kd_forward", "kd_backward", "kd_triton_forward")]
    + [(name, "dkd") for name in ("kd", "kd_backward", "kd_triton_backward")],
)
def test_trap_32_opcheck(name, divergence):
    """Schema, fake, autograd registration and AOT dispatch, by PyTorch's own check."""
    check_op(name, values(name in FUSED, divergence))


@pytest.mark.parametrize("name", [name for name in PASSES if name.startswith("kd_")])
def test_opcheck_of_pixels(name):
    """Fakes have the strides of the gradients."""
    given = values(False, "forward_kl")
    pixels = {key: torch.randn(2, C, 3).movedim(1, -1) for key in ("student", "gradient")}
    teachers = [
        torch.randn(2, C, 3).movedim(1, -1),
        torch.randn(2, C + 1, 3)[:, :C].movedim(1, -1),
        torch.randn(2, 3, C),
    ]
    given["kd"] |= pixels | dict(teachers=teachers, target=torch.randint(C, (2, 3)))
    check_op(name, given)


def check_op(name, given):
    family = name.split("_")[0]
    if "triton" in name:
        if "cpu" not in dispatch.implementations()["triton"].devices:
            pytest.skip("Triton does not run on this CPU")
        importlib.import_module(f"mtkd_fast.triton_ops.{family}")
    op = getattr(torch.ops.mtkd_fast, name).default
    given = given[family]
    if name == "kd":
        given["reduction"] = "none"
    arguments = tuple(given[argument.name] for argument in op._schema.arguments)
    opcheck(op, arguments)
