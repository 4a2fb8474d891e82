"""The reference, the oracle of everything else, against textbook formulas that share nothing with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.kd import KLS, WITHOUT_TARGET
from torch.autograd import gradcheck, gradgradcheck

from mtkd_fast import multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights
from mtkd_fast.checks import WEIGHT_RULES
from mtkd_fast.reference.divergences import DIVERGENCES

K, N, C = 3, 6, 11
F64 = torch.float64


def reference_loss(*args, **kwargs):
    return multi_teacher_kd_loss(*args, **kwargs, implementation="reference")


def reference_divergence(*args, **kwargs):
    return multi_teacher_divergence(*args, **kwargs, implementation="reference")


@pytest.fixture
def logits():
    student = torch.randn(N, C, dtype=F64, requires_grad=True)
    teachers = [2 * torch.randn(N, C, dtype=F64) for _ in range(K)]
    return student, teachers, torch.randint(C, (N,))


def softmax_of(row, temperature=1.0):
    exps = [math.exp(x / temperature) for x in row.tolist()]
    return [e / sum(exps) for e in exps]


def cross_entropy_of(row, label):
    return -math.log(softmax_of(row)[label])


def entropy_of(row):
    return -sum(p * math.log(p) for p in softmax_of(row))


def test_forward_kl_is_torchs_kl_div(logits):
    student, teachers, _ = logits
    for tau in (1.0, 4.0):
        got = reference_divergence(student, teachers, temperature=tau)
        for d, t in zip(got, teachers, strict=True):
            right = F.kl_div((student / tau).log_softmax(-1), (t / tau).softmax(-1), reduction="none").sum(-1)
            torch.testing.assert_close(d, right, rtol=1e-13, atol=1e-14)


def test_every_divergence_by_loops(logits):
    textbook = {
        "forward_kl": lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "reverse_kl": lambda p, q: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
    }
    student, teachers, _ = logits
    for divergence in textbook:
        got = reference_divergence(student, teachers, divergence=divergence, temperature=2.0)
        right = [
            [textbook[divergence](softmax_of(t[n], 2.0), softmax_of(student[n], 2.0)) for n in range(N)]
            for t in teachers
        ]
        torch.testing.assert_close(got, torch.tensor(right, dtype=F64), rtol=1e-12, atol=1e-13)


def test_confidence_weights_by_hand(logits):
    """CA-MKD: (1 - softmax_k CE_k)/(K - 1), the cross-entropies at temperature 1."""
    _, teachers, target = logits
    got = teacher_weights(teachers, target, rule="confidence", implementation="reference")
    for n in range(N):
        wrongness = [math.exp(cross_entropy_of(t[n], int(target[n]))) for t in teachers]
        right = [(1 - x / sum(wrongness)) / (K - 1) for x in wrongness]
        torch.testing.assert_close(got[:, n], torch.tensor(right, dtype=F64))
    assert (got < 1 / (K - 1)).all(), "no teacher can have more than 1/(K-1)"


def test_shares_of_hopeless_teachers_are_exact_in_float64(logits):
    _, teachers, target = logits
    for t in teachers:
        t[torch.arange(N), target] = -float("inf")
    got = teacher_weights(teachers, target, rule="confidence", implementation="reference")
    torch.testing.assert_close(got, torch.full((K, N), 1 / 3, dtype=F64), rtol=1e-15, atol=0)


def test_entropy_weights_by_hand(logits):
    """EBKD, scaled to sum to one: (1 - H_k / sum H)/(K - 1)."""
    _, teachers, _ = logits
    got = teacher_weights(teachers, rule="entropy", implementation="reference")
    for n in range(N):
        h = [entropy_of(t[n]) for t in teachers]
        torch.testing.assert_close(got[:, n], torch.tensor([(1 - x / sum(h)) / (K - 1) for x in h], dtype=F64))


def test_the_whole_objective_by_loops(logits):
    """kd_weight T^2 sum_k w_k KL + ce_weight CE, the mean over the rows that count."""
    student, teachers, target = logits
    target[1] = -100
    row_weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 2.0, 1.0], dtype=F64)
    tau, kd_weight, ce_weight, smoothing = 4.0, 0.7, 0.3, 0.1
    total, counted = 0.0, 0
    for n in range(N):
        if target[n] == -100 or row_weights[n] == 0:
            continue
        counted += 1
        q, q1, y = softmax_of(student[n], tau), softmax_of(student[n]), int(target[n])
        wrongness = [math.exp(cross_entropy_of(t[n], y)) for t in teachers]
        kd = 0.0
        for t, wrong in zip(teachers, wrongness, strict=True):
            p = softmax_of(t[n], tau)
            kd += (1 - wrong / sum(wrongness)) / (K - 1) * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -(1 - smoothing) * math.log(q1[y]) - smoothing / C * sum(map(math.log, q1))
        total += float(row_weights[n]) * (kd_weight * tau**2 * kd + ce_weight * hard)
    got = reference_loss(
        student, teachers, target, weights="confidence", temperature=tau, kd_weight=kd_weight, ce_weight=ce_weight,
        label_smoothing=smoothing, row_weights=row_weights,
    )  # fmt: skip
    assert got.item() == pytest.approx(total / counted, rel=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_hard_label_is_torchs_cross_entropy(logits, smoothing, reduction):
    student, teachers, target = logits
    target[0] = -100
    got = reference_loss(
        student, teachers, target, kd_weight=0.0, ce_weight=1.0, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(got, F.cross_entropy(student, target, label_smoothing=smoothing, reduction=reduction))


@pytest.mark.parametrize(
    ("divergence", "rule"),
    [(name, rule) for name in DIVERGENCES for rule in (WEIGHT_RULES if name in KLS else ("uniform",))],
)
def test_gradcheck_in_student_and_teachers(logits, divergence, rule):
    """Rules are constants: the numerical gradient in a teacher would move the weights, so they are checked as given."""
    student, teachers, target = logits

    def loss_of_student(s):
        return reference_loss(s, teachers, target, weights=rule, divergence=divergence, temperature=2.0, ce_weight=0.5)

    assert gradcheck(loss_of_student, (student,))
    assert gradgradcheck(loss_of_student, (student,))

    w = teacher_weights(teachers, target, rule=rule, implementation="reference").requires_grad_()
    leaves = [t.requires_grad_() for t in teachers]

    def loss_of_all(s, w, *ts):
        return reference_loss(s, ts, target, weights=w, divergence=divergence, temperature=2.0, reduction="none")

    assert gradcheck(loss_of_all, (student, w, *leaves))
    target = target[:2]
    assert gradgradcheck(loss_of_all, (student[:2].detach().requires_grad_(), w[:, :2], *[t[:2] for t in leaves]))


@pytest.mark.parametrize("divergence", WITHOUT_TARGET)
def test_gradcheck_of_the_divergences(logits, divergence):
    student, teachers, _ = logits
    teachers = [t.requires_grad_() for t in teachers]

    def of(s, *ts):
        return reference_divergence(s, ts, divergence=divergence, temperature=3.7)

    assert gradcheck(of, (student, *teachers))


def assert_same_gradient(one, other, student):
    gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("given", ["positive", "zero for one", "above one"])
def test_forward_kl_to_many_is_forward_kl_to_their_mixture(logits, given):
    """The gradient is W times that to the mixture; the values differ by a constant of the teachers."""
    student, teachers, _ = logits
    tau = 2.0
    w = {"positive": [0.2, 0.5, 0.3], "zero for one": [0.0, 0.4, 0.1], "above one": [2.0, 1.5, 3.0]}[given]
    w = torch.tensor(w, dtype=F64)
    many = reference_loss(student, teachers, weights=w, temperature=tau, temperature_squared=False, reduction="none")
    p = torch.stack([(t / tau).softmax(-1) for t in teachers])
    mixture = (w[:, None, None] * p).sum(0) / w.sum()
    one = w.sum() * reference_divergence(student, [tau * mixture.log()], temperature=tau)[0]
    assert_same_gradient(many, one, student)
    constant = (w[:, None, None] * p * p.log()).sum((0, 2)) - w.sum() * (mixture * mixture.log()).sum(-1)
    torch.testing.assert_close(many - one, constant, rtol=1e-10, atol=1e-12)


def test_reverse_kl_to_many_is_reverse_kl_to_their_mean_logits(logits):
    student, teachers, _ = logits
    tau, w = 2.0, torch.tensor([0.2, 1.5, 0.3], dtype=F64)
    many = reference_loss(
        student, teachers, weights=w, temperature=tau, temperature_squared=False, divergence="reverse_kl",
        reduction="none",
    )  # fmt: skip
    t = torch.stack(teachers)
    mean = (w[:, None, None] * t).sum(0) / w.sum()
    one = w.sum() * reference_divergence(student, [mean], divergence="reverse_kl", temperature=tau)[0]
    assert_same_gradient(many, one, student)
    constant = (w[:, None] * (t / tau).logsumexp(-1)).sum(0) - w.sum() * (mean / tau).logsumexp(-1)
    torch.testing.assert_close(many - one, constant, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n_teachers", [1, 2, 5])
@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_rules_need_two_accumulators(rule, n_teachers):
    """The mixture under confidence and entropy weights, from the sums over teachers of p_k and of its weighted twin."""
    p = torch.randn(n_teachers, N, C, dtype=F64).softmax(-1)
    target = torch.randint(C, (N,))
    w = teacher_weights(p.log(), target, rule=rule, implementation="reference")
    e_to_ce, h = 1 / p[:, torch.arange(N), target], -(p * p.log()).sum(-1)
    relative = e_to_ce if rule == "confidence" else h
    a, e = p.sum(0), (relative[..., None] * p).sum(0)
    mixture = (a - e / relative.sum(0)[:, None]) / (n_teachers - 1) if n_teachers > 1 else a
    torch.testing.assert_close((w[..., None] * p).sum(0), mixture)


def test_forward_kl_gradient_in_closed_form(logits):
    """(W q - sum_k w_k p_k) / tau for the student; p_k (log p_k - log q - D_k) / tau for teacher k."""
    student, teachers, _ = logits
    teachers = [t.requires_grad_() for t in teachers]
    tau, w = 3.7, torch.tensor([0.2, -0.5, 1.3], dtype=F64)
    loss = reference_loss(student, teachers, weights=w, temperature=tau, temperature_squared=False, reduction="sum")
    got = torch.autograd.grad(loss, [student, *teachers])
    log_q = (student / tau).log_softmax(-1)
    log_p = [(t / tau).log_softmax(-1) for t in teachers]
    mixture = sum(w_k * x.exp() for w_k, x in zip(w, log_p, strict=True))
    torch.testing.assert_close(got[0], (w.sum() * log_q.exp() - mixture) / tau)
    for g, w_k, x in zip(got[1:], w, log_p, strict=True):
        d = (x.exp() * (x - log_q)).sum(-1, keepdim=True)
        torch.testing.assert_close(g, w_k * x.exp() * (x - log_q - d) / tau)


def test_reverse_kl_gradient_in_closed_form(logits):
    """q (W log q - sum_k w_k log p_k - sum_k w_k D_k) / tau for the student; w_k (p_k - q) / tau for teacher k."""
    student, teachers, _ = logits
    teachers = [t.requires_grad_() for t in teachers]
    tau, w = 3.7, torch.tensor([0.2, -0.5, 1.3], dtype=F64)
    loss = reference_loss(
        student, teachers, weights=w, temperature=tau, temperature_squared=False, reduction="sum",
        divergence="reverse_kl",
    )  # fmt: skip
    got = torch.autograd.grad(loss, [student, *teachers])
    log_q = (student / tau).log_softmax(-1)
    log_p = [(t / tau).log_softmax(-1) for t in teachers]
    ratio = sum(w_k * (log_q - x) for w_k, x in zip(w, log_p, strict=True))
    d = (log_q.exp() * ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(got[0], log_q.exp() * (ratio - d) / tau)
    for g, w_k, x in zip(got[1:], w, log_p, strict=True):
        torch.testing.assert_close(g, w_k * (x.exp() - log_q.exp()) / tau)
