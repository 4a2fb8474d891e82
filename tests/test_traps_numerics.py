"""Traps of the numerics, each a place where a published kernel went wrong. (Trap 9 is of TVD, not here yet.)"""

import math

import pytest
import torch
from cases.kd import BF16, F16, F32, INF, NAN, WITHOUT_TARGET, check

every_divergence = pytest.mark.parametrize("divergence", WITHOUT_TARGET)


def draw(backend, *shape, n=2, dtype=F32):
    return [torch.randn(*shape, device=backend.device).to(dtype) for _ in range(n)]


def gradient_of(backend, student, teachers, *args, **kwargs):
    student = student.detach().requires_grad_()
    loss = backend.loss(student, teachers, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


@every_divergence
def test_trap_01_a_class_masked_on_both_sides_is_no_class(backend, divergence):
    student, teacher = draw(backend, 4, 20)
    kept = torch.arange(20) % 3 != 0
    loss, gradient = gradient_of(backend, student[:, kept], [teacher[:, kept]], divergence=divergence)
    for x in (student, teacher):
        x[:, ~kept] = -INF
    masked_loss, masked_gradient = gradient_of(backend, student, [teacher], divergence=divergence)
    torch.testing.assert_close(masked_loss, loss)
    torch.testing.assert_close(masked_gradient[:, kept], gradient)
    assert (masked_gradient[:, ~kept] == 0).all()


def test_trap_01_a_class_masked_in_the_teacher_adds_nothing_to_forward_kl(backend):
    student, teacher = draw(backend, 4, 20)
    teacher[:, 3] = -INF
    q, p = student.softmax(-1), teacher.softmax(-1)
    kept = torch.arange(20) != 3
    right = (p * (p.log() - q.log()))[:, kept].sum(-1).mean()
    loss, gradient = gradient_of(backend, student, [teacher])
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, (q - p) / 4)
    check(backend, student, [teacher])


def test_trap_01_a_class_masked_in_the_teacher_alone_makes_reverse_kl_infinite(backend):
    student, teacher = draw(backend, 4, 20)
    teacher[1, 3] = -INF
    loss, gradient = gradient_of(backend, student, [teacher], divergence="reverse_kl", reduction="none")
    assert loss[1] == INF
    assert gradient[1].isnan().any()
    assert loss[[0, 2, 3]].isfinite().all()
    assert gradient[[0, 2, 3]].isfinite().all()


def test_trap_01_a_class_masked_in_the_student_alone_makes_forward_kl_infinite_with_a_finite_gradient(backend):
    student, teacher = draw(backend, 4, 20)
    student[1, 3] = -INF
    loss, gradient = gradient_of(backend, student, [teacher], reduction="none")
    assert loss[1] == INF
    assert loss[[0, 2, 3]].isfinite().all()
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_trap_01_a_class_masked_in_the_student_alone_adds_nothing_to_reverse_kl(backend):
    student, teacher = draw(backend, 4, 20)
    student[1, 3] = -INF
    got = check(backend, student, [teacher], divergence="reverse_kl", reduction="none")
    assert got.loss.isfinite().all()
    assert got.gradients["student"][1, 3] == 0


@pytest.mark.parametrize("where", ["student", "teacher"])
@every_divergence
def test_trap_01_a_row_without_a_finite_logit_is_nan_and_alone(backend, divergence, where):
    student, *teachers = draw(backend, 4, 20, n=3)
    (student if where == "student" else teachers[1])[2] = -INF
    got = check(backend, student, teachers, divergence=divergence, reduction="none")
    assert got.loss.isnan().tolist() == [False, False, True, False]
    assert got.gradients["student"].isnan().any(-1).tolist() == [False, False, True, False]


@every_divergence
def test_trap_01_a_masked_shard_of_the_vocabulary_changes_nothing(backend, divergence):
    """Padding to a multiple of 128 with -inf, as language models do."""
    student, teacher = draw(backend, 3, 500)
    loss, gradient = gradient_of(backend, student, [teacher], divergence=divergence, temperature=2.0)
    padded = [torch.nn.functional.pad(x, (0, 12), value=-INF) for x in (student, teacher)]
    padded_loss, padded_gradient = gradient_of(backend, padded[0], [padded[1]], divergence=divergence, temperature=2.0)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_gradient[:, :500], gradient)
    assert (padded_gradient[:, 500:] == 0).all()


