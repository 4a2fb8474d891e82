"""What the CUDA kernels of the op kd should take on an H200, from what can be counted without one.

A multiprocessor moves bytes, issues instructions, evaluates exponentials and reads shared memory side by side; the one
that takes longest bounds the kernel from below. Latencies, the first and last microsecond of a row, and what two blocks
a multiprocessor cannot hide come on top: what a measurement has beyond the prediction is what wants explaining. Of rows
in registers only the bytes are counted, and of every call its two launches.

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
    """Over eight columns."""

    instructions: int
    exponentials: int
    shared_bytes: int  # read and written


class Case(NamedTuple):
    teachers: int
    half: bool  # bfloat16 or float16 logits; else float32
    computed: bool  # weights from confidence or entropy: two sums a column


# Forward KL with a hard label at τ = 4. tests/test_cuda_model.py holds those of the teachers against the machine code;
# of the student's, DECODE is its conversion from halves and SQUARES its statistics at temperature 1.
DECODE, SQUARES = 8, 20


def of_student(case: Case) -> list[Pass]:
    """Its sums; less its maximum, as floats; the gradient."""
    size = 2 if case.half else 4
    sums = Pass(69 + SQUARES + DECODE * case.half, 8, 8 * size)
    shift = Pass(18 + DECODE * case.half, 0, 8 * (size + 4))
    gradient = Pass(97 if case.computed else 81, 8, 8 * 4)
    return [sums, shift, gradient]


def of_teacher(case: Case) -> list[Pass]:
    """Its sums, against the student's floats; its share of the gradient."""
    size = 2 if case.half else 4
    came = 8 * size  # written by the copy into place
    sums = Pass({(0, 0): 99, (0, 1): 114, (1, 0): 96, (1, 1): 111}[case.half, case.computed], 8, came + 8 * (size + 4))
    share = Pass({(0, 0): 41, (0, 1): 48, (1, 0): 38, (1, 1): 45}[case.half, case.computed], 8, 8 * size)
    return [sums, share]


def seconds_of_column(case: Case, device: Device = H200) -> dict[str, float]:
    """What one column of one row takes of each of the four, on the whole device."""
    passes = of_student(case) + case.teachers * of_teacher(case)
    cycles = 8 * device.multiprocessors * device.hertz

    def at_rate(name: str) -> float:
        return sum(getattr(x, name) for x in passes) / (cycles * getattr(device, name))

    units = case.teachers + 2
    return {
        "memory": units * (2 if case.half else 4) / device.copied,
        "instructions": at_rate("instructions"),
        "exponentials": at_rate("exponentials"),
        "shared memory": at_rate("shared_bytes"),
    }


IN_REGISTERS = 6144  # classes; longer rows lie in shared memory (csrc/kd_selection.cuh)


def seconds(rows: int, classes: int, case: Case, device: Device = H200) -> float:
    """Loss and gradient: a launch that does everything, and one that finds the upstream to be 1."""
    took = seconds_of_column(case, device)
    bound = took["memory"] if classes <= IN_REGISTERS else max(took.values())
    return rows * classes * bound + 2 * device.launch


def name_of(case: Case) -> str:
    return f"{'bf16' if case.half else 'fp32'} | {'computed' if case.computed else 'given'} | {case.teachers}"


CASES = [
    Case(teachers, half, computed)
    for half in (True, False)
    for computed in (False, True)
    for teachers in (1, 2, 4, 8, 16)
]
CLASSES = (100, 1000, 4096, 32000, 50257, 128256, 151936, 262144)
ELEMENTS = 2**26  # of the student


def main() -> None:
    print("Picoseconds of a column on the whole device, of rows in shared memory:\n")
    print("| logits | weights | K | memory | instructions | exponentials | shared memory | share of a copy at most |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for case in CASES:
        took = seconds_of_column(case)
        cells = " | ".join(f"{1e12 * x:.2f}" for x in took.values())
        print(f"| {name_of(case)} | {cells} | {took['memory'] / max(took.values()):.0%} |")
    print(f"\nMilliseconds of loss and gradient, {ELEMENTS} logits a tensor, by classes:\n")
    print("| logits | weights | K |", *(f"{classes} |" for classes in CLASSES))
    print("| --- | --- | --: |", *("--: |" for _ in CLASSES))
    for case in CASES:
        times = (1e3 * seconds(ELEMENTS // classes, classes, case) for classes in CLASSES)
        print(f"| {name_of(case)} |", *(f"{x:.3f} |" for x in times))


if __name__ == "__main__":
    main()
