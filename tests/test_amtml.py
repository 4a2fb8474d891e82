"""AMTML-KD against its formulas in float64, written row by row: value and the gradient of everything that learns."""

import math

import pytest
import torch
from torch import nn

from mtkd_fast import AMTMLKDLoss, GroupHints, InstanceWeights

N, C, K, D = 6, 7, 3, 5
F64 = torch.float64
IMPLEMENTATIONS = ["cpp", "reference"]
TAPS = (4, 6, 8)  # channels


@pytest.fixture
def batch():
    """student_logits, teacher_logits, target, feature, taps, maps"""
    student = torch.randn(N, C, dtype=F64, requires_grad=True)
    teachers = [2 * torch.randn(N, C, dtype=F64) for _ in range(K)]
    feature = torch.randn(N, D, dtype=F64, requires_grad=True)
    taps = [torch.randn(N, c, 3, 3, dtype=F64, requires_grad=True) for c in TAPS]
    maps = [torch.randn(N, 6, 3, 3, dtype=F64), torch.randn(N, 9, 1, 1, dtype=F64), torch.randn(N, 2, 3, 3, dtype=F64)]
    return student, teachers, torch.randint(C, (N,)), feature, taps, maps


def make(implementation="cpp", with_hints=True, **options):
    hints = GroupHints(TAPS, [6, 9, 2]) if with_hints else None
    loss = AMTMLKDLoss(K, D, hints, implementation=implementation, seed=1, **options).double()
    if with_hints:
        for adapter in loss.hints.adapters:
            nn.init.normal_(adapter.weight)
    return loss


def mean_huber(values):
    return sum(0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in values) / len(values)


def distances(x):
    d = {(i, j): (x[i] - x[j]).norm() for i in range(N) for j in range(N) if i != j}
    mean = sum(d.values()) / len(d)
    return [d[i, j] / mean if i != j else x.new_zeros(()) for i in range(N) for j in range(N)]


def angles(x):
    def unit(i, j):
        return (x[j] - x[i]) / (x[j] - x[i]).norm() if i != j else torch.zeros_like(x[i])

    return [unit(i, j) @ unit(i, k) for i in range(N) for j in range(N) for k in range(N)]


def hint_term(loss, taps, maps, lambdas):
    total = 0
    for j, (g, adapter) in enumerate(zip(loss.hints.groups, loss.hints.adapters, strict=True)):
        u, size = adapter.weight[:, :, 0, 0], taps[g].shape[-1]
        pixels = []
        for n in range(N):
            for x in range(size):
                for y in range(size):
                    f = taps[g][n, :, x, y]
                    wanted = maps[j][n, :, *((x, y) if maps[j].shape[-1] > 1 else (0, 0))]
                    pixels.append((u @ (f / f.norm()) - wanted / wanted.norm()).square().mean())
        total = total + lambdas[j] * sum(pixels) / len(pixels)
    return total


def by_hand(
    loss, student, teachers, target, feature, taps=None, maps=None, *,
    tau=5.0, a=0.7, mean=False, ce_tau=1.0, log_probabilities=False, probabilities=False, weigh=False,
    regularised=True,
):  # fmt: skip
    theta, w = loss.weights.theta, loss.weights.W
    kd, ce, mixtures, mus = 0, 0, [], []
    for n in range(N):
        mu = torch.stack([sum(feature[n, j] * theta[k, j] * w[j] for j in range(D)) for k in range(K)]).softmax(0)
        pbar = sum(mu[k] * (teachers[k][n] / tau).softmax(0) for k in range(K))
        log_q = (student[n] / tau).log_softmax(0)
        kd = kd + (pbar * (pbar.log() - log_q)).sum() / N / (C if mean else 1)
        ce = ce - (student[n] / ce_tau).log_softmax(0)[target[n]] / N
        mixtures.append(pbar.detach()), mus.append(mu.detach())
    total = 2 * a * tau**2 * kd + (1 - a) * ce
    pbar = torch.stack(mixtures)
    s = (student / tau).log_softmax(-1) if log_probabilities else student
    s = (student / tau).softmax(-1) if probabilities else s
    for relation in (distances, angles):
        total = total + mean_huber([x - y for x, y in zip(relation(s), relation(pbar), strict=True)])
    if taps is not None:
        total = total + hint_term(loss, taps, maps, sum(mus) / N if weigh else [1.0] * K)
    return total + (0.1 * (w.square().sum() + sum(t.square().sum() for t in theta)) if regularised else 0)


