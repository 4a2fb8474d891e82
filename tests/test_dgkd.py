"""DGKD against its formula in float64, the guides that are left out, and the chain."""

import pytest
import torch
from torch import nn

from mtkd_fast import DGKDLoss, GuideSampler, dense_chain

N, C, G = 5, 7, 3
IMPLEMENTATIONS = ["cpp", "reference"]


@pytest.fixture
def logits():
    student = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    return student, [2 * torch.randn(N, C, dtype=torch.float64) for _ in range(G)], torch.randint(C, (N,))


def by_hand(student, guides, target, keep, lam, official, tau=5.0):
    total = 0
    for n in range(N):
        ce = -student[n].log_softmax(0)[target[n]]
        total = total + (1 - lam) * ce * (1 if official else G)
        for c, guide in zip(keep, guides, strict=True):
            log_p, log_q = (guide[n] / tau).log_softmax(0), (student[n] / tau).log_softmax(0)
            total = total + lam * c * tau**2 * (log_p.exp() * (log_p - log_q)).sum() / (C if official else 1)
    return total / N


@pytest.mark.parametrize("keep", [(1, 1, 1), (0, 1, 1), (1.5, 0, 1.5), (0.2, 1.0, 0.7)], ids=str)
@pytest.mark.parametrize("lam", [1.0, 0.6])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradient_are_the_formula(logits, implementation, official, lam, keep):
    student, guides, target = logits
    loss = DGKDLoss(kd_weight=lam, official_code=official, implementation=implementation)
    got, right = loss(*logits, keep), by_hand(student, guides, target, keep, lam, official)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(right, student)[0]
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("absent", ["none", "poisoned"])
def test_a_guide_that_is_left_out_need_not_exist_and_is_not_read(logits, absent):
    student, guides, target = logits
    right = DGKDLoss(kd_weight=0.5)(student, guides, target, [1, 0, 1])
    guides[1] = None if absent == "none" else torch.full_like(guides[1], float("nan"))
    assert torch.equal(DGKDLoss(kd_weight=0.5)(student, guides, target, [1, 0, 1]), right)
    if absent == "none":
        assert torch.equal(DGKDLoss(kd_weight=0.5)(student, guides, target), right), "None is as good as a 0"


def test_without_any_guide_the_labels_are_left(logits):
    student, _, target = logits
    loss = DGKDLoss(kd_weight=0.25)(student, [None] * G, target)
    right = G * 0.75 * nn.functional.cross_entropy(student, target)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("guides", "keep", "error", "message"),
    [
        ([], None, ValueError, "guide_logits must hold 1 to 64 guides, got 0"),
        (None, None, TypeError, "guide_logits must be a sequence of G tensors or None, got NoneType"),
        ([torch.zeros(N, C)], [1, 1], ValueError, "keep must hold 1 numbers, one a guide, got 2"),
        ([torch.zeros(N, C)], torch.ones(1), TypeError, "keep must be a sequence of 1 numbers on the host, got Tensor"),
        ([None], [1.0], ValueError, r"guide_logits\[0\] must be there, since keep\[0\] = 1\.0; got None"),
        ([torch.zeros(N, C)], ["1"], TypeError, r"keep\[0\] must be a number, got str"),
        ([torch.zeros(N, C), torch.zeros(N, 2)], None, ValueError, r"guide_logits\[1\] must have shape \(5, 7\)"),
        ([torch.zeros(N, C).long()], None, TypeError, r"guide_logits\[0\] must be float32"),
    ],
)  # fmt: skip
def test_bad_guides_are_named(logits, guides, keep, error, message):
    student, _, target = logits
    with pytest.raises(error, match=message):
        DGKDLoss()(student, guides, target, keep)


@pytest.mark.parametrize("keep_teacher", [False, True])
def test_a_fixed_count_is_left_out_each_as_often(keep_teacher):
    sampler = GuideSampler(4, drop=2, keep_teacher=keep_teacher, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([sampler() for _ in range(3000)])
    assert (kept.sum(1) == 2).all()
    share = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3] if keep_teacher else [0.5] * 4)
    torch.testing.assert_close(kept.mean(0), share, rtol=0, atol=0.04)


@pytest.mark.parametrize("rescale", ["none", "survivors"])
def test_each_survives_with_its_probability(rescale):
    generator = torch.Generator().manual_seed(0)
    sampler = GuideSampler(4, survival=0.75, at_least_one=False, rescale=rescale, generator=generator)
    kept = torch.tensor([sampler() for _ in range(3000)])
    torch.testing.assert_close((kept != 0).float().mean(0), torch.full((4,), 0.75), rtol=0, atol=0.04)
    some = kept.sum(1) > 0
    assert (kept.sum(1)[some] == 4).all() if rescale == "survivors" else ((kept == 0) | (kept == 1)).all()


def test_somebody_is_kept_and_the_teacher_if_asked():
    draws = [GuideSampler(3, survival=0.05)() for _ in range(200)]
    assert all(any(kept) for kept in draws)
    assert all(GuideSampler(3, survival=0.05, keep_teacher=True)()[0] == 1 for _ in range(50))
    assert any(not any(GuideSampler(3, survival=0.05, at_least_one=False)()) for _ in range(200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_guides=0, drop=0), "n_guides must be at least 1, got 0"),
        (dict(n_guides=3), "drop or survival must be given, and not both"),
        (dict(n_guides=3, drop=1, survival=0.5), "drop or survival must be given, and not both"),
        (dict(n_guides=3, drop=4, at_least_one=False), r"drop must be in \[0, 3\], got 4"),
        (dict(n_guides=3, drop=3), r"drop must be in \[0, 2\], got 3"),
        (dict(n_guides=3, survival=1.5), r"survival must be a finite number in \[0, 1\], got 1\.5"),
        (dict(n_guides=3, drop=1, rescale="all"), "rescale must be one of 'none', 'survivors', got 'all'"),
    ],
    ids=str,
)
def test_bad_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuideSampler(**options)


def test_labels_are_asked_for_by_name(logits):
    student, guides, _ = logits
    assert DGKDLoss()(student, guides).isfinite(), "with λ = 1 there is no hard label"
    with pytest.raises(ValueError, match=r"target must be given for the hard label, since kd_weight = 0\.5"):
        DGKDLoss(kd_weight=0.5)(student, guides)
    with pytest.raises(ValueError, match=r"kd_weight must be a finite number in \[0, 1\], got 1\.5"):
        DGKDLoss(kd_weight=1.5)


def test_the_chain_teaches_every_model_by_all_larger_ones():
    models = [nn.Linear(2, 2) for _ in range(4)]
    seen = []

    def train(model, guides):
        assert model.training
        assert not any(guide.training for guide in guides)
        seen.append((models.index(model), [models.index(guide) for guide in guides]))
        return len(guides)

    assert dense_chain(models, train) == [1, 2, 3]
    assert seen == [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])]
    with pytest.raises(ValueError, match="models must hold a teacher and at least one model to train, got 1"):
        dense_chain(models[:1], train)
