"""What the compiler makes of the Triton kernels, without a GPU: spills, width of loads, exponentials, recompilations.

Signatures, tiles, warps and alignment are those that the launchers choose. The kernels are compiled in another process,
since the interpreter, where the rest of the suite runs them, is chosen when a kernel is decorated. The disassembler is
the one in Triton's own wheel; it knows sm_80, sm_90 and sm_100.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

BF16, F32 = torch.bfloat16, torch.float32


class Kernel(NamedTuple):
    """One launch, and what it may cost a thread."""

    launch: str  # on chip, streaming, backward or rescale
    n_rows: int = 4096
    n_classes: int = 1000
    n_teachers: int = 3
    dtype: torch.dtype = BF16
    rule: str = "uniform"
    divergence: str = "forward_kl"
    temperature: float = 4.0
    ce_weight: float = 1.0
    most_registers: int = 255
    most_spills: int = 0  # loads and stores of spilled registers
    image: tuple[int, int, int] | None = None  # B, H, W: logits [B, C, H, W]
    learn: bool = False  # the teachers too


KERNELS = {
    "A, C=10": Kernel("on chip", n_classes=10, rule="confidence"),
    "A, C=100": Kernel("on chip", n_classes=100, rule="confidence", dtype=F32, most_registers=168),
    "A, C=1000": Kernel("on chip", rule="confidence"),
    "A, C=1000, uniform": Kernel("on chip"),
    "A, C=1000, fp32, K=4": Kernel("on chip", dtype=F32, n_teachers=4, rule="given"),
    "A, C=1000, table": Kernel("on chip", n_teachers=6, rule="confidence"),
    "A, C=4096, entropy, tau=3": Kernel("on chip", n_classes=4096, rule="entropy", temperature=3.0),
    "A, C=8192": Kernel("on chip", n_classes=8192, rule="confidence"),
    "A, C=8192, reverse": Kernel(
        "on chip", n_classes=8192, rule="confidence", divergence="reverse_kl", most_spills=120
    ),
    "B forward, C=32000": Kernel("streaming", n_classes=32000, rule="confidence", most_registers=200),
    "B forward, C=32000, few rows": Kernel("streaming", n_rows=64, n_classes=32000, rule="confidence"),
    "B forward, C=32000, table": Kernel(
        "streaming", n_classes=32000, n_teachers=9, rule="entropy", divergence="reverse_kl"
    ),
    "B backward, C=32000": Kernel("backward", n_classes=32000, most_registers=80),
    "B backward, C=32000, table": Kernel("backward", n_classes=32000, n_teachers=9, most_registers=128),
    "A, C=1000, jsd": Kernel("on chip", rule="confidence", divergence="jsd"),
    "A, C=1000, skew, table": Kernel("on chip", n_teachers=6, divergence="skew_kl", ce_weight=0.0),
    "A, C=8192, jsd": Kernel("on chip", n_classes=8192, rule="confidence", divergence="jsd", most_spills=160),
    "A, C=1000, dkd": Kernel("on chip", rule="confidence", divergence="dkd"),
    "B backward, C=32000, jsd": Kernel("backward", n_classes=32000, divergence="jsd", most_registers=128),
    "B backward, C=32000, dkd": Kernel("backward", n_classes=32000, divergence="dkd", most_registers=128),
    "rescale": Kernel("rescale", most_registers=64),
}
ARCHITECTURES = {"A, C=1000": (80, 90, 100), "B forward, C=32000": (80, 90, 100), "B backward, C=32000": (80, 90, 100)}
COMPILED = [(name, arch) for name in KERNELS for arch in ARCHITECTURES.get(name, (90,))]


def of_pixels(launch: str, **options) -> Kernel:
    return Kernel(launch, image=(8, 128, 128), **({"n_classes": 21, "rule": "confidence"} | options))


PIXELS = {
    "pixels A": of_pixels("on chip", most_registers=208),
    "pixels A, uniform": of_pixels("on chip", rule="uniform", most_registers=208),
    "pixels B forward": of_pixels("streaming", most_registers=184),
    "pixels B forward, uniform": of_pixels("streaming", rule="uniform", most_registers=184),
    "pixels B backward": of_pixels("backward", most_registers=208),
    "pixels rescale": of_pixels("rescale", most_registers=80),
}
PIXELS |= {f"{name}, fp32": kernel._replace(dtype=F32) for name, kernel in PIXELS.items()}
PIXELS_COMPILED = [(name, arch) for name in PIXELS for arch in (80, 90, 100)]
PIXELS |= {
    "pixels A, K=1, reverse, C=2": of_pixels("on chip", n_classes=2, n_teachers=1, divergence="reverse_kl"),
    "pixels A, C=150, jsd": of_pixels("on chip", n_classes=150, divergence="jsd"),
    "pixels A, C=256, table": of_pixels("on chip", n_classes=256, n_teachers=6, rule="entropy", dtype=F32),
    "pixels B forward, C=600, table": of_pixels("streaming", n_classes=600, n_teachers=9, rule="entropy"),
    "pixels B backward, table": of_pixels("backward", n_teachers=6, dtype=F32),
    "pixels B backward, teachers": of_pixels("backward", learn=True),
    "pixels B backward, table, teachers": of_pixels("backward", n_teachers=6, learn=True),
    "pixels B backward, teachers, dkd": of_pixels("backward", divergence="dkd", dtype=F32, learn=True),
}
PIXELS_COMPILED += [(name, 90) for name in PIXELS if (name, 90) not in PIXELS_COMPILED]


def launch_of(kernel: Kernel):
    """The launch, on CPU tensors that nobody reads."""
    from mtkd_fast.kernels import kd

    n, c, k = kernel.n_rows, kernel.n_classes, kernel.n_teachers
    student, *teachers = [torch.empty(n, c, dtype=kernel.dtype) for _ in range(k + 1)]
    if kernel.image is not None:
        b, h, w = kernel.image
        n = b * h * w
        student, *teachers = [torch.empty(b, c, h, w, dtype=kernel.dtype).movedim(1, -1) for _ in range(k + 1)]
    target, weights, row_stats = torch.zeros(n, dtype=torch.int64), torch.ones(k, n), torch.empty(7 * k + 5, n)
    scales = (0.5, kernel.temperature, 1.0, kernel.ce_weight, 0.1)
    if kernel.launch == "rescale":
        return kd.rescale_launch(student, student, torch.ones(()), row_stats[0])
    if kernel.launch == "backward":
        gradients = [torch.empty_like(student), *(torch.empty_like(t) if kernel.learn else None for t in teachers)]
        return kd.backward_launch(
            student, teachers, target, weights, torch.ones(()), row_stats, kernel.divergence, *scales, gradients
        )
    beta, temperature, kd_scale, ce_weight, label_smoothing = scales
    return kd.forward_launch(
        student, teachers, target, weights, None, torch.ones(()), torch.empty(n), row_stats, torch.empty_like(student),
        rule=kernel.rule, divergence=kernel.divergence, beta=beta, temperature=temperature,
        kd_scale=kd_scale, ce_weight=ce_weight, label_smoothing=label_smoothing, ignore_index=-100,
        skip_zero_weights=True, write_gradient=kernel.launch == "on chip",
    )  # fmt: skip


RELATION_REGISTERS = {"planes": 128, "angle": 176, "angle, no gradient": 128, "distance": 128, "distance pull": 128}
RELATIONS = [(name, batch, arch) for name in RELATION_REGISTERS for batch in (256, 1024) for arch in (80, 90, 100)]


def relation_launch(name: str, batch: int):
    """On tensors that nobody reads."""
    from mtkd_fast.kernels import relation

    scalar, x = torch.ones((), dtype=torch.float64), torch.empty(batch, 8, dtype=torch.float64)
    square = torch.empty(batch, batch, dtype=torch.float64)
    planes = torch.empty(3, relation.pitch_of(batch), relation.pitch_of(batch))
    if name == "planes":
        return relation.planes_launch(x, square, scalar)
    if name.startswith("angle"):
        return relation.angle_launch(planes, planes, batch, write_gradient=name == "angle")
    out = dict.fromkeys(("losses", "weighted"), x) | dict(drag=None, pulls=None)
    if name == "distance pull":
        out = dict(losses=None, weighted=None, drag=scalar, pulls=square)
    scalars = dict.fromkeys(("nearest", "nearest_t", "mean", "mean_t"), scalar)
    return relation.distance_launch(planes, planes, batch, **scalars, **out)


class MixtureKernel(NamedTuple):
    """A launch of the op mixture, and what it may cost a thread."""

    launch: str  # forward, backward, divergence
    n_classes: int = 1000
    n_teachers: int = 3
    dtype: torch.dtype = BF16
    most_registers: int = 128


MIXTURES = {
    "mixture, C=100": MixtureKernel("forward", n_classes=100, dtype=F32),
    "mixture, C=1000": MixtureKernel("forward"),
    "mixture, C=8192": MixtureKernel("forward", n_classes=8192),
    "mixture, C=32000": MixtureKernel("forward", n_classes=32000),
    "mixture, table": MixtureKernel("forward", n_teachers=6),
    "mixture backward, C=1000": MixtureKernel("backward"),
    "mixture backward, table": MixtureKernel("backward", n_classes=32000, n_teachers=6),
    "mixture divergence, C=100": MixtureKernel("divergence", n_classes=100, dtype=F32, most_registers=255),
    "mixture divergence, C=1000": MixtureKernel("divergence", most_registers=200),
    "mixture divergence, C=32000": MixtureKernel("divergence", n_classes=32000, most_registers=200),
    "mixture divergence, table": MixtureKernel("divergence", n_teachers=6, most_registers=200),
}
MIXTURES_COMPILED = [(name, arch) for name in MIXTURES for arch in ((80, 90, 100) if "C=1000" in name else (90,))]


def launch_of_mixture(kernel: MixtureKernel):
    from mtkd_fast.kernels import mixture

    n, c, k = 4096, kernel.n_classes, kernel.n_teachers
    student, *teachers = [torch.empty(n, c, dtype=kernel.dtype) for _ in range(k + 1)]
    weights, probabilities, states = torch.ones(k, n), torch.empty(n, c), torch.empty(2 * k, n)
    if kernel.launch == "forward":
        return mixture.forward_launch(teachers, weights, 4.0, False, probabilities, states)
    if kernel.launch == "backward":
        gradients = [torch.empty_like(t) for t in teachers]
        return mixture.backward_launch(
            teachers, weights, probabilities, states, 4.0, False, torch.empty(k, n), gradients
        )
    row_stats = torch.empty(6 * k + 5, n)
    return mixture.divergence_launch(
        student, teachers, weights, 4.0, False, torch.empty(n), row_stats, torch.empty_like(student)
    )


MUTUAL = {  # launch, students, classes, detach_peers
    "mutual A, M=3": ("on chip", 3, 1000, True),
    "mutual A, M=2, peers learn": ("on chip", 2, 4096, False),
    "mutual A, table": ("on chip", 6, 1000, True),
    "mutual B forward": ("streaming", 3, 32000, True),
    "mutual B forward, table": ("streaming", 9, 32000, True),
    "mutual B backward": ("backward", 3, 32000, False),
    "mutual B backward, table": ("backward", 9, 32000, False),
}


def mutual_launch(launch: str, m: int, n_classes: int, detach_peers: bool):
    from mtkd_fast.kernels import mutual

    students = [torch.empty(64, n_classes, dtype=BF16) for _ in range(m)]
    gradients = [None if launch == "streaming" else torch.empty_like(z) for z in students]
    row_stats, one = torch.empty(mutual.row_stats_size(m), 64), torch.ones(())
    options = dict(temperature=2.0, scale=4.0, detach_peers=detach_peers)
    if launch == "backward":
        return mutual.backward_launch(students, None, one, row_stats, *options.values(), gradients)
    return mutual.forward_launch(students, None, None, one, torch.empty(64), row_stats, gradients, **options)


def entries_launch(number: int):
    from mtkd_fast.kernels import logits

    names = [p.name for p in logits.write_entries.params[2:]]
    table = {"table": torch.empty(8, dtype=torch.int64), "first": min(number, 60)}
    return SimpleNamespace(kernel=logits.write_entries, arguments=table | dict.fromkeys(names, number))


HINTS = [
    (kernel, distance) for kernel in ("forward", "backward", "fused") for distance in ("mse", "smooth_l1", "cosine")
]


def hint_launch(name: str, distance: str, dtype: torch.dtype = BF16, n_samples: int = 64):
    """A pair of maps of 256 × 14 × 14, the weights per sample."""
    from mtkd_fast.kernels import hint

    student, teacher = [torch.empty(n_samples, 50176, dtype=dtype)], [torch.empty(n_samples, 50176, dtype=dtype)]
    ((pairs, arguments),) = hint.chunks(student, teacher, torch.ones(1, n_samples), distance)
    if name != "forward":
        arguments["gradients"] = (torch.empty_like(student[0]),)
    if name == "fused":
        arguments["scale"] = 1 / n_samples
    kernel = {"forward": hint.hint_forward, "backward": hint.hint_backward, "fused": hint.hint_fused}[name]
    return hint.launch(kernel, n_samples, kept=torch.empty(3, 1, n_samples)[:, pairs], **arguments)


ATTENTION = [
    (name, last, positions)
    for name in ("attention_energy", "attention_gradient")
    for last, positions in ((False, (16, 16)), (True, (14, 14)))
]


def attention_launch(name: str, last: bool = False, positions: tuple[int, int] = (16, 16), n_samples: int = 64):
    """A map of 256 channels, the weights per sample."""
    from mtkd_fast.kernels import attention

    features = torch.empty(n_samples, 256, *positions, dtype=BF16)
    if last:
        features = features.contiguous(memory_format=torch.channels_last)
    numbers, weights = torch.empty(n_samples, features[0, 0].numel()), torch.ones(1, n_samples)
    if name == "attention_distance":
        (launch,) = attention.distance_launches([numbers], [numbers], weights, torch.empty(1, n_samples))
    else:
        outputs = dict(gradients=[torch.empty_like(features)]) if name == "attention_gradient" else {}
        maps = attention.laid_out([features])
        (launch,) = attention.map_launches(getattr(attention, name), maps, [numbers], weights, **outputs)
    return launch


# In the other process.


def bound(launch, arch: int):
    """Target, backend, and the arguments as Triton's own launcher would specialise them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    return target, backend, bind(**launch.arguments)


