"""What a family of peers says of itself."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from ..case import Case, Exact, Inputs, Loss

Make = Callable[[Case], Loss]  # imports what it needs


class Entry(NamedTuple):
    """One function of a peer."""

    objective: str  # of the op kd that it computes
    make: Make
    value: bool = True  # False: its value lacks what has no gradient
    exact: Callable[[Inputs], Exact] | None = None  # of one that computes something else, for scale
    note: str = ""
    most_classes: int | None = None


class Peer(NamedTuple):
    module: str  # whose absence means that it is not installed
    entries: dict[str, Entry]
    package: str
    imports: str | None = None  # what must import besides, None: nothing that costs seconds
    gpu_only: str = ""  # why not on a CPU

    def entries_on(self, case: Case) -> dict[str, Entry]:
        """The functions of this peer that compute what the case is."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if case.op == "kd"
            and case.objective == entry.objective
            and (entry.most_classes is None or case.classes <= entry.most_classes)
        }

    def why_not(self, device: str) -> str | None:
        """Why nothing of this peer runs here, None where it does."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if self.gpu_only and device != "cuda":
            return self.gpu_only
        try:
            importlib.import_module(self.imports or self.module)
        except Exception as error:  # whatever another package's import may raise
            said = str(error).strip().splitlines() or ["no reason given"]
            return f"{self.package} does not import here: {type(error).__name__}: {said[0].strip()}"
        return None
