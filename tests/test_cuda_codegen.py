"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, the width of loads, exponentials."""

import fcntl
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

if not shutil.which("nvcc"):
    pytest.skip("there is no nvcc", allow_module_level=True)

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


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def architecture(request):
    return request.param


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def source(request):
    return request.param


def kernels(source: Path, architecture: str, *parts: str) -> dict[str, list[str]]:
    """Those whose mangled name holds every part."""
    found = {k: v for k, v in instructions(source, architecture).items() if all(p in k for p in parts)}
    assert found, f"no kernel {parts} in {source.name}"
    return found


def test_nothing_spills(source, architecture):
    used = resources(source, architecture)
    assert used.keys() == instructions(source, architecture).keys()
    for name, use in used.items():
        assert use["STACK"] == 0, name
        code = instructions(source, architecture)[name]
        assert count(code, "LDL") == count(code, "STL") == 0, name


def test_every_variant_is_there(architecture):
    """4 kinds of divergence × (1 or 2 sums) × 4 tiles of rows, 3 for the elementwise, one more that clusters share, and
    4 of pixels; 4 streaming and 4 backward each of rows and of pixels; 1 rescale.
    """
    names = list(instructions(SOURCES["kd"], architecture))
    assert sum("kd_resident" in name for name in names) == 30 + 8 + 32
    assert len(names) == 70 + 8 + 8 + 1


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("LaneGroup", 168),  # three blocks a multiprocessor
        ("BlockGroupENS_12RegisterTileILi8", 128),
        ("RegisterTileILi16", 168),
        ("SharedTile", 128),
        ("PixelTileILi8E", 168),  # 12 warps a multiprocessor
        ("PixelTileILi16E", 168),
        ("PixelTileILi24E", 255),  # 8
        ("PixelTileILi32E", 255),
        ("kd_streaming", 128),
        ("kd_backward", 128),
        ("kd_rescale", 64),
    ],
)
def test_registers_leave_room_for_the_launch(kernel, most, architecture):
    used = {name: use["REG"] for name, use in resources(SOURCES["kd"], architecture).items() if kernel in name}
    assert used
    assert max(used.values()) <= most, used


@pytest.mark.parametrize("kernel", ["kd_streaming", "kd_backward"])
def test_aligned_rows_load_16_bytes(kernel, architecture):
    for name, code in kernels(SOURCES["kd"], architecture, kernel).items():
        wide = [x for x in code if re.search(r"LDG\.E\.128", x)]
        assert wide, name
        if kernel == "kd_backward":
            assert [x for x in code if re.search(r"STG\.E\.128", x)], name


def test_resident_rows_come_in_by_asynchronous_copies(architecture):
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident").items():
        assert [x for x in code if re.search(r"LDGSTS\S*\.128", x)], name
        assert [x for x in code if re.search(r"STG\.E\.128", x)], name


def test_clusters_meet_at_their_own_barriers(architecture):
    """After the student, after each teacher, after an elementwise sweep, and before the end."""
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident").items():
        barriers = 0 if architecture == "80" or "ClusterGroup" not in name else 4 if "KindE3E" in name else 3
        assert count(code, "UCGABAR_ARV") == count(code, "UCGABAR_WAIT") == barriers, name


@pytest.mark.parametrize("op", ["hint", "mixture"])
def test_hint_and_mixture_load_16_bytes(op, architecture):
    for name, code in instructions(SOURCES[op], architecture).items():
        assert [x for x in code if re.search(r"LDG\.E\.128", x)], name


def test_mutual_loads_and_stores_16_bytes(architecture):
    found = instructions(SOURCES["mutual"], architecture)
    assert len(found) == 2
    for name, code in found.items():
        assert [x for x in code if re.search(r"LDG\.E\.128", x)], name
        assert [x for x in code if re.search(r"STG\.E\.128", x)], name


def test_attention_loads_and_stores_16_bytes(architecture):
    for name, code in kernels(SOURCES["attention"], architecture, "attention_energy").items():
        assert len([x for x in code if re.search(r"LDG\.E\.128", x)]) >= 4, name
    for name, code in kernels(SOURCES["attention"], architecture, "attention_gradient").items():
        assert [x for x in code if re.search(r"LDG\.E\.128", x)], name
        assert [x for x in code if re.search(r"STG\.E\.128", x)], name


@pytest.mark.parametrize(("group", "wide", "merges"), [("BlockGroup", 16, 40), ("PixelGroup", 8, 56)])
def test_exponentials_of_the_streaming_forward(group, wide, merges, architecture):
    """A tile of 16 columns a thread (reverse KL and pixels: 8): the student's and a teacher's e^{·/τ}, both again at
    temperature 1 where τ needs its own, and for reverse KL the student's beside the teachers. The elementwise
    divergences, 8 columns too, have a second sweep: q, and p in each of four formulas. The rest belongs to merges, to
    DKD's target and, with a thread's own loop over the teachers, to their weights.
    """
    for kind, exponentials in (("E0E", 4 * wide), ("E1E", 5 * 8), ("E2E", 4 * wide), ("E3E", (4 + 5) * 8)):
        (code,) = kernels(SOURCES["kd"], architecture, "kd_streamingILNS_4Kind" + kind, group).values()
        assert exponentials <= count(code, "MUFU.EX2") <= exponentials + merges, kind


@pytest.mark.parametrize(
    ("tile", "columns"),
    [("RegisterTileILi8E", 8), *((f"PixelTileILi{columns}E", columns) for columns in (8, 16, 24, 32))],
)
def test_exponentials_of_rows_in_registers(tile, columns, architecture):
    """Of every column: student, teacher, each again at temperature 1, the student's once more for the gradient, and p
    and q in each of four elementwise formulas.
    """
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident", tile).items():
        merges = 40
        formulas = 4 * 2 * columns if "KindE3E" in name else 0
        assert 5 * columns <= count(code, "MUFU.EX2") - formulas <= 8 * columns + merges, name