def compiled(launch, arch: int) -> bytes:
    from triton.compiler import ASTSource

    target, backend, (arguments, specialization, _) = bound(launch, arch)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, {"num_warps": launch.num_warps}, arguments, specialization, None
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__).asm["cubin"]


def disassembled(cubin: bytes) -> dict[str, int]:
    """Registers, stack and counts of instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    found = Counter(opcodes)
    named = ("LDL", "STL", "LDG", "LDG.E.128", "STG.E.128", "MUFU.EX2")
    counts = {name: sum(n for op, n in found.items() if op == name or op.startswith(name + ".")) for name in named}
    exchange = next((i for i, op in enumerate(opcodes) if op.startswith("SHFL")), len(opcodes))
    in_flight = sum(op.startswith("LDG.E.128") for op in opcodes[:exchange])
    return counts | {"registers": registers, "stack": stack, "instructions": found.total(), "in flight": in_flight}


def main() -> None:
    found = {}
    for name, arch in COMPILED + PIXELS_COMPILED:
        launch = launch_of((KERNELS | PIXELS)[name])
        a = launch.arguments
        elements = a["BLOCK_N"] * a["BLOCK_C"] // (32 * launch.num_warps)
        found[f"{name} sm_{arch}"] = disassembled(compiled(launch, arch)) | {"elements": elements}
    for name, distance in HINTS:
        found[f"hint {name} {distance}"] = disassembled(compiled(hint_launch(name, distance), 90))
    for name, last, positions in ATTENTION:
        found[f"{name} {last}"] = disassembled(compiled(attention_launch(name, last, positions), 90))
    found["attention_distance"] = disassembled(compiled(attention_launch("attention_distance"), 90))
    for name in ("attention_energy", "attention_distance", "attention_gradient"):
        launches = [attention_launch(name, n_samples=n) for n in (3, 64, 77)]
        found[f"{name} samples"] = len({str(bound(launch, 90)[2][1]) for launch in launches})
    for name in ("forward", "fused"):
        launches = [hint_launch(name, "cosine", n_samples=n) for n in (3, 64, 77)]
        found[f"{name} samples"] = len({str(bound(launch, 90)[2][1]) for launch in launches})
    for name, batch, arch in RELATIONS:
        found[f"{name} {batch} sm_{arch}"] = disassembled(compiled(relation_launch(name, batch), arch))
    for name, arch in MIXTURES_COMPILED:
        found[f"{name} sm_{arch}"] = disassembled(compiled(launch_of_mixture(MIXTURES[name]), arch))
    for name, kernel in MUTUAL.items():
        launch = mutual_launch(*kernel)
        threads, a = 32 * launch.num_warps, launch.arguments
        tile = {"columns": a["BLOCK_C"] // threads, "elements": a["BLOCK_C"] * a["M_PAD"] // threads}
        found[name] = disassembled(compiled(launch, 90)) | tile
    for varied in ("n_rows", "temperature"):
        kernels = [KERNELS["A, C=1000"]._replace(**{varied: value}) for value in (77, 4096, 3)]
        found[varied] = len({str(bound(launch_of(kernel), 90)[2][1]) for kernel in kernels})
    found["table entry"] = len({str(bound(entries_launch(i), 90)[2][1]) for i in (0, 1, 16, 2**40, 2**40 + 1)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EACH = pytest.mark.parametrize(("name", "arch"), COMPILED, ids=lambda x: f"sm_{x}" if isinstance(x, int) else x)


@EACH
def test_registers(built, name, arch):
    found, kernel = built[f"{name} sm_{arch}"], KERNELS[name]
    assert found["LDL"] + found["STL"] <= kernel.most_spills
    assert (found["stack"] > 0) == (kernel.most_spills > 0)
    assert found["registers"] <= kernel.most_registers


@EACH
def test_aligned_rows_are_loaded_128_bits_at_a_time(built, name, arch):
    """C = 10 and C = 1001 have no aligned rows; a table of teachers loads the student and, in a loop, one teacher."""
    kernel, found = KERNELS[name], built[f"{name} sm_{arch}"]
    if kernel.n_classes == 10:
        pytest.skip("rows of 20 bytes are not aligned")
    read = 1 if kernel.launch == "rescale" else 1 + (kernel.n_teachers if kernel.n_teachers <= 4 else 1)
    assert found["LDG.E.128"] == read * found["elements"] * kernel.dtype.itemsize // 16


@pytest.mark.parametrize("name", ["A, C=1000", "A, C=1000, uniform", "B forward, C=32000"])
def test_most_loads_are_in_flight_before_the_first_reduction(built, name):
    """The loads of the student and of every teacher are issued first; the compiler may hold back some for registers."""
    found = built[f"{name} sm_90"]
    assert found["in flight"] >= found["LDG.E.128"] // 2


@EACH
def test_one_exponential_an_element_read(built, name, arch):
    """At temperatures 1, 2 and 4; elsewhere one more for the statistics at temperature 1. A few more a row, and where
    the target stands apart those of its probabilities, a dozen a teacher."""
    kernel, found = KERNELS[name], built[f"{name} sm_{arch}"]
    read = 0 if kernel.launch == "rescale" else 1 + (kernel.n_teachers if kernel.n_teachers <= 4 else 1)
    per_element = read * (1 if kernel.temperature in (1, 2, 4) else 2)
    rows = max(1, 256 // kernel.n_classes)
    of_targets = 12 * kernel.n_teachers if kernel.divergence == "dkd" else 0
    assert 0 <= found["MUFU.EX2"] - per_element * found["elements"] <= (24 + of_targets) * rows


@pytest.mark.parametrize(("name", "arch"), PIXELS_COMPILED, ids=lambda x: f"sm_{x}" if isinstance(x, int) else x)
def test_pixels(built, name, arch):
    """No spills. Elementwise, 128 bits a load and a store; where rows are summed a pixel a thread, whose neighbours'
    addresses follow its own, and an exponential an element: none is computed again in another layout."""
    found, kernel = built[f"{name} sm_{arch}"], PIXELS[name]
    assert found["LDL"] + found["STL"] + found["stack"] == 0
    assert found["registers"] <= kernel.most_registers
    read = 1 + (kernel.n_teachers if kernel.n_teachers <= 4 else 1)
    if kernel.launch == "rescale" or (kernel.launch == "backward" and not kernel.learn):
        read = 1 if kernel.launch == "rescale" else read
        assert found["LDG.E.128"] == read * found["elements"] * kernel.dtype.itemsize // 16
        assert found["STG.E.128"] == found["elements"] * kernel.dtype.itemsize // 16
    else:
        assert 0 <= found["LDG"] - read * found["elements"] <= 16 * kernel.n_teachers
    if kernel.launch != "rescale" and kernel.divergence != "dkd":
        assert 0 <= found["MUFU.EX2"] - read * found["elements"] <= 36


@pytest.mark.parametrize("name", MUTUAL)
def test_mutual(built, name):
    """No spills, wide loads, one exponential an element and a few a row, whatever the number of pairs."""
    found, (_, m, *_) = built[name], MUTUAL[name]
    assert found["LDL"] == found["STL"] == found["stack"] == 0
    read = m * found["columns"] if m <= 4 else found["elements"]  # a table is read by one load for all students
    assert found["LDG.E.128"] == read * BF16.itemsize // 16
    assert read <= found["MUFU.EX2"] <= found["elements"] + 24


@pytest.mark.parametrize("varied", ["n_rows", "temperature"])
def test_batch_size_and_temperature_do_not_recompile(built, varied):
    assert built[varied] == 1


def test_no_entry_of_a_table_of_teachers_compiles_another_kernel(built):
    """So that nothing is left to compile while a CUDA graph is captured."""
    assert built["table entry"] == 1


@pytest.mark.parametrize(("name", "distance"), HINTS)
def test_hints_load_128_bits_and_do_not_spill(built, name, distance):
    """A tile of 16 elements a thread and side; the cosine has the loop of its second sweep besides, and that of its
    gradient.
    """
    found = built[f"hint {name} {distance}"]
    assert found["LDL"] + found["STL"] + found["stack"] == 0
    sweeps = {"forward": 2, "backward": 1, "fused": 3}[name] if distance == "cosine" else 1
    assert found["LDG.E.128"] == 2 * 2 * sweeps
    assert found["STG.E.128"] == (0 if name == "forward" else 2)
    assert found["registers"] <= 128


@pytest.mark.parametrize("name", ["forward", "fused"])
def test_the_number_of_samples_does_not_recompile_hints(built, name):
    assert built[f"{name} samples"] == 1


@pytest.mark.parametrize(("name", "batch", "arch"), RELATIONS)
def test_relations_stay_in_registers(built, name, batch, arch):
    found = built[f"{name} {batch} sm_{arch}"]
    assert found["stack"] == found["LDL"] == found["STL"] == 0
    assert found["registers"] <= RELATION_REGISTERS[name]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_angles_load_their_columns_128_bits_at_a_time(built, arch):
    """Of a small batch a thread has two pairs."""
    assert built[f"angle 1024 sm_{arch}"]["LDG.E.128"] > 0


@pytest.mark.parametrize(("name", "arch"), MIXTURES_COMPILED)
def test_mixtures_spill_nothing_and_load_128_bits(built, name, arch):
    found, kernel = built[f"{name} sm_{arch}"], MIXTURES[name]
    assert found["LDL"] + found["STL"] + found["stack"] == 0
    assert found["registers"] <= kernel.most_registers
    assert found["LDG.E.128"] > 0
    if kernel.launch != "backward" or kernel.n_teachers <= 4:  # the addresses in a table are of unknown alignment
        assert found["STG.E.128"] > 0


@pytest.mark.parametrize(("name", "last", "positions"), ATTENTION)
def test_attention_loads_128_bits_and_does_not_spill(built, name, last, positions):
    """A tile of 16 elements a thread."""
    found = built[f"{name} {last}"]
    assert found["LDL"] + found["STL"] + found["stack"] == 0
    assert found["LDG.E.128"] >= 2
    assert (found["STG.E.128"] >= 2) == (name == "attention_gradient")
    assert found["registers"] <= 128


def test_attention_maps_do_not_spill(built):
    found = built["attention_distance"]
    assert found["LDL"] + found["STL"] + found["stack"] == 0


@pytest.mark.parametrize("name", ["attention_energy", "attention_distance", "attention_gradient"])
def test_the_number_of_samples_does_not_recompile_attention(built, name):
    assert built[f"{name} samples"] == 1
