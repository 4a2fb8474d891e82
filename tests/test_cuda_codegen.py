"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, the width of loads, exponentials."""

import re
import shutil

import pytest
import torch

if not shutil.which("nvcc"):
    pytest.skip("there is no nvcc", allow_module_level=True)

import emulator
from sass import ARCHITECTURES, SOURCES, count, instructions, kernels, resources


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def architecture(request):
    return request.param


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def source(request):
    return request.param


def test_nothing_spills(source, architecture):
    used = resources(source, architecture)
    assert used.keys() == instructions(source, architecture).keys()
    for name, use in used.items():
        assert use["STACK"] == 0, name
        code = instructions(source, architecture)[name]
        assert count(code, "LDL") == count(code, "STL") == 0, name


def test_every_variant_is_there(architecture):
    """4 kinds of divergence × (1 or 2 sums) × (lanes, short rows, but for DKD, long rows, clusters, 4 of pixels); 4
    streaming and 4 backward each of rows and of pixels; 1 rescale.
    """
    names = list(instructions(SOURCES["kd"], architecture))
    assert sum("kd_resident" in name for name in names) == 8 + 6 + 8 + 8 + 32
    assert len(names) == 62 + 8 + 8 + 1


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("LaneGroup", 168),  # three blocks a multiprocessor
        ("SharedTileILi32E", 168),  # 12 warps
        ("SharedTileILi64E", 255),  # 8 warps, with all that a thread can have
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
        if architecture == "80" and "ClusterGroup" in name:
            assert not [x for x in code if re.search(r"LDG|STG", x)], name  # there are none
            continue
        assert [x for x in code if re.search(r"LDGSTS\S*\.128", x)], name
        assert [x for x in code if re.search(r"STG\.E\.128", x)], name


def test_long_rows_come_in_bulk(architecture):
    """And their ends, or all of them, by each thread's own copies."""
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident").items():
        in_bulk = architecture != "80" and "SharedTile" in name
        assert bool(count(code, "UBLKCP")) == in_bulk, name
        # Before every bulk copy, and behind −inf that a thread has written where one may go.
        assert not in_bulk or count(code, "FENCE.VIEW.ASYNC") > count(code, "UBLKCP"), name


LATENCY = 0.8e-6  # seconds, of memory under load
BANDWIDTH = 4.8e12 / 132  # bytes a second, of an H200, for a multiprocessor
REGISTERS, SHARED_MEMORY, RESERVED = 65536, 228 * 1024, 1024  # of a multiprocessor; bytes, of a block


@pytest.mark.parametrize(
    ("rule", "divergence"), [("uniform", "forward_kl"), ("confidence", "forward_kl"), ("uniform", "dkd")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_teachers", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("classes", [264, 400, 1000, 4096, 8192, 16384, 32000, 50257, 128256, 151936, 262144])
def test_enough_bytes_are_on_their_way(classes, n_teachers, dtype, rule, divergence):
    """By Little's law, beside the row that is worked on, in as many blocks as a multiprocessor holds."""
    at = emulator.placement(classes, dtype, n_teachers, rule, divergence)
    group = "BlockGroup" if at.blocks == 1 else "ClusterGroup"
    kind = "kd_residentILNS_4KindE" + ("2E" if divergence == "dkd" else "0E")
    sums = "Lb1E" if rule == "confidence" else "Lb0E"
    is_short = classes <= 1024 and divergence != "dkd"
    tile = "SharedTileILi32E" if is_short else "SharedTileILi64E"
    (used,) = (
        use["REG"]
        for name, use in resources(SOURCES["kd"], "90a").items()
        if all(x in name for x in (kind + sums, group, tile))
    )
    registers = at.threads * -(-used // 8) * 8
    resident = min(REGISTERS // registers, SHARED_MEMORY // (at.shared_bytes + RESERVED))
    columns = -(-classes // at.blocks)
    assert resident >= (2 if columns <= 8192 else 1)
    assert resident * at.threads >= (384 if is_short else 256)
    assert resident * (at.places - 1) * columns * dtype.itemsize >= LATENCY * BANDWIDTH


def test_clusters_meet_once_and_send_what_they_have(architecture):
    """After the student, after each teacher, and after an elementwise sweep: no barrier of the cluster, nor a fence."""
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident").items():
        merges = 0 if architecture == "80" or "ClusterGroup" not in name else 3 if "KindE3E" in name else 2
        assert count(code, "UCGABAR_ARV") == (merges > 0), name
        assert count(code, "SYNCS.PHASECHK") >= merges, name
        assert bool(count(code, "STAS")) == (merges > 0), name


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
    temperature 1 where τ needs its own, the teacher's with its entropy or without, and for reverse KL the student's
    beside the teachers. The elementwise divergences, 8 columns too, have a second sweep: q, and p in each of four
    formulas. The rest belongs to merges, to DKD's target and, with a thread's own loop over the teachers, to their
    weights.
    """
    for kind, exponentials in (("E0E", 5 * wide), ("E1E", 6 * 8), ("E2E", 5 * wide), ("E3E", (5 + 5) * 8)):
        (code,) = kernels(SOURCES["kd"], architecture, "kd_streamingILNS_4Kind" + kind, group).values()
        assert exponentials <= count(code, "MUFU.EX2") <= exponentials + merges, kind


@pytest.mark.parametrize(
    ("tile", "columns"),
    [("RegisterTile", 8), *((f"PixelTileILi{columns}E", columns) for columns in (8, 16, 24, 32))],
)
def test_exponentials_of_rows_in_registers(tile, columns, architecture):
    """Of every column: student, teacher, each again at temperature 1, the student's once more for the gradient, and p
    and q in each of four elementwise formulas.
    """
    for name, code in kernels(SOURCES["kd"], architecture, "kd_resident", tile).items():
        merges = 40
        formulas = 4 * 2 * columns if "KindE3E" in name else 0
        assert 5 * columns <= count(code, "MUFU.EX2") - formulas <= 8 * columns + merges, name