def assert_same(loss, got, right, leaves):
    torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)
    learn = [*leaves, *(p for p in loss.parameters() if p.requires_grad)]
    found, wanted = (torch.autograd.grad(x, learn, allow_unused=True) for x in (got, right))
    for x, y in zip(found, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        (dict(official_code=True), dict(mean=True, ce_tau=5.0, log_probabilities=True)),
        (dict(temperature=20.0, kd_share=0.4), dict(tau=20.0, a=0.4)),
        (dict(reduction="mean"), dict(mean=True)),
        (dict(ce_temperature=3.0), dict(ce_tau=3.0)),
        (dict(relation_on="log_probabilities"), dict(log_probabilities=True)),
        (dict(relation_on="probabilities"), dict(probabilities=True)),
        (dict(weigh_hints=True), dict(weigh=True)),
        (dict(official_code=True, reduction="batchmean"), dict(ce_tau=5.0, log_probabilities=True)),
    ],
    ids=str,
)
def test_value_and_every_gradient_are_the_formulas(batch, options, formula, implementation):
    student, _, _, feature, taps, _ = batch
    loss = make(implementation, **options)
    assert_same(loss, loss(*batch), by_hand(loss, *batch, **formula), [student, feature, *taps])


def test_the_official_scaling_in_numbers(batch):
    """KL times 2·0.7·25/(N·C) = 35/(N·C), cross-entropy at τ times 0.3, 0.1 of the squares."""
    student, teachers, target, feature, *_ = batch
    loss = make(with_hints=False, official_code=True, distance_weight=0.0, angle_weight=0.0)
    mu = loss.weights(feature)
    pbar = sum(m[:, None] * (t / 5).softmax(1) for m, t in zip(mu, teachers, strict=True))
    log_q = (student / 5).log_softmax(1)
    right = 35 * nn.functional.kl_div(log_q, pbar, reduction="sum") / (N * C)
    right = (
        right
        + 0.3 * nn.functional.cross_entropy(log_q, target)
        + 0.1 * sum(p.square().sum() for p in loss.parameters())
    )
    torch.testing.assert_close(loss(student, teachers, target, feature), right, rtol=1e-12, atol=0)


def test_stage_2_freezes_all_but_the_student(batch):
    student, _, _, feature, *_ = batch
    loss = make()
    loss.set_stage(2)
    assert not any(p.requires_grad for p in loss.parameters())
    logits = batch[:4]
    assert_same(loss, loss(*logits), by_hand(loss, *logits, regularised=False), [student, feature])
    torch.testing.assert_close(loss(*batch), loss(*logits), rtol=0, atol=0)  # features are not looked at
    loss.set_stage(1)
    assert all(p.requires_grad for p in loss.parameters())


def test_the_state_dict_holds_parameters_and_stage(batch):
    loss, other = make(), make()
    with torch.no_grad():
        other.weights.theta.zero_()
    loss.set_stage(2)
    other.load_state_dict(loss.state_dict())
    assert other.stage == 2
    assert torch.equal(other.weights.theta, loss.weights.theta)
    torch.testing.assert_close(other(*batch), loss(*batch), rtol=0, atol=0)


def test_every_parameter_learns_so_that_ddp_waits_for_none(batch):
    loss = make()
    loss(*batch).backward()
    assert {name for name, p in loss.named_parameters()} == {
        "weights.theta", "weights.W", *(f"hints.adapters.{j}.weight" for j in range(K)),
    }  # fmt: skip
    assert all(p.grad is not None and (p.grad != 0).any() for p in loss.parameters())


def test_detached_features_get_no_gradient_through_the_weights(batch):
    student, teachers, target, feature, *_ = batch
    loss = make(with_hints=False, detach_features_for_weights=True)
    gradients = torch.autograd.grad(
        loss(student, teachers, target, feature), [feature, loss.weights.theta], allow_unused=True
    )
    assert gradients[0] is None
    assert (gradients[1] != 0).any()


