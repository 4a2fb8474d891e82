"""Relations between samples: RKD's distance and angle losses against the published forms in float64."""

import pytest
import torch

from mtkd_fast import dispatch, rkd_angle_loss, rkd_distance_loss
from mtkd_fast.reference import relation as reference

LOSSES = {"distance": rkd_distance_loss, "angle": rkd_angle_loss}
each = pytest.mark.parametrize("name", LOSSES)
needs_cpp = pytest.mark.skipif("cpu" not in dispatch.implementations()["cpp"].devices, reason="no C++ for the CPU")
pytestmark = needs_cpp


def oracle(name, student, teacher):
    """Value and gradient in float64."""
    s = student.detach().double().requires_grad_()
    loss = reference.relation(s, teacher.double(), name)
    return loss.detach(), torch.autograd.grad(loss, s)[0]


def check(name, student, teacher, rtol=1e-9, atol=1e-12):
    student = student.detach().requires_grad_()
    loss = LOSSES[name](student, teacher, implementation="cpp")
    (gradient,) = torch.autograd.grad(loss, student)
    right, wanted = oracle(name, student, teacher)
    torch.testing.assert_close(loss.double(), right, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=atol + rtol * wanted.abs().max().item())
    assert gradient.dtype == student.dtype
    return loss


def by_hand(name, student, teacher):
    """Entry by entry."""

    def relations(x):
        b = len(x)
        d = [[(x[i] - x[j]).norm() for j in range(b)] for i in range(b)]
        if name == "distance":
            mean = sum(d[i][j] for i in range(b) for j in range(b) if i != j) / (b * (b - 1))
            return [d[i][j] / mean for i in range(b) for j in range(b)]
        found = []
        for i in range(b):
            for j in range(b):
                for k in range(b):
                    apart = d[i][j] > 0 and d[i][k] > 0
                    dot = (x[j] - x[i]) @ (x[k] - x[i])
                    found.append(dot / (d[i][j] * d[i][k]) if apart else torch.zeros((), dtype=x.dtype))
        return found

    e = torch.stack(relations(student)) - torch.stack(relations(teacher))
    return torch.where(e.abs() < 1, 0.5 * e**2, e.abs() - 0.5).mean()


@each
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_entry_by_entry(name, implementation):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    loss = LOSSES[name](student, teacher, implementation=implementation)
    torch.testing.assert_close(loss, by_hand(name, student, teacher), rtol=1e-12, atol=1e-14)


@each
@pytest.mark.parametrize("capability", dispatch._C.cpu_capabilities() if dispatch._C else [])
@pytest.mark.parametrize(("batch", "width"), [(2, 3), (3, 1), (4, 8), (17, 5), (33, 64), (50, 2)])
def test_value_and_gradient_in_every_instruction_set(name, capability, batch, width):
    best = dispatch._C.cpu_capability()
    dispatch._C.set_cpu_capability(capability)
    try:
        check(name, torch.randn(batch, width, dtype=torch.float64), torch.randn(batch, width + 1, dtype=torch.float64))
    finally:
        dispatch._C.set_cpu_capability(best)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype):
    student, teacher = torch.randn(24, 16).to(dtype), torch.randn(24, 16).to(dtype)
    epsilon = torch.finfo(dtype).eps
    check(name, student, teacher, rtol=2 * max(epsilon, 1e-7))


@each
@pytest.mark.parametrize("radius", [1e-2, 1e-3])
def test_tight_clusters_far_from_the_origin_lose_no_digits(name, radius):
    def clusters():
        centres = torch.randn(4, 32, dtype=torch.float64) + 100
        return (centres.repeat(6, 1) + radius * torch.randn(24, 32, dtype=torch.float64)).float()

    check(name, clusters(), clusters(), rtol=1e-5)


@each
def test_coincident_and_collinear_points(name):
    student, teacher = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    student[1] = student[0]
    student[5] = student[0]
    teacher[2] = teacher[3]
    student[4] = 2 * student[6] - student[7]
    loss = check(name, student, teacher)
    assert loss.isfinite()


@each
@pytest.mark.parametrize("points", ["one", "all alike", "all zero"])
def test_nothing_to_compare(name, points):
    student = torch.zeros(4, 3) if points == "all zero" else torch.ones(1 if points == "one" else 4, 3)
    student = student.requires_grad_()
    loss = LOSSES[name](student, student.detach().clone())
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


@each
def test_a_student_like_its_teacher_moved_and_turned_has_nothing_to_learn(name):
    teacher = torch.randn(20, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    scale = 3.0
    student = (scale * teacher @ turn + 7).requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert student.grad.abs().max() < 1e-9


@each
def test_gradcheck_and_upstream(name):
    student, teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 5).double()
    assert torch.autograd.gradcheck(lambda s: -2.5 * LOSSES[name](s, teacher), student)
    (gradient,) = torch.autograd.grad(LOSSES[name](student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through implementation='cpp'"):
        gradient.sum().backward()


@each
def test_opcheck(name):
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)
    torch.library.opcheck(torch.ops.mtkd_fast.relation, (student, teacher, name))
    torch.library.opcheck(torch.ops.mtkd_fast.relation_forward, (student.detach(), teacher, name, True))


@each
def test_one_graph(name):
    student, teacher = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher)
    torch.testing.assert_close(loss, LOSSES[name](student, teacher))
    right = torch.autograd.grad(LOSSES[name](student, teacher), student)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], right)


@each
def test_embeddings_of_any_shape_and_nan_is_not_hidden(name):
    student, teacher = torch.randn(6, 2, 3, 2), torch.randn(6, 4)
    assert torch.equal(LOSSES[name](student, teacher), LOSSES[name](student.flatten(1), teacher))
    student[2, 1, 1, 0] = float("nan")
    assert LOSSES[name](student, teacher).isnan()


@each
@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        ([1.0], torch.zeros(3, 2), TypeError, "student must be a tensor, got list"),
        (torch.zeros(3), torch.zeros(3, 2), ValueError, r"student must have shape \[B, ...\], .* got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(4, 2), ValueError, "teacher must hold as many samples .* got 4 and 3"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), TypeError, "student must be float32, .* got torch.int64"),
        (torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True), ValueError, "teacher must not require grad"),
    ],
)  # fmt: skip
def test_bad_input_is_named(name, student, teacher, error, message):
    with pytest.raises(error, match=message):
        LOSSES[name](student, teacher)


@each
def test_triton_says_that_it_has_no_kernel(name):
    with pytest.raises(
        ValueError, match="implementation='triton' cannot run on cpu tensors: the op relation has kernels"
    ):
        LOSSES[name](torch.zeros(3, 2), torch.zeros(3, 2), implementation="triton")
