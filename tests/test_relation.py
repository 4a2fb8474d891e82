"""The op ``relation``: every backend on its case table, and what a table cannot say."""

import pytest
import torch
from cases.relation import CASES, FLOAT64_CASES, LOSSES, assert_matches, build, evaluate, oracle

from mtkd_fast.reference import relation as reference
from mtkd_fast.relation import relations_to_peers

each = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, fused):
    got = evaluate(case, *build(case, fused.device), fused.implementation)
    assert_matches(got, oracle(case), fused.interpreted)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, fused64):
    got = evaluate(case, *build(case), fused64.implementation)
    assert got.loss.dtype == torch.float64
    assert_matches(got, oracle(case))


@pytest.mark.parametrize("case", [c for c in CASES if "cluster" in c.values], ids=str)
def test_tight_clusters_lose_no_digits(case, fused):
    """Whatever plain PyTorch may lose there."""
    got, exact = evaluate(case, *build(case, fused.device), fused.implementation), oracle(case).exact
    assert (got.loss.cpu().double() - exact.loss).abs() <= 1e-5 * exact.loss
    if got.gradient.dtype == torch.float32:
        error = (got.gradient.cpu().double() - exact.gradient).abs().max()
        assert error <= 1e-5 * exact.gradient.abs().max()


def by_hand(name, student, teacher):
    """Entry by entry."""

    def relations(x):
        b = len(x)
        d = [[(x[i] - x[j]).norm() for j in range(b)] for i in range(b)]
        if name == "distance":
            mean = sum(d[i][j] for i in range(b) for j in range(b) if i != j) / (b * (b - 1))
            return [d[i][j] / mean for i in range(b) for j in range(b)]
        found = []
        for i in range(b):
            for j in range(b):
                for k in range(b):
                    apart = d[i][j] > 0 and d[i][k] > 0
                    dot = (x[j] - x[i]) @ (x[k] - x[i])
                    found.append(dot / (d[i][j] * d[i][k]) if apart else torch.zeros((), dtype=x.dtype))
        return found

    e = torch.stack(relations(student)) - torch.stack(relations(teacher))
    return torch.where(e.abs() < 1, 0.5 * e**2, e.abs() - 0.5).mean()


@each
def test_entry_by_entry(name, backend):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    dtype = torch.float64 if backend.float64 else torch.float32
    student, teacher = student.to(backend.device, dtype), teacher.to(backend.device, dtype)
    loss = LOSSES[name](student, teacher, implementation=backend.implementation)
    rtol = 1e-12 if backend.float64 else 1e-6
    torch.testing.assert_close(loss.double(), by_hand(name, student.double(), teacher.double()), rtol=rtol, atol=0)


@each
def test_the_same_every_time(name, fused):
    """No sum depends on who is first."""
    student, teacher = torch.randn(40, 6, device=fused.device), torch.randn(40, 6, device=fused.device)
    student.requires_grad_()
    runs = [LOSSES[name](student, teacher, implementation=fused.implementation) for _ in range(2)]
    assert runs[0].equal(runs[1])
    a, b = (torch.autograd.grad(loss, student)[0] for loss in runs)
    assert a.equal(b)


@each
@pytest.mark.parametrize("points", ["one", "all alike", "all zero"])
def test_nothing_to_compare_is_exactly_0(name, points, fused):
    student = torch.zeros(4, 3) if points == "all zero" else torch.ones(1 if points == "one" else 4, 3)
    student = student.to(fused.device).requires_grad_()
    loss = LOSSES[name](student, student.detach().clone(), implementation=fused.implementation)
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


@each
def test_gradcheck(name, fused64):
    student, teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 5).double()
    assert torch.autograd.gradcheck(lambda s: -2.5 * LOSSES[name](s, teacher), student)


@each
def test_without_a_gradient(name, fused):
    student, teacher = torch.randn(20, 4, device=fused.device), torch.randn(20, 5, device=fused.device)
    loss = LOSSES[name](student, teacher, implementation=fused.implementation)
    assert not loss.requires_grad
    with_gradient = LOSSES[name](student.requires_grad_(), teacher, implementation=fused.implementation)
    torch.testing.assert_close(loss, with_gradient.detach(), rtol=1e-6, atol=0)


@each
def test_double_backward_is_refused_and_the_graph_can_be_kept(name, fused):
    student = torch.randn(6, 4, device=fused.device, requires_grad=True)
    loss = LOSSES[name](student, torch.randn(6, 5, device=fused.device), implementation=fused.implementation)
    first, again = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert first.equal(again)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=f"double backward through implementation='{fused.implementation}'"):
        gradient.sum().backward()


