"""The op ``hint``: every backend on the case table, and what a table cannot say."""

import pytest
import torch
import torch.nn.functional as F
from cases.hint import CASES, FLOAT64_CASES, assert_matches, build, evaluate, oracle

from mtkd_fast import hint_loss
from mtkd_fast.reference import hint as reference

N = 5
F64 = torch.float64
every = pytest.mark.parametrize("distance", reference.DISTANCES)


@pytest.mark.filterwarnings("ignore:overflow encountered in reduce")  # the first sweep over a huge sample
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, fused, monkeypatch):
    """On a GPU the forward writes the gradients of large features: here, of those of Triton's autograd, all or none."""
    for smallest in (1 << 40, 0) if fused.implementation == "triton" else (None,):
        if smallest is not None:
            monkeypatch.setattr("mtkd_fast.triton_ops.hint.FUSED_BYTES", smallest)
        got = evaluate(case, build(case, fused.device), fused.implementation)
        assert_matches(case, got, oracle(case), fused.interpreted)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, fused64):
    assert_matches(case, evaluate(case, build(case, fused64.device), fused64.implementation), oracle(case))


def features(device, *shapes, n=N, dtype=torch.float32):
    return [[torch.randn(n, *shape, device=device, dtype=dtype) for shape in shapes] for _ in range(2)]


def by_hand(distance, f, g):
    """Of one sample, in its elements' own words."""
    if distance == "attention":
        maps = []
        for x in (f, g):
            energy = [sum(float(x[c, s]) ** 2 for c in range(x.shape[0])) for s in range(x.shape[1])]
            maps.append([e / (sum(e * e for e in energy) ** 0.5 + 1e-6) for e in energy])
        return sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / f.shape[1]
    f, g = f.flatten().tolist(), g.flatten().tolist()
    if distance == "cosine":
        norms = sum(x * x for x in f) ** 0.5 * sum(x * x for x in g) ** 0.5
        return 1 - sum(x * y for x, y in zip(f, g, strict=True)) / norms
    differences = [abs(x - y) for x, y in zip(f, g, strict=True)]
    if distance == "mse":
        return sum(d * d for d in differences) / len(f)
    return sum(d * d / 2 if d < 1 else d - 0.5 for d in differences) / len(f)


@every
def test_it_is_the_weighted_sum_by_loops(distance):
    students, teachers = features("cpu", (4, 3), (2, 5), dtype=F64)
    w = torch.rand(2, N, dtype=F64)
    right = sum(
        float(w[k, n]) * by_hand(distance, f[n], g[n])
        for k, (f, g) in enumerate(zip(students, teachers, strict=True))
        for n in range(N)
    )
    got = hint_loss(students, teachers, weights=w, distance=distance, implementation="reference")
    assert got.item() == pytest.approx(right / N, rel=1e-13)


def test_they_are_torchs_losses(backend):
    (student,), (teacher,) = features(backend.device, (4, 5, 5))
    flat = student.flatten(1), teacher.flatten(1)
    for distance, right in (
        ("mse", F.mse_loss(student, teacher)),
        ("smooth_l1", F.smooth_l1_loss(student, teacher)),
        ("cosine", 1 - F.cosine_similarity(*flat).mean()),
    ):
        torch.testing.assert_close(backend.hint([student], [teacher], distance=distance), right)


@every
def test_gradcheck_in_float64(backend64, distance):
    (a, b), (c, d) = features("cpu", (4, 2), (2, 2, 2), n=3, dtype=F64)
    leaves = [x.requires_grad_() for x in (a, b, c, d)]
    w = torch.rand(2, 3, dtype=F64, requires_grad=True)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda a, b, c, d, w, r=reduction: backend64.hint(
                [a, b], [c, d], weights=w, distance=distance, reduction=r
            ),
            (*leaves, w),
        )


@every
def test_the_reference_has_second_derivatives(distance):
    (f,), (g,) = features("cpu", (3, 2), n=2, dtype=F64)
    inputs = [f.requires_grad_(), g.requires_grad_()]
    assert torch.autograd.gradgradcheck(
        lambda f, g: hint_loss([f], [g], distance=distance, implementation="reference"), inputs
    )


