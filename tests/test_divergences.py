"""Every divergence against its formula written once more, in float64, and what is known of it without one."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.kd import F32, F64, INF, WITHOUT_TARGET, check

from mtkd_fast import dispatch, multi_teacher_divergence, multi_teacher_kd_loss
from mtkd_fast.reference.divergences import DIVERGENCES

N, C, K = 6, 11, 3
TAU = 2.5
FINITE = ("jsd", "tvd", "skew_kl", "skew_reverse_kl")


@pytest.fixture
def logits():
    student, *teachers = (2 * torch.randn(N, C, dtype=F64) for _ in range(K + 1))
    return student, teachers, torch.randint(C, (N,))


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def dkd_of_the_paper(t, s, target, beta, tau):
    """TCKD from two-class probabilities, NCKD from softmaxes whose target's logit is lowered by 1000."""
    mask = F.one_hot(target, s.shape[-1]).to(s.dtype)
    p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
    p_b, q_b = (torch.stack(((x * mask).sum(-1), (x * (1 - mask)).sum(-1)), -1) for x in (p, q))
    log_rest_p, log_rest_q = ((x / tau - 1000.0 * mask).log_softmax(-1) for x in (t, s))
    nckd = F.kl_div(log_rest_q, log_rest_p, log_target=True, reduction="none").sum(-1)
    return kl(p_b, q_b) + beta * nckd


FORMULAS = {  # of p, q and beta
    "forward_kl": lambda p, q, _: kl(p, q),
    "reverse_kl": lambda p, q, _: kl(q, p),
    "jsd": jsd,
    "tvd": lambda p, q, _: 0.5 * (p - q).abs().sum(-1),
    "skew_kl": lambda p, q, beta: kl(p, beta * p + (1 - beta) * q),
    "skew_reverse_kl": lambda p, q, beta: kl(q, (1 - beta) * p + beta * q),
}
BETAS = {"jsd": (None, 0.1, 0.9), "skew_kl": (None, 0.5), "skew_reverse_kl": (None, 0.5)}


def textbook(divergence, student, teachers, target, beta, tau=TAU):
    beta = DIVERGENCES[divergence].beta if beta is None else beta
    if divergence == "dkd":
        return torch.stack([dkd_of_the_paper(t, student, target, beta, tau) for t in teachers])
    q = (student / tau).softmax(-1)
    return torch.stack([FORMULAS[divergence]((t / tau).softmax(-1), q, beta) for t in teachers])


def test_the_formulas_cover_the_registry():
    assert {*FORMULAS, "dkd"} == set(DIVERGENCES)


