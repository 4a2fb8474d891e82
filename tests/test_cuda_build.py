"""MTKD_FAST_BUILD=cuda needs nvcc, not a GPU: it compiles, links and loads beside whatever torch is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_the_cuda_build_compiles_links_and_loads(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "results", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "MTKD_FAST_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": "1",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]

    program = """
import torch, mtkd_fast._C as built, mtkd_fast
assert built.cuda and "9.0" in built.cuda_architectures
assert mtkd_fast.implementations()["cpp"].devices == ("cpu", "cuda")
passes = ("kd_forward", "kd_backward", "kd_rescale", "hint_forward", "hint_backward")
for op in (*passes, "attention_forward", "attention_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mtkd_fast::{op}", "CUDA"), op
x = torch.randn(4, 10, requires_grad=True)
mtkd_fast.multi_teacher_kd_loss(x, [torch.randn(4, 10)], implementation="cpp").backward()
assert x.grad.isfinite().all()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
