"""Every Triton kernel moves the bytes of its strategy and no more, counted lane by lane in the interpreter."""

import pytest
import torch
from traffic import (
    attention_bytes,
    counted_in_interpreter,
    hint_bytes,
    kd_bytes,
    large,
    mixture_bytes,
    mutual_bytes,
    relation_angle_bytes,
    relation_planes_bytes,
    rescale_bytes,
)

triton = pytest.importorskip("triton")

from mtkd_fast import dispatch  # noqa: E402

if not dispatch.INTERPRETED:
    pytest.skip("bytes are counted in Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from mtkd_fast.kernels import (  # noqa: E402
    attention,
    hint,
    kd,
    mixture,
    mutual,
    relation,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = dict(
    rule="uniform", divergence="forward_kl", beta=0.5, temperature=2.0, kd_scale=4.0, ce_weight=0.0,
    label_smoothing=0.0, ignore_index=-100, skip_zero_weights=True, write_gradient=False,
)  # fmt: skip


def logits(n_rows: int, n_classes: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(n_rows, n_classes).to(dtype) for dtype in dtypes]


def named(student, teachers, **more) -> dict[str, torch.Tensor]:
    return {"student": student} | {f"teacher {k}": t for k, t in enumerate(teachers)} | more


def run_forward(monkeypatch, student, teachers, *tensors, **options):
    """forward(...) with its gradient among the watched tensors; the watched traffic and the row statistics."""
    launched = []
    build = kd.forward_launch
    monkeypatch.setattr(kd, "forward_launch", lambda *a, **o: launched.append(build(*a, **o)) or Held())
    _, row_stats, gradient = kd.forward(student, teachers, *tensors, **(OPTIONS | options))
    watched = named(student, teachers)
    if gradient.numel():
        watched["gradient of student"] = gradient
    with counted_in_interpreter(watched) as found:
        launched[0].run()
    return found, row_stats


class Held:
    def run(self) -> None:
        """Launched later, once its outputs are being watched."""


TEACHERS = pytest.mark.parametrize(
    "dtypes",
    [(BF16,), (BF16, F32, F16), (BF16,) * 6, (BF16, F32, F16, BF16, F32)],
    ids=["K=1", "K=3", "table", "mixed table"],
)


@TEACHERS
@pytest.mark.parametrize(
    ("rule", "divergence"),
    [
        ("uniform", "reverse_kl"),
        ("confidence", "forward_kl"),
        ("entropy", "forward_kl"),
        ("confidence", "jsd"),
        ("entropy", "dkd"),
    ],
)
@pytest.mark.parametrize(("write_gradient", "n_classes"), [(True, 10), (True, 1000), (False, 9001)])
def test_forward_reads_every_logit_once(monkeypatch, dtypes, rule, divergence, write_gradient, n_classes):
    student, *teachers = logits(3, n_classes, BF16, *dtypes)
    target = torch.tensor([0, n_classes - 1, 5])
    found, _ = run_forward(
        monkeypatch, student, teachers, target, None, None, None,
        rule=rule, divergence=divergence, ce_weight=1.0, label_smoothing=0.1, write_gradient=write_gradient,
    )  # fmt: skip
    model = kd_bytes(
        student, teachers, counted=3, label_of_student=True,
        label_of_teachers=rule == "confidence" or divergence == "dkd",
        sweeps=2 if divergence == "jsd" and not write_gradient else 1, gradients=("student",) if write_gradient else (),
    )  # fmt: skip
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores


@TEACHERS
@pytest.mark.parametrize(("write_gradient", "n_classes"), [(True, 1000), (False, 9001)])
def test_rows_and_teachers_that_do_not_count_are_not_read(monkeypatch, dtypes, write_gradient, n_classes):
    student, *teachers = logits(5, n_classes, BF16, *dtypes)
    target = torch.tensor([1, -100, 2, 3, 4])
    row_weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0])
    weights = torch.rand(len(teachers), 5) + 0.5
    weights[0, 0] = 0
    found, _ = run_forward(
        monkeypatch, student, teachers, target, weights, row_weights, None, rule="given", write_gradient=write_gradient
    )
    rows_of_student = 3 if len(teachers) > 1 else 2  # of a row in which no teacher is used, nothing is read
    model = kd_bytes(student, teachers, counted=rows_of_student, used=[2] + [3] * (len(teachers) - 1))
    assert large(found.loads) == model.loads


