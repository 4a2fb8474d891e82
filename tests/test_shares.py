"""How the rows of a batch are shared out among threads: piece by piece where there are many, else at once."""

import pytest
import torch
from cases.kd import assert_same_bits, check, loss_and_gradient
from cases.threads import using_threads

from mtkd_fast import hint_loss, mixture_divergence, multi_teacher_kd_loss, mutual_kd_loss

PIECES = 16 * 64  # rows of each thread, from which on it takes them in pieces
OPTIONS = dict(weights="confidence", ce_weight=1.0)


def inputs(*shape):
    g = torch.Generator().manual_seed(shape[0])
    student, *teachers = (torch.randn(shape, generator=g) * 3 for _ in range(3))
    return student, teachers, torch.randint(shape[-1], shape[:-1], generator=g)


def found_on(threads, call):
    with using_threads(threads):
        return call()


def check_on_threads(backend, tensors, others):
    """The loss and the gradient of every row have the bits that one thread gives them."""

    def call():
        return loss_and_gradient(backend, *tensors, **OPTIONS)

    alone = found_on(1, call)
    for threads in others:
        assert_same_bits(alone, found_on(threads, call), slice(None))


@pytest.mark.parametrize("rows", [PIECES - 1, 2 * PIECES - 1, 2 * PIECES, 2 * PIECES + 1, 5 * PIECES + 77])
@pytest.mark.parametrize("classes", [100, 300])
def test_every_row_is_done_whoever_takes_it(instruction_set, rows, classes):
    check_on_threads(instruction_set, inputs(rows, classes), (2, 3, 5))


def test_long_rows_keep_their_exponentials_in_rows_of_the_same_piece(instruction_set):
    """Rows of several tiles write to the gradient before their turn: never to one that another thread has written."""
    check_on_threads(instruction_set, inputs(2 * PIECES, 2200), (2, 2, 2))


def test_the_longest_rows_keep_the_exponentials_of_their_first_columns(instruction_set):
    """Of three tensors of 150000 classes a megabyte has room for more than half."""
    check(instruction_set, *inputs(6, 150_000), temperature=4.0, **OPTIONS)


OF_ROWS = {
    "kd, of pixels": lambda s, t, y: multi_teacher_kd_loss(s.T[None], [x.T[None] for x in t], y[None], class_dim=1),
    "kd, upstream of rows": lambda s, t, y: multi_teacher_kd_loss(s, t, y, reduction="none", **OPTIONS).square(),
    "kd, half precision": lambda s, t, y: multi_teacher_kd_loss(s.half(), t, y, **OPTIONS),
    "mixture": lambda s, t, _: mixture_divergence(s, t),
    "mutual": lambda s, t, _: mutual_kd_loss([s, *t]),
    "hints": lambda s, t, _: hint_loss([s, s], t),
    "attention": lambda s, t, _: hint_loss(
        [s.view(-1, 5, 20)] * 2, [x.view(-1, 5, 20) for x in t], distance="attention"
    ),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_so_are_the_rows_of_the_other_ops(name):
    student, teachers, target = inputs(4 * PIECES + 3, 100)

    def gradient():
        leaf = student.clone().requires_grad_()
        return torch.autograd.grad(OF_ROWS[name](leaf, teachers, target).sum(), leaf)[0]

    assert torch.equal(found_on(1, gradient), found_on(2, gradient))