class Silent(torch.autograd.Function):
    """Passes nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


@each
def test_an_upstream_that_is_not_there_gives_no_gradient(name, fused):
    student = torch.randn(6, 4, device=fused.device, requires_grad=True)
    loss = LOSSES[name](student, torch.randn(6, 5, device=fused.device), implementation=fused.implementation)
    (gradient,) = torch.autograd.grad(Silent.apply(loss), student, allow_unused=True)
    assert gradient is None


@each
def test_one_graph(name, implementation):
    student, teacher = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)

    def eager(student, teacher):
        row_mask = student[:, 0] > -1
        loss = LOSSES[name](student, teacher, row_mask=row_mask, implementation=implementation)
        return loss + LOSSES[name](student, teacher, implementation=implementation)

    loss = torch.compile(eager, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(loss, eager(student, teacher))
    right = torch.autograd.grad(eager(student, teacher), student)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], right)


@each
def test_embeddings_of_any_shape(name):
    student, teacher = torch.randn(6, 2, 3, 2), torch.randn(6, 4)
    assert torch.equal(LOSSES[name](student, teacher), LOSSES[name](student.flatten(1), teacher))


@each
@pytest.mark.parametrize("side", [0, 1])
def test_a_single_sample_of_nan_is_nan(name, side, backend):
    pair = [torch.randn(1, 3, device=backend.device) for _ in range(2)]
    pair[side][0, 1] = float("nan")
    assert LOSSES[name](*pair, implementation=backend.implementation).isnan()


def test_the_reference_hides_no_nan():
    x = torch.randn(4, 3)
    x[1, 1] = float("nan")
    assert reference.angles(x)[1].isnan().all()
    assert reference.distances(x)[1].isnan().sum() == 3


@each
def test_a_mask_of_nobody_is_zero_and_attached(name, backend):
    student = torch.full((5, 3), float("nan"), device=backend.device, requires_grad=True)
    mask = torch.zeros(5, dtype=torch.bool, device=backend.device)
    loss = LOSSES[name](student, student.detach(), row_mask=mask, implementation=backend.implementation)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@each
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 3, TypeError, "row_mask must be a tensor, got list"),
        (torch.ones(3), TypeError, "row_mask must be bool, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"row_mask must have shape \(3,\), one a sample, got \(2,\)"),
        (torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "row_mask must be on cpu like student, got meta"),
    ],
)
def test_a_bad_mask_is_named(name, mask, error, message):
    with pytest.raises(error, match=message):
        LOSSES[name](torch.zeros(3, 2), torch.zeros(3, 2), row_mask=mask)


# Students that learn from one another.


def of_the_first_of_two(student, teacher, **options):
    return relations_to_peers([student, teacher], angle_weight=0.0, **options)[0]


@pytest.mark.parametrize("case", [c for c in CASES if c.relation == "distance"], ids=str)
def test_case_of_two_peers(case, fused):
    got = evaluate(case, *build(case, fused.device), fused.implementation, of_the_first_of_two)
    assert_matches(got, oracle(case), fused.interpreted)


def peer_by_peer(points, row_mask, angle_weight, implementation):
    losses = []
    for k, student in enumerate(points):
        loss = 0.0
        for peer in (x.detach() for j, x in enumerate(points) if j != k):
            options = dict(row_mask=row_mask, implementation=implementation)
            loss = loss + LOSSES["distance"](student, peer, **options)
            loss = loss + angle_weight * LOSSES["angle"](student, peer, **options)
        losses.append(loss / (len(points) - 1))
    return torch.stack(losses)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("angle_weight", [0.0, 1.7])
@pytest.mark.parametrize("m", [2, 3])
def test_relations_to_peers_are_those_pair_by_pair(m, angle_weight, masked, backend):
    points = [torch.randn(9, 4 + k, device=backend.device) for k in range(m)]
    leaves = [x.requires_grad_(k != 2) for k, x in enumerate(points)]  # the third one only teaches
    row_mask = torch.arange(9, device=backend.device) % 4 != 1 if masked else None
    options = dict(row_mask=row_mask, angle_weight=angle_weight, implementation=backend.implementation)
    losses, right = relations_to_peers(leaves, **options), peer_by_peer(leaves, *options.values())
    torch.testing.assert_close(losses, right, rtol=1e-6, atol=0)
    upstream = torch.tensor([0.7, -2.0, 5.0][:m], device=backend.device)
    found, wanted = (torch.autograd.grad(x, leaves[:2], upstream) for x in (losses, right))
    for gradient, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(relations_to_peers(leaves, **options), losses.detach(), rtol=1e-6, atol=0)


def test_gradcheck_of_relations_to_peers(fused64):
    points = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for k in range(3):  # each with the others held

        def loss(x, k=k):
            others = [x if j == k else y.detach() for j, y in enumerate(points)]
            return relations_to_peers(others, row_mask=None, angle_weight=0.5, implementation="cpp")[k]

        assert torch.autograd.gradcheck(loss, points[k])


def test_one_side_a_student(fused):
    """Three students: three Gram matrices at most, where pair by pair there are twenty-four."""
    points = [torch.randn(5, 3, device=fused.device, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        losses = relations_to_peers(points, row_mask=None, angle_weight=1.0, implementation=fused.implementation)
        losses.sum().backward()
    assert sum(event.name == "aten::mm" for event in seen.events()) <= 3 + 3, "a Gram matrix and a gradient a student"


@each
@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        ([1.0], torch.zeros(3, 2), TypeError, "student must be a tensor, got list"),
        (torch.zeros(3), torch.zeros(3, 2), ValueError, r"student must have shape \[B, ...\], .* got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(4, 2), ValueError, "teacher must hold as many samples .* got 4 and 3"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), TypeError, "student must be float32, .* got torch.int64"),
        (torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True), ValueError, "teacher must not require grad"),
    ],
)  # fmt: skip
def test_bad_input_is_named(name, student, teacher, error, message):
    with pytest.raises(error, match=message):
        LOSSES[name](student, teacher)