def test_terms_of_weight_0_are_not_read(monkeypatch):
    student, *teachers = logits(3, 100, F32, F32, F32)
    target = torch.tensor([0, 1, 2])
    found, _ = run_forward(monkeypatch, student, teachers, target, None, None, None, kd_scale=0.0, ce_weight=1.0)
    assert large(found.loads) == kd_bytes(student, [], counted=3, label_of_student=True).loads
    found, _ = run_forward(monkeypatch, student, teachers, target, None, None, None, kd_scale=0.0)
    assert large(found.loads) == {}


@TEACHERS
@pytest.mark.parametrize(
    ("of", "divergence"),
    [("student", "forward_kl"), ("teachers", "reverse_kl"), ("all", "forward_kl"), ("all", "jsd")],
)
def test_backward_reads_every_logit_once(monkeypatch, dtypes, divergence, of):
    student, *teachers = logits(3, 2500, BF16, *dtypes)
    target = torch.tensor([0, -100, 7])
    options = dict(divergence=divergence, beta=0.5, temperature=2.0, kd_scale=4.0, ce_weight=1.0, label_smoothing=0.0)
    _, row_stats, _ = kd.forward(student, teachers, target, None, None, None, **(OPTIONS | options))
    weights = row_stats[len(teachers) : 2 * len(teachers)]
    names = (("student",) if of != "teachers" else ()) + tuple(
        f"teacher {k}" for k in range(len(teachers)) if of != "student"
    )
    watched = named(student, teachers)
    gradients = [torch.empty_like(x) if name in names else None for name, x in watched.items()]
    launch = kd.backward_launch(
        student, teachers, target, weights, torch.tensor(2.0), row_stats, *options.values(), gradients
    )
    watched |= {f"gradient of {name}": g for name, g in zip(list(watched), gradients, strict=True) if g is not None}
    with counted_in_interpreter(watched) as found:
        launch.run()
    model = kd_bytes(student, teachers, counted=2, gradients=names)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores


def pixels(n_rows: tuple[int, int, int], n_classes: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """[B, C, H, W] seen as [B, H, W, C]."""
    b, h, w = n_rows
    return [torch.randn(b, n_classes, h, w).to(dtype).movedim(1, -1) for dtype in dtypes]


@TEACHERS
@pytest.mark.parametrize(("rule", "divergence"), [("confidence", "forward_kl"), ("entropy", "jsd")])
@pytest.mark.parametrize(("write_gradient", "n_classes"), [(True, 7), (True, 150), (False, 70)])
def test_forward_reads_every_logit_of_a_pixel_once(
    monkeypatch, dtypes, rule, divergence, write_gradient, n_classes
):  # fmt: skip
    """Of pixels that do not count, none."""
    student, *teachers = pixels((2, 5, 7), n_classes, BF16, *dtypes)
    target = torch.arange(70).view(2, 5, 7) % n_classes
    target[0, 0, 3], target[1, 2] = -100, -100
    found, _ = run_forward(
        monkeypatch, student, teachers, target, None, None, None,
        rule=rule, divergence=divergence, ce_weight=1.0, write_gradient=write_gradient,
    )  # fmt: skip
    model = kd_bytes(
        student, teachers, counted=62, label_of_student=True, label_of_teachers=rule == "confidence",
        sweeps=2 if divergence == "jsd" and not write_gradient else 1, gradients=("student",) if write_gradient else (),
    )  # fmt: skip
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores


@TEACHERS
@pytest.mark.parametrize("learn", [False, True])
def test_backward_reads_every_logit_of_a_pixel_once(dtypes, learn):
    """And where a load is wide, those of the pixels beside it: of a block in which none counts, none."""
    student, *teachers = pixels((2, 8, 16), 40, BF16, *dtypes)
    target = torch.zeros(2, 8, 16, dtype=torch.int64)
    target[0, :3], target[1] = -100, -100  # 48 and 128 pixels
    options = dict(divergence="forward_kl", beta=0.0, temperature=2.0, kd_scale=4.0, ce_weight=1.0, label_smoothing=0.0)
    _, row_stats, _ = kd.forward(student, teachers, target, None, None, None, **(OPTIONS | options))
    watched = named(student, teachers)
    gradients = [torch.empty_like(x) if learn or name == "student" else None for name, x in watched.items()]
    weights = row_stats[len(teachers) : 2 * len(teachers)]
    launch = kd.backward_launch(student, teachers, target, weights, None, row_stats, *options.values(), gradients)
    counted = 80 if learn else 80 + 48 % launch.arguments["BLOCK_N"]
    names = tuple(name for name, g in zip(watched, gradients, strict=True) if g is not None)
    watched |= {f"gradient of {name}": g for name, g in zip(list(watched), gradients, strict=True) if g is not None}
    with counted_in_interpreter(watched) as found:
        launch.run()
    model = kd_bytes(student, teachers, counted=counted, gradients=names)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores


@pytest.mark.parametrize("in_place", [True, False])
def test_rescale_of_pixels_touches_the_blocks_that_change(in_place):
    (gradient,) = pixels((2, 8, 16), 40, BF16)
    scale, upstream = torch.full((256,), 0.5), torch.ones(256)
    upstream[130], upstream[140] = 2.0, 3.0
    scale[5], gradient[0, 0, 5] = 0.0, 0.0
    out = gradient if in_place else torch.empty_like(gradient)
    expected = (gradient.float() * upstream.view(2, 8, 16, 1)).bfloat16()
    launch = kd.rescale_launch(gradient, out, upstream, scale)
    with counted_in_interpreter({"gradient": gradient} if in_place else {"gradient": gradient, "out": out}) as found:
        launch.run()
    block = launch.arguments["BLOCK_N"]
    model = rescale_bytes(gradient, counted=256, changed=block, in_place=in_place)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)  # the interpreter truncates bfloat16


