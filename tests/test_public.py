"""The public functions: what they refuse and in which words, and the conventions of what they return."""

import pytest
import torch
from cases.kd import WITHOUT_TARGET

import mtkd_fast
from mtkd_fast import checks, implementations, multi_teacher_divergence, multi_teacher_kd_loss, teacher_weights

N, C, K = 4, 10, 3


@pytest.fixture
def logits():
    student, *teachers = (torch.randn(N, C) for _ in range(K + 1))
    return student, teachers, torch.randint(C, (N,))


# What is refused: (what is wrong, what changes in a good call, the error, argument and expectation and what came).

REFUSED = [
    ("student is no tensor", dict(student=[1.0]), TypeError, "student_logits must be a tensor, got list"),
    ("student of integers", dict(student=torch.ones(N, C, dtype=torch.long)), TypeError,
     "student_logits must be float32, bfloat16, float16 or float64, got torch.int64"),
    ("student without classes", dict(student=torch.ones(N, 0)), ValueError,
     r"student_logits must have shape \[..., C\] with C >= 1, got \(4, 0\)"),
    ("scalar student", dict(student=torch.tensor(1.0)), ValueError, r"student_logits must have shape .* got \(\)"),
    ("no teachers", dict(teachers=[]), ValueError, "teacher_logits must hold 1 to 64 teachers, got 0"),
    ("65 teachers", dict(teachers=[torch.zeros(N, C)] * 65), ValueError, "teacher_logits must hold 1 to 64 .* got 65"),
    ("one tensor without K", dict(teachers=torch.zeros(C)), ValueError, r"must have shape \[K, ..., C\], got \(10,\)"),
    ("one teacher not in a list", dict(teachers=torch.zeros(N, C)), ValueError, r"teacher_logits\[0\] must have shape"),
    ("teachers in a dict", dict(teachers={"a": torch.zeros(N, C)}), TypeError, "teacher_logits must be .* got dict"),
    ("teachers by name", dict(teachers="abc"), TypeError, "teacher_logits must be a sequence .* got str"),
    ("a teacher that is no tensor", dict(teachers=[torch.zeros(N, C), None]), TypeError,
     r"teacher_logits\[1\] must be a tensor, got NoneType"),
    ("a teacher of integers", dict(teachers=[torch.zeros(N, C, dtype=torch.int32)]), TypeError,
     r"teacher_logits\[0\] must be float32.*got torch.int32"),
    ("a teacher with other classes", dict(teachers=[torch.zeros(N, C), torch.zeros(N, C + 1)]), ValueError,
     r"teacher_logits\[1\] must have shape \(4, 10\) like student_logits, got \(4, 11\)"),
    ("a teacher with other rows", dict(teachers=[torch.zeros(N + 1, C)]), ValueError,
     r"teacher_logits\[0\] must have shape \(4, 10\) like student_logits, got \(5, 10\)"),
    ("a teacher elsewhere", dict(teachers=[torch.zeros(N, C, device="meta")]), ValueError,
     r"teacher_logits\[0\] must be on cpu like student_logits, got meta"),
    ("target is no tensor", dict(target=[1, 2, 3, 4]), TypeError, "target must be a tensor, got list"),
    ("soft labels", dict(target=torch.rand(N, C)), TypeError,
     r"target must hold integer labels \(soft labels are not supported\), got torch.float32"),
    ("bool labels", dict(target=torch.ones(N, dtype=torch.bool)), TypeError, "target must hold integer.*torch.bool"),
    ("too few labels", dict(target=torch.zeros(N - 1, dtype=torch.long)), ValueError,
     r"target must have shape \(4,\), one number per row of logits, got \(3,\)"),
    ("labels elsewhere", dict(target=torch.zeros(N, dtype=torch.long, device="meta")), ValueError,
     "target must be on cpu like student_logits, got meta"),
    ("unknown rule", dict(weights="trust"), ValueError,
     "weights must be one of 'uniform', 'confidence', 'entropy', got 'trust'"),
    ("confidence without labels", dict(weights="confidence", target=None), ValueError,
     'weights="confidence" must come with target.*got None'),
    ("weights in a list", dict(weights=[0.5, 0.2, 0.3]), TypeError, "weights must be .* or a tensor .* got list"),
    ("integer weights", dict(weights=torch.ones(K, dtype=torch.long)), TypeError,
     "weights must be floating point, got torch.int64"),
    ("weights for other teachers", dict(weights=torch.ones(K + 1)), ValueError,
     r"weights must have shape \(3,\) or \(3, 4\), got \(4,\)"),
    ("weights the wrong way round", dict(weights=torch.ones(N, K)), ValueError,
     r"weights must have shape \(3,\) or \(3, 4\), got \(4, 3\)"),
    ("weights elsewhere", dict(weights=torch.ones(K, device="meta")), ValueError, "weights must be on cpu .* got meta"),
    ("temperature zero", dict(temperature=0.0), ValueError, r"temperature must be a finite number > 0, got 0\.0"),
    ("temperature negative", dict(temperature=-1), ValueError, "temperature must be a finite number > 0, got -1"),
    ("temperature infinite", dict(temperature=float("inf")), ValueError, "temperature must be .* got inf"),
    ("temperature nan", dict(temperature=float("nan")), ValueError, "temperature must be .* got nan"),
    ("temperature a tensor", dict(temperature=torch.tensor(2.0)), TypeError,
     "temperature must be a number, got Tensor"),
    ("temperature True", dict(temperature=True), TypeError, "temperature must be a number, got bool"),
    ("temperature too small for float32", dict(temperature=1e-50), ValueError, "temperature must be in .* got 1e-50"),
    ("temperature too large for float32", dict(temperature=1e39), ValueError, r"temperature must be in .* got 1e\+39"),
    ("temperature_squared a number", dict(temperature_squared=1), TypeError,
     "temperature_squared must be True or False, got int"),
    ("unknown divergence", dict(divergence="kl"), ValueError, "divergence must be one of 'forward_kl', .* got 'kl'"),
    ("beta for a KL", dict(beta=0.5), ValueError,
     "beta must be None for divergence='forward_kl', which takes none, got 0.5"),
    ("beta for tvd", dict(divergence="tvd", beta=0.0), ValueError, "beta must be None for divergence='tvd', .* got 0"),
    ("beta of jsd above one", dict(divergence="jsd", beta=1.5), ValueError,
     r"beta of divergence='jsd' must be in \[0, 1\], .* got 1\.5"),
    ("beta of skew_kl one", dict(divergence="skew_kl", beta=1), ValueError,
     r"beta of divergence='skew_kl' must be in \[0, 1\), .* got 1"),
    ("beta of dkd negative", dict(divergence="dkd", beta=-1.0), ValueError,
     r"beta of divergence='dkd' must be 0 or more, .* got -1\.0"),
    ("beta too small for float32", dict(divergence="jsd", beta=1e-50), ValueError, "beta .* float32, got 1e-50"),
    ("beta a string", dict(divergence="jsd", beta="0.5"), TypeError, "beta must be a number, got str"),
    ("beta nan", dict(divergence="jsd", beta=float("nan")), ValueError, "beta must be a finite number, got nan"),
    ("dkd without labels", dict(divergence="dkd", target=None), ValueError,
     "divergence='dkd' must come with target .* got None"),
    ("kd_weight nan", dict(kd_weight=float("nan")), ValueError, "kd_weight must be a finite number, got nan"),
    ("kd_weight a string", dict(kd_weight="1"), TypeError, "kd_weight must be a number, got str"),
    ("ce_weight without labels", dict(ce_weight=1.0, target=None), ValueError, "target must be given .* got None"),
    ("ce_weight infinite", dict(ce_weight=float("inf")), ValueError, "ce_weight must be a finite number, got inf"),
    ("smoothing above one", dict(label_smoothing=1.1), ValueError,
     r"label_smoothing must be a finite number in \[0, 1\], got 1\.1"),
    ("smoothing negative", dict(label_smoothing=-0.1), ValueError, r"label_smoothing .* in \[0, 1\], got -0\.1"),
    ("row weights of integers", dict(row_weights=torch.ones(N, dtype=torch.long)), TypeError,
     "row_weights must be bool or floating point, got torch.int64"),
    ("row weights of another shape", dict(row_weights=torch.ones(N, 1)), ValueError,
     r"row_weights must have shape \(4,\), one number per row of logits, got \(4, 1\)"),
    ("row weights that want a gradient", dict(row_weights=torch.ones(N, requires_grad=True)), ValueError,
     "row_weights must not require grad.*detach"),
    ("unknown reduction", dict(reduction="batchmean"), ValueError,
     "reduction must be one of 'none', 'sum', 'mean', got 'batchmean'"),
    ("num_items with a sum", dict(num_items=4, reduction="sum"), ValueError,
     'num_items replaces the denominator of reduction="mean", got reduction=\'sum\''),
    ("num_items zero", dict(num_items=0), ValueError, "num_items must be a finite number > 0, got 0"),
    ("num_items of several", dict(num_items=torch.ones(2)), ValueError,
     r"num_items must be a number or a tensor of one element, got shape \(2,\)"),
    ("num_items True", dict(num_items=True), TypeError, "num_items must be a number, got bool"),
    ("num_items a mask", dict(num_items=torch.tensor(True)), TypeError, r"num_items must hold .* got torch\.bool"),
    ("ignore_index None", dict(ignore_index=None), TypeError, "ignore_index must be an integer, got NoneType"),
    ("unknown implementation", dict(implementation="cuda"), ValueError,
     "implementation must be one of 'cpp', 'triton', 'reference' or None, got 'cuda'"),
    ("label out of range", dict(target=torch.tensor([0, 1, C, 2])), ValueError,
     r"target must hold labels in \[0, 10\) or ignore_index = -100, got 10"),
    ("label negative", dict(target=torch.tensor([0, -1, 1, 2])), ValueError, r"target must hold labels .* got -1"),
    ("label of another ignore_index", dict(target=torch.tensor([0, -100, 1, 2]), ignore_index=-1), ValueError,
     r"target must hold labels .* ignore_index = -1, got -100"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_bad_arguments_are_refused_by_name(logits, change, error, message):
    student, teachers, target = logits
    good = dict(student=student, teachers=teachers, target=target, weights="uniform", ce_weight=0.5)
    call = good | ({"ce_weight": 0.0} if "target" in change and change["target"] is None else {}) | change
    with pytest.raises(error, match=message):
        multi_teacher_kd_loss(call.pop("student"), call.pop("teachers"), call.pop("target"), **call)


@pytest.mark.parametrize("name", ["cpp", "triton", "reference"])
def test_labels_out_of_range_raise_in_every_implementation_on_the_cpu(logits, implementation, name):
    if name != implementation:
        pytest.skip("another implementation's turn")
    student, teachers, target = logits
    target[2] = C
    with pytest.raises(ValueError, match=r"target must hold labels in \[0, 10\)"):
        multi_teacher_kd_loss(student, teachers, target, ce_weight=1.0, implementation=name)


def test_everything_after_the_tensors_is_keyword_only(logits):
    student, teachers, target = logits
    with pytest.raises(TypeError, match="positional"):
        multi_teacher_kd_loss(student, teachers, target, "uniform")
    with pytest.raises(TypeError, match="positional"):
        multi_teacher_divergence(student, teachers, "forward_kl")


def test_float64_is_refused_where_the_kernels_have_none(logits):
    if "cpu" not in implementations()["triton"].devices:
        pytest.skip("Triton does not run on this CPU")
    student, teachers, _ = logits
    with pytest.raises(ValueError, match=r"implementation='triton' cannot run.*got torch\.float64"):
        multi_teacher_kd_loss(student.double(), teachers, implementation="triton")


def test_a_named_implementation_that_cannot_run_raises_and_says_why(logits, monkeypatch):
    student, teachers, _ = logits
    gone = {**mtkd_fast.dispatch._AVAILABLE, "triton": mtkd_fast.dispatch.Implementation((), "not on this planet")}
    monkeypatch.setattr(mtkd_fast.dispatch, "_AVAILABLE", gone)
    with pytest.raises(ValueError, match="implementation='triton' cannot run on cpu tensors: not on this planet"):
        multi_teacher_kd_loss(student, teachers, implementation="triton")


# Conventions.


def test_teachers_may_be_one_tensor_a_list_or_a_tuple(logits, implementation):
    student, teachers, _ = logits
    losses = [
        multi_teacher_kd_loss(student, form, implementation=implementation)
        for form in (teachers, tuple(teachers), torch.stack(teachers))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_a_stacked_teacher_tensor_gets_one_stacked_gradient(logits, implementation):
    student, teachers, _ = logits
    stacked = torch.stack(teachers).requires_grad_()
    multi_teacher_kd_loss(student, stacked, implementation=implementation).backward()
    assert stacked.grad.shape == (K, N, C)
    assert (stacked.grad != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_float32(logits, implementation, dtype):
    student, teachers, _ = logits
    loss = multi_teacher_kd_loss(student.to(dtype), [t.to(dtype) for t in teachers], implementation=implementation)
    assert loss.dtype == torch.float32
    assert loss.shape == ()


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_float64_stays_float64_on_the_cpu(logits, implementation):
    student, teachers, _ = logits
    assert multi_teacher_kd_loss(student.double(), teachers, implementation=implementation).dtype == torch.float64
    teachers[1] = teachers[1].double()
    assert multi_teacher_kd_loss(student, teachers, implementation=implementation).dtype == torch.float64
    assert multi_teacher_divergence(student, teachers, implementation=implementation).dtype == torch.float64


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_empty_batch_is_zero_and_attached(implementation, rows, reduction):
    student = torch.randn(*rows, C, requires_grad=True)
    teachers = [torch.randn(*rows, C) for _ in range(K)]
    target = torch.zeros(rows, dtype=torch.long)
    loss = multi_teacher_kd_loss(
        student, teachers, target, weights="confidence", ce_weight=1.0, reduction=reduction,
        implementation=implementation,
    )  # fmt: skip
    assert loss.shape == (rows if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("wants", ["student", "teacher", "weights"])
def test_terms_of_weight_zero_leave_a_zero_attached_to_the_graph(logits, implementation, wants):
    """A schedule that starts at kd_weight = 0 can call backward from its first step."""
    student, teachers, _ = logits
    w = torch.rand(K)
    leaf = {"student": student, "teacher": teachers[0], "weights": w}[wants].requires_grad_()
    loss = multi_teacher_kd_loss(student, teachers, weights=w, kd_weight=0.0, implementation=implementation)
    assert loss == 0
    loss.backward()
    assert leaf.grad is None or torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_kd_weight_of_zero_reads_no_teacher(logits, implementation):
    student, _, target = logits
    poisoned = [torch.full((N, C), float("nan"))] * K
    got = multi_teacher_kd_loss(
        student, poisoned, target, weights="confidence", kd_weight=0.0, ce_weight=1.0, implementation=implementation
    )
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(student, target))


def test_a_ce_weight_of_zero_leaves_the_hard_label_out(logits, implementation):
    """A student that excludes the label has an infinite cross-entropy; 0 times it is 0."""
    student, teachers, target = logits
    for x in (student, *teachers):
        x[torch.arange(N), target] = -float("inf")
    loss, stats = multi_teacher_kd_loss(student, teachers, target, return_stats=True, implementation=implementation)
    assert loss.isfinite()
    assert stats.student_ce is None


@pytest.mark.parametrize("divergence", WITHOUT_TARGET)
def test_divergence_has_neither_temperature_squared_nor_weights(logits, implementation, divergence):
    student, teachers, _ = logits
    kwargs = dict(divergence=divergence, temperature=3.0, implementation=implementation)
    d = multi_teacher_divergence(student, teachers, **kwargs)
    assert d.shape == (K, N)
    torch.testing.assert_close(multi_teacher_kd_loss(student, teachers, **kwargs), 9 * d.mean(0).mean())


@pytest.mark.parametrize("rows", [(), (N,), (2, 3)])
@pytest.mark.parametrize("divergence", WITHOUT_TARGET)
def test_divergence_is_differentiable_in_every_logit(backend, divergence, rows):
    device = backend.device
    student = torch.randn(*rows, C, device=device, requires_grad=True)
    teachers = torch.randn(K, *rows, C, device=device, requires_grad=True)
    upstream = torch.randn(K, *rows, device=device)
    kwargs = dict(divergence=divergence, temperature=2.0)
    got = backend.divergence(student, teachers, **kwargs)
    doubles = [x.detach().cpu().double().requires_grad_() for x in (student, teachers)]
    right = multi_teacher_divergence(*doubles, implementation="reference", **kwargs)
    assert got.shape == (K, *rows)
    torch.testing.assert_close(got.cpu().double(), right, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(got, [student, teachers], upstream)
    for gradient, exact in zip(found, torch.autograd.grad(right, doubles, upstream.cpu().double()), strict=True):
        torch.testing.assert_close(gradient.cpu().double(), exact, rtol=1e-4, atol=1e-6)


def test_divergence_with_upstream_for_one_teacher_only(backend):
    """What a selection of teachers sends back: zeros for the others."""
    student, *teachers = (torch.randn(N, C, device=backend.device, requires_grad=True) for _ in range(K + 1))
    d = backend.divergence(student, teachers)
    gradients = torch.autograd.grad(d[1].sum(), [student, *teachers])
    alone = torch.autograd.grad(backend.divergence(student, teachers[1:2]).sum(), [student, teachers[1]])
    torch.testing.assert_close(gradients[0], alone[0])
    torch.testing.assert_close(gradients[2], alone[1])
    assert torch.equal(gradients[1], torch.zeros_like(student))


def test_divergence_refuses_in_the_same_words(logits):
    student, teachers, _ = logits
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        multi_teacher_divergence(student, teachers, temperature=0)
    with pytest.raises(ValueError, match="divergence must be one of"):
        multi_teacher_divergence(student, teachers, divergence="tv")
    with pytest.raises(ValueError, match=r"teacher_logits\[0\] must have shape"):
        multi_teacher_divergence(student, [teachers[0][:2]])


# Statistics.


def test_stats_are_detached_unscaled_and_named(logits, implementation):
    student, teachers, target = logits
    student.requires_grad_()
    target[1] = -100
    loss, stats = multi_teacher_kd_loss(
        student, teachers, target, weights="confidence", temperature=4.0, kd_weight=0.5, ce_weight=2.0,
        reduction="none", return_stats=True, implementation=implementation,
    )  # fmt: skip
    assert stats._fields == ("divergence", "weights", "teacher_ce", "teacher_entropy", "student_ce")
    assert all(not x.requires_grad for x in stats if x is not None)
    assert stats.teacher_entropy is None
    rebuilt = 0.5 * 16 * (stats.weights * stats.divergence).sum(0) + 2.0 * stats.student_ce
    torch.testing.assert_close(loss.detach(), rebuilt)
    assert all((x[..., 1] == 0).all() for x in stats if x is not None), "rows that do not count give 0"
    ce = torch.stack([torch.nn.functional.cross_entropy(t, target, reduction="none") for t in teachers])
    torch.testing.assert_close(stats.teacher_ce, ce)


@pytest.mark.parametrize(
    ("kwargs", "computed"),
    [
        (dict(), {"divergence", "weights"}),
        (dict(weights="confidence"), {"divergence", "weights", "teacher_ce"}),
        (dict(weights="entropy"), {"divergence", "weights", "teacher_entropy"}),
        (dict(ce_weight=1.0), {"divergence", "weights", "student_ce"}),
        (dict(ce_weight=1.0, kd_weight=0.0), {"student_ce"}),
    ],
    ids=["uniform", "confidence", "entropy", "hard label", "hard label alone"],
)
def test_what_the_pass_did_not_compute_is_none(logits, implementation, kwargs, computed):
    student, teachers, target = logits
    _, stats = multi_teacher_kd_loss(
        student, teachers, target, return_stats=True, implementation=implementation, **kwargs
    )
    assert {name for name, x in stats._asdict().items() if x is not None} == computed


def test_stats_do_not_change_when_the_loss_is_used(logits, implementation):
    student, teachers, target = logits
    student.requires_grad_()
    loss, stats = multi_teacher_kd_loss(
        student, teachers, target, ce_weight=1.0, return_stats=True, implementation=implementation
    )
    before = [x.clone() for x in stats if x is not None]
    (3 * loss).backward()
    assert all(map(torch.equal, before, [x for x in stats if x is not None]))


# Weights.


@pytest.mark.parametrize("rule", checks.WEIGHT_RULES)
@pytest.mark.parametrize("rows", [(N,), (2, 3)])
def test_teacher_weights_are_those_of_the_loss(implementation, rule, rows):
    student, *teachers = (torch.randn(*rows, C) for _ in range(K + 1))
    target = torch.randint(C, rows)
    w = teacher_weights(teachers, target, rule=rule, implementation=implementation)
    assert w.shape == (K, *rows)
    torch.testing.assert_close(w.sum(0), torch.ones(rows))
    by_rule = multi_teacher_kd_loss(student, teachers, target, weights=rule, implementation=implementation)
    as_given = multi_teacher_kd_loss(student, teachers, weights=w, implementation=implementation)
    torch.testing.assert_close(by_rule, as_given)


def test_teacher_weights_of_ignored_rows_are_zero(logits, implementation):
    _, teachers, target = logits
    target[2] = -100
    w = teacher_weights(teachers, target, rule="confidence", implementation=implementation)
    assert (w[:, 2] == 0).all()
    assert (w[:, 0] > 0).all()


def test_teacher_weights_are_constants(logits, implementation):
    _, teachers, target = logits
    teachers[0].requires_grad_()
    assert not teacher_weights(teachers, target, rule="confidence", implementation=implementation).requires_grad


def test_teacher_weights_refuse_in_the_same_words(logits):
    _, teachers, target = logits
    with pytest.raises(ValueError, match='rule="confidence" must come with target'):
        teacher_weights(teachers, rule="confidence")
    with pytest.raises(TypeError, match=r"teacher_logits\[0\] must be float32"):
        teacher_weights([t.long() for t in teachers], target, rule="confidence")
    with pytest.raises(ValueError, match="rule must be one of 'uniform', 'confidence', 'entropy', got 'given'"):
        teacher_weights(teachers, target, rule="given")
    with pytest.raises(ValueError, match=r"teacher_logits\[1\] must have shape"):
        teacher_weights([teachers[0], teachers[1][:, :5]], target, rule="entropy")


# Implementations.


def test_implementations_say_what_runs_here_and_why_not():
    found = implementations()
    assert list(found) == ["cpp", "triton", "reference"]
    assert found["reference"].devices == ("cpu", "cuda")
    assert all(implementation.note for implementation in found.values())


def test_implementations_hands_out_a_copy():
    implementations().clear()
    assert implementations()


def test_the_best_implementation_on_a_cpu_is_cpp_when_built(logits, monkeypatch):
    student, *_ = logits
    best = mtkd_fast.dispatch.choose(None, student)
    assert best == ("cpp" if "cpu" in implementations()["cpp"].devices else "reference")
    without = {**mtkd_fast.dispatch._AVAILABLE, "cpp": mtkd_fast.dispatch.Implementation((), "not built")}
    monkeypatch.setattr(mtkd_fast.dispatch, "_AVAILABLE", without)
    assert mtkd_fast.dispatch.choose(None, student) == "reference"


def test_the_reference_chosen_on_a_gpu_warns():
    with pytest.warns(UserWarning, match="runs the plain PyTorch reference on cuda tensors"):
        mtkd_fast.dispatch._warn_reference("cuda")


def test_every_public_name_is_documented_and_exported():
    for name in mtkd_fast.__all__:
        assert getattr(mtkd_fast, name).__doc__, f"{name} has no docstring"
