"""Where ops are declared."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("mtkd_fast", "DEF")
FUSED: list[str] = []  # names of the ops with autograd
PASSES: list[str] = []  # and of those without


def declare(schema: str) -> None:
    """An op with autograd, made of passes."""
    LIBRARY.define(schema)
    FUSED.append(name_of(schema))


def declare_pass(schema: str, fake: Callable) -> None:
    """A pass over memory and its Triton twin: kd_forward(...) and kd_triton_forward(...)."""
    for twin in (schema, triton_name(schema)):
        LIBRARY.define(twin)
        torch.library.register_fake(f"mtkd_fast::{name_of(twin)}", fake, lib=LIBRARY)
        PASSES.append(name_of(twin))


def name_of(schema: str) -> str:
    return schema.partition("(")[0]


def triton_name(schema: str) -> str:
    op, rest = schema.split("_", 1)
    return f"{op}_triton_{rest}"


def implement(passes: dict[str, Callable]) -> None:
    """Kernels by the name of their op, for the CPU (in an interpreter) and for CUDA."""
    for name, kernel in passes.items():
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, key)
