"""The op ``mixture``: every backend on its case table, and what a table cannot say."""

import pytest
import torch
from cases.kd import BF16, F16, F32, F64, INF, NAN
from cases.mixture import CASES, FLOAT64_CASES, assert_matches, build, evaluate
from tolerance import ulp

from mtkd_fast import ensemble_probabilities, mixture_divergence

N, C, K = 5, 11, 3
FUNCTIONS = pytest.mark.parametrize("function", ["probabilities", "divergence"])


@FUNCTIONS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, function, fused):
    got = evaluate(function, build(case, fused.device), fused.implementation)
    assert got.value.dtype == F32
    assert_matches(function, got, case, fused.interpreted)


@FUNCTIONS
@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, function, fused64):
    got = evaluate(function, build(case), fused64.implementation)
    assert_matches(function, got, case)


def draw(device="cpu", dtype=F32, n_teachers=K, rows=(N,), c=C):
    student, *teachers = (torch.randn(*rows, c, device=device, dtype=dtype) for _ in range(n_teachers + 1))
    return student, teachers, torch.rand(n_teachers, *rows, device=device, dtype=dtype)


# The formula, once more.


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_reference_is_the_formula_row_by_row(temperature):
    student, teachers, w = draw(dtype=F64)
    w = w.softmax(0)
    probabilities = ensemble_probabilities(teachers, weights=w, temperature=temperature, implementation="reference")
    divergence = mixture_divergence(student, teachers, weights=w, temperature=temperature, implementation="reference")
    for n in range(N):
        pbar = sum(w[k, n] * (teachers[k][n] / temperature).softmax(0) for k in range(K))
        q = (student[n] / temperature).softmax(0)
        torch.testing.assert_close(probabilities[n], pbar, rtol=1e-13, atol=0)
        torch.testing.assert_close(divergence[n], (pbar * (pbar / q).log()).sum(), rtol=1e-12, atol=1e-14)


def test_one_teacher_is_its_own_kl(backend):
    student, teachers, _ = draw(backend.device, n_teachers=1)
    torch.testing.assert_close(
        backend.mixture_divergence(student, teachers, temperature=3.0),
        backend.divergence(student, teachers, temperature=3.0)[0],
    )


def test_the_student_gradient_is_that_of_the_weighted_kl(backend):
    student, teachers, w = draw(backend.device)
    student.requires_grad_()
    w = w.softmax(0)
    mixed = backend.mixture_divergence(student, teachers, weights=w, temperature=2.0).sum()
    apart = (w * backend.divergence(student, teachers, temperature=2.0)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mixed, apart)))
    assert mixed < apart, "a KL is convex"


def test_a_student_that_is_the_mixture_is_at_0(backend):
    _, teachers, w = draw(backend.device)
    w = w.softmax(0)
    student = backend.ensemble_probabilities(teachers, weights=w).log().requires_grad_()
    divergence = backend.mixture_divergence(student, teachers, weights=w)
    assert divergence.abs().max() < 1e-6
    assert torch.autograd.grad(divergence.sum(), student)[0].abs().max() < 1e-6


def test_weights_that_do_not_sum_to_one(backend):
    """W·KL(pbar/W‖q) + W log W."""
    student, teachers, w = draw(backend.device)
    w = w.softmax(0)
    got = backend.mixture_divergence(student, teachers, weights=3 * w)
    right = 3 * backend.mixture_divergence(student, teachers, weights=w) + 3 * torch.tensor(3.0).log()
    torch.testing.assert_close(got, right)


def test_a_mixture_that_is_negative_has_no_logarithm(backend):
    student, teachers, _ = draw(backend.device)
    w = torch.tensor([1.0, -5.0, 1.0], device=backend.device)
    assert backend.mixture_divergence(student, teachers, weights=w).isnan().all()
    torch.testing.assert_close(
        backend.ensemble_probabilities(teachers, weights=w).sum(-1), torch.full((N,), -3.0, device=backend.device)
    )


# Hard inputs.


def test_what_is_excluded(backend):
    student, teachers, w = draw(backend.device)
    for t in teachers:
        t[0, 2] = -INF  # by every teacher: adds 0, whatever the student holds
    student[0, 2] = -INF
    teachers[0][1, 4] = -INF  # by one of them
    student[2, 3] = -INF  # by the student alone
    student.requires_grad_(), w.requires_grad_()
    divergence = backend.mixture_divergence(student, teachers, weights=w)
    assert divergence.isposinf().tolist() == [False, False, True, False, False]
    assert divergence[[0, 1, 3, 4]].isfinite().all()
    of_student, of_w = torch.autograd.grad(divergence.sum(), (student, w))
    assert of_student.isfinite().all()
    assert of_student[0, 2] == 0
    assert of_w[:, 2].isposinf().all()
    assert of_w[:, [0, 1, 3, 4]].isfinite().all()


