"""The machine code that nvcc makes of the CUDA kernels, as cuobjdump prints it."""

import fcntl
import functools
import re
import shutil
import subprocess
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from emulator.build import CSRC, CUDA_SOURCES, cache, digest

SOURCES = {path.stem.removesuffix("_cuda"): path for path in CUDA_SOURCES}
ARCHITECTURES = ("80", "90a", "100")
FLAGS = (
    "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Werror", "all-warnings",
    "-Xcompiler", "-Wall,-Wextra",
)  # fmt: skip


@functools.cache
def tool(name: str) -> str:
    """From the CUDA toolkit, or from triton's wheel, which carries the same."""
    if found := shutil.which(name):
        return found
    triton = pytest.importorskip("triton")
    found = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not found.exists():
        pytest.skip(f"there is no {name}, in the PATH or in triton's wheel")
    return str(found)


@functools.cache
def cubin(source: Path, architecture: str) -> Path:
    file = cache() / f"{source.stem}_{architecture}_{digest(source)}.cubin"
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            command = ["nvcc", "-cubin", target, *FLAGS, f"-I{CSRC}", str(source), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            unfinished.rename(file)
    return file


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def resources(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """kernel -> REG, STACK, SHARED, ..."""
    text = output_of(tool("cuobjdump"), "--dump-resource-usage", str(cubin(source, architecture)))
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@functools.cache
def instructions(source: Path, architecture: str) -> dict[str, list[str]]:
    """kernel -> its SASS, one instruction a line"""
    text = output_of(tool("cuobjdump"), "-sass", str(cubin(source, architecture)))
    kernels = re.split(r"\n\s*Function : (\S+)\n", text)
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
    return {name: line.findall(body) for name, body in zip(kernels[1::2], kernels[2::2], strict=True)}


def count(code: list[str], opcode: str) -> int:
    return sum(bool(re.search(rf"(^|\s){re.escape(opcode)}(\s|\.|$)", x)) for x in code)


def kernels(source: Path, architecture: str, *parts: str) -> dict[str, list[str]]:
    """Those whose mangled name holds every part."""
    found = {k: v for k, v in instructions(source, architecture).items() if all(p in k for p in parts)}
    assert found, f"no kernel {parts} in {source.name}"
    return found


# ---------- ways through a kernel

INSTRUCTION_BYTES = 16
JUMP = re.compile(r"(?P<sometimes>@!?U?P\d+ )?(?:BRA|EXIT|RET|BRX)\b(?P<operands>.*)")


def following(code: list[str]) -> list[list[int]]:
    """Of each instruction those that may come next, by their place."""
    found = []
    for i, x in enumerate(code):
        jump = JUMP.match(x)
        falls_through = jump is None or jump["sometimes"] or re.search(r"\bU?P\d", jump["operands"])
        to = [i + 1] if falls_through and i + 1 < len(code) else []
        if jump and (target := re.search(r"0x([0-9a-f]+)\s*$", x)):
            to.append(int(target[1], 16) // INSTRUCTION_BYTES)
        found.append(to)
    return found


def shortest_way(nexts: list[list[int]], start: int, end: int) -> list[int]:
    """The fewest instructions from ``start`` on until ``end`` comes next; empty where it never does."""
    before, waiting = {start: None}, deque([start])
    while waiting:
        i = waiting.popleft()
        if end in nexts[i]:
            way = [i]
            while before[way[-1]] is not None:
                way.append(before[way[-1]])
            return way[::-1]
        for j in nexts[i]:
            if j not in before:
                before[j] = i
                waiting.append(j)
    return []


def loops(code: list[str]) -> list[list[str]]:
    """Of each loop its shortest round: what an ordinary column takes, without the exceptions beside it."""
    nexts = following(code)
    heads = sorted({j for i, to in enumerate(nexts) for j in to if j <= i})
    return [[code[i] for i in shortest_way(nexts, head, head)] for head in heads]


def stretches(code: list[str], opcode: str) -> list[list[str]]:
    """What lies between one instruction of a kind and the next, by the shortest way."""
    nexts = following(code)
    marks = [i for i, x in enumerate(code) if count([x], opcode)]
    return [[code[i] for i in shortest_way(nexts, a, b)] for a, b in pairwise(marks)]
