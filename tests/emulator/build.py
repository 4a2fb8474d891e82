"""Compiles C++ against the emulator, once for each state of its sources."""

import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
KERNELS = (CSRC / "kd_cuda.cu", CSRC / "hint_cuda.cu", CSRC / "attention_cuda.cu", HERE / "launchers.cpp")
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-DMTKD_EMULATOR", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",  # which refuses a longjmp to another stack
    f"-I{CSRC}", f"-I{HERE}",
)  # fmt: skip


def cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"mtkd_fast_emulator_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def digest(*sources: Path) -> str:
    """Of the sources and of everything they may include."""
    state = hashlib.sha256(repr(FLAGS).encode())
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    for path in sorted({*sources, *headers}):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


@functools.cache
def shared_library(*sources: Path) -> Path:
    """The sources and the emulator in one library. Processes that want the same one wait for the first."""
    library = cache() / f"{sources[0].stem}_{digest(*sources)}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            command = [os.environ.get("CXX", "g++"), *FLAGS, "-x", "c++"]
            command += [*map(str, sources), str(HERE / "emulator.cpp"), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            unfinished.rename(library)
    return library