@pytest.mark.parametrize("n_classes", [96, 5000])
@pytest.mark.parametrize("finite", ["last", "first", "middle"])
@every_divergence
def test_trap_02_tiles_without_a_finite_logit(backend, divergence, finite, n_classes):
    few = {"last": slice(-5, None), "first": slice(0, 5), "middle": slice(n_classes // 2, n_classes // 2 + 5)}[finite]
    rows = draw(backend, 2, n_classes, n=3)
    student, *teachers = [torch.full_like(x, -INF) for x in rows]
    for x, row in zip((student, *teachers), rows, strict=True):
        x[:, few] = row[:, few]
    loss, gradient = gradient_of(
        backend, rows[0][:, few].clone(), [t[:, few].clone() for t in rows[1:]], divergence=divergence
    )
    masked_loss, masked_gradient = gradient_of(backend, student, teachers, divergence=divergence)
    torch.testing.assert_close(masked_loss, loss)
    torch.testing.assert_close(masked_gradient[:, few], gradient)
    assert masked_gradient.isfinite().all()


@every_divergence
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_trap_02_a_masked_tile_and_logits_far_from_zero(backend, divergence, temperature, offset):
    student, *teachers = (x + offset for x in draw(backend, 3, 2500, n=3))
    for x in (student, *teachers):
        x[:, :2100] = -INF  # more than a tile of csrc/tile.h
    got = check(backend, student, teachers, divergence=divergence, temperature=temperature)
    assert got.gradients["student"].isfinite().all()


@every_divergence
def test_trap_02_finite_masks_below_temperature_one(backend, divergence):
    """finfo.min/τ is −inf: the class is as impossible as one of −inf, and no NaN."""
    student, *teachers = draw(backend, 3, 50)
    for x in (student, *teachers):
        x[:, 7] = torch.finfo(F32).min
    for wants in (("student",), ("student", "teachers")):
        got = check(backend, student, teachers, divergence=divergence, temperature=0.5, wants=wants)
        assert got.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in got.gradients.values())


@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_trap_02_a_leading_tile_masked_on_one_side_only(backend, masked):
    student, teacher = draw(backend, 2, 5000)
    divergence = "reverse_kl" if masked == "student" else "forward_kl"
    (student if masked == "student" else teacher)[:, :4500] = -INF
    got = check(backend, student, [teacher], divergence=divergence, temperature=4.0)
    assert got.loss.isfinite()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@every_divergence
def test_trap_03_underflow(backend, divergence, dtype):
    """Logits of +-300 at T = 0.05: exponents of 12000, where probability targets give non-finite gradients."""
    student, teacher = (x.clamp(-3, 3).mul(100) for x in draw(backend, 4, 50))
    got = check(
        backend, student.to(dtype), [teacher.to(dtype)], divergence=divergence, temperature=0.05,
        temperature_squared=False, wants=("student", "teachers"),
    )  # fmt: skip
    assert got.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


@every_divergence
def test_trap_03_a_very_peaked_teacher(backend, divergence):
    student, teacher = draw(backend, 4, 50)
    teacher[:, 7] += 200
    assert check(backend, student, [teacher], divergence=divergence).loss.isfinite()


@pytest.mark.parametrize("shape", [(8, 10), (4, 1000), (2, 32000)])
@every_divergence
def test_trap_04_identical_rows_give_zero_and_no_gradient(backend, divergence, shape):
    (student,) = draw(backend, *shape, n=1)
    loss, gradient = gradient_of(backend, student, [student.clone()] * 2, divergence=divergence, reduction="none")
    rounding = 4 * torch.finfo(F32).eps * math.log(shape[1])
    assert loss.abs().max() <= rounding
    assert gradient.abs().max() <= rounding * student.softmax(-1).max()


def test_trap_04_nearly_identical_rows_at_32000_classes(backend):
    """A true divergence near 1e-3, below what bfloat16 arithmetic resolves."""
    student, noise = draw(backend, 2, 32000)
    teacher = student + 0.05 * noise
    got = check(backend, student, [teacher], reduction="none")
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    right = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(got.loss.double(), right, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("offset", [0.0, 50.0, 500.0, 5e3])
@every_divergence
def test_trap_05_a_common_offset_changes_nothing(backend, divergence, offset):
    student, *teachers = [x.mul(64).round().div(64) for x in draw(backend, 4, 100, n=3)]  # exact after the shift
    loss, gradient = gradient_of(backend, student, teachers, divergence=divergence, temperature=2.0)
    shifted = [t - offset for t in teachers]
    shifted_loss, shifted_gradient = gradient_of(
        backend, student + offset, shifted, divergence=divergence, temperature=2.0
    )
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_trap_06_half_precision_accumulates_in_float32_and_rounds_its_gradient_once(backend, dtype):
    student, teacher = draw(backend, 8, 1000, dtype=dtype)
    got = check(backend, student, [teacher], temperature=2.0)
    assert got.loss.dtype == F32
    assert got.gradients["student"].dtype == dtype
    exact = student.double().div(2).softmax(-1) - teacher.double().div(2).softmax(-1)
    once = (2 * exact / 8).to(dtype)
    differ = (got.gradients["student"] != once).double().mean()
    if not (backend.interpreted and dtype == BF16):  # the interpreter truncates there
        assert differ < 0.01, f"{differ:.1%} of the gradient is not the rounded exact one"


@pytest.mark.parametrize("dtypes", [(BF16, F32, F16), (F32, BF16, BF16), (F16, F32, BF16)])
@every_divergence
def test_trap_07_every_tensor_has_its_own_dtype(backend, divergence, dtypes):
    student, *teachers = (torch.randn(4, 65, device=backend.device).to(dtype) for dtype in dtypes)
    got = check(backend, student, teachers, divergence=divergence, wants=("student", "teachers"))
    assert [gradient.dtype for gradient in got.gradients.values()] == list(dtypes)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_trap_07_autocast_changes_nothing(backend, dtype):
    student, teacher = draw(backend, 4, 65, dtype=dtype)
    loss, gradient = gradient_of(backend, student, [teacher])
    with torch.autocast(backend.device, dtype=BF16):
        cast_loss, cast_gradient = gradient_of(backend, student, [teacher])
    assert cast_loss.dtype == loss.dtype
    assert torch.equal(cast_loss, loss)
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["student", "teacher"])
@every_divergence
def test_trap_08_nan_and_inf_are_not_masked_away(backend, divergence, where, value):
    student, *teachers = draw(backend, 3, 40, n=3)
    (student if where == "student" else teachers[0])[1, 17] = value
    got = check(backend, student, teachers, divergence=divergence, reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert got.gradients["student"].isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@every_divergence
def test_trap_08_a_poisoned_teacher_of_weight_zero_is_not_read(backend, divergence, value):
    student, *teachers = draw(backend, 3, 40, n=3)
    weights = torch.tensor([0.0, 0.4], device=backend.device)
    clean = check(backend, student, teachers, weights=weights, divergence=divergence)
    teachers[0] = torch.full_like(teachers[0], value)
    got = check(backend, student, teachers, weights=weights, divergence=divergence)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.gradients["student"], clean.gradients["student"])


@pytest.mark.parametrize("dtype", [F32, BF16])
@every_divergence
def test_trap_10_gradient_rows_sum_to_zero(backend, divergence, dtype):
    student, *teachers = draw(backend, 4, 1000, n=3, dtype=dtype)
    target = torch.randint(1000, (4,), device=backend.device)
    _, gradient = gradient_of(
        backend, student, teachers, target, weights="confidence", ce_weight=1.0, label_smoothing=0.1,
        divergence=divergence,
    )  # fmt: skip
    sums, sizes = gradient.double().sum(-1).abs(), gradient.double().abs().sum(-1)
    assert (sums <= 4 * torch.finfo(dtype).eps * sizes).all()
