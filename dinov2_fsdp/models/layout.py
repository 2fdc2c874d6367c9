"""How sequences of several lengths lie one after the other in one packed tensor of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Groups of equally long sequences, in the order in which their tokens are concatenated.

    ``groups`` holds (sequences, tokens per sequence) for each crop size. The packed tensor has shape
    ``(total_tokens, dim)``: group after group, sequence after sequence, token after token.
    """

    groups: tuple[tuple[int, int], ...]

    @property
    def total_tokens(self) -> int:
        return sum(sequences * length for sequences, length in self.groups)

    @property
    def lengths(self) -> list[int]:
        """Length of every sequence, in order."""
        return [length for sequences, length in self.groups for _ in range(sequences)]

    def spans(self) -> list[tuple[int, int, int, int]]:
        """Return (first row, end row, sequences, length) of every group."""
        result, start = [], 0
        for sequences, length in self.groups:
            result.append((start, start + sequences * length, sequences, length))
            start += sequences * length
        return result

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Return one view ``(sequences, length, …)`` per group of a packed tensor ``(total_tokens, …)``."""
        return [tokens[start:end].unflatten(0, (sequences, length)) for start, end, sequences, length in self.spans()]

    def first_rows(self, device: torch.device) -> Tensor:
        """Return the row of each sequence's first token (the class token): ``(sequences,)`` int64."""
        return torch.cat([torch.arange(start, end, length, device=device) for start, end, _, length in self.spans()])
