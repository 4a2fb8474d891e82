"""The op ``mutual``: every backend on its case table, and what the table does not say."""

import pytest
import torch
from cases import BF16, F16, F32, F64, INF, NAN
from cases.mutual import CASES, FLOAT64_CASES, assert_matches, build, evaluate, oracle

from mtkd_fast import multi_teacher_divergence, multi_teacher_kd_loss, mutual_kd_loss

N, C = 5, 12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, fused):
    got = evaluate(build(case, fused.device), fused.implementation)
    assert_matches(got, oracle(case), fused.interpreted)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_case(case, fused64):
    got = evaluate(build(case, fused64.device), fused64.implementation)
    assert got.loss.dtype == F64
    assert_matches(got, oracle(case))


def draw(m, device="cpu", dtype=F32, shape=(N, C)):
    return [torch.randn(*shape, device=device).to(dtype).requires_grad_() for _ in range(m)]


def gradients(loss, students, upstream=None):
    return torch.autograd.grad(loss, students, upstream)


# The formula once more.


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("m", [2, 3])
def test_it_is_the_double_loop(implementation, m, detach):
    students, tau = draw(m, dtype=F64), 1.7
    a = torch.rand(m, m, dtype=F64)
    total, divergences = 0, torch.zeros(m, m, N, dtype=F64)
    for n in range(N):
        log_p = [(z[n] / tau).log_softmax(0) for z in students]
        for i in range(m):
            for j in range(m):
                if i != j:
                    log_t = log_p[j].detach() if detach else log_p[j]
                    d = (log_t.exp() * (log_t - log_p[i])).sum()
                    divergences[i, j, n] = d.detach()
                    total = total + tau**2 * a[i, j] * d / N
    loss, found = mutual_kd_loss(
        students, pair_weights=a, temperature=tau, detach_peers=detach, return_divergences=True,
        implementation=implementation,
    )  # fmt: skip
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, divergences, rtol=1e-12, atol=1e-14)
    for got, right in zip(gradients(loss, students), gradients(total, students), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradcheck(implementation, detach):
    a = torch.rand(3, 3, dtype=F64)

    def loss(*students):
        if detach:  # a difference sees peers move, too: hold them
            held = [mutual_kd_loss(
                [z if j == i else z.detach() for j, z in enumerate(students)],
                pair_weights=torch.zeros_like(a).index_copy(0, torch.tensor([i]), a[i : i + 1]),
                detach_peers=False, temperature=2.0, implementation=implementation,
            ) for i in range(3)]  # fmt: skip
            return torch.stack(held)[0]
        return mutual_kd_loss(
            students, pair_weights=a, detach_peers=False, temperature=2.0, implementation=implementation
        )

    students = draw(3, dtype=F64)
    assert torch.autograd.gradcheck(loss, students[:1] + [z.detach() for z in students[1:]] if detach else students)


def test_gradgradcheck_of_the_reference():
    students = draw(2, dtype=F64, shape=(2, 4))
    assert torch.autograd.gradgradcheck(
        lambda *z: mutual_kd_loss(z, detach_peers=False, implementation="reference"), students
    )


@pytest.mark.parametrize("m", [2, 4])
def test_a_student_and_its_peers_are_multi_teacher_distillation(backend, m):
    """The gradient of student i is that of its KL from its peers as teachers, and so are the divergences."""
    students = draw(m, backend.device)
    loss, found = mutual_kd_loss(
        students, temperature=2.0, return_divergences=True, implementation=backend.implementation
    )
    for i, gradient in enumerate(gradients(loss, students)):
        peers = [z.detach() for j, z in enumerate(students) if j != i]
        alone = multi_teacher_kd_loss(students[i], peers, temperature=2.0, implementation=backend.implementation)
        torch.testing.assert_close(gradient, gradients(alone, students[i])[0])
        d = multi_teacher_divergence(students[i], peers, temperature=2.0, implementation=backend.implementation)
        torch.testing.assert_close(found[i][[j for j in range(m) if j != i]], d.detach())


# Identities.


@pytest.mark.parametrize("detach", [True, False])
def test_equal_students_have_nothing_to_learn(backend, detach):
    z = torch.randn(N, C, device=backend.device)
    students = [z.clone().requires_grad_() for _ in range(3)]
    loss = mutual_kd_loss(students, detach_peers=detach, implementation=backend.implementation)
    assert loss.abs() < 1e-6
    for gradient in gradients(loss, students):
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("detach", [True, False])
def test_a_constant_added_to_a_row_changes_nothing_and_gradients_sum_to_zero(backend, detach):
    students = draw(3, backend.device)
    moved = [(z.detach() + 8 * torch.randn(N, 1, device=z.device)).requires_grad_() for z in students]
    losses = [mutual_kd_loss(z, detach_peers=detach, implementation=backend.implementation) for z in (students, moved)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(losses[0], students), gradients(losses[1], moved), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.sum(-1), torch.zeros(N, device=a.device), rtol=0, atol=1e-6)


def test_another_order_of_students_is_the_same_loss(backend):
    students, order = draw(4, backend.device), [2, 0, 3, 1]
    a = torch.rand(4, 4, device=backend.device)
    loss = mutual_kd_loss(students, pair_weights=a, implementation=backend.implementation)
    other = mutual_kd_loss(
        [students[i] for i in order], pair_weights=a[order][:, order], implementation=backend.implementation
    )
    torch.testing.assert_close(loss, other)
    for x, y in zip(gradients(loss, students), gradients(other, students), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_one_stacked_tensor_gets_one_stacked_gradient(backend):
    stacked = torch.randn(3, N, C, device=backend.device, requires_grad=True)
    students = [z.detach().requires_grad_() for z in stacked]
    losses = [mutual_kd_loss(z, implementation=backend.implementation) for z in (stacked, students)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients(losses[0], stacked)[0], torch.stack(gradients(losses[1], students)))


# Autograd.


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_kept_graph_gives_the_same_gradients_again(backend, dtype):
    students = draw(3, backend.device, dtype)
    loss = 3 * mutual_kd_loss(students, implementation=backend.implementation)
    first = [g.clone() for g in torch.autograd.grad(loss, students, retain_graph=True)]
    for a, b in zip(first, gradients(loss, students), strict=True):
        assert a.equal(b)


def test_only_what_is_asked_for_gets_a_gradient(backend):
    students = draw(3, backend.device)
    students[1].requires_grad_(False)
    loss = mutual_kd_loss(students, implementation=backend.implementation)
    loss.backward()
    assert students[1].grad is None
    assert students[0].grad.abs().max() > 0


def test_students_are_not_written_to(backend):
    students = draw(3, backend.device, BF16)
    before = [z.detach().clone() for z in students]
    (2 * mutual_kd_loss(students, detach_peers=False, implementation=backend.implementation)).backward()
    for a, b in zip(students, before, strict=True):
        assert a.equal(b)


def test_double_backward_is_refused(fused):
    students = draw(2, fused.device)
    loss = mutual_kd_loss(students, implementation=fused.implementation)
    found = torch.autograd.grad(loss, students, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through"):
        found[0].sum().backward()


def test_without_grad_there_is_no_graph(backend):
    students = draw(2, backend.device)
    with torch.no_grad():
        loss, divergences = mutual_kd_loss(students, return_divergences=True, implementation=backend.implementation)
    assert not loss.requires_grad
    loss, divergences = mutual_kd_loss(students, return_divergences=True, implementation=backend.implementation)
    assert loss.requires_grad
    assert not divergences.requires_grad


def test_fp16_gradients_that_a_scaler_saves(backend):
    """Of 1/n at once they would flush to zero."""
    students = draw(2, backend.device, F16, shape=(16, 8))
    scale, n = 2.0**14, 2.0**18
    loss = mutual_kd_loss(students, num_items=n, implementation=backend.implementation) * scale
    wide = [z.detach().float().requires_grad_() for z in students]
    right = gradients(mutual_kd_loss(wide, num_items=n, implementation="reference"), wide)
    for got, exact in zip(gradients(loss, students), right, strict=True):
        torch.testing.assert_close(got.float() / scale, exact, rtol=2e-3, atol=1e-11)


# Hard inputs.


def test_a_class_that_a_student_excludes_and_a_peer_allows(backend):
    """D is +inf, and the gradient of what the student learns is finite: p_i − p_j."""
    students = draw(2, backend.device)
    with torch.no_grad():
        students[0][0, 3] = -INF
    loss, d = mutual_kd_loss(students, reduction="none", return_divergences=True, implementation=backend.implementation)
    assert loss[0] == INF
    assert d[0, 1, 0] == INF
    assert d[1, 0].isfinite().all()
    p = [z.detach().softmax(-1) for z in students]
    found = gradients(loss, students, torch.ones_like(loss))
    torch.testing.assert_close(found[0], p[0] - p[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], p[1] - p[0], rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row(backend):
    students = draw(3, backend.device)
    with torch.no_grad():
        students[1][2, 4] = NAN
    loss = mutual_kd_loss(students, reduction="none", implementation=backend.implementation)
    assert loss.isnan().tolist() == [n == 2 for n in range(N)]
    for gradient in gradients(loss, students, torch.ones_like(loss)):
        assert gradient[2].isnan().any()
        assert gradient[[0, 1, 3, 4]].isfinite().all()


def test_who_only_teaches_gets_zero_and_who_has_no_pair_is_not_read(backend):
    students = draw(3, backend.device)
    with torch.no_grad():
        students[2].fill_(NAN)
    a = torch.zeros(3, 3, device=backend.device)
    a[0, 1] = 1.0
    loss, d = mutual_kd_loss(students, pair_weights=a, return_divergences=True, implementation=backend.implementation)
    assert loss.isfinite()
    found = gradients(loss, students)
    assert (found[1] == 0).all()
    assert (found[2] == 0).all()
    assert (d != 0).sum() == N


REFUSED = [
    ("no sequence", dict(student_logits=None), TypeError, "student_logits must be a sequence of .* got NoneType"),
    ("one student", dict(student_logits=[torch.zeros(N, C)]), ValueError,
     "student_logits must hold 2 to 64 students, got 1"),
    ("too many", dict(student_logits=torch.zeros(65, 1, 1)), ValueError, "2 to 64 students, got 65"),
    ("integers", dict(student_logits=[torch.zeros(N, C).long()] * 2), TypeError,
     r"student_logits\[0\] must be float32"),
    ("no classes", dict(student_logits=[torch.zeros(N, 0)] * 2), ValueError, r"\[..., C\] with C >= 1, got \(5, 0\)"),
    ("shapes", dict(student_logits=[torch.zeros(N, C), torch.zeros(N, 3)]), ValueError,
     r"student_logits\[1\] must have shape \(5, 12\) like student_logits\[0\], got \(5, 3\)"),
    ("devices", dict(student_logits=[torch.zeros(N, C), torch.zeros(N, C, device="meta")]), ValueError,
     r"student_logits\[1\] must be on cpu like student_logits\[0\], got meta"),
    ("pair weights", dict(pair_weights=[[0.0]]), TypeError, "pair_weights must be a tensor, got list"),
    ("shape of pair weights", dict(pair_weights=torch.ones(3, 3)), ValueError,
     r"pair_weights must have shape \(2, 2\), got \(3, 3\)"),
    ("integer pair weights", dict(pair_weights=torch.ones(2, 2).long()), TypeError,
     "pair_weights must be floating point, got torch.int64"),
    ("pair weights that learn", dict(pair_weights=torch.ones(2, 2, requires_grad=True)), ValueError,
     "pair_weights must not require grad"),
    ("temperature", dict(temperature=0.0), ValueError, "temperature must be a finite number > 0, got 0.0"),
    ("temperature_squared", dict(temperature_squared=1), TypeError, "temperature_squared must be True or False"),
    ("detach_peers", dict(detach_peers=None), TypeError, "detach_peers must be True or False, got NoneType"),
    ("return_divergences", dict(return_divergences="yes"), TypeError, "return_divergences must be True or False"),
    ("row weights", dict(row_weights=torch.ones(3)), ValueError, r"row_weights must have shape \(5,\)"),
    ("reduction", dict(reduction="max"), ValueError, "reduction must be one of .* got 'max'"),
    ("num_items", dict(num_items=3, reduction="sum"), ValueError, "num_items replaces the denominator"),
    ("implementation", dict(implementation="eager"), ValueError, "implementation must be one of .* got 'eager'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    call = dict(student_logits=[torch.zeros(N, C)] * 2) | change
    with pytest.raises(error, match=message):
        mutual_kd_loss(call.pop("student_logits"), **call)
