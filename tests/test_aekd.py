"""AE-KD: the weights against a solver of another library, the objective against gradients that autograd took."""

import pytest
import torch
from scipy import optimize

from mtkd_fast import AEKDLoss, AverageKDLoss
from mtkd_fast.losses.aekd import min_norm_weights

N, C, K, TAU = 6, 12, 3, 4.0


@pytest.fixture
def logits():
    student = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    return student, [3 * torch.randn(N, C, dtype=torch.float64) for _ in range(K)], torch.randint(C, (N,))


def kl(teacher, student):
    """τ² KL per batch."""
    log_p, log_q = (teacher / TAU).log_softmax(1), (student / TAU).log_softmax(1)
    return TAU**2 * (log_p.exp() * (log_p - log_q)).sum() / N


def mean_gradients(student, teachers):
    return torch.stack([torch.autograd.grad(kl(t, student), student)[0].mean(0) for t in teachers])


def by_another_solver(gram, cap):
    g = (gram / gram.diagonal().mean()).numpy()
    found = optimize.minimize(
        lambda a: 0.5 * a @ g @ a, [1 / len(g)] * len(g), jac=lambda a: g @ a, bounds=[(0, cap)] * len(g),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1}, method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("cap", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_weights_solve_the_quadratic_program(n, cap):
    for scale in (1.0, 1e-9):
        v = torch.randn(n, 4, dtype=torch.float64) + torch.randn(4, dtype=torch.float64)
        gram, bound = scale * v @ v.T, max(cap, 1 / n)
        a, other = min_norm_weights(gram, cap), by_another_solver(gram, bound)
        assert a.sum().item() == pytest.approx(1, abs=1e-12)
        assert (a >= 0).all()
        assert (a <= bound).all()
        assert a @ gram @ a <= (other @ gram @ other) * (1 + 1e-7) + 1e-12 * scale
        if n <= 4:  # the solution is unique
            torch.testing.assert_close(a, other, rtol=0, atol=1e-4)


def test_two_teachers_in_closed_form():
    v = torch.randn(2, 9, dtype=torch.float64)
    g = v @ v.T
    first = ((g[1, 1] - g[0, 1]) / (g[0, 0] + g[1, 1] - 2 * g[0, 1])).clamp(0.4, 0.6)
    torch.testing.assert_close(min_norm_weights(g, 0.6), torch.stack([first, 1 - first]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gram", [torch.ones, torch.zeros], ids=["equal", "like the student"])
def test_equal_teachers_share_evenly(gram):
    a = min_norm_weights(gram(4, 4, dtype=torch.float64), 0.6)
    torch.testing.assert_close(a, torch.full_like(a, 0.25), rtol=0, atol=1e-3)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_value_and_gradient_are_the_formula(logits, implementation, normalise):
    student, teachers, target = logits
    v = mean_gradients(student, teachers)
    length = v.norm(dim=1)
    if normalise:
        a = by_another_solver((v / length[:, None]) @ (v / length[:, None]).T, 0.6) / length
        a = a / a.sum()
    else:
        a = by_another_solver(v @ v.T, 0.6)
    right = torch.nn.functional.cross_entropy(student, target)
    right = right + sum(weight * kl(t, student) for weight, t in zip(a, teachers, strict=True))
    loss = AEKDLoss(normalise=normalise, implementation=implementation)(*logits)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(right, student)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], wanted, rtol=1e-4, atol=1e-6)


def test_at_most_one_over_k_is_the_average(logits):
    torch.testing.assert_close(AEKDLoss(max_weight=0.1)(*logits), AverageKDLoss()(*logits), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("n_teachers", "max_weight", "wanted"),
    [(3, 0.6, [0.6, 0.4, 0]), (4, 0.3, [0.3, 0.3, 0.3, 0.1]), (3, 1.0, [1, 0, 0]), (2, 0.1, [0.5, 0.5])],
)
def test_the_released_solver_returns_where_it_starts(logits, n_teachers, max_weight, wanted):
    student, teachers, target = logits
    teachers = (teachers * 2)[:n_teachers]
    loss = AEKDLoss(max_weight=max_weight, solver="legacy_init")(student, teachers, target)
    right = torch.nn.functional.cross_entropy(student, target)
    right = right + sum(weight * kl(t, student) for weight, t in zip(wanted, teachers, strict=True))
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)


def test_ignored_rows_weigh_nothing(logits):
    student, teachers, target = logits
    target[4:] = -100
    some = AEKDLoss()(student, teachers, target)
    torch.testing.assert_close(some, AEKDLoss()(student[:4], [t[:4] for t in teachers], target[:4]), rtol=1e-9, atol=0)


def test_too_many_teachers_for_the_exact_solver_are_refused(logits):
    student, (teacher, *_), target = logits
    with pytest.raises(ValueError, match=r"teacher_logits must hold at most 9 teachers .* got 16"):
        AEKDLoss()(student, [teacher] * 16, target)


def test_where_nothing_is_to_be_solved_any_number_of_teachers_will_do(logits):
    student, (teacher, *_), target = logits
    many = [teacher] * 16
    average = AverageKDLoss()(student, many, target)
    torch.testing.assert_close(AEKDLoss(max_weight=1 / 16)(student, many, target), average, rtol=1e-12, atol=0)
    ce = torch.nn.functional.cross_entropy(student, target)
    torch.testing.assert_close(AEKDLoss(kd_weight=0.0)(student, many, target), ce, rtol=1e-12, atol=0)


def test_one_graph_and_no_look_at_the_host(logits):
    """What torch.compile takes as one graph reads no number back from the device."""
    compiled = torch.compile(AEKDLoss(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*logits), AEKDLoss()(*logits), rtol=1e-12, atol=0)


def test_a_teacher_without_weight_has_exactly_none(logits):
    v = torch.tensor([[1.0, 0.0], [0.9, 0.1], [50.0, 50.0]], dtype=torch.float64)
    assert min_norm_weights(v @ v.T, 0.6)[2] == 0


@pytest.mark.parametrize("shape", [(C,), (2, 3, C)], ids=str)
def test_rows_are_any_leading_dimensions(shape):
    student, *teachers = torch.randn(4, *shape)
    target = torch.randint(C, shape[:-1])
    flat = AEKDLoss()(student.reshape(-1, C), [t.reshape(-1, C) for t in teachers], target.reshape(-1))
    torch.testing.assert_close(AEKDLoss()(student, teachers, target), flat)


@pytest.mark.parametrize("options", [dict(max_weight=0.0), dict(max_weight=1.5), dict(solver="svm")], ids=str)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AEKDLoss(**options)
