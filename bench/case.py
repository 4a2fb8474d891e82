"""A case: one op at one shape and dtype. What the benchmark asks of an op stands here; bench/ops/ answers it.

Timing, the correctness gate, memory, tables and plots know this class and no op.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Loss = Callable[..., Tensor]  # called with the arguments of ``Inputs``; gives a scalar
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORACLE_ELEMENTS = 1 << 22  # of one tensor in float64 at a time: all of a large case and K times over would not fit


class Inputs(NamedTuple):
    """Arguments of a loss, each a tensor or a list of tensors, each tensor its own memory as K networks give them."""

    arguments: tuple
    learns: tuple[int, ...] = (0,)  # the arguments that get a gradient

    def fresh(self) -> tuple:
        """The arguments, with leaves that have no gradient yet, in the same memory."""
        return tuple(_leaf(x) if i in self.learns else x for i, x in enumerate(self.arguments))

    def leaves(self, arguments: tuple) -> list[Tensor]:
        return [leaf for i in self.learns for leaf in _listed(arguments[i])]

    @property
    def n_bytes(self) -> int:
        return sum(x.nbytes for argument in self.arguments if argument is not None for x in _listed(argument))


def _listed(argument: Tensor | list[Tensor]) -> list[Tensor]:
    return argument if isinstance(argument, list) else [argument]


def _leaf(argument: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(argument, list):
        return [x.detach().requires_grad_() for x in argument]
    return argument.detach().requires_grad_()


class Exact(NamedTuple):
    """What a loss must give, in float64: its value and one gradient a leaf."""

    loss: float
    gradients: list[Tensor]
    by_row: bool = True  # an error counts against the largest element of its row; else of the whole gradient


class Anchor(NamedTuple):
    """Another function of the same inputs, measured for scale: what it computes, and what that must give."""

    loss: Loss
    exact: Callable[[Inputs], Exact]
    what: str


class Case(ABC):
    """A frozen dataclass, whose fields are what a user would choose."""

    op: ClassVar[str]
    OBJECTIVES: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "gradients"  # in which peak memory is told

    objective: str
    rows: int
    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> str:
        """The sizes in words, without the dtype."""

    @property
    @abstractmethod
    def gradient_bytes(self) -> int:
        """Of all gradients that the loss must write: the unit in which peak memory is told."""

    @property
    @abstractmethod
    def number_bytes(self) -> int:
        """Of the O(N·K) numbers a pass may keep besides."""

    @abstractmethod
    def minimal_bytes(self, gradient: bool = True) -> int:
        """Every input read once, every gradient, if wanted, written once; numbers a row are not counted."""

    @abstractmethod
    def inputs(self, device: str, seed: int = 0) -> Inputs: ...

    @abstractmethod
    def oracle(self, inputs: Inputs) -> Exact: ...

    @abstractmethod
    def eager(self) -> dict[str, Loss]:
        """The loss as people write it in PyTorch: "eager", and further forms as "eager-<form>"."""

    @abstractmethod
    def fused(self, implementation: str) -> Loss: ...

    @abstractmethod
    def few(self) -> "Case":
        """The same on so few rows that it leaves no trace in memory: what a process runs before it is measured."""

    def settle(self) -> None:  # noqa: B027  (nothing, for most)
        """Makes a process allocate what it keeps for good, before memory is measured."""

    def anchors(self, device: str) -> dict[str, Anchor]:
        return {}

    def why_not(self, form: str, device: str) -> str | None:
        """Why an eager form does not run on this case, None where it does."""
        return None

    def strategy(self, implementation: str, device: str, gradient: bool) -> str:
        """Which way our kernels go about it, in words."""
        return "one pass"

    @property
    def title(self) -> str:
        return f"{self.op} {self.objective} {self}"

    def __str__(self) -> str:
        return f"{self.shape} {DTYPE_NAMES[self.dtype]}"

    def facts(self) -> dict:
        """The fields, as JSON holds them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"op": self.op, **found, "dtype": DTYPE_NAMES[self.dtype]}


def generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32, as autocast does for softmax and losses."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def blocks(rows: int, width: int) -> list[slice]:
    """Rows, which are independent, a block at a time."""
    step = max(1, ORACLE_ELEMENTS // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
