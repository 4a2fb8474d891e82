"""What is compiled, and where the packages lie. MTKD_FAST_BUILD=auto|cuda|cpu|none chooses; see README.md, Install."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
NO_ISOLATION = "pip install --no-build-isolation ."
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cu"))


def stop(sentence: str) -> None:
    sys.exit(f"mtkd_fast: {sentence}")


def version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "mtkd_fast/__init__.py").read_text())[1]


def build_kind() -> str:
    """cuda, cpu or none. `auto` adds CUDA where nvcc and a CUDA build of torch are, never by looking for a GPU."""
    kind = os.environ.get("MTKD_FAST_BUILD", "auto")
    if kind not in ("auto", "cuda", "cpu", "none"):
        stop(f"MTKD_FAST_BUILD must be auto, cuda, cpu or none, got {kind!r}")
    if kind == "none":
        return kind
    try:
        import torch
    except ImportError:
        stop(f"torch is not here to build against; install it first, then: {NO_ISOLATION} (or MTKD_FAST_BUILD=none)")
    has_cuda = cuda_home() is not None and torch.version.cuda is not None
    return ("cuda" if has_cuda else "cpu") if kind == "auto" else kind


def cuda_home() -> str | None:
    """Where nvcc and its libraries are, None without nvcc. It is asked, since the one on the PATH may be a script."""
    nvcc = os.environ.get("CUDA_HOME", "") + "/bin/nvcc" if os.environ.get("CUDA_HOME") else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).parent.parent)


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler: {compiler} is not on the PATH; install it, or set MTKD_FAST_BUILD=none")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [compiler, "-fopenmp", str(source), "-o", str(Path(folder, "openmp"))]
        if subprocess.run(command, capture_output=True).returncode != 0:
            stop(f"{compiler} cannot compile with OpenMP (-fopenmp); install its OpenMP runtime (libgomp)")
    macros = subprocess.run([compiler, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True).stdout
    if "__clang__" in macros:
        stop(f"{compiler} is clang; the C++ kernels are written in GCC's vector types: set CXX=g++")


def pybind11_headers() -> list[str]:
    """The package's own; without it, the copy among torch's headers is found."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def architectures(home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or Ampere, Hopper and Blackwell where this nvcc knows them, and PTX for later ones."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    found = [number for number in ("8.0", "9.0", "10.0") if f"compute_{number.replace('.', '')}" in known]
    return ";".join(found) + "+PTX"


def extension(kind: str):
    from torch.utils import cpp_extension

    check_compiler()
    options = {
        "name": "mtkd_fast._C",
        "sources": list(SOURCES),
        "include_dirs": pybind11_headers(),
        "depends": [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir())],
        "extra_link_args": ["-fopenmp"],
    }
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-Wno-psabi"]
    if kind == "cpu":
        return cpp_extension.CppExtension(extra_compile_args=cxx, **options)
    home = cuda_home()
    if home is None:
        stop("MTKD_FAST_BUILD=cuda needs nvcc, which is neither on the PATH nor under CUDA_HOME")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
    macros = ["-DMTKD_CUDA", f'-DMTKD_CUDA_ARCHITECTURES="sm {architectures(home)}"']
    options["sources"] += CUDA_SOURCES
    # A plain C++ extension with the static CUDA runtime: it links, and loads, beside a CPU build of torch too.
    options["library_dirs"] = [f"{home}/lib64"]
    cpp_extension.CUDA_HOME = home  # a CPU build of torch does not look for it
    options["extra_link_args"] += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    nvcc = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr"]
    return cpp_extension.CppExtension(extra_compile_args={"cxx": cxx + macros, "nvcc": nvcc}, **options)


def compiled() -> dict:
    kind = build_kind()
    if kind == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension(kind)], "cmdclass": {"build_ext": BuildExtension}}


setup(
    version=version(),
    packages=[
        "mtkd_fast",
        "mtkd_fast.schemas",
        "mtkd_fast.reference",
        "mtkd_fast.triton_ops",
        "mtkd_fast.losses",
        "mtkd_fast.kernels",
        "mtkd_fast.bench",
        "mtkd_fast.bench.ops",
        "mtkd_fast.bench.peers",
        "mtkd_fast.bench.demo",
        "mtkd_fast.bench.demo.methods",
        "mtkd_fast.bench.demo.segmentation",
    ],
    package_dir={"mtkd_fast.kernels": "kernels", "mtkd_fast.bench": "bench"},
    package_data={"mtkd_fast": ["py.typed"], "mtkd_fast.bench": ["page.html"]},
    **compiled(),
)
