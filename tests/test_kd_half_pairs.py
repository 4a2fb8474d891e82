"""Short bf16 rows are taken and written two numbers at a time: whatever the classes, the strides and the row's place,
nothing but the rounding of the result tells them from float32."""

import pytest
import torch

NUMBERS = [-torch.inf, 0.0, -0.0, 1e-40, -3e38, 3e38]


def draw(rows, classes, seed=0):
    """bf16 numbers, some of them at the ends of the format."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, classes, generator=g).mul(3)
    some = x.view(-1)[:: 7 * classes + 5]
    some.copy_(torch.tensor(NUMBERS)[torch.arange(len(some)) % len(NUMBERS)])
    return x.bfloat16()


def contiguous(x):
    return x


def at_an_odd_place(x):
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def rows_apart(x):
    return torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype)[:, : x.shape[1]].copy_(x)


def columns_apart(x):
    return torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)[:, ::2].copy_(x)


def loss_and_gradient(implementation, student, teachers, target):
    leaf = student.detach().requires_grad_()
    loss = implementation.loss(
        leaf, teachers, target, weights="confidence", temperature=2.0, ce_weight=1.0, reduction="none"
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128])
@pytest.mark.parametrize("rows", [1, 15, 16, 35])
@pytest.mark.parametrize("layout", [contiguous, at_an_odd_place, rows_apart, columns_apart])
def test_nothing_but_the_rounding_differs(instruction_set, classes, rows, layout):
    student, *teachers = (layout(draw(rows, classes, seed)) for seed in range(3))
    target = torch.arange(rows) % classes
    target[rows // 2 :: 9] = -100
    loss, gradient = loss_and_gradient(instruction_set, student, teachers, target)
    wide_loss, wide = loss_and_gradient(instruction_set, student.float(), [t.float() for t in teachers], target)
    torch.testing.assert_close(loss, wide_loss.to(loss.dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_rows_that_end_in_the_middle_of_a_line_go_past_the_caches(instruction_set):
    rows, classes = 1 << 15, 97
    student, teacher = draw(rows, classes).clamp(-9, 9), draw(rows, classes, 1).clamp(-9, 9)
    target = torch.arange(rows) % classes
    _, gradient = loss_and_gradient(instruction_set, student, [teacher, teacher], target)
    _, wide = loss_and_gradient(instruction_set, student.float(), [teacher.float()] * 2, target)
    assert torch.equal(gradient, wide.bfloat16())
