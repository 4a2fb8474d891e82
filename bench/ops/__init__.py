"""The ops that are measured, one file each. Adding one here adds it to the grid, the tests and the command line."""

from dataclasses import fields

from ..case import DTYPES, Case
from .hint import Hint
from .kd import KD
from .mixture import Mixture
from .mutual import Mutual
from .relation import Relation

OPS: dict[str, type[Case]] = {case.op: case for case in (KD, Mixture, Mutual, Hint, Relation)}


def make(op: str = "kd", **chosen) -> Case:
    """The case of an op with these fields; those not given, or None, have the op's own values."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    case = OPS[op]
    chosen = {name: value for name, value in chosen.items() if value is not None}
    known = {field.name for field in fields(case)}
    for name, value in chosen.items():
        if name not in known:
            raise ValueError(f"{name} is no size of the op {op}, which has {', '.join(sorted(known))}; got {value!r}")
        if name not in ("objective", "dtype") and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if "dtype" in chosen:
        if chosen["dtype"] not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {chosen['dtype']!r}")
        chosen["dtype"] = DTYPES[chosen["dtype"]]
    if chosen.get("objective", case.OBJECTIVES[0]) not in case.OBJECTIVES:
        raise ValueError(
            f"objective of the op {op} must be one of {', '.join(case.OBJECTIVES)}, got {chosen['objective']!r}"
        )
    return case(**chosen)