@pytest.mark.parametrize(
    ("divergence", "beta"), [(name, beta) for name in FORMULAS for beta in BETAS.get(name, (None,))]
)
def test_value_and_gradients_are_those_of_the_formula(backend64, logits, divergence, beta):
    leaves = [x.requires_grad_() for x in (logits[0], *logits[1])]
    got = backend64.divergence(leaves[0], leaves[1:], divergence=divergence, beta=beta, temperature=TAU)
    right = textbook(divergence, leaves[0], leaves[1:], None, beta)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(K, N, dtype=F64)
    for a, b in zip(*(torch.autograd.grad(d, leaves, upstream) for d in (got, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("n_classes", [2, 3, C])
def test_dkd_is_that_of_the_paper(backend64, beta, n_classes):
    leaves = [torch.randn(N, n_classes, dtype=F64, requires_grad=True) for _ in range(K + 1)]
    target, w = torch.randint(n_classes, (N,)), torch.rand(K, N, dtype=F64)
    got = backend64.loss(
        leaves[0], leaves[1:], target, weights=w, divergence="dkd", beta=beta, temperature=TAU,
        temperature_squared=False, reduction="none",
    )  # fmt: skip
    right = (w * textbook("dkd", leaves[0], leaves[1:], target, beta)).sum(0)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in (got, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_kl_is_tckd_and_the_rest_of_the_teacher_times_nckd(logits):
    """KL = TCKD + (1 − p_y)·NCKD, so DKD with a β of 1 − p_y, row by row, is the KL."""
    student, teachers, target = logits
    forward = multi_teacher_divergence(student, teachers, temperature=TAU)
    for k, t in enumerate(teachers):
        rest = 1 - (t / TAU).softmax(-1)[torch.arange(N), target]
        for n in range(N):
            one = multi_teacher_kd_loss(
                student[n], [t[n]], target[n], divergence="dkd", beta=rest[n].item(), temperature=TAU,
                temperature_squared=False,
            )  # fmt: skip
            torch.testing.assert_close(one, forward[k, n])


def test_one_class_beside_the_target_leaves_nothing_to_nckd(backend):
    student, teacher, target = torch.randn(N, 2), torch.randn(N, 2), torch.randint(2, (N,))
    losses = [backend.loss(student, [teacher], target, divergence="dkd", beta=beta) for beta in (0.0, 8.0)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(losses[0], backend.loss(student, [teacher], target))
    one = check(backend, student[:, :1], [teacher[:, :1]], torch.zeros(N, dtype=torch.long), divergence="dkd")
    assert one.loss == 0
    assert (one.gradients["student"] == 0).all()


def test_a_teacher_that_allows_the_target_alone_has_no_nckd(backend):
    student, teacher, target = torch.randn(N, C), torch.full((N, C), -INF), torch.randint(C, (N,))
    teacher[torch.arange(N), target] = 1.0
    got = check(backend, student, [teacher], target, divergence="dkd", temperature=TAU, wants=("student", "teachers"))
    torch.testing.assert_close(got.loss, TAU**2 * F.cross_entropy(student / TAU, target))


@pytest.mark.parametrize("weights", ["confidence", "entropy"])
@pytest.mark.parametrize("gap", [0.0, 60.0, 300.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_a_target_apart_costs_the_other_terms_no_digits(backend, weights, gap, smoothing):
    """Weights and hard label are those of the whole row, also where the target outweighs all other classes."""
    target = torch.randint(C, (N,))
    student, *teachers = (torch.randn(N, C) for _ in range(K + 1))
    for x in (student, teachers[0]):
        x[torch.arange(N), target] += gap
    check(
        backend, student, teachers, target, divergence="dkd", weights=weights, ce_weight=1.0,
        label_smoothing=smoothing, temperature=TAU, wants=("student", "teachers"),
    )  # fmt: skip


def test_jsd_is_symmetric_at_one_half_and_swaps_sides_elsewhere(logits):
    p, q, _ = logits
    for beta in (None, 0.3):
        swapped = None if beta is None else 1 - beta
        there = multi_teacher_divergence(p, q[:1], divergence="jsd", beta=beta)
        back = multi_teacher_divergence(q[0], [p], divergence="jsd", beta=swapped)
        torch.testing.assert_close(there, back)


@pytest.mark.parametrize(
    ("divergence", "beta", "is_that"),
    [("jsd", 0, "forward_kl"), ("jsd", 1.0, "reverse_kl"), ("skew_kl", 0.0, "forward_kl"),
     ("skew_reverse_kl", 0, "reverse_kl")],
)  # fmt: skip
def test_the_ends_of_beta_are_the_kls(logits, divergence, beta, is_that):
    student, teachers, _ = logits
    got = multi_teacher_divergence(student, teachers, divergence=divergence, beta=beta)
    assert torch.equal(got, multi_teacher_divergence(student, teachers, divergence=is_that))
    if divergence != "jsd":
        near = multi_teacher_divergence(student, teachers, divergence=divergence, beta=1e-9)
        torch.testing.assert_close(near, got, rtol=1e-4, atol=1e-6)


def test_scaled_jsd_tends_to_the_kls(logits):
    student, teachers, _ = logits
    for beta, is_that in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        near = multi_teacher_divergence(student, teachers, divergence="jsd", beta=beta) / 1e-7
        torch.testing.assert_close(
            near, multi_teacher_divergence(student, teachers, divergence=is_that), rtol=1e-3, atol=1e-5
        )


def test_bounds(backend):
    student, *teachers = (100 * torch.randn(N, C) for _ in range(K + 1))
    student[0, 3], teachers[0][0, 4:] = -INF, -INF
    most = {"tvd": 1.0, "jsd": math.log(2), "skew_kl": math.log(10), "skew_reverse_kl": math.log(10)}
    for divergence, bound in most.items():
        d = backend.divergence(student, teachers, divergence=divergence)
        assert (d >= -1e-6).all(), divergence
        assert (d <= bound + 1e-5).all(), divergence


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_rows_give_0_and_offsets_do_not_matter(backend, divergence):
    student, *teachers = (torch.randn(N, C) for _ in range(K + 1))
    target = torch.randint(C, (N,))
    got = check(backend, student, [student.clone()], target, divergence=divergence, wants=("student", "teachers"))
    assert abs(got.loss) < 1e-6
    for gradient in got.gradients.values():
        assert gradient.abs().max() < 1e-6
    right = backend.loss(student, teachers, target, divergence=divergence)
    moved = backend.loss(student + 128, [t - 64 for t in teachers], target, divergence=divergence)
    torch.testing.assert_close(moved, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_sum_to_0_over_the_classes(backend, divergence):
    student, *teachers = (torch.randn(N, C, requires_grad=True) for _ in range(K + 1))
    loss = backend.loss(student, teachers, torch.randint(C, (N,)), divergence=divergence, reduction="sum")
    for gradient in torch.autograd.grad(loss, [student, *teachers]):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(N), rtol=0, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(backend64, divergence):
    leaves, target = [torch.randn(3, 5, dtype=F64, requires_grad=True) for _ in range(3)], torch.randint(5, (3,))
    w = torch.rand(2, 3, dtype=F64, requires_grad=True)

    def loss(s, w, *t):
        return backend64.loss(
            s, t, target, weights=w, divergence=divergence, temperature=2.0, ce_weight=0.3, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (leaves[0], w, *leaves[1:]))


@pytest.mark.parametrize("divergence", FINITE)
def test_masked_classes_keep_the_bounded_divergences_finite(backend, divergence):
    student, teacher = torch.randn(N, C), torch.randn(N, C)
    student[:, ::3], teacher[:, 1::3] = -INF, -INF
    got = check(backend, student, [teacher], divergence=divergence, wants=("student", "teachers"))
    assert got.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())
    apart = [torch.full((1, 2), -INF) for _ in range(2)]
    apart[0][0, 0] = apart[1][0, 1] = 0.0
    check(backend, apart[0], apart[1:], divergence=divergence, wants=("student", "teachers"))


def test_dkd_of_an_excluded_target_is_infinite_with_a_finite_gradient(backend):
    student, teacher, target = torch.randn(1, C), torch.randn(1, C), torch.tensor([4])
    student[0, 4] = -INF
    got = check(backend, student, [teacher], target, divergence="dkd")
    assert got.loss == INF
    assert got.gradients["student"].isfinite().all()


def test_tvd_has_subgradient_0_at_ties(backend):
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 1.0, -1.0]])
    teacher[0] -= teacher[0].logsumexp(0) - math.log(4)
    got = check(backend, student, [student.clone()], divergence="tvd", wants=("student", "teachers"))
    assert all((gradient == 0).all() for gradient in got.gradients.values())


@pytest.mark.parametrize("divergence", WITHOUT_TARGET)
@pytest.mark.parametrize("n_classes", [1, 16, 1025, 3000])
def test_tiles_and_single_classes(backend, divergence, n_classes):
    student, *teachers = (torch.randn(2, n_classes) for _ in range(3))
    check(
        backend, student, teachers, torch.zeros(2, dtype=torch.long), divergence=divergence, weights="confidence",
        ce_weight=0.5, wants=("student", "teachers"),
    )  # fmt: skip


@pytest.mark.parametrize("n_classes", [1, 16, 1025, 3000])
@pytest.mark.parametrize("label", [0, -1])
def test_a_target_apart_in_any_tile(backend, n_classes, label):
    student, *teachers = (torch.randn(2, n_classes) for _ in range(3))
    target = torch.full((2,), label % n_classes)
    for weights in ("confidence", "entropy"):
        check(
            backend, student, teachers, target, divergence="dkd", weights=weights, ce_weight=0.5, label_smoothing=0.2,
            wants=("student",) if weights == "entropy" else ("student", "teachers"),
        )  # fmt: skip


def test_dkd_needs_labels_that_the_divergences_alone_do_not_have(logits):
    with pytest.raises(ValueError, match=r"dkd.*multi_teacher_kd_loss"):
        multi_teacher_divergence(logits[0], logits[1], divergence="dkd")


def test_what_has_no_kernel_is_refused_by_name(logits, monkeypatch):
    student, teachers, _ = (logits[0].to(F32), [t.to(F32) for t in logits[1]], None)
    monkeypatch.setattr(dispatch, "FUSED_DIVERGENCES", ("forward_kl", "reverse_kl"))
    with pytest.raises(ValueError, match=r"implementation='cpp' cannot run on cpu.*'tvd' has no fused kernel"):
        multi_teacher_divergence(student, teachers, divergence="tvd", implementation="cpp")
    assert multi_teacher_divergence(student, teachers, divergence="tvd").shape == (K, N)  # the reference's


def test_dkd_without_the_other_classes_forgets_what_they_hold(backend):
    """β = 0 removes its term, though the student excludes a class that its teacher allows."""
    student = torch.randn(3, 7, device=backend.device)
    student[:, 0] = -INF
    teachers, target = torch.randn(2, 3, 7, device=backend.device), torch.full((3,), 4, device=backend.device)
    loss = backend.loss(student, teachers, target, divergence="dkd", beta=0.0)
    right = multi_teacher_kd_loss(student, teachers, target, divergence="dkd", beta=0.0, implementation="reference")
    assert right.isfinite()
    torch.testing.assert_close(loss, right)
