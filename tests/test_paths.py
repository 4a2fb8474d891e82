"""The paths of Adaptive Distillation, against the formulas written once more in float64."""

import pytest
import torch
import torch.nn.functional as F

from mtkd_fast import (
    attention_transfer_loss,
    feature_map_loss,
    hint_loss,
    multi_teacher_kd_loss,
    nst_loss,
    softmax_regression_loss,
)

B = 3
F64 = torch.float64
STAGES = [(6, 2, 2), (3, 4, 3), (5, 5)]  # fewer positions than channels, more, and maps of one dimension


def stages(own_channels=False, dtype=F64):
    student = [torch.randn(B, *shape, dtype=dtype, requires_grad=True) for shape in STAGES]
    teacher = [torch.randn(B, c + 2 * own_channels, *rest, dtype=dtype, requires_grad=True) for c, *rest in STAGES]
    return student, teacher


def attention_by_hand(f, g):
    def attention(x):
        energy = x.pow(2).sum(1).flatten(1)
        return energy / (energy.norm(p=2, dim=1, keepdim=True) + 1e-6)

    return F.mse_loss(attention(f), attention(g))  # over B·S


def nst_by_hand(f, g):
    def gram(x):
        x = F.normalize(x.flatten(2), dim=2)
        return torch.einsum("bcs,bds->bcd", x, x)

    return F.mse_loss(gram(f), gram(g))  # over B·C·C


def feature_map_by_hand(f, g):
    return (f.flatten(2).mean(2) - g.flatten(2).mean(2)).pow(2).mean()  # over B·C


PATHS = {
    "attention": (attention_transfer_loss, attention_by_hand),
    "nst": (nst_loss, nst_by_hand),
    "feature map": (feature_map_loss, feature_map_by_hand),
}
each = pytest.mark.parametrize("path", PATHS)


def assert_same(loss, right, leaves):
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-14)
    up = torch.rand_like(right)
    for got, wanted in zip(torch.autograd.grad(loss, leaves, up), torch.autograd.grad(right, leaves, up), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


@each
@pytest.mark.parametrize("per_stage", [False, True])
def test_path_is_the_formula(path, per_stage):
    loss, by_hand = PATHS[path]
    student, teacher = stages(own_channels=path == "attention")
    right = torch.stack([by_hand(f, g) for f, g in zip(student, teacher, strict=True)])
    right = right if per_stage else right.sum()
    assert_same(loss(student, teacher, per_stage=per_stage), right, [*student, *teacher])


@each
def test_memory_layout_and_dtype_do_not_matter(path):
    loss, _ = PATHS[path]
    student, teacher = torch.randn(2, B, 8, 4, 4)
    wanted = loss([student], [teacher])
    assert wanted.dtype == torch.float32
    torch.testing.assert_close(loss([student.to(memory_format=torch.channels_last)], [teacher]), wanted)
    half = loss([student.bfloat16().requires_grad_()], [teacher.bfloat16()])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss([student.bfloat16().float()], [teacher.bfloat16().float()]))


@pytest.mark.parametrize(("channels", "positions"), [(9, 4), (4, 9), (5, 5), (3, 1)])
def test_both_routes_of_nst_are_the_gram_match(channels, positions):
    student, teacher = (torch.randn(B, channels, positions, dtype=F64, requires_grad=True) for _ in range(2))
    assert_same(nst_loss([student], [teacher]), nst_by_hand(student, teacher), [student, teacher])


@pytest.mark.parametrize(("channels", "positions"), [(64, 9), (16, 36)])
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_nst_loses_no_digits_as_the_student_approaches(channels, positions, noise):
    teacher = torch.randn(B, channels, positions)
    student = teacher + noise * torch.randn(B, channels, positions)
    right = nst_by_hand(student.double(), teacher.double())
    torch.testing.assert_close(nst_loss([student], [teacher]).double(), right, rtol=2e-6 / noise, atol=0)


