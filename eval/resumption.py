"""A head in training as a file, so that an interrupted evaluation goes on from its last save."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov2_fsdp.parallel.world import World

_SECONDS_BETWEEN_SAVES = 30.0


def file_of(folder: Path, tag: str) -> Path:
    """Return the file in ``folder`` of what depends on ``tag``, so that nothing is gone on from that has another."""
    return folder / f"{hashlib.blake2b(tag.encode(), digest_size=6).hexdigest()}.safetensors"


class Resumption:
    """A head that all ranks hold alike, and its optimizer, in a file that rank 0 writes.

    Args:
        file: where; None: nothing is kept.
    """

    def __init__(self, file: Path | None, head: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.file, self.head, self.optimizer, self.world = file, head, optimizer, world
        self.saved = time.monotonic()

    def load(self) -> int:
        """Take up what is kept, where all ranks see it, and return the number of steps that it has seen; else 0."""
        found = load_file(self.file) if self.file is not None and self.file.is_file() else {}
        step = int(found.pop("step", torch.tensor(0)))
        if self.world.size > 1:
            least = torch.tensor([step, -step], device=self.world.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            step = step if int(least[0]) == -int(least[1]) else 0
        if step == 0:
            return 0
        self.head.load_state_dict(_below("head", found))
        for name, parameter in self.head.named_parameters():
            state = _below(f"optimizer.{name}", found)
            # AdamW counts its steps on the CPU.
            self.optimizer.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device) for key, tensor in state.items()
            }
        return step

    def save(self, step: int, now: bool = False) -> None:
        """Keep the state after ``step`` steps, at most every thirty seconds unless ``now``."""
        if self.file is None or self.world.rank != 0:
            return
        if not now and time.monotonic() - self.saved < _SECONDS_BETWEEN_SAVES:
            return
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for name, parameter in self.head.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}")
        save_file({"step": torch.tensor(step), **{name: t.contiguous() for name, t in tensors.items()}}, draft)
        draft.replace(self.file)
        self.saved = time.monotonic()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
