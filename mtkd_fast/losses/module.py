"""What the losses of all methods share: options that are checked when the module is made, and shown by ``print``."""

import torch
from torch import Tensor, nn

from mtkd_fast import checks


class DistillationLoss(nn.Module):
    """A loss with a temperature τ > 0, numbers and switches, each kept as an attribute."""

    def __init__(
        self,
        *,
        temperature: float,
        implementation: str | None,
        numbers: dict[str, float],
        switches: dict[str, bool] | None = None,
    ) -> None:
        super().__init__()
        switches = switches or {}
        checks.temperature(temperature)
        for name, value in numbers.items():
            checks.number(name, value)
        for name, value in switches.items():
            checks.flag(name, value)
        self._options = {"temperature": temperature} | numbers | switches
        for name, value in self._options.items():
            setattr(self, name, value)
        self.implementation = implementation

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._options)


def relation_points(logits: Tensor, counted: Tensor | None) -> Tensor:
    """Logits [N, C] as points for relations: a class that is -inf in every row that counts is left out, as a 0."""
    excluded = logits == -torch.inf
    if counted is not None:
        excluded = excluded | ~counted[:, None]
    return logits.masked_fill(excluded.all(0), 0)


def share_of_rows(target: Tensor, dtype: torch.dtype) -> Tensor:
    """[N], 1/n for the n rows whose label is not -100, else 0: so that hints count the rows that the logits do."""
    counted = (target != -100).reshape(-1)
    return counted.to(dtype) / counted.sum().clamp(min=1)
