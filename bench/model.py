"""What the CUDA kernels that keep a row in shared memory should take on an H200, from what can be counted without one.

A multiprocessor moves bytes, issues instructions, evaluates exponentials and reads shared memory side by side; the one
that takes longest bounds the kernel from below. Latencies, the first and last microsecond of a row, and what two blocks
a multiprocessor cannot hide come on top: what a measurement has beyond the prediction is what wants explaining.

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
    sums = Pass({(0, 0): 92, (0, 1): 106, (1, 0): 97, (1, 1): 110}[case.half, case.computed], 8, came + 8 * (size + 4))
    share = Pass({(0, 0): 34, (0, 1): 42, (1, 0): 39, (1, 1): 48}[case.half, case.computed], 8, 8 * size)
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


def seconds(rows: int, classes: int, case: Case, device: Device = H200) -> float:
    return rows * classes * max(seconds_of_column(case, device).values())


def main() -> None:
    print("| logits | weights | K | memory | instructions | exponentials | shared memory | share of a copy at most |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for half in (True, False):
        for computed in (False, True):
            for teachers in (1, 2, 4, 8, 16):
                case = Case(teachers, half, computed)
                took = seconds_of_column(case)
                cells = " | ".join(f"{1e12 * x:.2f}" for x in took.values())
                share = took["memory"] / max(took.values())
                kind = f"{'bf16' if half else 'fp32'} | {'computed' if computed else 'given'}"
                print(f"| {kind} | {teachers} | {cells} | {share:.0%} |")


if __name__ == "__main__":
    main()