@pytest.mark.parametrize("n_classes", [10, 5000])
@pytest.mark.parametrize(
    ("upstream", "changed"),
    [
        (torch.tensor(1.0), 0),
        (torch.tensor(1.0).expand(4), 0),
        (torch.tensor(2.0), 3),
        (torch.tensor([1.0, 3.0, 2.0, 0.0]), 2),
    ],
    ids=["one", "one a row", "two", "per row"],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_rescale_touches_only_what_changes(n_classes, upstream, changed, in_place):
    gradient = torch.randn(4, n_classes).bfloat16()
    scale = torch.tensor([0.5, 0.0, 0.5, 0.5])
    gradient[1] = 0
    out = gradient if in_place else torch.empty_like(gradient)
    expected = (gradient.float() * upstream.expand(4)[:, None]).bfloat16()
    with counted_in_interpreter({"gradient": gradient} if in_place else {"gradient": gradient, "out": out}) as found:
        kd.rescale_launch(gradient, out, upstream, scale).run()
    model = rescale_bytes(gradient, counted=3, changed=changed, in_place=in_place)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)  # the interpreter truncates bfloat16


@pytest.mark.parametrize("n_teachers", [3, 6])
def test_what_is_not_logits_is_a_few_numbers_a_row(monkeypatch, n_teachers):
    student, *teachers = logits(8, 2000, *([F32] * (n_teachers + 1)))
    found, row_stats = run_forward(monkeypatch, student, teachers, None, None, None, None, write_gradient=True)
    assert found.stores["rest"] == (row_stats.numel() + 8) * 4
    assert found.loads.get("rest", 0) <= 8 * n_teachers * 6 * 8  # the table of teachers, read by every program


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
def test_hint_reads_both_sides_once(distance):
    student = [torch.randn(4, 3, 8), torch.randn(4, 1000).bfloat16(), torch.randn(4, 5)]
    teacher = [torch.randn_like(f) for f in student]
    weights = torch.rand(3, 4) + 0.5
    weights[1, 2] = 0
    watched = {f"student {k}": f for k, f in enumerate(student)} | {f"teacher {k}": g for k, g in enumerate(teacher)}
    with counted_in_interpreter(watched) as found:
        kept = hint.forward(student, teacher, weights, distance)
    model = hint_bytes(student, teacher, used=[4, 3, 4], gradients=False)
    assert large(found.loads) == model.loads
    with counted_in_interpreter(watched) as found:
        gradients = hint.backward(student, teacher, weights, kept, [True, False, True], distance)
    model = hint_bytes(student, teacher, used=[4, 0, 4], gradients=True)
    assert large(found.loads) == model.loads
    assert found.stores["rest"] == sum(g.numel() * g.element_size() for g in gradients)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