def test_underflow_is_not_impossibility(backend):
    """The mixture holds e^-150, which float32 does not; the weight of the teacher that would need it is 0."""
    teachers = [torch.tensor([[0.0, -150.0]]), torch.tensor([[-150.0, 0.0]])]
    teachers = [t.to(backend.device) for t in teachers]
    student = torch.zeros(1, 2, device=backend.device)
    w = torch.tensor([1.0, 0.0], device=backend.device, requires_grad=True)
    divergence = backend.mixture_divergence(student, teachers, weights=w)
    (gradient,) = torch.autograd.grad(divergence.sum(), w)
    log2 = 0.6931471805599453
    right = torch.tensor([log2 + 1, -150 + log2 + 1], device=backend.device)
    torch.testing.assert_close(gradient, right)


def test_a_row_of_nothing_but_zeros(backend):
    student, teachers, w = draw(backend.device)
    w[:, 1] = 0
    student[1], teachers[0][1] = NAN, -INF
    for needs in (False, True):
        s, w = student.detach().requires_grad_(), w.detach().requires_grad_(needs)
        divergence = backend.mixture_divergence(s, teachers, weights=w)
        assert divergence[1] == 0
        assert (torch.autograd.grad(divergence.sum(), s)[0][1] == 0).all()
        assert (backend.ensemble_probabilities(teachers, weights=w)[1] == 0).all()


def test_a_saturated_softmax_gets_finite_gradients(backend):
    """As AMTML-KD meets it: scores far apart, a weight of exactly 0, teachers that exclude classes."""
    student, teachers, _ = draw(backend.device)
    teachers[0][:, 1] = -INF
    scores = torch.tensor([[500.0], [0.0], [-500.0]], device=backend.device).repeat(1, N).requires_grad_()
    divergence = backend.mixture_divergence(student, teachers, weights=scores.softmax(0))
    assert torch.autograd.grad(divergence.sum(), scores)[0].isfinite().all()


# Autograd.


def test_gradcheck_in_float64(backend64):
    student, teachers, w = draw(dtype=F64, rows=(2,), c=5)
    leaves = [x.requires_grad_() for x in (student, w, *teachers)]

    def probabilities(w, *teachers):
        return backend64.ensemble_probabilities(teachers, weights=w, temperature=2.0)

    def divergence(student, w):
        return backend64.mixture_divergence(student, [t.detach() for t in teachers], weights=w, temperature=2.0)

    assert torch.autograd.gradcheck(probabilities, leaves[1:])
    assert torch.autograd.gradcheck(divergence, leaves[:2])


def test_the_reference_has_every_gradient_twice():
    student, teachers, w = draw(dtype=F64, rows=(2,), c=4)
    leaves = [x.requires_grad_() for x in (student, w, *teachers)]

    def divergence(student, w, *teachers):
        return mixture_divergence(student, teachers, weights=w, temperature=2.0, implementation="reference")

    assert torch.autograd.gradcheck(divergence, leaves)
    assert torch.autograd.gradgradcheck(divergence, leaves)


def test_double_backward_is_refused(fused):
    student, teachers, w = draw(fused.device)
    w.requires_grad_()
    for value in (
        fused.mixture_divergence(student, teachers, weights=w),
        fused.ensemble_probabilities(teachers, weights=w),
    ):
        (gradient,) = torch.autograd.grad(value.square().sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward()


def test_backward_twice_gives_the_same_gradient_twice(backend):
    student, teachers, w = draw(backend.device)
    student.requires_grad_()
    loss = 2 * backend.mixture_divergence(student, teachers, weights=w).sum()
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], kept)


def test_small_upstreams_of_a_float16_student_do_not_vanish(backend):
    student, teachers, w = draw(backend.device, c=2000)
    student = student.half().requires_grad_()
    divergence = backend.mixture_divergence(student, teachers, weights=w)
    (gradient,) = torch.autograd.grad(divergence.sum(), student, torch.tensor(64.0, device=backend.device))
    assert (gradient == 0).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_gradient_of_a_half_precision_student_is_rounded_once(backend, dtype):
    student, teachers, w = draw(backend.device, rows=(40,), c=64)
    leaf = student.to(dtype).requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    upstream = torch.linspace(0.3, 1.7, 40, device=backend.device)
    divergence = backend.mixture_divergence(leaf, teachers, weights=w)
    (found,) = torch.autograd.grad(divergence, leaf, upstream)
    divergence = mixture_divergence(wide, teachers, weights=w, implementation="reference")
    (exact,) = torch.autograd.grad(divergence, wide, upstream.double())
    roundings = 1.0 if backend.interpreted and dtype == BF16 else 0.5  # Triton's interpreter truncates bfloat16
    allowed = roundings * ulp(exact, dtype) + 1e-6 * exact.abs().amax(-1, keepdim=True)
    assert ((found.double() - exact).abs() <= allowed).all()


def test_inputs_are_never_written(backend):
    student, teachers, w = draw(backend.device)
    before = [x.clone() for x in (student, w, *teachers)]
    student.requires_grad_(), w.requires_grad_()
    backend.mixture_divergence(student, teachers, weights=w).sum().backward()
    backend.ensemble_probabilities(teachers, weights=w).square().sum().backward()
    assert all(map(torch.equal, before, (student, w, *teachers)))


