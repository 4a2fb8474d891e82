"""The command mtkd-fast: measure, profile, and draw the report of a measurement again.

    mtkd-fast bench                                     the whole grid of this machine, a results file and a report
    mtkd-fast bench --quick                             in under a minute
    mtkd-fast bench --rows 4096 --classes 32000 --teachers 3 --dtype bf16          your own shape
    mtkd-fast profile --rows 4096 --classes 1000        a trace of ours on a shape
    mtkd-fast report results/cpu.json                   tables, verdicts, plots and page of what was measured

Also as python -m mtkd_fast.bench.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import cores, grid, machine, ops, profiling, report, runner, verdicts
from .case import DTYPES

SIZES = ("rows", "classes", "width", "teachers", "students")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        return options.command(options)
    except ValueError as error:
        print(f"mtkd-fast: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mtkd-fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="bench | profile | report")
    bench = commands.add_parser("bench", help="measure, beside eager PyTorch, torch.compile, peers and floors")
    bench.set_defaults(command=run_bench)
    where = bench.add_argument_group("what is measured")
    where.add_argument("--grid", choices=grid.GRIDS, default="full", help="targets: the cells that the targets name")
    where.add_argument("--quick", action="store_true", help="the same as --grid quick")
    where.add_argument("--budget", type=float, metavar="SECONDS", help="start no cell after so many seconds")
    where.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="SECONDS",
        help=f"on a virtual machine: wait up to so long until a copy on all cores is {cores.APART} times as fast as on "
        "one, and time a cell once more if other work disturbed it much",
    )
    add_case(bench)

    profile = commands.add_parser("profile", help="one case under PyTorch's profiler")
    profile.set_defaults(command=run_profile)
    profile.add_argument("--who", default="ours", help="contenders, by commas: ours, eager, compile (default ours)")
    add_case(profile)

    again = commands.add_parser("report", help="tables, verdicts, plots and page from a results file")
    again.set_defaults(command=run_report)
    again.add_argument("results", type=Path, help="a .json that bench wrote; the report is written beside it")
    return top


def add_case(of: argparse.ArgumentParser) -> None:
    """A user's own shape; what is not given is the op's own."""
    case = of.add_argument_group("your own shape")
    case.add_argument("--op", choices=tuple(ops.OPS), help="default kd")
    case.add_argument("--objective", help="; ".join(f"{op}: {', '.join(c.OBJECTIVES)}" for op, c in ops.OPS.items()))
    for size in SIZES:
        case.add_argument(f"--{size}", type=int)
    case.add_argument("--dtype", choices=tuple(DTYPES))
    of.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    of.add_argument("--threads", type=int, help="of PyTorch, on the CPU")
    of.add_argument("--out", type=Path, default=Path("results"), help="folder of what is written (default results)")


def own_case(options: argparse.Namespace):
    """The case, None where none of its options was given."""
    chosen = {name: getattr(options, name) for name in ("op", "objective", "dtype", *SIZES)}
    if all(value is None for value in chosen.values()):
        return None
    return ops.make(**{name: value for name, value in chosen.items() if value is not None})


def run_bench(options: argparse.Namespace) -> int:
    device, case = options.device, own_case(options)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: torch finds no CUDA device, got cuda")
    name = "own" if case else "quick" if options.quick else options.grid
    cells = grid.own(case, device) if case else grid.cells(device, name)
    seconds = runner.QUICK_SECONDS if name == "quick" else runner.CELL_SECONDS[device]
    stem = machine.slug(device) + ("" if name == "full" else f"-{name}")
    found = runner.run(
        device,
        cells,
        runner.Effort(seconds, patience=options.patience),
        budget=options.budget,
        keep=lambda so_far: report.write_json(so_far, options.out, stem),
        what=name,
    )
    return conclude(found, options.out, stem)


def run_profile(options: argparse.Namespace) -> int:
    case = own_case(options) or ops.make()
    for name, path, table in profiling.trace(case, options.device, tuple(options.who.split(",")), options.out):
        print(f"{name} on {case.title}", table, f"wrote {path}", "", sep="\n")
    return 0


def run_report(options: argparse.Namespace) -> int:
    found = json.loads(options.results.read_text())
    found["verdicts"] = [verdict._asdict() for verdict in verdicts.of(found)]
    return conclude(found, options.results.parent, options.results.stem)


def conclude(found: dict, folder: Path, stem: str) -> int:
    """Prints and writes; 1 where something failed, which a missed target is not."""
    print(report.text(found))
    print("wrote", *report.write(found, folder, stem))
    failed = runner.failures_of(found)
    for failure in failed:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
