"""The short way from Python into the op kd is the long way, only shorter; what it does not take goes the long way."""

import numpy as np
import pytest
import torch

from mtkd_fast import dispatch, kd, multi_teacher_kd_loss

pytestmark = pytest.mark.skipif(kd._kd_at_once is None, reason="mtkd_fast._C is not built")

PLAIN = [
    {},
    {"weights": "confidence", "temperature": 4.0, "ce_weight": 1.0},
    {"weights": "entropy", "temperature": 2, "temperature_squared": False, "kd_weight": 3},
    {"divergence": "reverse_kl", "reduction": "none", "ce_weight": 0.5, "label_smoothing": 0.1},
    {"divergence": "tvd", "reduction": "sum", "ignore_index": 3},
    {"kd_weight": 0.0, "ce_weight": 1, "implementation": "cpp"},
]
LONG = [
    {"beta": 0.5, "divergence": "jsd"},
    {"divergence": "dkd"},
    {"row_weights": torch.ones(6)},
    {"num_items": 4},
    {"return_stats": True},
    {"implementation": "reference"},
    {"weights": torch.ones(3)},
    {"temperature": np.float64(2.0)},
]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(6, 11), [torch.randn(6, 11) for _ in range(3)], torch.randint(11, (6,))


@pytest.fixture
def taken(monkeypatch):
    """How often the short way was asked, and what it answered."""
    answers = []

    def ask(*arguments):
        answers.append(dispatch._C.kd_at_once(*arguments))
        return answers[-1]

    monkeypatch.setattr(kd, "_kd_at_once", ask)
    return answers


def loss_and_gradient(inputs, options):
    student, teachers, target = inputs
    leaf = student.clone().requires_grad_()
    loss = multi_teacher_kd_loss(leaf, teachers, target, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_plain_calls_go_the_short_way_to_the_same_bits(inputs, taken, options, monkeypatch):
    short = loss_and_gradient(inputs, options)
    assert taken
    assert all(isinstance(x, torch.Tensor) for x in taken)
    monkeypatch.setattr(kd, "_kd_at_once", None)
    for mine, theirs in zip(short, loss_and_gradient(inputs, options), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", LONG, ids=str)
def test_other_arguments_go_the_long_way(inputs, taken, options):
    loss_and_gradient(inputs, options)
    assert all(x is None for x in taken)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, t, y: (s, torch.stack(t), y),
        lambda s, t, y: (s, t, y.int()),
        lambda s, t, y: (torch.nn.Parameter(s).as_subclass(torch.nn.Buffer), t, y),
    ],
    ids=["stacked", "int32 labels", "subclass"],
)
def test_other_tensors_go_the_long_way(inputs, taken, change):
    student, teachers, target = change(*inputs)
    multi_teacher_kd_loss(student, teachers, target, ce_weight=1.0)
    assert taken == [None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, y: (s, t[:0], y), "teacher_logits"),
        (lambda s, t, y: (s, [t[0], t[1][:, :5]], y), r"teacher_logits\[1\]"),
        (lambda s, t, y: (s, t, None), "target"),
        (lambda s, t, y: (s, t, y[:3]), "target"),
        (lambda s, t, y: (s, t, y.clone().fill_(99)), "target must hold labels"),
    ],
    ids=["no teacher", "another shape", "no labels", "fewer labels", "labels out of range"],
)
def test_errors_are_those_of_the_long_way(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        multi_teacher_kd_loss(*change(*inputs), weights="confidence")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {"temperature": float("nan")}, {"temperature": True}, {"kd_weight": float("inf")},
        {"label_smoothing": 1.5}, {"reduction": "all"}, {"weights": "best"}, {"divergence": "kl"},
        {"ignore_index": 1.0}, {"class_dim": -1.0}, {"temperature_squared": 1}, {"ce_weight": "1"},
        {"implementation": "fast"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_raise(inputs, options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        multi_teacher_kd_loss(*inputs, **options)


def test_an_integer_beyond_every_double_raises(inputs):
    with pytest.raises(OverflowError):
        multi_teacher_kd_loss(*inputs, kd_weight=10**400)


def test_a_torch_function_mode_sees_the_call(inputs):
    class Seen(torch.overrides.TorchFunctionMode):
        names = ()

        def __torch_function__(self, function, types, arguments=(), options=None):
            self.names += (str(function),)
            return function(*arguments, **(options or {}))

    with Seen() as mode:
        multi_teacher_kd_loss(*inputs)
    assert any("mtkd_fast" in name for name in mode.names)
