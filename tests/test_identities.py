"""What must hold of every method on logits whatever its formula: no oracle is needed."""

import pytest
import torch

from mtkd_fast import (
    AEKDLoss,
    AverageKDLoss,
    CAMKDLoss,
    DGKDLoss,
    EntropyKDLoss,
    FitNetKDLoss,
    multi_teacher_divergence,
    teacher_weights,
)

N, C, K = 6, 11, 3


def fitnet(student, teachers, target):
    return FitNetKDLoss(ce_weight=0.0, hint_weight=0.0)(student, teachers, target, None, None)


# name -> (the method's soft term, its weight on K teachers that are all alike: of τ² KL at that τ)
METHODS = {
    "AVER": (AverageKDLoss(ce_weight=0.0), 1, 4.0),
    "EBKD": (EntropyKDLoss(ce_weight=0.0), 1, 4.0),
    "EBKD, official": (EntropyKDLoss(ce_weight=0.0, official_code=True), (K - 1) / K, 4.0),
    "AE-KD": (AEKDLoss(ce_weight=0.0), 1, 4.0),
    "FitNet-MKD": (fitnet, 1, 4.0),
    "CA-MKD": (CAMKDLoss(ce_weight=0.0), 1, 4.0),
    "CA-MKD, official": (CAMKDLoss(ce_weight=0.0, official_code=True), 1 / K, 4.0),
    "DGKD": (lambda s, t, y: DGKDLoss()(s, t), K, 5.0),
    "DGKD, official": (lambda s, t, y: DGKDLoss(official_code=True)(s, t), K / C, 5.0),
}
each = pytest.mark.parametrize(("loss", "weight", "temperature"), METHODS.values(), ids=METHODS)


@pytest.fixture
def drawn():
    def draw():
        return 2 * torch.randn(N, C, dtype=torch.float64)

    return draw().requires_grad_(), [draw() for _ in range(K)], torch.randint(C, (N,))


def gradient(loss, student, teachers, target):
    return torch.autograd.grad(loss(student, teachers, target), student)[0]


@each
def test_teachers_that_are_alike_teach_like_one(drawn, loss, weight, temperature):
    student, (teacher, *_), target = drawn
    got = loss(student, [teacher] * K, target)
    one = temperature**2 * multi_teacher_divergence(student, [teacher], temperature=temperature).mean()
    torch.testing.assert_close(got, weight * one, rtol=1e-12, atol=0)
    right = torch.autograd.grad(weight * one, student)[0]
    torch.testing.assert_close(gradient(loss, student, [teacher] * K, target), right, rtol=1e-10, atol=1e-14)


@each
def test_a_student_that_is_its_teachers_has_nothing_to_learn(drawn, loss, weight, temperature):
    student, _, target = drawn
    teachers = [student.detach().clone()] * K
    assert loss(student, teachers, target).item() == pytest.approx(0, abs=1e-13)
    assert gradient(loss, student, teachers, target).abs().max() < 1e-14


@each
def test_an_offset_of_a_row_changes_nothing(drawn, loss, weight, temperature):
    student, teachers, target = drawn
    moved = [t + 100 * torch.randn(N, 1, dtype=torch.float64) for t in teachers]
    other = (student + 100 * torch.randn(N, 1, dtype=torch.float64)).detach().requires_grad_()
    torch.testing.assert_close(loss(other, moved, target), loss(student, teachers, target), rtol=1e-10, atol=0)
    right = gradient(loss, student, teachers, target)
    torch.testing.assert_close(gradient(loss, other, moved, target), right, rtol=1e-9, atol=1e-13)


@each
def test_the_order_of_the_teachers_does_not_matter(drawn, loss, weight, temperature):
    student, teachers, target = drawn
    right = gradient(loss, student, teachers, target)
    torch.testing.assert_close(gradient(loss, student, teachers[::-1], target), right, rtol=1e-9, atol=1e-14)


@each
def test_a_gradient_moves_no_probability_in_or_out(drawn, loss, weight, temperature):
    assert gradient(loss, *drawn).sum(1).abs().max() < 1e-14


def test_no_teacher_has_more_confidence_weight_than_its_share(drawn):
    weights = teacher_weights(drawn[1], drawn[2], rule="confidence")
    assert (weights >= 0).all()
    assert (weights <= 1 / (K - 1)).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("max_weight", [1 / K, 0.6, 1.0])
def test_the_ensembles_gradient_is_no_longer_than_any_other_mixtures(drawn, max_weight):
    """AE-KD minimises the norm of the batch's mean gradient."""
    student, teachers, target = drawn

    def norm(weights):
        parts = multi_teacher_divergence(student, teachers, temperature=4.0).mean(1)
        return torch.autograd.grad((weights * parts).sum(), student)[0].sum(0).norm()

    found = AEKDLoss(max_weight=max_weight).weights(student.detach(), teachers, target)
    best = norm(torch.full((K,), 1 / K, dtype=torch.float64) if found == "uniform" else found)
    for _ in range(50):
        other = torch.distributions.Dirichlet(torch.ones(K, dtype=torch.float64)).sample()
        if (other <= max_weight + 1e-12).all():
            assert best <= norm(other) * (1 + 1e-9)
