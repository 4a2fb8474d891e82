"""What the CUDA kernels of the op kd should take on an H200, from what can be counted without one.

A multiprocessor moves bytes, issues instructions, evaluates exponentials and reads shared memory side by side; the one
that takes longest bounds the kernel from below. Latencies, the first and last microsecond of a call, and what the rows
that share a multiprocessor cannot hide of one another come on top: what a measurement has beyond the prediction is what
wants explaining; so does the last turn of rows, in which multiprocessors idle. Of rows in registers only the bytes are
counted, and of every call its two launches.

    python -m mtkd_fast.bench.model
"""

from typing import NamedTuple


class Device(NamedTuple):
    multiprocessors: int
    hertz: float
    copied: float  # bytes a second that a copy reads and writes
    # Of a multiprocessor, each cycle:
    instructions: int = 128  # of one lane
    exponentials: int = 16
    shared_bytes: int = 128
    launch: float = 2e-6  # seconds, behind another


H200 = Device(multiprocessors=132, hertz=1.9e9, copied=4.3e12)


class Pass(NamedTuple):
    """Over a chunk of eight columns."""

    instructions: int
    exponentials: int
    shared_bytes: int  # read and written


class Case(NamedTuple):
    teachers: int
    half: bool  # bfloat16 or float16 logits; else float32
    computed: bool  # weights from confidence or entropy: two sums a column


# Forward KL with a hard label at τ = 4. tests/test_cuda_model.py holds them against the machine code, but for the
# gradient, and for the student's statistics at temperature 1 (SQUARES): those are read by eye.
SQUARES = 20


def of_student(case: Case) -> list[Pass]:
    """Its largest logit; its sums; less its maximum, as floats; the gradient."""
    size = 2 if case.half else 4
    largest = Pass(7 if case.half else 20, 0, 8 * size)
    sums = Pass((51 if case.half else 56) + SQUARES, 8, 8 * size)
    shift = Pass(32 if case.half else 34, 0, 8 * (size + 4))
    gradient = Pass(93 if case.computed else 77, 8, 8 * 4)
    return [largest, sums, shift, gradient]


def of_teacher(case: Case) -> list[Pass]:
    """Its largest logit; its sums, against the student's floats; its share of the gradient, of exponentials that are
    kept where there is one sum.
    """
    size = 2 if case.half else 4
    came = 8 * size  # written by the copy into place
    largest = Pass(7 if case.half else 20, 0, came + 8 * size)
    instructions = {(0, 0): 68, (0, 1): 84, (1, 0): 67, (1, 1): 83}[case.half, case.computed]
    sums = Pass(instructions, 8, 8 * (size + 4))
    share = Pass(42 if case.half else 44, 8, 8 * size) if case.computed else Pass(11, 0, 0)
    return [largest, sums, share]


class Layout(NamedTuple):
    """Where a row of shared memory lies (csrc/kd_selection.cuh)."""

    blocks: int
    threads: int  # of a block
    rounds: int  # chunks of 32 lanes, of all warps of a block


CHUNK, WARP = 8, 32
IN_REGISTERS = 256  # classes; longer rows lie in shared memory
OF_A_WARP = 1024
OF_TWO_BLOCKS = 8192  # the columns that a block has at most, for two to share a multiprocessor


