"""Dense prediction: classes in another dimension than the last, rows that are pixels."""

import pytest
import torch

from mtkd_fast import ensemble_probabilities, mixture_divergence, multi_teacher_kd_loss, mutual_kd_loss

B, C, H, W, K = 2, 5, 3, 4, 3


@pytest.fixture(params=[(B, C, H, W), (B, C, 7), (C, 6), (B, C, 2, 3, 2)], ids=str)
def maps(request, backend):
    """Student and teachers with the classes in dimension 1 (0 of two), a map of labels, and that dimension."""
    shape, device = request.param, backend.device
    class_dim = 1 if len(shape) > 2 else 0
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    student = torch.randn(shape, device=device, requires_grad=True)
    teachers = [torch.randn(shape, device=device) for _ in range(K)]
    target = torch.randint(C, rows, device=device)
    target.view(-1)[::5] = 255
    return student, teachers, target, class_dim


def both(backend, maps, **options):
    """(loss, gradient, stats) with class_dim, and of the same rows with the classes last."""
    student, teachers, target, class_dim = maps
    found = []
    for given, dim in ((lambda x: x, class_dim), (lambda x: x.movedim(class_dim, -1).contiguous(), -1)):
        leaf = given(student.detach()).requires_grad_()
        loss, stats = backend.loss(
            leaf, [given(t) for t in teachers], target, temperature=2.0, ce_weight=0.5, ignore_index=255,
            class_dim=dim, return_stats=True, **options,
        )  # fmt: skip
        upstream = torch.linspace(0.5, 2.0, loss.numel(), device=loss.device).view(loss.shape)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        found.append((loss, gradient if dim != -1 else gradient.movedim(-1, class_dim), stats))
    return found


@pytest.mark.parametrize("weights", ["uniform", "confidence", "entropy"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pixels_are_rows(backend, maps, weights, reduction):
    (loss, gradient, stats), (right, wanted, same) = both(backend, maps, weights=weights, reduction=reduction)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, wanted)
    for ours, theirs in zip(stats, same, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_weights_of_teachers_and_of_pixels_are_maps(backend, maps):
    target = maps[2]
    given = torch.rand(K, *target.shape, device=target.device)
    of_pixels = torch.rand(target.shape, device=target.device)
    (loss, gradient, _), (right, wanted, _) = both(backend, maps, weights=given, row_weights=of_pixels)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, wanted)


def test_divergences_and_weights_take_it_too(backend, maps):
    student, teachers, target, class_dim = maps
    divergence = backend.divergence(student, teachers, class_dim=class_dim)
    weights = backend.weights(teachers, target, rule="confidence", ignore_index=255, class_dim=class_dim)
    assert divergence.shape == weights.shape == (K, *target.shape)
    last = [t.movedim(class_dim, -1) for t in teachers]
    torch.testing.assert_close(divergence, backend.divergence(student.movedim(class_dim, -1), last))
    torch.testing.assert_close(weights, backend.weights(last, target, rule="confidence", ignore_index=255))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("wants", ["student", "everybody"])
def test_gradients_lie_as_their_logits(fused, memory_format, upstream, wants):
    logits = [
        torch.randn(B, C, H, W, device=fused.device).contiguous(memory_format=memory_format) for _ in range(K + 1)
    ]
    leaves = [x.requires_grad_() for x in (logits if wants == "everybody" else logits[:1])]
    loss = upstream * fused.loss(logits[0], logits[1:], class_dim=1, temperature=2.0)
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert gradient.stride() == leaf.stride()


def test_one_map_for_every_class():
    """A student of stride 0 along the classes, whose gradient is larger than a cache and ends in part of a block."""
    n_classes, rows = 512, 41 * 101
    student = torch.randn(1, 1, 41, 101).expand(1, n_classes, 41, 101).requires_grad_()
    teacher = torch.randn(1, n_classes, 41, 101)
    loss = multi_teacher_kd_loss(student, [teacher], class_dim=1)
    (gradient,) = torch.autograd.grad(loss, student)
    wanted = (1 / n_classes - teacher.softmax(1)) / rows
    torch.testing.assert_close(gradient, wanted, atol=1e-6 * wanted.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "dkd", "jsd", "tvd"])
@pytest.mark.parametrize("n_classes", [2, 21, 70])
def test_ignored_pixels_and_unread_teachers_among_many(backend, n_classes, divergence):
    """63 pixels a map, some of which do not count; a teacher that some pixels leave out holds NaN there."""
    pixels = (2, 9, 7)
    target = torch.randint(n_classes, pixels, device=backend.device)
    target[torch.rand(pixels, device=backend.device) < 0.1] = 255
    ignored = (target == 255)[:, None]
    given = torch.rand(K, *pixels, device=backend.device)
    given[1][torch.rand(pixels, device=backend.device) < 0.3] = 0
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    student, *teachers = (
        torch.randn(2, n_classes, 9, 7, device=backend.device).masked_fill_(ignored, torch.nan).to(dtype)
        for dtype in dtypes
    )
    teachers[1].masked_fill_((given[1] == 0)[:, None], torch.nan)
    maps = student.requires_grad_(), teachers, target, 1
    (loss, gradient, _), (right, wanted, _) = both(backend, maps, weights=given, divergence=divergence)
    assert loss.isfinite()
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, wanted)


