"""Traps of the labels and the reductions."""

import pytest
import torch
import torch.nn.functional as F
from cases.kd import check

N, C = 6, 10


@pytest.fixture
def logits(backend):
    student, *teachers = (torch.randn(N, C, device=backend.device) for _ in range(3))
    return student, teachers, torch.randint(1, C, (N,), device=backend.device)


def objective(backend, student, teachers, target, **kwargs):
    return backend.loss(student, teachers, target, weights="confidence", ce_weight=1.0, temperature=2.0, **kwargs)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
def test_trap_17_ignored_rows_are_as_if_they_were_not_there(backend, logits, ignore_index):
    """Negative, positive, and inside the range of the classes."""
    student, teachers, target = logits
    kept = torch.tensor([True, False, True, True, False, True], device=backend.device)
    target[~kept] = ignore_index
    student.requires_grad_()
    loss = objective(backend, student, teachers, target, ignore_index=ignore_index)
    alone = objective(backend, student[kept], [t[kept] for t in teachers], target[kept])
    torch.testing.assert_close(loss, alone)
    (gradient,), (gradient_alone,) = torch.autograd.grad(loss, student), torch.autograd.grad(alone, student)
    torch.testing.assert_close(gradient, gradient_alone)
    assert (gradient[~kept] == 0).all()


def test_trap_17_first_and_last_class(backend, logits):
    student, teachers, target = logits
    target[0], target[1] = 0, C - 1
    got = backend.loss(student, teachers, target, kd_weight=0.0, ce_weight=1.0, reduction="none")
    torch.testing.assert_close(got, F.cross_entropy(student, target, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_trap_17_any_integer_dtype(backend, logits, dtype):
    student, teachers, target = logits
    assert torch.equal(
        objective(backend, student, teachers, target.to(dtype)), objective(backend, student, teachers, target)
    )


def test_trap_17_strided_and_misaligned_labels(backend, logits):
    student, teachers, target = logits
    right = objective(backend, student, teachers, target)
    strided = torch.zeros(N, 3, dtype=torch.long, device=backend.device)
    strided[:, 1] = target
    misaligned = torch.zeros(N + 1, dtype=torch.int32, device=backend.device)
    misaligned[1:] = target
    reversed_twice = target.flip(0).contiguous().flip(0)
    for same in (strided[:, 1], misaligned[1:], reversed_twice, target[:1].expand(N)[:0]):
        if same.numel():
            assert torch.equal(objective(backend, student, teachers, same), right)
    one_for_all = target[:1].expand(N)
    assert torch.equal(
        objective(backend, student, teachers, one_for_all), objective(backend, student, teachers, one_for_all.clone())
    )


@pytest.mark.parametrize("label", [C, -1, 2**31, -(2**40)])
def test_trap_17_a_label_out_of_range_is_never_read(backend, logits, label):
    """On the CPU it raises; on a GPU, where looking would stall the stream, its row is NaN."""
    student, teachers, target = logits
    target[2] = label
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=rf"target must hold labels in \[0, {C}\).*got {label}"):
            objective(backend, student, teachers, target)
    else:
        loss = objective(backend, student, teachers, target, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_trap_18_no_row_that_counts_is_zero_with_a_zero_gradient(backend, logits, reduction):
    student, teachers, target = logits
    student.requires_grad_()
    teachers[0].requires_grad_()
    loss = objective(backend, student, teachers, torch.full_like(target, -100), reduction=reduction)
    assert loss.requires_grad
    assert (loss == 0).all()
    loss.sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert torch.equal(teachers[0].grad, torch.zeros_like(student))


def test_trap_18_all_row_weights_zero(backend, logits):
    student, teachers, _ = logits
    student.requires_grad_()
    backend.loss(student, teachers, row_weights=torch.zeros(N, device=backend.device)).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_trap_19_reductions_of_one_vector_of_rows(backend, logits):
    student, teachers, target = logits
    target[4] = -100
    rows = objective(backend, student, teachers, target, reduction="none")
    assert rows.shape == (N,)
    assert rows[4] == 0
    torch.testing.assert_close(objective(backend, student, teachers, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(objective(backend, student, teachers, target, reduction="mean"), rows.sum() / (N - 1))


def test_trap_19_mean_never_divides_by_classes_nor_by_weights(backend, logits):
    """Row weights multiply their rows; only whether they are 0 enters the denominator."""
    student, teachers, _ = logits
    rows = backend.loss(student, teachers, reduction="none")
    weights = torch.tensor([2.0, 0.0, 0.5, -1.0, 3.0, 0.0], device=backend.device)
    got = backend.loss(student, teachers, row_weights=weights)
    torch.testing.assert_close(got, (weights * rows).sum() / 4)


def test_trap_19_a_bool_mask_is_row_weights_of_zero_and_one(backend, logits):
    student, teachers, _ = logits
    keep = torch.tensor([True, False, True, True, False, True], device=backend.device)
    got = backend.loss(student, teachers, row_weights=keep)
    assert torch.equal(got, backend.loss(student, teachers, row_weights=keep.float()))
    torch.testing.assert_close(got, backend.loss(student[keep], [t[keep] for t in teachers]))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_trap_19_num_items_replaces_the_denominator(backend, logits, as_tensor):
    student, teachers, target = logits
    items = torch.tensor(11, device=backend.device) if as_tensor else 11
    got = objective(backend, student, teachers, target, num_items=items)
    torch.testing.assert_close(got, objective(backend, student, teachers, target, reduction="sum") / 11)


def test_trap_20_gradient_accumulation_over_uneven_batches_is_the_whole_batch(backend, logits):
    """With ignored tokens, the mean of the micro-batches' means is another number."""
    student, teachers, target = logits
    target[0], target[1] = -100, -100
    whole = student.clone().requires_grad_()
    objective(backend, whole, teachers, target).backward()
    parts = student.clone().requires_grad_()
    items = (target != -100).sum()
    total = 0.0
    for piece in (slice(0, 3), slice(3, 6)):
        loss = objective(backend, parts[piece], [t[piece] for t in teachers], target[piece], num_items=items)
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(parts.grad, whole.grad)
    assert total == pytest.approx(objective(backend, student, teachers, target).item(), rel=1e-6)


def test_trap_20_normalisation_by_an_independent_formula(backend, logits):
    student, teachers, target = logits
    target[3] = -100
    kept = [n for n in range(N) if n != 3]
    by_hand = 0.0
    for n in kept:
        ce = torch.stack([F.cross_entropy(t[n], target[n]) for t in teachers]).softmax(0)
        for t, wrong in zip(teachers, ce, strict=True):
            kl = F.kl_div((student[n] / 2).log_softmax(-1), (t[n] / 2).softmax(-1), reduction="sum")
            by_hand += 4 * (1 - wrong) * kl
        by_hand += F.cross_entropy(student[n], target[n])
    torch.testing.assert_close(objective(backend, student, teachers, target), by_hand / len(kept))
    check(backend, student, teachers, target, weights="confidence", ce_weight=1.0, temperature=2.0)
