"""What the losses of all methods share: options that are checked when the module is made, and shown by ``print``."""

from torch import nn

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