def test_one_tensor_of_all_teachers():
    student, teachers = torch.randn(B, C, H, W), torch.randn(K, B, C, H, W)
    loss = multi_teacher_kd_loss(student, teachers, class_dim=1)
    torch.testing.assert_close(loss, multi_teacher_kd_loss(student, list(teachers), class_dim=-3))


@pytest.mark.parametrize(
    ("class_dim", "error", "message"),
    [
        (4, ValueError, r"class_dim must be a dimension of student_logits \(2, 5, 3, 4\), got 4"),
        (-5, ValueError, "class_dim must be a dimension"),
        (1.0, TypeError, "class_dim must be an integer, got float"),
        (True, TypeError, "class_dim must be an integer, got bool"),
    ],
)
def test_a_wrong_dimension_is_named(class_dim, error, message):
    with pytest.raises(error, match=message):
        multi_teacher_kd_loss(torch.zeros(B, C, H, W), torch.zeros(K, B, C, H, W), class_dim=class_dim)


def test_shapes_are_named_as_they_were_given():
    with pytest.raises(ValueError, match=r"teacher_logits\[0\] must have shape \(2, 5, 3, 4\) .* got \(2, 5, 3, 3\)"):
        multi_teacher_kd_loss(torch.zeros(B, C, H, W), [torch.zeros(B, C, H, 3)], class_dim=1)
    with pytest.raises(ValueError, match=r"\[..., C, ...\], C in dimension 1, with C >= 1, got \(2, 0, 3\)"):
        multi_teacher_kd_loss(torch.zeros(2, 0, 3), [torch.zeros(2, 0, 3)], class_dim=1)


def test_mixtures_have_their_classes_where_the_teachers_have_them(backend, maps):
    _, teachers, target, class_dim = maps
    weights = torch.rand(K, *target.shape, device=backend.device, requires_grad=True)
    leaves = [t.requires_grad_() for t in teachers]
    found = backend.ensemble_probabilities(leaves, weights=weights, temperature=2.0, class_dim=class_dim)
    last = [t.movedim(class_dim, -1) for t in leaves]
    right = backend.ensemble_probabilities(last, weights=weights, temperature=2.0).movedim(-1, class_dim)
    assert found.shape == teachers[0].shape
    torch.testing.assert_close(found, right)
    upstream = torch.randn(found.shape, device=backend.device)
    pairs = zip(*(torch.autograd.grad(x, [weights, *leaves], upstream) for x in (found, right)), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted)


def test_divergences_of_mixtures_and_mutual_learning_take_it_too(backend, maps):
    student, teachers, target, class_dim = maps
    weights = torch.rand(K, *target.shape, device=backend.device, requires_grad=True)
    last = [x.movedim(class_dim, -1) for x in (student, *teachers)]
    mixed = backend.mixture_divergence(student, teachers, weights=weights, class_dim=class_dim)
    right = backend.mixture_divergence(last[0], last[1:], weights=weights)
    assert mixed.shape == target.shape
    students = [student, *teachers[:2]]
    options = dict(row_weights=target != 255, reduction="none", return_divergences=True)
    options |= dict(implementation=backend.implementation)
    loss, divergences = mutual_kd_loss(students, class_dim=class_dim, **options)
    same, wanted = mutual_kd_loss(last[:3], **options)
    assert divergences.shape == (3, 3, *target.shape)
    for got, exact in ((mixed, right), (loss, same), (divergences, wanted)):
        torch.testing.assert_close(got, exact)
    for got, exact in ((mixed, right), (loss, same)):
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student)[0] for x in (got, exact)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda z, **o: mixture_divergence(z[0], z, **o), "student_logits"),
        (ensemble_probabilities, r"teacher_logits\[0\]"),
        (mutual_kd_loss, r"student_logits\[0\]"),
    ],
)
def test_a_wrong_dimension_is_named_there_too(function, name):
    logits = [torch.zeros(B, C, H, W)] * K
    with pytest.raises(ValueError, match=rf"class_dim must be a dimension of {name} \(2, 5, 3, 4\), got 4"):
        function(logits, class_dim=4)
    with pytest.raises(TypeError, match="class_dim must be an integer, got float"):
        function(logits, class_dim=1.0)
    with pytest.raises(ValueError, match="C in dimension 1, with C >= 1"):
        function([torch.zeros(2, 0, 3)] * K, class_dim=1)
