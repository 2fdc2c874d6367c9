"""Many linear classifiers trained at once on the same frozen features, each rank training some of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_fsdp.rng import generator

MOMENTUM = 0.9
INITIAL_DEVIATION = 0.01


@dataclass(frozen=True)
class Head:
    """Which classifier: what it reads (a name of an input) and its base learning rate."""

    input: str
    rate: float


class LinearHeads:
    """Softmax classifiers for every pair of an input and a learning rate, by SGD with momentum and cosine decay.

    An input is a slice of the features' columns. Heads that read the same one are trained by one batched product;
    rank r owns those with the learning rates r, r + world_size, … and holds nothing of the others.

    Args:
        inputs: columns (first, end) by name.
        rates: learning rates at step 0, already scaled by the batch.
        steps: length of the cosine.
    """

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, int]],
        rates: Sequence[float],
        classes: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.inputs, self.rates, self.classes, self.steps = dict(inputs), list(rates), classes, steps
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.step = 0
        self.own = list(range(rank, len(rates), world_size))
        self._rates = torch.tensor([rates[number] for number in self.own], dtype=dtype, device=device).view(-1, 1, 1)
        self.weight: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}
        for group, (name, (first, end)) in enumerate(self.inputs.items()):
            shape = (end - first, classes)
            drawn = [
                torch.from_numpy(generator(seed, "linear head", group, number).standard_normal(shape)).to(dtype)
                for number in self.own
            ]
            weight = torch.stack(drawn) if drawn else torch.empty(0, *shape, dtype=dtype)
            self.weight[name] = (INITIAL_DEVIATION * weight).to(device)
            self.bias[name] = torch.zeros(len(self.own), 1, classes, dtype=dtype, device=device)
        self._momentum = {
            name: (torch.zeros_like(w), torch.zeros_like(self.bias[name])) for name, w in self.weight.items()
        }

    @property
    def heads(self) -> list[Head]:
        """All heads, of all ranks, in the order of :meth:`each`."""
        return [Head(name, rate) for name in self.inputs for rate in self.rates]

    @torch.no_grad()
    def train_step(self, rows: Tensor, labels: Tensor) -> None:
        """Take one step of SGD on the mean cross-entropy of ``rows`` (n, D), the same on all ranks.

        The rate at step t is rate · (1 + cos(π·t / steps)) / 2. Without rows only the schedule moves on.
        """
        decay = (1 + math.cos(math.pi * self.step / self.steps)) / 2
        self.step += 1
        if not self.own or not len(rows):
            return
        rows, labels = rows.to(self.device), labels.to(self.device)
        for name, (first, end) in self.inputs.items():
            weight, bias = self.weight[name], self.bias[name]
            inputs = rows[:, first:end].to(weight.dtype)
            logits = torch.matmul(inputs, weight) + bias
            # The gradient of the mean cross-entropy with respect to the logits: (softmax − one-hot) / n.
            gradient = logits.softmax(dim=2)
            gradient[:, torch.arange(len(labels), device=self.device), labels] -= 1
            gradient /= len(labels)
            gradients = torch.matmul(inputs.T, gradient), gradient.sum(dim=1, keepdim=True)
            for parameter, momentum, change in zip((weight, bias), self._momentum[name], gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(change)
                parameter.sub_(decay * self._rates * momentum)

    def each(self) -> Iterator[tuple[Head, Tensor, Tensor]]:
        """Yield every head with its weight (inputs, classes) and bias (classes); all ranks call this together."""
        for name, (first, end) in self.inputs.items():
            for number, rate in enumerate(self.rates):
                owner = number % self.world_size
                if owner == self.rank:
                    place = number // self.world_size
                    packed = torch.cat([self.weight[name][place], self.bias[name][place]])
                else:
                    dtype = self.weight[name].dtype
                    packed = torch.empty(end - first + 1, self.classes, dtype=dtype, device=self.device)
                if self.world_size > 1:
                    dist.broadcast(packed, owner)
                yield Head(name, rate), packed[:-1], packed[-1]

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's heads and the step, to be read by :meth:`load` with this tag on as many ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{self._file(tag)}"
        save_file({"step": torch.tensor([self.step]), **self._tensors()}, draft)
        draft.replace(folder / self._file(tag))

    def load(self, folder: Path, tag: str) -> bool:
        """Go on from what :meth:`save` wrote, if all ranks have it from one step; return whether it was so.

        Args:
            tag: what the heads depend on; those saved with another one are not found.
        """
        file = folder / self._file(tag)
        found = load_file(file) if file.is_file() else {}
        own = self._tensors()
        fits = bool(found) and all(name in found and found[name].shape == t.shape for name, t in own.items())
        step = int(found["step"]) if fits else -1
        if self.world_size > 1:
            least = torch.tensor([step, -step], device=self.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            step = step if int(least[0]) == -int(least[1]) else -1
        if step < 0:
            return False
        self.step = step
        for name, tensor in own.items():
            tensor.copy_(found[name])
        return True

    def _file(self, tag: str) -> str:
        digest = hashlib.blake2b(tag.encode(), digest_size=6).hexdigest()
        return f"heads_{digest}_{self.rank}_of_{self.world_size}.safetensors"

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weight.items():
            parts = (weight, self.bias[name], *self._momentum[name])
            kinds = ("weight", "bias", "weight_momentum", "bias_momentum")
            tensors |= {f"{name}.{kind}": part for kind, part in zip(kinds, parts, strict=True) if part.numel()}
        return tensors