def test_instance_weights_take_maps_by_their_maximum_and_are_seeded():
    a, b = InstanceWeights(K, D, seed=1), InstanceWeights(K, D, seed=1)
    assert torch.equal(a.theta, b.theta)
    assert not torch.equal(a.theta, InstanceWeights(K, D, seed=2).theta)
    maps = torch.randn(N, D, 2, 2)
    torch.testing.assert_close(a(maps), a(maps.amax((2, 3))))
    torch.testing.assert_close(a(maps).sum(0), torch.ones(N))
    assert a(maps.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relation_on", ["logits", "log_probabilities", "probabilities"])
def test_ignored_rows_count_in_no_term(batch, relation_on, implementation):
    student, teachers, target, feature, taps, maps = batch
    target[2] = -100
    kept = [n for n in range(N) if n != 2]
    loss = make(implementation, relation_on=relation_on)
    fewer = loss(
        student[kept], [t[kept] for t in teachers], target[kept], feature[kept], [f[kept] for f in taps],
        [g[kept] for g in maps],
    )  # fmt: skip
    torch.testing.assert_close(loss(*batch), fewer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relation_on", ["logits", "log_probabilities", "probabilities"])
def test_what_an_ignored_row_holds_reaches_nobody(batch, relation_on, implementation):
    student, teachers, target, feature, taps, _ = batch
    target[2] = -100
    with torch.no_grad():
        for x in (student, *teachers, feature, *taps):
            x[2] = math.nan
    loss = make(implementation, relation_on=relation_on)
    value = loss(*batch)
    assert value.isfinite()
    leaves = [student, feature, *taps, *loss.parameters()]
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("relation_on", ["logits", "log_probabilities"])
def test_a_class_that_every_row_excludes_adds_nothing_to_the_relations(batch, relation_on):
    student, teachers, target, feature, *_ = batch
    without = [n for n in range(C) if n != 3]
    target[:] = target.clamp(max=2)
    for logits in (student, *teachers):
        logits.data[:, 3] = -math.inf
    loss = make(with_hints=False, relation_on=relation_on)
    fewer = student.detach()[:, without].requires_grad_()
    got = loss(student, teachers, target, feature)
    right = loss(fewer, [t[:, without] for t in teachers], target, feature)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    (found,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(right, fewer)
    torch.testing.assert_close(found[:, without], wanted, rtol=1e-9, atol=1e-12)
    assert (found[:, 3] == 0).all()


def test_classes_that_some_rows_exclude_have_relations_of_probabilities(batch):
    student, teachers, target, feature, *_ = batch
    target[0] = 0
    for logits in (student, *teachers):
        logits.data[0, 3] = -math.inf
    assert make(with_hints=False)(student, teachers, target, feature).isnan()
    loss = make(with_hints=False, relation_on="probabilities")(student, teachers, target, feature)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_a_pooled_vector_is_a_map_of_one_pixel():
    hints = GroupHints([D], [D])
    tap, pooled = torch.randn(D, D, D, D), torch.randn(D, D)
    torch.testing.assert_close(hints([tap], [pooled]), hints([tap], [pooled[:, :, None, None]]))


def test_the_reference_takes_the_relations_too(batch):
    loss = make(implementation="reference")
    (gradient,) = torch.autograd.grad(loss(*batch), batch[0], create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("kd_share", [0.0, 1.0])
def test_a_share_of_0_removes_its_term_whatever_it_holds(batch, kd_share):
    student, teachers, target, feature, *_ = batch
    with torch.no_grad():
        if kd_share == 0:  # the KL is infinite
            target[:] = 1
            student[:, 0] = -math.inf
        else:  # the cross-entropy is
            target[:] = 0
            for logits in (student, *teachers):
                logits[:, 0] = -math.inf
    loss = make(distance_weight=0.0, angle_weight=0.0, hint_weight=0.0, kd_share=kd_share)
    value = loss(student, teachers, target, feature)
    assert value.isfinite()
    assert torch.autograd.grad(value, loss.weights.theta)[0].isfinite().all()


def test_terms_of_weight_0_are_not_computed(batch):
    student, teachers, target, feature, *_ = batch
    loss = make(hint_weight=0.0, distance_weight=0.0, angle_weight=0.0, regularisation=0.0, kd_share=0.0)
    right = nn.functional.cross_entropy(student, target)
    torch.testing.assert_close(loss(student, teachers, target, feature), right, rtol=1e-12, atol=0)


def test_saturated_weights_leave_finite_gradients(batch):
    student, teachers, target, feature, *_ = batch
    teachers[0][:, 1] = -math.inf
    loss = AMTMLKDLoss(K, D)
    with torch.no_grad():
        loss.weights.theta.mul_(1e3)
    loss(student.float(), [t.float() for t in teachers], target, feature.float()).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    assert feature.grad.isfinite().all()
    assert student.grad.isfinite().all()


def test_in_half_precision_it_is_near_float32(batch):
    student, teachers, target, feature, *_ = batch
    loss = make(with_hints=False).float()
    exact = loss(student.float(), [t.float() for t in teachers], target, feature.float())
    half = loss(student.bfloat16(), [t.bfloat16() for t in teachers], target, feature.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=3e-2, atol=0)


def test_it_trains():
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    target = (inputs @ torch.randn(8, 4)).argmax(1)
    teachers = [3 * nn.functional.one_hot(target, 4).float() + torch.randn(64, 4) * s for s in (0.1, 1.0, 3.0)]
    body, head, loss = nn.Linear(8, D), nn.Linear(D, 4), AMTMLKDLoss(K, D, seed=1)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters(), *loss.parameters()], lr=0.05)
    values = []
    for _ in range(100):
        feature = body(inputs).relu()
        values.append(loss(head(feature), teachers, target, feature))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


def test_one_compiled_graph(batch):
    student, teachers, target, feature, *_ = batch
    loss = make(with_hints=False)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teachers, target, feature), loss(student, teachers, target, feature))


