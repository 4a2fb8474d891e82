"""Traps of the tests themselves."""

import ast
from pathlib import Path

import pytest
import torch
from cases.kd import CASES, F64, build, check, oracle
from conftest import BACKENDS

import mtkd_fast
from mtkd_fast import dispatch

REFERENCE = Path(mtkd_fast.__file__).parent / "reference"


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.py")), ids=lambda path: path.name)
def test_trap_37_the_oracle_shares_no_code_with_the_kernels(path):
    tree = ast.parse(path.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {module for module in modules if module.split(".")[0] not in ("torch", "typing", "math", "collections")}
    assert all(module.startswith("mtkd_fast.reference") for module in ours), ours


def test_trap_37_the_oracle_is_in_float64_and_rounds_nothing():
    for case in CASES[:20]:
        exact = oracle(case).exact
        assert exact.loss.dtype == F64
        assert all(gradient.dtype == F64 for gradient in exact.gradients.values())


def test_trap_38_reduction_none_is_tested_with_gradients():
    assert any("student" in case.wants and case.reduction == "none" and case.upstream == "random" for case in CASES)


def test_trap_38_log_probabilities_are_logits(backend):
    student, teacher = (torch.randn(5, 30, device=backend.device) for _ in range(2))
    target = torch.randint(30, (5,), device=backend.device)
    kwargs = dict(weights="confidence", temperature=2.0, ce_weight=1.0)
    right = backend.loss(student, [teacher, student], target, **kwargs)
    as_log = [x.log_softmax(-1) for x in (teacher, student)]
    torch.testing.assert_close(backend.loss(as_log[1], as_log, target, **kwargs), right)
    check(backend, as_log[1], as_log, target, **kwargs)


def test_trap_39_every_implementation_is_on_the_one_case_table():
    covered = {backend.implementation for backend in BACKENDS}
    assert covered >= {"cpp", "reference"}
    if dispatch.HAS_TRITON:
        assert "triton" in covered
    if dispatch._C is not None:
        names = {f"cpp-{name}" for name in dispatch._C.cpu_capabilities()}
        assert names <= {backend.name for backend in BACKENDS}


def test_trap_39_every_case_has_a_reason_and_a_name_of_its_own():
    assert all(case.why for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_trap_40_without_a_gpu_every_kernel_still_runs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = {backend.name for backend in BACKENDS}
    assert {"triton-interpreted", "cuda-emulated"} <= names


def test_the_same_case_is_built_from_the_same_numbers_every_time():
    a, b = (build(CASES[0]) for _ in range(2))
    assert torch.equal(a.student, b.student)
    assert all(map(torch.equal, a.teachers, b.teachers))