@every
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_samples_give_zero_attached_to_the_graph(backend, reduction, distance):
    students, teachers = features(backend.device, (8, 2), n=0)
    students[0].requires_grad_()
    loss = backend.hint(students, teachers, distance=distance, reduction=reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    assert students[0].grad.shape == (0, 8, 2)


@every
def test_backward_twice_gives_the_same_gradient_twice(backend, distance):
    students, teachers = features(backend.device, (8, 2))
    students[0].requires_grad_()
    loss = backend.hint(students, teachers, distance=distance)
    first = torch.autograd.grad(2 * loss, students, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(2 * loss, students)[0], kept)


@every
def test_inputs_are_never_written(backend, distance):
    students, teachers = features(backend.device, (8, 2), (3, 3))
    before = [x.clone() for x in (*students, *teachers)]
    for f in students:
        f.requires_grad_()
    versions = [x._version for x in (*students, *teachers)]
    backend.hint(students, teachers, distance=distance).backward()
    assert all(map(torch.equal, before, (*students, *teachers)))
    assert [x._version for x in (*students, *teachers)] == versions


def test_each_side_of_a_map_has_channels_of_its_own():
    student, teacher = torch.randn(3, 4, 2, 5), torch.randn(3, 7, 2, 5)
    assert hint_loss([student], [teacher], distance="attention").isfinite()
    with pytest.raises(ValueError, match=r"student_features\[0\] must be a map \[N, C, ...\] .* got \(3, 4\)"):
        hint_loss([torch.zeros(3, 4)], [torch.zeros(3, 4)], distance="attention")
    with pytest.raises(ValueError, match=r"teacher_features\[0\] must have shape \(3, 7, 2, 5\) .* got \(3, 7, 5, 2\)"):
        hint_loss([student], [teacher.mT], distance="attention")


def test_energies_that_overflow_give_nan(backend):
    student, teacher = (torch.ones(2, 3, 4, device=backend.device) for _ in range(2))
    student[0] *= 1e20
    loss = backend.hint([student], [teacher], distance="attention", reduction="none")
    assert loss[0].isnan()
    assert loss[1] == 0


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_map_lies_as_the_map_does(backend, form):
    student, teacher = (torch.randn(2, 3, 4, 5, device=backend.device) for _ in range(2))
    student = student.contiguous(memory_format=form).requires_grad_()
    (gradient,) = torch.autograd.grad(backend.hint([student], [teacher], distance="attention"), student)
    assert gradient.is_contiguous(memory_format=form)


UNEQUAL = [torch.zeros(N, 4), torch.zeros(2, 4)]
REFUSED = [
    ("one tensor", dict(student=torch.zeros(N, 4)), TypeError, "student_features must be a sequence .* got Tensor"),
    ("no pairs", dict(student=[], teacher=[]), ValueError, "student_features must hold 1 to 64 tensors, got 0"),
    ("unpaired", dict(student=[torch.zeros(N, 4)] * 2), ValueError, "teacher_features must hold 2 tensors .* got 1"),
    ("another shape", dict(student=[torch.zeros(N, 5)]), ValueError,
     r"teacher_features\[0\] must have shape \(5, 5\) like student_features\[0\], got \(5, 4\)"),
    ("integers", dict(student=[torch.zeros(N, 4, dtype=torch.long)]), TypeError,
     r"student_features\[0\] must be float32.*got torch.int64"),
    ("no elements", dict(student=[torch.zeros(N, 0)], teacher=[torch.zeros(N, 0)]), ValueError,
     r"student_features\[0\] must have shape \[N, ...\]"),
    ("another batch", dict(student=UNEQUAL, teacher=UNEQUAL), ValueError,
     r"student_features\[1\] must hold 5 samples like student_features\[0\], got 2"),
    ("weights shape", dict(weights=torch.ones(2)), ValueError,
     r"weights must have shape \(1,\) or \(1, 5\), got \(2,\)"),
    ("integer weights", dict(weights=torch.ones(1, dtype=torch.long)), TypeError, "weights must be floating point"),
    ("unknown distance", dict(distance="l1"), ValueError, "distance must be one of 'mse', .*, got 'l1'"),
    ("unknown reduction", dict(reduction="max"), ValueError, "reduction must be one of .* got 'max'"),
    ("unknown implementation", dict(implementation="eager"), ValueError,
     "implementation must be one of .* got 'eager'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    call = dict(student=[torch.zeros(N, 4)], teacher=[torch.zeros(N, 4)]) | change
    with pytest.raises(error, match=message):
        hint_loss(call.pop("student"), call.pop("teacher"), **call)


@pytest.mark.parametrize("implementation", ["cpp", "triton"], indirect=True)
def test_maps_without_positions_are_refused_by_the_op_too(implementation):
    hint_loss([torch.zeros(N, 4, 2)], [torch.zeros(N, 4, 2)], distance="attention", implementation=implementation)
    op = getattr(torch.ops.mtkd_fast, "attention_forward" if implementation == "cpp" else "attention_triton_forward")
    empty = [torch.zeros(N, 4, 0)]
    with pytest.raises(ValueError, match=r"features must be maps \[N, C, ...\] of one or more positions, got "):
        op(empty, empty, None)
