"""CTSL-MKT against its formula, written once more row by row in float64."""

import pytest
import torch

from mtkd_fast import CTSLMKTLoss, mutual_kd_loss

N, C = 5, 4
F64 = torch.float64
IMPLEMENTATIONS = ["cpp", "reference"]
WEIGHTS = dict(ce_weight=0.7, mutual_weight=0.9, angle_weight=1.7, kl_weight=0.6, self_weight=0.8)


def draw(m):
    students = [torch.randn(N, C, dtype=F64, requires_grad=True) for _ in range(m)]
    return students, torch.randint(C, (N,)), [torch.randn(N, C, dtype=F64) for _ in range(m)]


def kl(z_p, z_q, t=1.0):
    log_p, log_q = (z_p / t).log_softmax(0), (z_q / t).log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


def huber(e):
    return 0.5 * e**2 if e.abs() < 1 else e.abs() - 0.5


def distances(x):
    d = {(i, j): (x[i] - x[j]).norm() for i in range(len(x)) for j in range(len(x)) if i != j}
    mean = sum(d.values()) / len(d)
    return [value / mean for value in d.values()]


def angles(x):
    n = range(len(x))
    found = []
    for i in n:
        units = {j: (x[j] - x[i]) / (x[j] - x[i]).norm() for j in n if j != i}
        found += [units[j] @ units[k] for j in units for k in units]
    return found


def relation(of, x, y, power):
    return sum(huber(a - b) for a, b in zip(of(x), of(y), strict=True)) / len(x) ** power


def by_hand(students, target, alone, points, *, t, squared, detach, w=WEIGHTS):
    """The loss of every student."""
    m, rows, losses = len(students), [n for n in range(N) if target[n] != -100], []
    hold = (lambda x: x.detach()) if detach else (lambda x: x)
    for k in range(m):
        own = taught = related = 0
        for n in rows:
            own = own - w["ce_weight"] * students[k][n].log_softmax(0)[target[n]] / len(rows)
            if w["self_weight"]:
                size = w["self_weight"] * (t**2 if squared else 1) / len(rows)
                own = own + size * kl(alone[k][n], students[k][n], t)
            for j in range(m):
                if j != k:
                    taught = taught + kl(hold(students[j][n]), students[k][n]) / len(rows) / (m - 1)
        for j in range(m):
            if j != k:
                related = related + relation(distances, points[k], hold(points[j]), 2) / (m - 1)
                related = related + w["angle_weight"] * relation(angles, points[k], hold(points[j]), 3) / (m - 1)
        losses.append(own + w["mutual_weight"] * (related + w["kl_weight"] * taught))
    return torch.stack(losses)


