"""Where the tests run: the backends, the device, and memory that shows what a kernel forgot to write."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # fixed when a kernel is decorated, so before any import of one
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out

import pytest

from mtkd_fast import (
    dispatch,
    ensemble_probabilities,
    hint_loss,
    mixture_divergence,
    multi_teacher_divergence,
    multi_teacher_kd_loss,
    teacher_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Backend:
    """One form of the op ``kd``: an implementation, on a device, and on the CPU in one instruction set."""

    def __init__(self, name: str, implementation: str, device: str = "cpu", missing: str | None = None):
        self.name, self.implementation, self.device, self.missing = name, implementation, device, missing
        self.interpreted = implementation == "triton" and dispatch.INTERPRETED
        self.float64 = device == "cpu" and implementation in ("cpp", "reference")

    @contextmanager
    def active(self):
        yield

    def loss(self, *args, **kwargs):
        return multi_teacher_kd_loss(*args, **kwargs, implementation=self.implementation)

    def divergence(self, *args, **kwargs):
        return multi_teacher_divergence(*args, **kwargs, implementation=self.implementation)

    def weights(self, *args, **kwargs):
        return teacher_weights(*args, **kwargs, implementation=self.implementation)

    def hint(self, *args, **kwargs):
        return hint_loss(*args, **kwargs, implementation=self.implementation)

    def ensemble_probabilities(self, *args, **kwargs):
        return ensemble_probabilities(*args, **kwargs, implementation=self.implementation)

    def mixture_divergence(self, *args, **kwargs):
        return mixture_divergence(*args, **kwargs, implementation=self.implementation)


class InstructionSet(Backend):
    def __init__(self, capability: str):
        super().__init__(f"cpp-{capability}", "cpp")
        self.capability = capability

    @contextmanager
    def active(self):
        before = dispatch._C.cpu_capability()
        dispatch._C.set_cpu_capability(self.capability)
        try:
            yield
        finally:
            dispatch._C.set_cpu_capability(before)


class EmulatedCuda(Backend):
    """The CUDA kernels, compiled as C++, behind the same autograd as Triton's."""

    def __init__(self):
        super().__init__("cuda-emulated", "triton")
        self.interpreted = False
        if not shutil.which("g++"):
            self.missing = "the CUDA emulator needs g++"

    @contextmanager
    def active(self):
        import emulator
        from emulator import attention, hint, mixture, mutual, relation

        from mtkd_fast.triton_ops import attention as triton_attention
        from mtkd_fast.triton_ops import hint as triton_hint
        from mtkd_fast.triton_ops import kd as triton_kd
        from mtkd_fast.triton_ops import mixture as triton_mixture
        from mtkd_fast.triton_ops import mutual as triton_mutual
        from mtkd_fast.triton_ops import relation as triton_relation

        def dense(features):  # as csrc/hint_ops.cpp hands them over
            return [x.contiguous() for x in features]

        class Ops:
            kd_triton_forward = staticmethod(triton_kd.kd_forward)
            kd_triton_backward = staticmethod(emulator.backward)
            kd_triton_rescale = staticmethod(emulator.rescale)
            kd_triton_rescale_ = staticmethod(emulator.rescale_)
            relation_triton_forward = staticmethod(triton_relation.relation_forward)
            relation_triton_peers_forward = staticmethod(triton_relation.relation_peers_forward)
            mixture_triton_forward = staticmethod(mixture.forward)
            mixture_triton_backward = staticmethod(mixture.backward)
            mixture_triton_divergence_forward = staticmethod(mixture.divergence)

            mutual_triton_forward = staticmethod(triton_mutual.mutual_forward)
            mutual_triton_backward = staticmethod(mutual.backward)

            attention_triton_forward = staticmethod(attention.forward)
            attention_triton_backward = staticmethod(attention.backward)

            @staticmethod
            def hint_triton_forward(student, teacher, weights, distance):
                return hint.forward(dense(student), dense(teacher), weights, distance)

            @staticmethod
            def hint_triton_backward(student, teacher, weights, *rest):
                return hint.backward(dense(student), dense(teacher), weights, *rest)

            @staticmethod
            def hint_triton_fused_forward(student, teacher, *rest):
                return triton_hint.fused_forward(dense(student), dense(teacher), *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_hint, "hint_kernels", hint)
            patch.setattr(triton_kd, "kd_kernels", emulator)
            patch.setattr(triton_mutual, "mutual_kernels", mutual)
            patch.setattr(triton_relation, "relation_kernels", relation)
            for op in (triton_kd, triton_hint, triton_attention, triton_mixture, triton_mutual, triton_relation):
                patch.setattr(op, "ops", Ops)
            yield


def _backends() -> list[Backend]:
    found = [Backend("reference", "reference")]
    if dispatch._C is None:
        found.append(Backend("cpp", "cpp", missing="mtkd_fast._C is not built"))
    else:
        found += [InstructionSet(name) for name in dispatch._C.cpu_capabilities()]
    if dispatch.INTERPRETED and dispatch.HAS_TRITON:
        found.append(Backend("triton-interpreted", "triton"))
        found.append(EmulatedCuda())
    if DEVICE == "cuda":
        built = dispatch._C is not None and dispatch._C.cuda
        found.append(Backend("cuda", "cpp", "cuda", None if built else "mtkd_fast._C is built without CUDA"))
        if not dispatch.INTERPRETED:
            found.append(Backend("triton", "triton", "cuda"))
    return found


BACKENDS = _backends()


def _param(backend: Backend):
    marks = [pytest.mark.gpu] if backend.device == "cuda" else []
    return pytest.param(backend, id=backend.name, marks=marks)


def _each_of(backends: list[Backend]):
    """A fixture that is each of them in turn."""

    @pytest.fixture(params=[_param(backend) for backend in backends])
    def one(request):
        with _activated(request.param) as active:
            yield active

    return one


FUSED = [backend for backend in BACKENDS if backend.name != "reference"]  # the tolerance is measured in plain PyTorch
backend = _each_of(BACKENDS)  # the emulated and interpreted ones included
backend64 = _each_of([backend for backend in BACKENDS if backend.float64])
fused = _each_of(FUSED)
fused64 = _each_of([backend for backend in FUSED if backend.float64])
instruction_set = _each_of(
    [backend for backend in BACKENDS if backend.implementation == "cpp" and backend.device == "cpu"]
)


@pytest.fixture(params=["cpp", "triton", "reference"])
def implementation(request):
    """Every name that `implementation=` takes, on the CPU."""
    if request.param == "cpp" and dispatch._C is None:
        _missing("mtkd_fast._C is not built")
    if "cpu" not in dispatch.implementations()[request.param].devices:
        pytest.skip(dispatch.implementations()[request.param].note)
    return request.param


@contextmanager
def _activated(backend: Backend):
    if backend.missing:
        _missing(backend.missing)
    with backend.active():
        yield backend


def _missing(what: str):
    """A machine with a compiler must have built the extension; only one without may skip it."""
    if shutil.which("g++"):
        pytest.fail(f"{what}, though g++ is here: pip install --no-build-isolation -e .")
    pytest.skip(f"{what}, and there is no g++")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    for category in ("RuntimeWarning", "DeprecationWarning"):  # inf - inf in numpy's words
        config.addinivalue_line("filterwarnings", f"ignore::{category}:triton.runtime.interpreter")
    # Several workers share the cores: threads that wait for each other would spin. Tests of threads set their own.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
