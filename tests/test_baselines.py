"""The plain multi-teacher losses against their formulas, written once more row by row in float64."""

import pytest
import torch

from mtkd_fast import AverageKDLoss, EntropyKDLoss, FitNetKDLoss

N, C, K = 5, 7, 3
IMPLEMENTATIONS = ["cpp", "reference"]


@pytest.fixture
def logits():
    student = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    return student, [3 * torch.randn(N, C, dtype=torch.float64) for _ in range(K)], torch.randint(C, (N,))


def kl(teacher, student, tau):
    log_p, log_q = (teacher / tau).log_softmax(0), (student / tau).log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


def by_hand(student, teachers, target, weight, tau=4.0):
    """Σ over rows of CE + τ² Σ_k weight(n, k) KL_k, over N."""
    total = 0
    for n in range(N):
        total = total - student[n].log_softmax(0)[target[n]]
        for k, t in enumerate(teachers):
            total = total + tau**2 * weight(n, k) * kl(t[n], student[n], tau)
    return total / N


def entropy_weights(teachers, official):
    h = torch.stack([-(t.softmax(1) * t.log_softmax(1)).sum(1) for t in teachers])
    w = 1 - h / h.sum(0)
    return w / len(teachers) if official else w / (len(teachers) - 1)


def assert_same(loss, right, *leaves):
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_average_is_the_formula(logits, implementation):
    student = logits[0]
    loss = AverageKDLoss(implementation=implementation)(*logits)
    assert_same(loss, by_hand(*logits, lambda n, k: 1 / K), student)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entropy_is_the_formula(logits, implementation, official):
    student, teachers, _ = logits
    w = entropy_weights(teachers, official)
    loss = EntropyKDLoss(official_code=official, implementation=implementation)(*logits)
    assert_same(loss, by_hand(*logits, lambda n, k: w[k, n]), student)


def test_entropy_of_one_teacher(logits):
    """The cleaned form is that teacher's KD; the official weight of a single teacher is 1 − H/H = 0."""
    student, teachers, target = logits
    one = (student, teachers[:1], target)
    torch.testing.assert_close(EntropyKDLoss()(*one), AverageKDLoss()(*one), rtol=1e-12, atol=0)
    official = EntropyKDLoss(official_code=True)(*one)
    torch.testing.assert_close(official, torch.nn.functional.cross_entropy(student, target), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [AverageKDLoss(), EntropyKDLoss()], ids=["average", "entropy"])
def test_equal_teachers_teach_like_one(logits, loss):
    student, (teacher, *_), target = logits
    assert_same(loss(student, [teacher] * 4, target), loss(student, [teacher], target), student)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fitnet_is_the_formula_and_the_official_hints_teach_nobody(logits, implementation, official):
    student = logits[0]
    shapes = [(N, 4, 3, 3), (N, 6), (N, 2, 5)]
    adapted = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    wanted = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    hint = sum(((f - g) ** 2).mean() for f, g in zip(adapted, wanted, strict=True)) / K
    right = by_hand(*logits, lambda n, k: 1 / K) + 100 * hint
    loss = FitNetKDLoss(official_code=official, implementation=implementation)(*logits, adapted, wanted)
    if not official:
        return assert_same(loss, right, student, *adapted)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(loss, adapted, allow_unused=True, retain_graph=True) == (None,) * K
    alone = torch.autograd.grad(AverageKDLoss()(*logits), student)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], alone, rtol=1e-12, atol=0)


def test_fitnet_names_a_list_of_another_length(logits):
    feature = torch.zeros(N, 3)
    with pytest.raises(
        ValueError, match="adapted_features must hold 3 tensors of 5 samples like teacher_logits, got 2 of 5"
    ):
        FitNetKDLoss()(*logits, [feature] * 2, [feature] * 2)


def test_fitnet_counts_no_ignored_row_and_reads_nothing_without_a_weight(logits):
    student, teachers, target = logits
    target[3:] = -100
    adapted, wanted = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    adapted[3:] = float("nan")
    some = FitNetKDLoss()(student, teachers, target, [adapted] * K, [wanted] * K)
    kept = (student[:3], [t[:3] for t in teachers], target[:3], [adapted[:3]] * K, [wanted[:3]] * K)
    torch.testing.assert_close(some, FitNetKDLoss()(*kept), rtol=1e-12, atol=0)
    without = FitNetKDLoss(hint_weight=0.0)(student, teachers, target, None, None)
    assert torch.equal(without, AverageKDLoss()(student, teachers, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [AverageKDLoss(), EntropyKDLoss()], ids=["average", "entropy"])
def test_any_dtype_and_any_leading_dimensions(logits, loss, dtype):
    student, *teachers = torch.randn(K + 1, 2, N, C).to(dtype)
    target = torch.randint(C, (2, N))
    flat = loss(student.flatten(0, 1), [t.flatten(0, 1) for t in teachers], target.flatten())
    assert torch.equal(loss(student, teachers, target), flat)
    exact = loss(student.double(), [t.double() for t in teachers], target)
    torch.testing.assert_close(flat.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [AverageKDLoss, EntropyKDLoss, FitNetKDLoss])
def test_options_are_checked_and_shown(loss):
    assert "temperature=2.0" in repr(loss(temperature=2.0))
    with pytest.raises(TypeError, match="kd_weight must be a number, got str"):
        loss(kd_weight="1")
