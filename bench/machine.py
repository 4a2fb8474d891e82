"""What a number was measured on: device, versions, commit, date. Without these a time means nothing."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import mtkd_fast

from . import rotation

PACKAGES = (
    "torch", "triton", "numpy",
    "liger_kernel", "flash-linear-attention", "quack-kernels", "torchdistill", "torchtune", "trl",
)  # fmt: skip
PYTHON = (sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else []))  # for children like ourselves


def facts(device: str) -> dict:
    return {
        "kind": device,
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cache": rotation.cache_bytes(device),
        "versions": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "mtkd_fast": mtkd_fast.__version__,
        "implementations": {name: found.note for name, found in mtkd_fast.implementations().items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def slug(device: str) -> str:
    """The device as a file name: cpu, nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device == "cuda" else "cpu"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def busy_seconds() -> float | None:
    """Seconds of processors spent on others than this process, since the machine began; None where nobody counts."""
    counted = Path("/proc/stat")
    if not counted.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, counted.read_text().split("\n", 1)[0].split()[1:])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def share_of_others(busy_before: float | None, seconds: float) -> float | None:
    """Of all processors' time in the last ``seconds``, the share that went to other processes."""
    busy = busy_seconds()
    if busy is None or busy_before is None:
        return None
    return max(0.0, busy - busy_before) / (seconds * (os.cpu_count() or 1))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the sources, with "+changes" where tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