def layout(classes: int) -> Layout:
    of_row = classes if classes % CHUNK == 0 else classes + CHUNK - 1  # columns: a row may begin anywhere in a chunk
    columns, most = (32, 384) if of_row <= OF_A_WARP else (64, 256)  # of a thread; threads of a multiprocessor
    chunks = -(-of_row // CHUNK)
    blocks = 1
    while -(-chunks // blocks) * CHUNK > OF_TWO_BLOCKS and blocks < 16:
        blocks *= 2
    chunks = -(-chunks // blocks)
    threads = -(-chunks * CHUNK // (columns * WARP)) * WARP
    threads = most // (most // threads) // WARP * WARP
    return Layout(blocks, threads, -(-chunks // WARP))


class Warp(NamedTuple):
    """Instructions of a warp beside the chunks, read by eye off the way that an ordinary row takes, to a fifth or so:
    where it is, how lanes wait and merge; and what only the first warp of a block does: ask for what comes next, for
    labels, and end the row.
    """

    every: int
    first: int
    of_warps: int = 80  # merged once more, where a block has several
    of_blocks: int = 60  # and where a row has several blocks


OF_A_ROW, OF_A_TEACHER = Warp(every=700, first=250), Warp(every=200, first=145)


def instructions_of_row(classes: int, case: Case) -> int:
    """Of all warps."""
    at = layout(classes)
    warps = at.threads // WARP
    chunk = sum(x.instructions for x in of_student(case) + case.teachers * of_teacher(case))

    def beside(of: Warp) -> int:
        merges = of.of_warps * (warps > 1) + of.of_blocks * (at.blocks > 1)
        return warps * (of.every + merges) + of.first

    return at.blocks * (at.rounds * chunk + beside(OF_A_ROW) + case.teachers * beside(OF_A_TEACHER))


def seconds_of_row(classes: int, case: Case, device: Device = H200) -> dict[str, float]:
    """What a row takes of each of the four, on the whole device."""
    passes = of_student(case) + case.teachers * of_teacher(case)
    chunks = classes / CHUNK
    cycles = device.multiprocessors * device.hertz
    return {
        "memory": (case.teachers + 2) * classes * (2 if case.half else 4) / device.copied,
        "instructions": WARP * instructions_of_row(classes, case) / (cycles * device.instructions),
        "exponentials": chunks * sum(x.exponentials for x in passes) / (cycles * device.exponentials),
        "shared memory": chunks * sum(x.shared_bytes for x in passes) / (cycles * device.shared_bytes),
    }


def seconds(rows: int, classes: int, case: Case, device: Device = H200) -> float:
    """Loss and gradient: a launch that does everything, and one that finds the upstream to be 1."""
    took = seconds_of_row(classes, case, device)
    bound = took["memory"] if classes <= IN_REGISTERS else max(took.values())
    return rows * bound + 2 * device.launch


def name_of(case: Case) -> str:
    return f"{'bf16' if case.half else 'fp32'} | {'computed' if case.computed else 'given'} | {case.teachers}"


CASES = [
    Case(teachers, half, computed)
    for half in (True, False)
    for computed in (False, True)
    for teachers in (1, 2, 4, 8, 16)
]
CLASSES = (100, 1000, 4096, 32000, 50257, 128256, 151936, 262144)
LONG, SHARES = 128256, (1000, 4096, 32000)
ELEMENTS = 2**26  # of the student


def share_of_copy(classes: int, case: Case) -> float:
    took = seconds_of_row(classes, case)
    return took["memory"] / max(took.values())


def main() -> None:
    print(f"Picoseconds a column on the whole device, of rows of {LONG} classes; what other rows can reach:\n")
    print(
        "| logits | weights | K | memory | instructions | exponentials | shared memory | share of a copy at most |",
        end="",
    )
    print(*(f" {classes} |" for classes in SHARES), sep="")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |", " --: |" * len(SHARES), sep="")
    for case in CASES:
        cells = " | ".join(f"{1e12 * x / LONG:.2f}" for x in seconds_of_row(LONG, case).values())
        shares = (f"{share_of_copy(classes, case):.0%}" for classes in (LONG, *SHARES))
        print(f"| {name_of(case)} | {cells} |", *(f"{x} |" for x in shares))
    print(f"\nMilliseconds of loss and gradient, {ELEMENTS} logits a tensor, by classes:\n")
    print("| logits | weights | K |", *(f"{classes} |" for classes in CLASSES))
    print("| --- | --- | --: |", *("--: |" for _ in CLASSES))
    for case in CASES:
        times = (1e3 * seconds(ELEMENTS // classes, classes, case) for classes in CLASSES)
        print(f"| {name_of(case)} |", *(f"{x:.3f} |" for x in times))


if __name__ == "__main__":
    main()
