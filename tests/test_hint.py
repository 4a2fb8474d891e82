"""The op ``hint``: K pairs of features, per-sample weights; every backend against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from cases.kd import BF16, F16, F32, F64, NAN
from tolerance import assert_numbers_close, assert_rows_close

from mtkd_fast import hint_loss

N = 5
SHAPES = {
    "one number": [(1,)],
    "vectors": [(7,), (64,)],
    "around vector widths": [(15,), (16,), (17,), (31,), (33,)],
    "maps of different size": [(3, 4, 4), (8, 2, 2), (5,)],
    "large": [(64, 9, 9)],
}
DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16 and fp32": (BF16, F32),
    "fp32 and fp16": (F32, F16),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "sample stride": lambda x: torch.cat([x, torch.full_like(x, NAN)], 1)[:, : x.shape[1]],
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}
WEIGHTS = {
    "none": lambda k: None,
    "per pair": lambda k: torch.rand(k),
    "per sample": lambda k: torch.rand(k, N),
    "some zero": lambda k: torch.rand(k, N) * (torch.rand(k, N) < 0.6),
    "negative": lambda k: -torch.rand(k),
    "repeated": lambda k: torch.rand(k, 1).expand(k, N),
}


def features(device, shapes, dtypes=(F32, F32), n=N):
    return [[torch.randn(n, *shape, device=device).to(dtype) for shape in shapes] for dtype in dtypes]


def gradients_of(loss, leaves, upstream):
    return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype), allow_unused=True)


def assert_hint_matches(backend, students, teachers, weights, reduction="mean", upstream=None):
    """Value and every gradient, by the tolerance rule."""

    def run(dtype, implementation):
        cast = [
            [(x.detach().cpu().to(dtype) if dtype else x.detach()).requires_grad_() for x in side]
            for side in (students, teachers)
        ]
        w = weights
        if w is not None:
            w = (w.detach().cpu().to(dtype) if dtype else w.detach()).requires_grad_()
        loss = hint_loss(*cast, weights=w, reduction=reduction, implementation=implementation)
        up = torch.ones(loss.shape, device=loss.device) if upstream is None else upstream.to(loss.device)
        leaves = [*cast[0], *cast[1], *([] if w is None else [w])]
        return loss.detach(), gradients_of(loss, leaves, up)

    exact_loss, exact = run(F64, "reference")
    plain_loss, plain = run(F32, "reference")
    loss, got = run(None, backend.implementation)
    assert loss.dtype == F32
    terms = exact_loss.abs() if weights is None or (weights >= 0).all() else exact_loss.abs().clamp(min=1.0)
    assert_numbers_close("hint loss", loss, exact_loss, plain_loss, terms=terms)
    leaves = [*students, *teachers, *([] if weights is None else [weights])]
    for i, (leaf, gradient, right, simple) in enumerate(zip(leaves, got, exact, plain, strict=True)):
        assert gradient.dtype == leaf.dtype
        right, simple = right.flatten(1) if right.dim() > 1 else right[None], simple.to(leaf.dtype)
        assert_rows_close(
            f"gradient {i}", gradient.reshape(right.shape), right, simple.reshape(right.shape),
            terms=torch.zeros(()), arithmetic=F32, interpreted=backend.interpreted,
        )  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_and_weights(backend, shapes, weights):
    students, teachers = features(backend.device, SHAPES[shapes])
    w = WEIGHTS[weights](len(students))
    assert_hint_matches(backend, students, teachers, w if w is None else w.to(backend.device))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(backend, dtypes):
    students, teachers = features(backend.device, [(8, 3, 3), (40,)], DTYPES[dtypes])
    assert_hint_matches(backend, students, teachers, torch.rand(2, N, device=backend.device))


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, side):
    """Two sides that lie differently are still compared element by element."""
    students, teachers = features(backend.device, [(6, 3, 5), (12,)])
    if side != "teacher":
        students = [LAYOUTS[layout](x) for x in students]
    if side != "student":
        teachers = [LAYOUTS[layout](x) for x in teachers]
    assert_hint_matches(backend, students, teachers, torch.rand(2, N, device=backend.device))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_upstream(backend, reduction):
    students, teachers = features(backend.device, [(4, 3), (9,)])
    upstream = torch.randn(N if reduction == "none" else ())
    w = torch.rand(2, N, device=backend.device)
    assert_hint_matches(backend, students, teachers, w, reduction, upstream)


@pytest.mark.parametrize("n", [1, 2, 77])
def test_numbers_of_samples(backend, n):
    students, teachers = features(backend.device, [(33,)], n=n)
    assert_hint_matches(backend, students, teachers, torch.rand(1, n, device=backend.device))


def test_sixty_four_pairs(backend):
    students, teachers = features(backend.device, [(3 + k % 5,) for k in range(64)])
    assert_hint_matches(backend, students, teachers, torch.rand(64, N, device=backend.device))


def test_it_is_torchs_mse_loss(backend):
    (student,), (teacher,) = features(backend.device, [(4, 5, 5)])
    torch.testing.assert_close(backend.hint([student], [teacher]), F.mse_loss(student, teacher))


def test_it_is_the_weighted_sum_by_loops():
    students, teachers = features("cpu", [(4, 3), (6,)], (F64, F64))
    w = torch.rand(2, N, dtype=F64)
    by_hand = sum(
        float(w[k, n]) * float((f[n] - g[n]).square().sum()) / f[n].numel()
        for k, (f, g) in enumerate(zip(students, teachers, strict=True))
        for n in range(N)
    )
    got = hint_loss(students, teachers, weights=w, implementation="reference")
    assert got.item() == pytest.approx(by_hand / N, rel=1e-13)


def test_equal_features_give_zero_and_no_gradient(backend):
    (student,), _ = features(backend.device, [(40,)])
    student.requires_grad_()
    loss = backend.hint([student], [student.detach().clone()])
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_pair_of_weight_zero_is_not_read(backend, per_sample):
    students, teachers = features(backend.device, [(8,), (8,)])
    students[0].fill_(NAN)
    w = torch.tensor([0.0, 0.5], device=backend.device)
    w = w[:, None].repeat(1, N) if per_sample else w
    for f in students:
        f.requires_grad_()
    loss = backend.hint(students, teachers, weights=w)
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(students[1], teachers[1]))
    gradients = torch.autograd.grad(loss, students)
    assert (gradients[0] == 0).all()
    assert gradients[1].isfinite().all()


def test_nan_is_not_masked_away(backend):
    (student,), (teacher,) = features(backend.device, [(8,)])
    student[1, 3] = NAN
    loss = backend.hint([student], [teacher], reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_samples_give_zero_attached_to_the_graph(backend, reduction):
    students, teachers = features(backend.device, [(8,)], n=0)
    students[0].requires_grad_()
    loss = backend.hint(students, teachers, reduction=reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    assert students[0].grad.shape == (0, 8)


def test_only_the_weights_learn(backend):
    students, teachers = features(backend.device, [(8,), (4, 2)])
    w = torch.rand(2, N, device=backend.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(backend.hint(students, teachers, weights=w), w)
    right = torch.stack([(f - g).square().flatten(1).mean(1) / N for f, g in zip(students, teachers, strict=True)])
    torch.testing.assert_close(gradient, right)


def test_the_gradient_of_a_weight_of_zero_is_the_distance(backend):
    students, teachers = features(backend.device, [(8,)])
    w = torch.zeros(1, device=backend.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(backend.hint(students, teachers, weights=w), w)
    torch.testing.assert_close(gradient, F.mse_loss(students[0], teachers[0])[None])


def test_backward_twice_gives_the_same_gradient_twice(backend):
    students, teachers = features(backend.device, [(8,)])
    students[0].requires_grad_()
    loss = backend.hint(students, teachers)
    first = torch.autograd.grad(2 * loss, students, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(2 * loss, students)[0], kept)


def test_inputs_are_never_written(backend):
    students, teachers = features(backend.device, [(8,), (3, 3)])
    before = [x.clone() for x in (*students, *teachers)]
    for f in students:
        f.requires_grad_()
    versions = [x._version for x in (*students, *teachers)]
    backend.hint(students, teachers).backward()
    assert all(map(torch.equal, before, (*students, *teachers)))
    assert [x._version for x in (*students, *teachers)] == versions


def test_gradcheck_in_float64(backend):
    if not backend.float64:
        pytest.skip(f"{backend.name} computes in float32")
    leaves = [torch.randn(3, *shape, dtype=F64, requires_grad=True) for shape in ((4,), (2, 2), (4,), (2, 2))]
    w = torch.rand(2, 3, dtype=F64, requires_grad=True)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda a, b, c, d, w, r=reduction: backend.hint([a, b], [c, d], weights=w, reduction=r), (*leaves, w)
        )


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
    ("unknown distance", dict(distance="l1"), ValueError, "distance must be one of 'mse', got 'l1'"),
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
