"""Traps of the weights and of several teachers."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases.kd import INF, WITHOUT_TARGET, check

from mtkd_fast.checks import WEIGHT_RULES

N, C = 6, 40
every_rule = pytest.mark.parametrize("rule", WEIGHT_RULES)
every_divergence = pytest.mark.parametrize("divergence", WITHOUT_TARGET)


@pytest.fixture
def logits(backend):
    student, *teachers = (torch.randn(N, C, device=backend.device) for _ in range(4))
    return student, teachers, torch.randint(C, (N,), device=backend.device)


def gradient_of(loss, x):
    return torch.autograd.grad(loss, x)[0]


@every_rule
def test_trap_11_one_teacher_has_weight_one(backend, logits, rule):
    """CA-MKD and EBKD divide by K - 1."""
    student, teachers, target = logits
    assert torch.equal(backend.weights(teachers[:1], target, rule=rule), torch.ones(1, N, device=backend.device))
    loss = backend.loss(student, teachers[:1], target, weights=rule)
    torch.testing.assert_close(loss, backend.loss(student, teachers[:1]), rtol=1e-6, atol=0)


def test_trap_11_one_hopeless_teacher_has_weight_one(backend, logits):
    _, teachers, target = logits
    teachers[0][torch.arange(N), target] = -INF
    got = backend.weights(teachers[:1], target, rule="confidence")
    assert torch.equal(got, torch.ones(1, N, device=backend.device))


def test_trap_12_equal_cross_entropies_give_uniform_weights(backend, logits):
    _, teachers, target = logits
    got = backend.weights([teachers[0]] * 4, target, rule="confidence")
    torch.testing.assert_close(got, torch.full((4, N), 0.25, device=backend.device))


@pytest.mark.parametrize("hopeless", [1, 2, 3])
def test_trap_12_teachers_that_exclude_the_label_share_the_softmax(backend, logits, hopeless):
    student, teachers, target = logits
    for t in teachers[:hopeless]:
        t[torch.arange(N), target] = -INF
    got = backend.weights(teachers, target, rule="confidence")
    share = torch.tensor([1 / hopeless] * hopeless + [0.0] * (3 - hopeless), device=backend.device)
    torch.testing.assert_close(got, ((1 - share) / 2)[:, None].expand(3, N))
    check(backend, student, teachers, target, weights="confidence")


def test_trap_12_teachers_without_entropy_share_equally(backend):
    certain = [torch.where(torch.arange(C, device=backend.device) == k, 0.0, -INF).expand(N, C) for k in range(3)]
    got = backend.weights(certain, rule="entropy")
    torch.testing.assert_close(got, torch.full((3, N), 1 / 3, device=backend.device))


@every_rule
def test_trap_12_weights_of_a_rule_sum_to_one(backend, logits, rule):
    _, teachers, target = logits
    sums = backend.weights([10 * t for t in teachers], target, rule=rule).sum(0)
    torch.testing.assert_close(sums, torch.ones(N, device=backend.device))


def test_trap_13_one_weight_for_the_batch_is_that_weight_for_every_row(backend, logits):
    student, teachers, _ = logits
    w = torch.rand(3, device=backend.device)
    assert torch.equal(
        backend.loss(student, teachers, weights=w), backend.loss(student, teachers, weights=w[:, None].expand(3, N))
    )


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_trap_13_given_weights_are_used_as_they_are(backend, logits, factor):
    """Any sign and sum; nothing is normalised."""
    student, teachers, _ = logits
    student.requires_grad_()
    w = torch.rand(3, N, device=backend.device)
    one, scaled = (backend.loss(student, teachers, weights=x) for x in (w, factor * w))
    torch.testing.assert_close(scaled, factor * one)
    torch.testing.assert_close(gradient_of(scaled, student), factor * gradient_of(one, student))


def test_trap_13_a_row_of_zero_weights_gives_zero_and_still_counts(backend, logits):
    student, teachers, _ = logits
    student.requires_grad_()
    w = torch.rand(3, N, device=backend.device)
    w[:, 2] = 0
    per_row = backend.loss(student, teachers, weights=w, reduction="none")
    assert per_row[2] == 0
    mean = backend.loss(student, teachers, weights=w)
    torch.testing.assert_close(mean, per_row.sum() / N)
    assert (gradient_of(mean, student)[2] == 0).all()


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
@every_divergence
def test_trap_14_rules_are_constants(backend, logits, divergence, rule):
    """No gradient flows through the weights: not to the teachers that they come from, nor to the student."""
    student, teachers, target = logits
    leaves = [student.requires_grad_(), *(t.requires_grad_() for t in teachers)]
    w = backend.weights(teachers, target, rule=rule)
    assert not w.requires_grad
    by_rule = backend.loss(student, teachers, target, weights=rule, divergence=divergence)
    as_given = backend.loss(student, teachers, target, weights=w, divergence=divergence)
    for a, b in zip(torch.autograd.grad(by_rule, leaves), torch.autograd.grad(as_given, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@every_rule
def test_trap_14_the_order_of_the_teachers_does_not_matter(backend, logits, rule):
    student, teachers, target = logits
    student.requires_grad_()
    loss = backend.loss(student, teachers, target, weights=rule, temperature=2.0)
    turned = backend.loss(student, teachers[1:] + teachers[:1], target, weights=rule, temperature=2.0)
    torch.testing.assert_close(turned, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_of(turned, student), gradient_of(loss, student), rtol=1e-5, atol=1e-8)
    w = backend.weights(teachers, target, rule=rule)
    turned = backend.weights(teachers[1:] + teachers[:1], target, rule=rule)
    torch.testing.assert_close(turned, w.roll(-1, 0), rtol=1e-6, atol=1e-7)


@every_rule
@pytest.mark.parametrize("copies", [2, 7])
def test_trap_14_copies_of_a_teacher_are_that_teacher(backend, logits, rule, copies):
    student, teachers, target = logits
    student.requires_grad_()
    one = backend.loss(student, teachers[:1], target, temperature=4.0)
    many = backend.loss(student, teachers[:1] * copies, target, weights=rule, temperature=4.0)
    torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(many, student), gradient_of(one, student), rtol=1e-5, atol=1e-8)


@every_divergence
@pytest.mark.parametrize("tau", [2.0, 3.7, 0.5])
def test_trap_15_temperature_squared_multiplies_loss_and_gradient_alike(backend, logits, divergence, tau):
    student, teachers, _ = logits
    student.requires_grad_()
    kwargs = dict(divergence=divergence, temperature=tau)
    plain = backend.loss(student, teachers, temperature_squared=False, **kwargs)
    squared = backend.loss(student, teachers, **kwargs)
    torch.testing.assert_close(squared, tau**2 * plain)
    torch.testing.assert_close(gradient_of(squared, student), tau**2 * gradient_of(plain, student))


def test_trap_15_temperature_squared_leaves_the_hard_label_alone(backend, logits):
    student, teachers, target = logits
    got = backend.loss(student, teachers, target, kd_weight=0.0, ce_weight=1.0, temperature=4.0)
    torch.testing.assert_close(got, F.cross_entropy(student, target))


def test_trap_15_the_direction_is_what_its_name_says(backend, logits):
    """kl_div(input, target) of PyTorch is KL(target || input)."""
    student, (teacher, *_), _ = logits
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert abs(forward - reverse) > 0.01
    torch.testing.assert_close(backend.loss(student, [teacher], divergence="forward_kl"), forward)
    torch.testing.assert_close(backend.loss(student, [teacher], divergence="reverse_kl"), reverse)


def test_trap_15_forward_kl_is_soft_cross_entropy_less_the_teachers_entropy(backend, logits):
    student, (teacher, *_), _ = logits
    p = teacher.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    got = backend.loss(student, [teacher])
    torch.testing.assert_close(got, F.cross_entropy(student, p) - entropy)


def test_trap_16_mixture_mean_logits_and_mean_of_losses_are_three_things(backend, logits):
    student, teachers, _ = logits
    t = torch.stack([3 * t for t in teachers])
    of_losses = backend.loss(student, list(t))
    to_mixture = backend.loss(student, [t.softmax(-1).mean(0).log()])
    to_mean_logits = backend.loss(student, [t.mean(0)])
    mean = sum(backend.loss(student, [t_k]) for t_k in t) / 3
    torch.testing.assert_close(of_losses, mean)
    values = sorted([of_losses.item(), to_mixture.item(), to_mean_logits.item()])
    assert min(b - a for a, b in pairwise(values)) > 0.05