def test_a_hint_whose_gradient_comes_with_it_reads_both_sides_once(distance):
    """The cosine's twice."""
    student = [torch.randn(4, 1000).bfloat16(), torch.randn(4, 5)]
    teacher = [torch.randn_like(f) for f in student]
    weights = torch.rand(2, 4) + 0.5
    weights[0, 2] = 0
    watched = {f"student {k}": f for k, f in enumerate(student)} | {f"teacher {k}": g for k, g in enumerate(teacher)}
    with counted_in_interpreter(watched) as found:
        _, gradients = hint.fused(student, teacher, weights, distance, 0.25, [True, False])
    model = hint_bytes(student, teacher, used=[3, 4], gradients=True)
    times = 2 if distance == "cosine" else 1
    assert found.loads["student 0"] == times * model.loads["student 0"]
    assert found.loads["student 1"] == model.loads["student 1"]
    assert found.stores["rest"] == gradients[0].numel() * 2 + 2 * 4 * 4


def test_the_cosine_reads_a_sample_of_extreme_norm_twice():
    student, teacher = [torch.randn(4, 100)], [torch.randn(4, 100)]
    student[0][1] *= 1e-20
    with counted_in_interpreter({"student 0": student[0], "teacher 0": teacher[0]}) as found:
        hint.forward(student, teacher, None, "cosine")
    assert large(found.loads) == hint_bytes(student, teacher, used=[5], gradients=False).loads


def test_planes_of_relations_read_the_gram_matrix_once():
    x = torch.randn(20, 6, dtype=torch.float64)
    launch = relation.planes_launch(x, x @ x.T, torch.tensor(1e-12, dtype=torch.float64))
    with counted_in_interpreter({name: launch.arguments[name] for name in ("x", "gram", "planes")}) as found:
        launch.run()
    model = relation_planes_bytes(20, 32)
    assert found.stores["planes"] == model.stores["planes"]
    assert found.loads == model.loads | {"rest": 32 * 8, "gram": model.loads["gram"] + 20 * 8}  # 1e-6; own element


