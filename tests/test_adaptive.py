"""Adaptive Distillation: learned weights of paths, against the formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtkd_fast import AdaptiveDistillationLoss, HintAdapter, attention_transfer_loss, feature_map_loss, nst_loss

N, C = 5, 7
F64 = torch.float64


@pytest.fixture
def inputs():
    student, target = torch.randn(N, C, dtype=F64, requires_grad=True), torch.randint(C, (N,))
    losses = {
        "layers": torch.rand(3, dtype=F64, requires_grad=True),
        "logits": (3 * torch.rand((), dtype=F64)).requires_grad_(),
    }
    return student, target, losses


PATHS = {"layers": 3, "logits": 1}
WEIGHTS = {"layers": 2.0, "logits": 0.25}


def flat(loss):
    """[P]"""
    return torch.cat([alpha.reshape(-1) for alpha in loss.alpha.values()])


@torch.no_grad()
def set_alpha(loss, values):
    for alpha, value in zip(loss.alpha.values(), values.split([a.numel() for a in loss.alpha.values()]), strict=True):
        alpha.copy_(value.view(alpha.shape))


def assert_same(loss, right, leaves):
    torch.testing.assert_close(loss, right, rtol=1e-13, atol=1e-13)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("aggregation", ["adaptive", "equal", "fixed"])
def test_it_is_the_formula(inputs, aggregation, implementation):
    student, target, losses = inputs
    weights = None if aggregation == "equal" else WEIGHTS
    loss = AdaptiveDistillationLoss(
        PATHS, aggregation, path_weights=weights, ce_weight=0.7, distill_weight=1.3, implementation=implementation
    ).double()
    leaves = [student, *losses.values()]
    alphas = [torch.zeros((), dtype=F64)] * 4
    if aggregation == "adaptive":
        set_alpha(loss, torch.randn(4))
        leaves += loss.alpha.values()
        alphas = flat(loss)
    right = 0.7 * F.cross_entropy(student, target)
    terms = [(losses["layers"][i], 2.0) for i in range(3)] + [(losses["logits"], 0.25)]
    for (path_loss, c), alpha in zip(terms, alphas, strict=True):
        c = 1.0 if aggregation == "equal" else c
        right = right + 1.3 * ((-alpha).exp() * c * path_loss + alpha)
    assert_same(loss(student, target, losses), right, leaves)


def test_alpha_starts_at_zero_and_is_an_ordinary_parameter_by_path(inputs):
    loss = AdaptiveDistillationLoss(PATHS)
    assert {name: tuple(a.shape) for name, a in loss.named_parameters()} == {"alpha.layers": (3,), "alpha.logits": ()}
    assert torch.equal(flat(loss), torch.zeros(4))
    student, target, losses = inputs
    equal = AdaptiveDistillationLoss(PATHS, "equal")
    assert list(equal.parameters()) == []
    torch.testing.assert_close(loss(student, target, losses), equal(student, target, losses))
    set_alpha(loss, torch.arange(4.0))
    assert torch.equal(flat(copy.deepcopy(loss)), flat(loss))
    other = AdaptiveDistillationLoss(dict(reversed(PATHS.items())))  # a checkpoint knows its paths by name
    other.load_state_dict(loss.state_dict())
    assert other.alpha["layers"].tolist() == [0.0, 1.0, 2.0]
    assert other.alpha["logits"].item() == 3.0
    with pytest.raises(RuntimeError, match=r"Missing key.*alpha\.other"):
        AdaptiveDistillationLoss({"layers": 3, "other": 1}).load_state_dict(loss.state_dict())


def test_alpha_settles_at_the_logarithm_of_its_loss(inputs):
    student, target, losses = inputs
    loss = AdaptiveDistillationLoss(PATHS, path_weights=WEIGHTS).double()
    constant = {name: x.detach() for name, x in losses.items()}
    settled = torch.cat([(2.0 * constant["layers"]).log(), (0.25 * constant["logits"]).log()[None]])
    set_alpha(loss, settled)
    for gradient in torch.autograd.grad(loss(student, target, constant), list(loss.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    set_alpha(loss, torch.zeros(4, dtype=F64))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, target, constant).backward()
        optimizer.step()
    torch.testing.assert_close(flat(loss).detach(), settled, rtol=1e-9, atol=1e-9)
    weights = loss.weights()
    torch.testing.assert_close(weights["layers"] * constant["layers"], torch.ones(3, dtype=F64))
    torch.testing.assert_close(weights["logits"] * constant["logits"], torch.ones((), dtype=F64))


def test_alpha_is_bounded_only_where_asked_and_its_gradient_never(inputs):
    student, target, losses = inputs
    free, bound = AdaptiveDistillationLoss(PATHS), AdaptiveDistillationLoss(PATHS, min_alpha=-2.0)
    for loss in (free, bound):
        set_alpha(loss, torch.tensor([-5.0, -1.0, 0.0, 3.0]))
    free(student, target, losses)
    assert flat(free).tolist() == [-5.0, -1.0, 0.0, 3.0]
    bound.eval()(student, target, losses)
    assert flat(bound).tolist() == [-5.0, -1.0, 0.0, 3.0]
    total = bound.train()(student, target, losses)
    assert flat(bound).tolist() == [-2.0, -1.0, 0.0, 3.0]
    for name, gradient in zip(bound.alpha, torch.autograd.grad(total, list(bound.parameters())), strict=True):
        right = 1 - (-bound.alpha[name].detach()).exp() * losses[name].detach().float()
        torch.testing.assert_close(gradient, right)


def test_a_path_of_weight_zero_is_left_out(inputs):
    student, target, losses = inputs
    loss = AdaptiveDistillationLoss(PATHS, "fixed", path_weights={"layers": 0.0, "logits": 2.0})
    right = F.cross_entropy(student, target) + 2 * losses["logits"]
    poisoned = losses | {"layers": torch.full((3,), float("nan"))}
    torch.testing.assert_close(loss(student, target, poisoned), right)
    torch.testing.assert_close(loss(student, target, {"logits": losses["logits"]}), right)
    nothing = AdaptiveDistillationLoss(PATHS, "fixed", path_weights={"layers": 0.0, "logits": 0.0})
    torch.testing.assert_close(nothing(student, target, {}), F.cross_entropy(student, target))
    alone = AdaptiveDistillationLoss(PATHS, distill_weight=0.0)
    torch.testing.assert_close(alone(student, target, losses), F.cross_entropy(student, target))
    unlabelled = AdaptiveDistillationLoss(PATHS, "equal", ce_weight=0.0)
    torch.testing.assert_close(unlabelled(student, None, losses), sum(x.sum() for x in losses.values()))


def test_the_gradient_reaches_every_learned_tensor():
    """Features, adapters and α of an objective made of maps, against one that knows none of our functions."""
    student = [torch.randn(N, 3, 4, 4, dtype=F64, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(N, 6, 2, 2, dtype=F64), torch.randn(N, 6, 4, 4, dtype=F64)]
    adapters = nn.ModuleList(HintAdapter(3, 6, bias=False, relu=False) for _ in range(2)).double()
    logits, target = torch.randn(N, C, dtype=F64, requires_grad=True), torch.randint(C, (N,))
    loss = AdaptiveDistillationLoss({"nst": 2, "fm": 2, "at": 1}).double()
    set_alpha(loss, torch.randn(5))
    adapted = [adapt(f, g) for adapt, f, g in zip(adapters, student, teacher, strict=True)]
    found = loss(
        logits,
        target,
        {
            "fm": feature_map_loss(adapted, teacher, per_stage=True),
            "nst": nst_loss(adapted, teacher, per_stage=True),
            "at": attention_transfer_loss(student[1:], teacher[1:]),
        },
    )

    def unit(x):
        x = x.flatten(2)
        return x / x.norm(dim=2, keepdim=True)

    def energy(x):
        a = x.pow(2).sum(1).flatten(1)
        return a / (a.norm(dim=1, keepdim=True) + 1e-6)

    resized = [F.adaptive_avg_pool2d(student[0], 2), student[1]]
    by_hand = []
    for adapt, f in zip(adapters, resized, strict=True):
        convolution, norm = adapt.project
        assert convolution.bias is None
        by_hand.append(norm(F.conv2d(f, convolution.weight)))
    terms = [
        *((unit(f) @ unit(f).mT - unit(g) @ unit(g).mT).pow(2).mean() for f, g in zip(by_hand, teacher, strict=True)),
        *((f.mean((2, 3)) - g.mean((2, 3))).pow(2).mean() for f, g in zip(by_hand, teacher, strict=True)),
        (energy(student[1]) - energy(teacher[1])).pow(2).mean(),
    ]
    right = F.cross_entropy(logits, target)
    for term, alpha in zip(terms, flat(loss), strict=True):
        right = right + (-alpha).exp() * term + alpha
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    leaves = [logits, *student, *adapters.parameters(), *loss.parameters()]
    for got, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


def test_one_graph(inputs):
    student, target, losses = inputs
    loss = AdaptiveDistillationLoss(PATHS, min_alpha=-3.0)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, right = compiled(student, target, losses), loss(student, target, losses)
    torch.testing.assert_close(found, right)
    leaves = [student, *loss.parameters(), *losses.values()]
    for got, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, wanted)


def test_ignored_rows_and_printing(inputs):
    student, target, losses = inputs
    target[2:] = -100
    loss = AdaptiveDistillationLoss(["layers"], "equal")
    right = F.cross_entropy(student[:2], target[:2]) + losses["logits"]
    torch.testing.assert_close(loss(student, target, {"layers": losses["logits"]}), right)
    assert "aggregation=equal" in str(loss)


@pytest.mark.parametrize(
    ("paths", "options", "error", "message"),
    [
        ("nst", {}, TypeError, "paths must be a sequence of names or a mapping from names, got str"),
        ([], {}, ValueError, "paths must hold one or more names"),
        (["a", "a"], {}, ValueError, "paths must hold one or more names, each once"),
        ([1], {}, TypeError, "paths must hold names, got int"),
        ({"a": 0}, {}, ValueError, r"paths\['a'\] must be at least 1, got 0"),
        ({"a": 1.0}, {}, TypeError, r"paths\['a'\] must be an integer, got float"),
        (["a"], dict(aggregation="mean"), ValueError, "aggregation must be one of .* got 'mean'"),
        (["a"], dict(aggregation="fixed"), ValueError, "path_weights must be given with aggregation='fixed'"),
        (["a"], dict(aggregation="equal", path_weights={"a": 2}), ValueError, "path_weights must not be given"),
        (["a"], dict(path_weights={"b": 2}), ValueError, r"path_weights must hold names of paths \(a\), got 'b'"),
        (["a"], dict(path_weights=[2]), TypeError, "path_weights must be a mapping .* got list"),
        (["a"], dict(path_weights={"a": 0}), ValueError, r"path_weights\['a'\] must be a finite number > 0, got 0"),
        (["a.b"], {}, ValueError, "paths must hold names that a parameter can have, without '.', got 'a.b'"),
        (["values"], {}, ValueError, "paths must hold names that a parameter can have, .* got 'values'"),
        (["a"], dict(min_alpha="0"), TypeError, "min_alpha must be a number, got str"),
        (["a"], dict(aggregation="equal", min_alpha=0.0), ValueError, "min_alpha bounds the α of"),
        (["a"], dict(ce_weight=None), TypeError, "ce_weight must be a number"),
    ],
)
def test_bad_options_are_named(paths, options, error, message):
    with pytest.raises(error, match=message):
        AdaptiveDistillationLoss(paths, **options)


@pytest.mark.parametrize(
    ("target", "losses", "error", "message"),
    [
        (None, {"layers": torch.zeros(3), "logits": torch.zeros(())}, ValueError, "target must be given"),
        ("labels", [torch.zeros(())], TypeError, "path_losses must be a mapping from names to tensors, got list"),
        ("labels", {"layers": torch.zeros(3)}, ValueError, "path_losses must hold layers, logits, got layers"),
        ("labels", {"layers": torch.zeros(3), "logits": torch.zeros(()), "x": 1}, ValueError, "path_losses must hold"),
        ("labels", {"layers": torch.zeros(2), "logits": torch.zeros(())}, ValueError,
         r"path_losses\['layers'\] must be of shape \(3,\), got shape \(2,\)"),
        ("labels", {"layers": torch.zeros(3), "logits": torch.zeros(2)}, ValueError,
         r"path_losses\['logits'\] must be a scalar, got shape \(2,\)"),
        ("labels", {"layers": torch.zeros(3), "logits": 1.0}, TypeError, r"path_losses\['logits'\] must be a tensor"),
        ("labels", {"layers": torch.zeros(3).long(), "logits": torch.zeros(())}, TypeError,
         r"path_losses\['layers'\] must be floating point, got torch.int64"),
    ],
)  # fmt: skip
def test_bad_input_is_named(target, losses, error, message):
    labels = torch.zeros(N, dtype=torch.long) if target == "labels" else target
    with pytest.raises(error, match=message):
        AdaptiveDistillationLoss(PATHS)(torch.zeros(N, C), labels, losses)