def test_nst_needs_no_matrix_of_channels_where_positions_are_few():
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            shapes.extend(tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    student, teacher = torch.randn(B, 50, 4, requires_grad=True), torch.randn(B, 50, 4)
    with Watch():
        nst_loss([student], [teacher]).backward()
    assert (B, 4, 4) in shapes
    assert (B, 50, 50) not in shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_no_map_in_half_precision(dtype):
    f, g = torch.randn(2, 2048, 4, 4), torch.randn(2, 2048, 4, 4)
    for path in (nst_loss, attention_transfer_loss, feature_map_loss):
        with torch.autocast("cpu", dtype):
            loss = path([f], [g])
        torch.testing.assert_close(loss, path([f], [g]))


def test_dead_channels_and_equal_maps_have_no_gradient():
    student, teacher = torch.randn(B, 6, 4), torch.randn(B, 6, 4)
    student[:, 1] = 0
    student.requires_grad_()
    nst_loss([student], [teacher]).backward()
    assert (student.grad[:, 1] == 0).all()
    assert student.grad.isfinite().all()
    for path, _ in PATHS.values():
        f = teacher.clone().requires_grad_()
        loss = path([f], [teacher])
        loss.backward()
        assert loss == 0
        assert (f.grad == 0).all()


def test_softmax_regression_goes_through_the_frozen_head():
    head = torch.nn.Linear(6, 4, dtype=F64).requires_grad_(False)
    feature = torch.randn(B, 6, 3, 3, dtype=F64, requires_grad=True)
    logits = torch.randn(B, 4, dtype=F64)
    right = F.mse_loss(feature.flatten(2).mean(2) @ head.weight.T + head.bias, logits)
    assert_same(softmax_regression_loss(feature, logits, head), right, [feature])
    assert head.weight.grad is None


def test_soft_target_and_logits_are_here_by_other_names():
    student, teacher = torch.randn(B, 7, dtype=F64, requires_grad=True), torch.randn(B, 7, dtype=F64)
    soft = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    assert_same(multi_teacher_kd_loss(student, [teacher], temperature=4.0), soft, [student])
    assert_same(hint_loss([student], [teacher]), F.mse_loss(student, teacher), [student])


@each
def test_one_graph(path):
    loss, _ = PATHS[path]
    student, teacher = torch.randn(B, 8, 3, 3, requires_grad=True), torch.randn(B, 8, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, g: loss([f], [g]), fullgraph=True, backend="aot_eager")
    got, right = compiled(student, teacher), loss([student], [teacher])
    torch.testing.assert_close(got, right)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], torch.autograd.grad(right, student)[0])


@each
def test_an_empty_batch_gives_zero(path):
    loss, _ = PATHS[path]
    student = torch.randn(0, 4, 3, requires_grad=True)
    found = loss([student], [torch.randn(0, 4, 3)])
    assert found == 0
    found.backward()


@each
@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 4), [torch.zeros(2, 3, 4)], {}, TypeError, "features must be a sequence of K tensors"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], {}, ValueError, r"features\[0\] must be a map"),
        ([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 5)], {}, ValueError, r"teacher_features\[0\] must have shape"),
        ([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)], dict(per_stage=1), TypeError, "per_stage must be True"),
    ],
)
def test_bad_input_is_named(path, student, teacher, options, error, message):
    with pytest.raises(error, match=message):
        PATHS[path][0](student, teacher, **options)


@pytest.mark.parametrize(
    ("feature", "logits", "head", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.nn.Identity(), ValueError, "adapted_feature must be a map"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), None, TypeError, "teacher_head must be callable, got NoneType"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.nn.Identity(), ValueError,
         r"teacher_head's result must have shape \(2, 4\) like teacher_logits, got \(2, 3\)"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 4), torch.nn.Identity(), ValueError,
         r"adapted_feature must be a map \[B, C, ...\] with positions, got \(2, 3, 0\)"),
        (torch.zeros(2, 3, 4), torch.zeros(4), torch.nn.Identity(), ValueError,
         r"teacher_logits must have shape \[2, classes\], got \(4,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 0), torch.nn.Identity(), ValueError,
         r"teacher_logits must have shape \[2, classes\], got \(2, 0\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), torch.nn.Identity(), TypeError,
         "teacher_logits must be float32, .* got torch.int64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, device="meta"), torch.nn.Identity(), ValueError,
         "teacher_logits must be on cpu like adapted_feature, got meta"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.Tensor.long, TypeError,
         "teacher_head's result must be float32, .* got torch.int64"),
    ],
)  # fmt: skip
def test_bad_input_of_softmax_regression_is_named(feature, logits, head, error, message):
    with pytest.raises(error, match=message):
        softmax_regression_loss(feature, logits, head)