@pytest.mark.parametrize("gradient", [True, False])
def test_angles_read_each_row_once_a_tile(gradient):
    batch, pitch, tile = 20, 32, 16
    student, teacher = (torch.rand(3, pitch, pitch) for _ in range(2))
    launch = relation.angle_launch(student, teacher, batch, gradient)
    watched = dict(student=student, teacher=teacher) | ({"pull": launch.arguments["pulls"]} if gradient else {})
    with counted_in_interpreter(watched) as found:
        launch.run()
    model = relation_angle_bytes(pitch, tile, gradient=batch if gradient else 0)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores
    assert found.stores["rest"] == 8 * (pitch // tile) ** 2


def test_distances_read_two_planes_of_each_side():
    batch, pitch = 20, 32
    student, teacher = (torch.rand(3, pitch, pitch) for _ in range(2))
    scalars = {name: torch.tensor(1e-6, dtype=torch.float64) for name in ("nearest", "nearest_t", "mean", "mean_t")}
    for drag in ({}, {"drag": scalars["mean"]}):
        with counted_in_interpreter(dict(student=student, teacher=teacher)) as found:
            (relation.distance_pull if drag else relation.distance)(student, teacher, batch, **scalars, **drag)
        assert large(found.loads) == dict.fromkeys(("student", "teacher"), 2 * 4 * batch**2)
        assert found.stores["rest"] == (8 * batch**2 if drag else 2 * 8 * batch)


@TEACHERS
@pytest.mark.parametrize(("n_classes", "sweeps"), [(10, 1), (1000, 1), (9001, 2)])
def test_mixture_reads_rows_on_chip_once(dtypes, n_classes, sweeps):
    teachers = logits(3, n_classes, *dtypes)
    w = torch.rand(len(teachers), 3) + 0.5
    w[0, 1] = 0
    used = [2] + [3] * (len(teachers) - 1)
    watched = {f"teacher {k}": t for k, t in enumerate(teachers)}
    with counted_in_interpreter(watched) as found:
        probabilities, row_stats = mixture.forward(teachers, w, 2.0, True)
    assert large(found.loads) == mixture_bytes(teachers, used=used, sweeps=sweeps)
    assert found.stores["rest"] == (probabilities.numel() + row_stats.numel()) * 4
    with counted_in_interpreter(watched) as found:
        mixture.backward(teachers, w, probabilities, row_stats, 2.0, True, [False] * len(teachers))
    assert large(found.loads) == mixture_bytes(teachers, used=used)


@TEACHERS
@pytest.mark.parametrize("skip", [True, False])
def test_mixture_divergence_sweeps_twice_and_once_more_for_the_weights(dtypes, skip):
    student, *teachers = logits(3, 5000, BF16, *dtypes)
    w = torch.rand(len(teachers), 3) + 0.5
    with counted_in_interpreter(named(student, teachers)) as found:
        _, row_stats, gradient = mixture.divergence(student, teachers, w, 2.0, skip, True)
    sweeps = 2 if skip else 3
    assert large(found.loads) == mixture_bytes(teachers, used=[3] * len(teachers), sweeps=sweeps, student=student)
    assert found.stores["rest"] == gradient.numel() * 2 + (row_stats.numel() + 3) * 4


@pytest.mark.parametrize(
    "dtypes", [(BF16, F32, F16), (BF16,) * 6, (BF16, F32, F16) * 2], ids=["tuple", "table", "mixed table"]
)
@pytest.mark.parametrize("write_gradients", [True, False])
@pytest.mark.parametrize("detach_peers", [True, False])
def test_mutual_reads_and_writes_everything_once(dtypes, write_gradients, detach_peers):
    m, n_classes = len(dtypes), 1000 if write_gradients else 3001
    students = logits(3, n_classes, *dtypes)
    pairs = torch.rand(m, m)
    row_weights = torch.tensor([1.0, 0.0, 0.5])
    pairs[-1], pairs[:, -1] = 0, 0  # the last student has no pair
    needs = [i != 1 for i in range(m)]
    row_loss, row_stats = torch.empty(3), torch.empty(mutual.row_stats_size(m), 3)
    gradients = [torch.empty_like(z) if need else None for z, need in zip(students, needs, strict=True)]
    watched = {f"student {i}": z for i, z in enumerate(students)}
    watched |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    options = dict(temperature=2.0, scale=4.0, detach_peers=detach_peers)

    launch = mutual.forward_launch(
        students, pairs, row_weights, None, row_loss, row_stats, gradients if write_gradients else [None] * m, **options
    )
    with counted_in_interpreter(watched) as found:
        launch.run()
    read = [2] * (m - 1) + [0]
    model = mutual_bytes(students, read=read, gradients=[need and write_gradients for need in needs])
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores
    if write_gradients:
        return

    launch = mutual.backward_launch(students, pairs, None, row_stats, *options.values(), gradients)
    with counted_in_interpreter(watched) as found:
        launch.run()
    model = mutual_bytes(students, read=read, gradients=needs)
    assert large(found.loads) == model.loads
    assert large(found.stores) == model.stores


def test_attention_reads_every_map_once_and_one_side_again():
    student = [torch.randn(4, 3, 8), torch.randn(4, 40, 5, 5).bfloat16(), torch.randn(4, 5, 1)]
    student[1] = student[1].contiguous(memory_format=torch.channels_last)
    teacher = [torch.randn(4, 7, 8), torch.randn(4, 3, 5, 5), torch.randn(4, 5, 1).half()]
    weights = torch.rand(3, 4) + 0.5
    weights[1, 2] = 0
    watched = {f"student {k}": f for k, f in enumerate(student)} | {f"teacher {k}": g for k, g in enumerate(teacher)}
    with counted_in_interpreter(watched) as found:
        _, slopes = attention.forward(student, teacher, weights)
    used = [4, 3, 4]
    students, teachers = (attention_bytes(name, x, used) for name, x in (("student", student), ("teacher", teacher)))
    assert large(found.loads) == students.loads | teachers.loads
    energies = sum(x.numel() * 4 for x in slopes) - 4 * 2 * 25  # of the sample that is not read, slopes alone
    assert found.stores["rest"] == energies + sum(x.numel() * 4 for x in slopes) + 4 * 3 * 4
    with counted_in_interpreter(watched) as found:
        gradients = attention.backward(student, slopes[:3], weights, [True, False, True])
    assert large(found.loads) == {name: students.loads[name] for name in ("student 0", "student 2")}
    assert found.stores["rest"] == sum(g.numel() * g.element_size() for g in gradients)
