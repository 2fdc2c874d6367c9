"""Running sums of a run's metrics: filled every step without waiting for the device, read out at a flush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Value = Tensor | float


class Meters:
    """Sum and count per name since the last reset; sums of tensors are kept on ``device`` in fp32."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device: dict[str, Tensor] = {}
        self._on_host: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Value]) -> None:
        """Add one step's values: 0-d tensors or numbers. Never waits for the device.

        Raises:
            ValueError: a tensor has more than zero dimensions.
        """
        sums: list[Tensor] = []
        addends: list[Tensor] = []
        for name, value in values.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            if not isinstance(value, Tensor):
                self._on_host[name] = self._on_host.get(name, 0.0) + float(value)
                continue
            if value.dim() != 0:
                raise ValueError(f"metric '{name}' has shape {tuple(value.shape)}; record 0-d tensors or numbers")
            if name in self._on_device:
                sums.append(self._on_device[name])
                addends.append(value.detach())
            else:
                self._on_device[name] = value.detach().to(self.device, torch.float32, copy=True)
        if sums:
            torch._foreach_add_(sums, addends)  # one kernel for all names where there is one for each otherwise

    def names(self) -> list[str]:
        """Return the names recorded since the last reset, sorted so that ranks agree on their order."""
        return sorted(self._counts)

    def totals(self) -> Tensor:
        """Return sums of tensors, sums of numbers and counts, each in the order of ``names()``.

        fp64 on the meters' device, shape (3, names). The two kinds of sums stay apart so that ``load`` is exact.
        """
        names = self.names()
        totals = torch.zeros(3, len(names), dtype=torch.float64)
        totals[1] = torch.tensor([self._on_host.get(name, 0.0) for name in names], dtype=torch.float64)
        totals[2] = torch.tensor([self._counts[name] for name in names])
        totals = totals.to(self.device)
        if self._on_device:
            place = torch.tensor([names.index(name) for name in self._on_device]).to(self.device)
            totals[0, place] = torch.stack(list(self._on_device.values())).double()
        return totals

    def load(self, names: Sequence[str], totals: Tensor) -> None:
        """Replace the content by what ``names()`` and ``totals()`` gave."""
        self.reset()
        sums = totals[0].to(self.device, torch.float32)
        self._on_device = {name: sums[index].clone() for index, name in enumerate(names)}
        self._on_host = dict(zip(names, totals[1].tolist(), strict=True))
        self._counts = {name: int(count) for name, count in zip(names, totals[2].tolist(), strict=True)}

    def reset(self) -> None:
        """Forget everything."""
        self._on_device, self._on_host, self._counts = {}, {}, {}
