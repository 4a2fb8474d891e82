"""CAMKDLoss against its formulas, written once more in float64, and against the scaling of the official code."""

import pytest
import torch
import torch.nn.functional as F

from mtkd_fast import CAMKDLoss, HintAdapter

N, C, K = 6, 10, 3
SHAPES = [(8, 4, 4), (5, 3, 3), (7,)]  # a teacher's features need not look like another's


@pytest.fixture
def inputs():
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    student, target = leaf(N, C), torch.randint(C, (N,))
    teachers = [torch.randn(N, C, dtype=torch.float64) * 3 for _ in range(K)]
    adapted = [leaf(N, *shape) for shape in SHAPES]
    features = [torch.randn(N, *shape, dtype=torch.float64) for shape in SHAPES]
    heads = [leaf(N, C) for _ in range(K)]
    return student, teachers, target, adapted, features, heads


def confidence(ce):
    return (1 - ce.exp() / ce.exp().sum(0)) / (len(ce) - 1)


def label_losses(logits, target):
    return torch.stack([torch.stack([-x[n].log_softmax(0)[y] for n, y in enumerate(target)]) for x in logits])


def by_hand(student, teachers, target, adapted, features, heads, *, official):
    """γ = 1, α = 1, β = 50, τ = 4. methods: weights over the batch rows, sums over teachers, means over rows."""
    tau, total = 4.0, student.new_zeros(())
    w = confidence(label_losses(teachers, target))
    v = confidence(label_losses(heads, target))
    if not official:
        v = v.detach()
    for n in range(N):
        log_q = (student[n] / tau).log_softmax(0)
        soft = inter = 0
        for k in range(K):
            p = (teachers[k][n] / tau).softmax(0)
            soft = soft + w[k, n] * (p * (p.log() - log_q)).sum()
            inter = inter + v[k, n] * ((adapted[k][n] - features[k][n]) ** 2).mean()
        share = K if official else 1
        total = total + (-student[n].log_softmax(0)[target[n]] + tau**2 * soft / share + 50 * inter / share) / N
    return total


def leaves(inputs):
    student, _, _, adapted, _, heads = inputs
    return [student, *adapted, *heads]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_value_and_gradients_are_the_formulas(inputs, name, official):
    expected = by_hand(*inputs, official=official)
    got = CAMKDLoss(official_code=official, implementation=name)(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves(inputs), allow_unused=True),
        torch.autograd.grad(expected, leaves(inputs), allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_only_the_official_code_teaches_the_heads(inputs):
    heads = inputs[-1]
    clean = torch.autograd.grad(CAMKDLoss()(*inputs), heads, allow_unused=True)
    official = torch.autograd.grad(CAMKDLoss(official_code=True)(*inputs), heads)
    assert all(g is None for g in clean)
    assert all(g.abs().max() > 0 for g in official)


def test_the_official_code_divides_by_the_teachers_once_more(inputs):
    student, teachers, target, *_ = inputs
    hard = F.cross_entropy(student, target)
    clean, official = (CAMKDLoss(official_code=x)(student, teachers, target) - hard for x in (False, True))
    torch.testing.assert_close(official * K, clean, rtol=1e-10, atol=0)


@pytest.mark.parametrize("official", [False, True])
def test_one_teacher_has_weight_one(inputs, official):
    student, teachers, target, adapted, features, heads = (x[:1] if isinstance(x, list) else x for x in inputs)
    got = CAMKDLoss(official_code=official)(student, teachers, target, adapted, features, heads)
    kl = F.kl_div((student / 4).log_softmax(-1), (teachers[0] / 4).softmax(-1), reduction="batchmean")
    expected = F.cross_entropy(student, target) + 16 * kl + 50 * F.mse_loss(adapted[0], features[0])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_part_of_the_hint_term_is_refused(inputs):
    student, teachers, target, adapted, features, _ = inputs
    with pytest.raises(ValueError, match="head_logits"):
        CAMKDLoss()(student, teachers, target, adapted, features)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: i[3].pop(), ValueError, "teacher_features must hold 2 tensors like adapted_features, got 3"),
        (lambda i: i[5].pop(), ValueError, "must hold 3 tensors like teacher_logits, got 3, 3 and 2"),
        (lambda i: i[3].__setitem__(1, None), TypeError, r"adapted_features\[1\] must be a tensor, got NoneType"),
        (lambda i: i[4].__setitem__(2, i[4][0]), ValueError, r"teacher_features\[2\] must have shape \(6, 7\) like"),
        (lambda i: i[5].__setitem__(0, i[5][0][:, 1:]), ValueError, r"head_logits\[0\] must have shape \(6, 10\)"),
    ],
    ids=["a feature less", "a head less", "a feature that is none", "another shape", "a head of other classes"],
)
def test_bad_lists_are_named(inputs, change, error, message):
    change(inputs)
    with pytest.raises(error, match=message):
        CAMKDLoss()(*inputs)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (dict(temperature=0.0), ValueError),
        (dict(hint_weight="50"), TypeError),
        (dict(ce_weight=float("nan")), ValueError),
        (dict(official_code=1), TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused_when_it_is_made(option, error):
    with pytest.raises(error, match=next(iter(option))):
        CAMKDLoss(**option)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8), (4, 4)])
def test_adapter_brings_maps_to_the_teachers_size(student_size, teacher_size):
    adapter = HintAdapter(3, 5)
    teacher = torch.randn(N, 5, teacher_size, teacher_size)
    adapted = adapter(torch.randn(N, 3, student_size, student_size), teacher)
    assert adapted.shape == teacher.shape
    assert (adapted >= 0).all()
    adapted.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_adapter_takes_vectors():
    assert HintAdapter(3, 5)(torch.randn(N, 3), torch.randn(N, 5)).shape == (N, 5)


def test_adapter_survives_its_state_dict():
    a, b = HintAdapter(3, 5).eval(), HintAdapter(3, 5).eval()
    b.load_state_dict(a.state_dict())
    x, teacher = torch.randn(N, 3, 4, 4), torch.randn(N, 5, 2, 2)
    assert torch.equal(a(x, teacher), b(x, teacher))


@pytest.mark.parametrize("official", [False, True])
def test_ignored_rows_count_in_neither_term(inputs, official):
    student, teachers, target, adapted, features, heads = inputs
    target = target.clone()
    target[2:] = -100
    some = CAMKDLoss(official_code=official)(student, teachers, target, adapted, features, heads)
    kept = [[x[:2] for x in xs] if isinstance(xs, list) else xs[:2] for xs in inputs]
    torch.testing.assert_close(some, CAMKDLoss(official_code=official)(*kept), rtol=1e-12, atol=0)
