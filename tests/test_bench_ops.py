"""What the ops tell the benchmark: bytes counted by hand, oracles that are the reference, contenders that agree."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from mtkd_fast.bench import case as case_module
from mtkd_fast.bench import contenders, gate, ops, peers
from mtkd_fast.bench.ops import hint, kd, mixture, mutual, relation

import mtkd_fast

FP32, BF16 = torch.float32, torch.bfloat16
TINY = [
    *(kd.KD(objective, 16, 33, k, d) for objective in kd.OBJECTIVES for k, d in ((3, FP32), (1, FP32), (2, BF16))),
    mixture.Mixture("divergence", 16, 33, 3),
    mixture.Mixture("divergence", 16, 33, 2, BF16),
    mutual.Mutual("peers", 16, 33, 3),
    mutual.Mutual("peers", 16, 33, 2, BF16),
    *(hint.Hint(distance, 6, 50, 2, d) for distance in hint.Hint.OBJECTIVES for d in (FP32, BF16)),
    *(relation.Relation(name, 12, 5) for name in relation.Relation.OBJECTIVES),
]
UNCOMPILED = ("eager", "stacked", "peers", "anchors", "ours", "one-thread", "reference")


def id_of(case):
    return case.title


@pytest.mark.parametrize("case", TINY, ids=id_of)
def test_every_contender_passes_the_gate(case):
    inputs = case.inputs("cpu")
    exact = case.oracle(inputs)
    found, _ = contenders.on(case, "cpu", UNCOMPILED)
    assert {"eager", contenders.default_implementation("cpu")} <= {c.name for c in found}
    for c in found:
        errors = gate.check(c.name, c.loss, inputs, c.exact(inputs) if c.exact else exact, c.value)
        assert max(errors.values()) < (1e-5 if case.dtype == FP32 else 2**-7)


@pytest.mark.parametrize("case", TINY, ids=id_of)
def test_the_oracle_is_the_reference_in_float64(case, monkeypatch):
    """In blocks of rows, and all at once through the public function."""
    inputs = case.inputs("cpu")
    monkeypatch.setattr(case_module, "ORACLE_ELEMENTS", 5 * 33)
    exact = case.oracle(inputs)
    whole = inputs._replace(arguments=tuple(double(x) for x in inputs.arguments))
    arguments = whole.fresh()
    loss = case.fused("reference")(*arguments)
    loss.backward()
    assert exact.loss == pytest.approx(loss.item(), rel=1e-11)
    for leaf, gradient in zip(whole.leaves(arguments), exact.gradients, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12 * leaf.grad.abs().max().item())


def double(argument):
    if isinstance(argument, list):
        return [x.double() for x in argument]
    return argument.double() if argument.is_floating_point() else argument


def test_minimal_bytes_are_the_hand_counts():
    """Rows × width × bytes of an element × tensors read and written."""
    assert kd.KD("confidence", 10, 100, 3, BF16).minimal_bytes() == 10 * 100 * 2 * (1 + 3 + 1)
    assert kd.KD("confidence", 10, 100, 3, BF16).minimal_bytes(gradient=False) == 10 * 100 * 2 * (1 + 3)
    assert mixture.Mixture("divergence", 10, 100, 4).minimal_bytes() == 10 * 100 * 4 * (1 + 4 + 1)
    assert mutual.Mutual("peers", 10, 100, 3).minimal_bytes() == 10 * 100 * 4 * (3 + 3)
    assert mutual.Mutual("peers", 10, 100, 3).minimal_bytes(gradient=False) == 10 * 100 * 4 * 3
    assert hint.Hint("mse", 10, 64, 2, BF16).minimal_bytes() == 10 * 64 * 2 * (2 + 2 + 2)
    assert relation.Relation("angle", 10, 64).minimal_bytes() == 10 * 64 * 4 * (1 + 1 + 1)


@pytest.mark.parametrize("case", TINY, ids=id_of)
def test_minimal_bytes_are_those_of_the_large_inputs_and_their_gradients(case):
    inputs = case.inputs("cpu")
    large = [x for argument in inputs.arguments for x in (argument if isinstance(argument, list) else [argument])]
    large = [x for x in large if x.dtype == case.dtype and x.shape[-1] != case.rows]  # no labels, no weights [K, N]
    leaves = [x for x in inputs.leaves(inputs.arguments) if x.shape[-1] != case.rows]
    read, written = sum(x.nbytes for x in large), sum(x.nbytes for x in leaves)
    assert case.minimal_bytes(gradient=False) == read
    assert case.minimal_bytes() == read + written


@pytest.mark.parametrize("case", TINY, ids=id_of)
def test_a_case_survives_json(case):
    assert ops.make(**case.facts()) == case


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (dict(op="nothing"), "op must be one of kd"),
        (dict(op="kd", width=3), "width is no size of the op kd"),
        (dict(op="relation", teachers=3), "teachers is no size of the op relation"),
        (dict(rows=0), "rows must be at least 1, got 0"),
        (dict(dtype="int8"), "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (dict(objective="angle"), "objective of the op kd must be one of"),
    ],
)
def test_a_bad_case_is_refused_by_name(chosen, said):
    with pytest.raises(ValueError, match=said):
        ops.make(**chosen)


def test_the_strategy_is_what_the_library_does():
    """A writes the gradient in the forward: the backward needs no logits, so that those may change in between."""
    for dtype, expected in ((FP32, "A"), (torch.float16, "B")):
        case = kd.KD("uniform", 4, 10, 2, dtype)
        strategy = case.strategy("cpp", "cpu", gradient=True)
        assert strategy.startswith(expected)
        if "cpu" not in mtkd_fast.implementations()["cpp"].devices:
            continue
        student, teachers, target = case.inputs("cpu").fresh()
        loss = case.fused("cpp")(student, teachers, target)
        found = type(loss.grad_fn).__name__
        before = torch.autograd.grad(loss, student, retain_graph=True)[0]
        teachers[0].data.mul_(2)
        again = torch.autograd.grad(loss, student)[0]
        assert torch.equal(before, again) == (expected == "A"), found


def test_a_wrong_relation_is_not_timed():
    angle, distance = (relation.Relation(name, 12, 5) for name in ("angle", "distance"))
    inputs = angle.inputs("cpu")
    with pytest.raises(gate.WrongResult, match="relative error of the loss"):
        gate.check("eager", distance.eager()["eager"], inputs, angle.oracle(inputs))


def test_a_form_that_would_not_fit_is_named():
    _, missing = contenders.on(relation.Relation("angle", 100_000), "cpu", ("eager", "compile"))
    assert [m.name for m in missing] == ["eager", "compile"]
    assert "needs some" in missing[0].why


def test_every_fast_implementation_is_measured_against_all_baselines():
    built = "cpu" in mtkd_fast.implementations()["cpp"].devices
    found, _ = contenders.on(kd.KD(), "cpu", ("eager", "stacked", "compile", "compile-stacked", "ours"))
    ours = "cpp" if built else "reference"
    assert {c.name for c in found} == {"eager", "eager-stacked", "compile", "compile-stacked", ours}


def test_torch_compile_passes_the_gate():
    case = kd.KD("confidence", 16, 33, 3)
    inputs = case.inputs("cpu")
    ((compiled,), _) = contenders.on(case, "cpu", ("compile",))
    gate.check("compile", compiled.loss, inputs, case.oracle(inputs))


# ---------- peers


def test_peers_that_cannot_run_are_named_with_the_reason():
    named = {}
    for objective in kd.OBJECTIVES:
        found, missing = contenders.on(kd.KD(objective, 16, 33, 2), "cpu", ("peers",))
        named |= {c.name: "runs" for c in found} | {m.name: m.why for m in missing}
    assert set(named) == {name for peer in peers.ALL for name in peer.entries}
    for peer in peers.ALL:
        if importlib.util.find_spec(peer.module) is None:
            assert all(named[name] == f"{peer.package} is not installed" for name in peer.entries)
        elif peer.gpu_only:
            assert all(named[name] == peer.gpu_only for name in peer.entries)


def test_a_peer_whose_import_fails_is_named_with_the_error(tmp_path, monkeypatch):
    (tmp_path / "brokenpeer.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    peer = peers.Peer("brokenpeer", {}, package="broken-peer")
    assert peer.why_not("cpu") == "broken-peer does not import here: OSError: no such library"


def test_no_peer_is_imported_with_the_benchmark():
    heavy = ("matplotlib", *(peer.module for peer in peers.ALL))
    code = f"import sys, mtkd_fast.bench.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