def check(loss, students, target, alone, points=None, **options):
    leaves = students if points is None else [*students, *points]
    got, each = loss(students, target, alone, points, return_losses=True)
    right = by_hand(students, target, alone, students if points is None else points, **options)
    torch.testing.assert_close(each, right.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got, right.sum(), rtol=1e-11, atol=1e-12)
    assert not each.requires_grad
    wanted = torch.autograd.grad(right.sum(), leaves)
    for found, gradient in zip(torch.autograd.grad(got, leaves), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_value_and_gradients_are_the_formula(implementation, m, detach, squared):
    loss = CTSLMKTLoss(2.5, **WEIGHTS, temperature_squared=squared, detach_peers=detach, implementation=implementation)
    check(loss, *draw(m), t=2.5, squared=squared, detach=detach)


@pytest.mark.parametrize("m", [2, 3])
def test_relations_of_given_representations(m):
    """Of widths and a number of samples of their own."""
    points = [torch.randn(4, 2 + k, 2, dtype=F64, requires_grad=True) for k in range(m)]
    flat = [x.flatten(1) for x in points]
    students, target, alone = draw(m)
    loss = CTSLMKTLoss(2.0, **WEIGHTS)
    check(loss, students, target, alone, [x.detach().requires_grad_() for x in flat], t=2.0, squared=False, detach=True)
    torch.testing.assert_close(loss(students, target, alone, points), loss(students, target, alone, flat))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_do_not_count(implementation):
    """Whatever they hold; the relations are those of the representations given."""
    students, target, alone = draw(2)
    target[1] = -100
    points = [z.detach()[[0, 2, 3, 4]].requires_grad_() for z in students]
    loss = CTSLMKTLoss(3.0, **WEIGHTS, implementation=implementation)
    check(loss, students, target, alone, points, t=3.0, squared=False, detach=True)
    right = loss(students, target, alone, points)
    with torch.no_grad():
        for z in (*students, *alone):
            z[1] = float("nan")
    got = loss(students, target, alone, points)
    torch.testing.assert_close(got, right, rtol=0, atol=0)
    for gradient in torch.autograd.grad(got, students):
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_relations_of_logits_are_those_of_the_rows_that_count(implementation):
    students, target, alone = draw(3)
    target[1] = -100
    kept = [0, 2, 3, 4]
    loss = CTSLMKTLoss(3.0, **WEIGHTS, implementation=implementation)
    right = loss([z[kept] for z in students], target[kept], [z[kept] for z in alone])
    wanted = torch.autograd.grad(right, students)
    with torch.no_grad():
        for z in (*students, *alone):
            z[1] = float("nan")
    got = loss(students, target, alone)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    for gradient, exact in zip(torch.autograd.grad(got, students), wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_class_that_every_row_excludes_adds_nothing_to_the_relations(implementation):
    students, target, alone = draw(2)
    target[:] = target.clamp(max=2)
    loss = CTSLMKTLoss(3.0, **WEIGHTS, implementation=implementation)
    fewer = [z.detach()[:, :3].requires_grad_() for z in students]
    right = loss(fewer, target, [z[:, :3] for z in alone])
    for z in (*students, *alone):
        z.data[:, 3] = float("-inf")
    got = loss(students, target, alone)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    pairs = zip(torch.autograd.grad(got, students), torch.autograd.grad(right, fewer), strict=True)
    for gradient, exact in pairs:
        torch.testing.assert_close(gradient[:, :3], exact, rtol=1e-9, atol=1e-12)
        assert (gradient[:, 3] == 0).all()
    students[0].data[0, 1] = float("-inf")  # in one row alone: infinitely far from the others
    assert loss(students, target.fill_(0), alone).isnan()


def test_without_self_distillation_nobody_needs_to_have_been_alone():
    students, target, _ = draw(2)
    w = WEIGHTS | dict(self_weight=0.0)
    got, each = CTSLMKTLoss(**w)(students, target, return_losses=True)
    right = by_hand(students, target, None, students, t=4.0, squared=False, detach=True, w=w)
    torch.testing.assert_close(each, right.detach())
    torch.testing.assert_close(got, right.sum())


def test_an_empty_batch_is_zero_and_attached():
    students = [torch.zeros(0, C, requires_grad=True) for _ in range(2)]
    loss = CTSLMKTLoss()(students, torch.zeros(0, dtype=torch.long), [torch.zeros(0, C)] * 2)
    loss.backward()
    assert loss.item() == 0
    assert all(z.grad.shape == (0, C) for z in students)


def test_without_labels():
    students, target, alone = draw(2)
    loss = CTSLMKTLoss(**WEIGHTS | dict(ce_weight=0.0))
    torch.testing.assert_close(loss(students, None, alone), loss(students, target, alone))


@pytest.mark.parametrize("left_out", ["mutual_weight", "angle_weight", "kl_weight"])
def test_a_weight_of_zero_leaves_out_its_term(left_out):
    students, target, alone = draw(3)
    w = WEIGHTS | {left_out: 0.0}
    got, each = CTSLMKTLoss(**w)(students, target, alone, return_losses=True)
    right = by_hand(students, target, alone, students, t=4.0, squared=False, detach=True, w=w)
    torch.testing.assert_close(got, right.sum())
    torch.testing.assert_close(each, right.detach())
    torch.testing.assert_close(CTSLMKTLoss(**w)(students, target, alone), got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_students_have_nothing_to_teach_each_other(implementation):
    z = torch.randn(N, C, dtype=F64)
    students = [z.clone().requires_grad_() for _ in range(3)]
    loss = CTSLMKTLoss(ce_weight=0.0, self_weight=0.0, implementation=implementation)(students)
    assert loss.abs() < 1e-14
    for gradient in torch.autograd.grad(loss, students):
        assert gradient.abs().max() < 1e-14


def test_a_constant_added_to_a_row_changes_nothing_but_relations():
    students, target, alone = draw(2)
    loss = CTSLMKTLoss(**WEIGHTS)
    shift = [z + 3 * torch.randn(N, 1, dtype=F64) for z in students]
    torch.testing.assert_close(loss(shift, target, alone, students), loss(students, target, alone, students))
    (gradient,) = torch.autograd.grad(loss(students, target, alone, [z.detach() for z in students]), students[0])
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(N, dtype=F64), rtol=0, atol=1e-14)


def test_the_kl_term_is_the_op():
    students, target, alone = draw(3)
    with_kl, without = (CTSLMKTLoss(kl_weight=w)(students, target, alone) for w in (1.0, 0.0))
    torch.testing.assert_close(with_kl - without, mutual_kd_loss(students))


def test_one_graph():
    students, target, alone = draw(2)
    loss = CTSLMKTLoss(**WEIGHTS)

    def step(students, target, alone):
        return loss(students, target, alone)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, right = (torch.autograd.grad(f(students, target, alone), students) for f in (compiled, step))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(student_logits=[torch.zeros(N, C)]), ValueError, "student_logits must hold 2 to 64 students, got 1"),
        (dict(target=None), ValueError, "target must be given for the hard label"),
        (dict(target=torch.zeros(N)), TypeError, "target must hold integer labels"),
        (dict(self_logits=None), ValueError, "self_logits must be given, since self_weight = 1.0; got None"),
        (dict(self_logits=[torch.zeros(N, C)]), ValueError, "self_logits must hold 2 tensors like student_logits"),
        (dict(self_logits=[torch.zeros(N, 2)] * 2), ValueError, r"self_logits\[0\] must have shape \(5, 4\)"),
        (dict(representations=torch.zeros(2, N, C)), TypeError, "representations must be a sequence of M tensors"),
        (dict(representations=[torch.zeros(N, C)]), ValueError, "representations must hold 2 tensors"),
        (dict(representations=[None, None]), TypeError, r"representations\[0\] must be a tensor, got NoneType"),
        (dict(student_logits=[torch.zeros(N, 2, C)] * 2, target=torch.zeros(N, 2).long(),
              self_logits=[torch.zeros(N, 2, C)] * 2), ValueError,
         r"student_logits must have shape \[N, C\] where no representations are given, got \(5, 2, 4\)"),
        (dict(representations="ab"), TypeError, "representations must be a sequence of M tensors, got str"),
        (dict(representations=[torch.zeros(N, 2), torch.zeros(N)]), ValueError,
         r"representations\[1\] must have shape \[B, ...\], embeddings of B samples, got \(5,\)"),
        (dict(representations=[torch.zeros(N, 2), torch.zeros(N, 2).long()]), TypeError,
         r"representations\[1\] must be float32, .* got torch.int64"),
        (dict(representations=[torch.zeros(N, 2), torch.zeros(3, 2)]), ValueError,
         r"representations\[1\] must hold 5 samples like representations\[0\], got \(3, 2\)"),
        (dict(representations=[torch.zeros(N, 2), torch.zeros(N, 2, device="meta")]), ValueError,
         r"representations\[1\] must be on cpu like representations\[0\], got meta"),
        (dict(return_losses=1), TypeError, "return_losses must be True or False, got int"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    call = dict(student_logits=[torch.zeros(N, C)] * 2, target=torch.zeros(N).long())
    call |= dict(self_logits=[torch.zeros(N, C)] * 2) | change
    with pytest.raises(error, match=message):
        CTSLMKTLoss()(**call)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match="kl_weight must be a number, got str"):
        CTSLMKTLoss(kl_weight="1")
    with pytest.raises(TypeError, match="detach_peers must be True or False, got int"):
        CTSLMKTLoss(detach_peers=1)
