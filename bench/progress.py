"""A progress bar where tqdm is installed, one line a step where it is not (a GPU machine without network)."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def bar(steps: Sequence[T], what: str) -> Iterator[T]:
    try:
        from tqdm import tqdm
    except ImportError:
        for i, step in enumerate(steps):
            print(f"{what} {i + 1}/{len(steps)}: {step}", file=sys.stderr, flush=True)
            yield step
        return
    with tqdm(steps, desc=what, file=sys.stderr, dynamic_ncols=True, leave=True) as shown:
        for step in shown:
            shown.set_postfix_str(str(step))
            yield step
        shown.set_postfix_str("done")