def test_a_scalar_upstream_costs_no_tensor_and_other_layouts_are_read(backend):
    _, teachers, w = draw(backend.device, rows=(2, 3))
    w.requires_grad_()
    upstream = torch.randn(C, 3, 2, device=backend.device).permute(2, 1, 0)
    (got,) = torch.autograd.grad(backend.ensemble_probabilities(teachers, weights=w), w, upstream)
    right = torch.stack([(upstream * t.softmax(-1)).sum(-1) for t in teachers])
    torch.testing.assert_close(got, right)


def test_without_grad_nothing_is_kept(backend):
    student, teachers, w = draw(backend.device)
    student.requires_grad_()
    with torch.no_grad():
        assert not backend.mixture_divergence(student, teachers, weights=w).requires_grad
    assert not backend.ensemble_probabilities(teachers, weights=w).requires_grad


@pytest.mark.parametrize("n_classes", [3000, 30000, 70001])
def test_long_rows_in_and_out_of_cache(n_classes):
    """The exponentials of a row are kept as long as they fit a cache, relative to the maximum so far."""
    student, teachers, w = draw(n_teachers=2, rows=(3,), c=n_classes)
    teachers[0][1, :2500] = -INF
    teachers[0][0, 2048:] += 100
    teachers[1][2, 2048:] -= 100
    found = []
    for implementation, dtype in (("cpp", F32), ("reference", F64)):
        leaves = [x.to(dtype).requires_grad_() for x in (student, w)]
        of_teachers = [t.to(dtype) for t in teachers]
        given = dict(temperature=2.0, implementation=implementation)
        value = mixture_divergence(leaves[0], of_teachers, weights=leaves[1], **given)
        probabilities = ensemble_probabilities(of_teachers, weights=w.to(dtype), **given)
        found.append([value, probabilities, *torch.autograd.grad(value.sum(), leaves)])
    for got, right in zip(*found, strict=True):
        assert (got - right).abs().max() < 1e-6 * right.abs().max()


def test_many_rows_in_several_threads():
    student, teachers, w = draw(rows=(3000,), c=17)
    got = mixture_divergence(student, teachers, weights=w, temperature=2.0)
    right = mixture_divergence(student, teachers, weights=w, temperature=2.0, implementation="reference")
    torch.testing.assert_close(got, right)


# Errors.

REFUSED = [
    ("a rule", dict(weights="confidence"), ValueError, "weights must be one of 'uniform', got 'confidence'"),
    ("a list of weights", dict(weights=[1.0]), TypeError, "weights must be 'uniform' or a tensor .* got list"),
    ("integer weights", dict(weights=torch.ones(K, dtype=torch.long)), TypeError, "weights must be floating point"),
    ("weights of another shape", dict(weights=torch.ones(2)), ValueError,
     r"weights must have shape \(3,\) or \(3, 5\)"),
    ("no temperature", dict(temperature=0.0), ValueError, "temperature must be a finite number > 0, got 0.0"),
    ("no teachers", dict(teachers=[]), ValueError, "teacher_logits must hold 1 to 64 teachers, got 0"),
    ("unequal teachers", dict(teachers=[torch.zeros(N, C), torch.zeros(N, 2)]), ValueError,
     r"teacher_logits\[1\] must have shape \(5, 11\)"),
    ("unknown implementation", dict(implementation="eager"), ValueError, "implementation must be one of"),
]  # fmt: skip


@FUNCTIONS
@pytest.mark.parametrize(("change", "error", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_bad_arguments_are_refused_by_name(function, change, error, message):
    call = dict(teachers=list(torch.zeros(K, N, C))) | change
    logits = (call.pop("teachers"),)
    if function == "divergence":
        logits = (torch.zeros(N, C), *logits)
    with pytest.raises(error, match=message):
        (mixture_divergence if function == "divergence" else ensemble_probabilities)(*logits, **call)


def test_teachers_without_classes_are_refused():
    with pytest.raises(ValueError, match=r"teacher_logits\[0\] must have shape \[..., C\] with C >= 1, got \(5, 0\)"):
        ensemble_probabilities([torch.zeros(N, 0)])


def test_a_teacher_that_wants_a_gradient_is_refused_by_the_fused_divergence(fused):
    student, teachers, _ = draw(fused.device)
    teachers[1].requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_logits\[1\] must not require grad with implementation="):
        fused.mixture_divergence(student, teachers)
    with torch.no_grad():
        fused.mixture_divergence(student, teachers)


@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F16)])
def test_divergence_and_probabilities_agree_on_dtypes(backend, dtypes):
    student, teachers, w = draw(backend.device)
    student, teachers = student.to(dtypes[0]), [t.to(dtypes[1]) for t in teachers]
    pbar = backend.ensemble_probabilities(teachers, weights=w)
    right = (pbar * (pbar.log() - student.float().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(backend.mixture_divergence(student, teachers, weights=w), right, rtol=1e-5, atol=1e-5)