REFUSED = [
    ("teachers", lambda b: (b[0], b[1][:2], *b[2:]), ValueError, "teacher_logits must hold 3 teachers, got 2"),
    ("feature width", lambda b: (*b[:3], b[3][:, :2], *b[4:]), ValueError, r"feature must have shape \[N, 5\]"),
    ("feature batch", lambda b: (*b[:3], b[3][:2], *b[4:]), ValueError, "feature must hold 6 samples"),
    ("no feature", lambda b: (*b[:3], None, *b[4:]), TypeError, "feature must be a tensor, got NoneType"),
    ("no target", lambda b: (*b[:2], None, *b[3:]), TypeError, "target must be a tensor, got NoneType"),
    ("sequences", lambda b: (b[0][None], [t[None] for t in b[1]], *b[2:]), ValueError,
     r"student_logits must have shape \[N, C\], got \(1, 6, 7\)"),
    ("taps of no sequence", lambda b: (*b[:4], 3, b[5]), TypeError,
     "student_features must be a sequence of taps, got int"),
    ("no taps", lambda b: b[:4], ValueError, "student_features and teacher_features must be there"),
    ("too few maps", lambda b: (*b[:5], b[5][:1]), ValueError, "teacher_features 3 maps, got 3 and 1"),
    ("maps of another size", lambda b: (*b[:5], [b[5][0][..., :2], *b[5][1:]]), ValueError,
     r"teacher_features\[0\] must have shape \(6, 6, 3, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_bad_arguments_are_named(batch, change, error, message):
    with pytest.raises(error, match=message):
        make()(*change(batch))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(reduction="sum"), ValueError, "reduction must be one of 'batchmean', 'mean', got 'sum'"),
        (dict(relation_on="features"), ValueError, "relation_on must be one of"),
        (dict(ce_temperature=0.0), ValueError, "ce_temperature must be a finite number > 0"),
        (dict(temperature=-1.0), ValueError, "temperature must be a finite number > 0"),
        (dict(kd_share="most"), TypeError, "kd_share must be a number, got str"),
        (dict(official_code=1), TypeError, "official_code must be True or False"),
        (dict(hints=nn.Identity()), TypeError, "hints must be GroupHints or None, got Identity"),
        (dict(hints=GroupHints([3], [3]), weigh_hints=True), ValueError, "weigh_hints needs a hint for each"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        AMTMLKDLoss(K, D, **options)


def test_bad_modules_are_named():
    with pytest.raises(ValueError, match=r"n_teachers must be a finite number in \[1, 64\], got 65"):
        InstanceWeights(65, D)
    with pytest.raises(TypeError, match="feature_dim must be an integer"):
        InstanceWeights(K, 2.0)
    with pytest.raises(TypeError, match=r"teacher_channels\[0\] must be an integer, got float"):
        GroupHints([3, 4], [5.0])
    with pytest.raises(TypeError, match="student_channels must be a sequence of numbers of channels, got int"):
        GroupHints(3, [5])
    with pytest.raises(ValueError, match=r"teacher_channels\[0\] must be a finite number > 0, got 0"):
        GroupHints([3], [0])
    with pytest.raises(TypeError, match=r"groups\[0\] must be an integer, got str"):
        GroupHints([3, 4], [5], groups=["last"])
    with pytest.raises(ValueError, match="groups must hold one index below 2"):
        GroupHints([3, 4], [5], groups=[2])
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3"):
        AMTMLKDLoss(K, D).set_stage(3)


@pytest.mark.parametrize(
    ("taps", "maps", "error", "message"),
    [
        ([torch.zeros(N, 4, 3, 3)], torch.zeros(1, N, 6, 3, 3), TypeError,
         "teacher_features must be a sequence of maps, got Tensor"),
        ([None], [torch.zeros(N, 6)], TypeError, r"student_features\[0\] must be a tensor, got NoneType"),
        ([torch.zeros(N, 4)], [torch.zeros(N, 6)], ValueError,
         r"student_features\[0\] must have shape \[N, 4, H, W\], got \(6, 4\)"),
        ([torch.zeros(N, 5, 3, 3)], [torch.zeros(N, 6)], ValueError,
         r"student_features\[0\] must have shape \[N, 4, H, W\], got \(6, 5, 3, 3\)"),
        ([torch.zeros(N, 4, 3, 3).long()], [torch.zeros(N, 6)], TypeError, r"student_features\[0\] must be float32, "),
        ([torch.zeros(N, 4, 3, 3).double()], [torch.zeros(N, 6)], TypeError,
         r"student_features\[0\] must be torch.float32 like the adapter, or narrower, got torch.float64"),
        ([torch.zeros(N, 4, 3, 3)], [torch.zeros(N, 6, 3)], ValueError,
         r"teacher_features\[0\] must have shape \[N, 6\] or \[N, 6, H, W\], got \(6, 6, 3\)"),
        ([torch.zeros(N, 4, 3, 3)], [torch.zeros(N, 6).int()], TypeError, r"teacher_features\[0\] must be float32, "),
    ],
)  # fmt: skip
def test_bad_taps_and_maps_are_named(taps, maps, error, message):
    with pytest.raises(error, match=message):
        GroupHints([4], [6])(taps, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_meet_adapters_in_float32(dtype, autocast):
    """As an autocast student hands them over, a pixel of zeros among them; the loss may be taken outside autocast."""
    hints = GroupHints([4], [6])
    nn.init.normal_(hints.adapters[0].weight)
    tap, teacher = torch.randn(N, 4, 3, 3).to(dtype), torch.randn(N, 6, 3, 3).to(dtype)
    tap[0, :, 0, 0] = 0
    tap.requires_grad_()
    wide = tap.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = hints([tap], [teacher])
    right = hints([wide], [teacher.float()])
    assert loss.dtype == torch.float32
    exact = {} if not autocast else dict(rtol=3 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(loss, right, **exact)
    found, wanted = (torch.autograd.grad(x, (y, hints.adapters[0].weight)) for x, y in ((loss, tap), (right, wide)))
    assert found[0].dtype == dtype
    assert (found[0][0, :, 0, 0] == 0).all()
    assert found[0].isfinite().all()
    if not autocast:
        torch.testing.assert_close(found[0], wanted[0].to(dtype))
        torch.testing.assert_close(found[1], wanted[1])
