"""Checkpoints: everything that a run is, saved by all ranks together and read back on any number of them.

A checkpoint is a folder ``checkpoints/step_00001000`` of safetensors files, written through torch's distributed
checkpointing, with ``state.json`` (numbers and text) beside them. It is written under another name and renamed when
whole, so that a folder under its final name is complete. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.optim.groups import clean_name
from dinov2_fsdp.parallel.world import World

logger = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return the numbers and text saved beside the tensors."""
        return json.loads((self.path / STATE_FILE).read_text())


def list_checkpoints(run_dir: Path) -> list[SavedCheckpoint]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append(SavedCheckpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(run_dir: Path, step: int | None = None) -> SavedCheckpoint:
    """Return a run's newest checkpoint, or the one of ``step``.

    Raises:
        UserError: there is none.
    """
    found = list_checkpoints(run_dir)
    chosen = [checkpoint for checkpoint in found if step is None or checkpoint.step == step]
    if not chosen:
        have = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{wanted} in {run_dir / 'checkpoints'}; steps there: {have}")
    return chosen[-1]


class Checkpointer:
    """Saves and restores named groups of tensors and a dictionary of plain numbers.

    Args:
        run_dir: the run directory.
        world: all ranks take part in every call.
        keep: newest checkpoints to leave on disk.
        keep_every: checkpoints at multiples of this many steps stay for ever; 0: none does.
    """

    def __init__(self, run_dir: Path, world: World, keep: int, keep_every: int) -> None:
        self.folder, self.world, self.keep, self.keep_every = run_dir / "checkpoints", world, keep, keep_every
        self.run_dir = run_dir

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint and return its folder. Older ones go only after it is complete."""
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"step_{step:08d}.partial"
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(_one_row(tensors), storage_writer=writer)
        if self.world.rank == 0:
            (partial / STATE_FILE).write_text(json.dumps({"format": FORMAT, "step": step, **state}))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            self._prune()
        self.world.barrier()
        return final

    def load(self, checkpoint: SavedCheckpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from a checkpoint saved on any number of ranks and return its numbers and text.

        Raises:
            UserError: the checkpoint holds other tensors, or tensors of another shape; all are listed.
        """
        state = checkpoint.state()
        if state.get("format") != FORMAT:
            found = state.get("format")
            raise UserError(f"{checkpoint.path} has checkpoint format {found}; this version reads {FORMAT}")
        load_tensors(checkpoint.path, tensors, whole="")
        return state

    def _prune(self) -> None:
        saved = list_checkpoints(self.run_dir)
        for old in saved[: -self.keep]:
            if not (self.keep_every and old.step % self.keep_every == 0):
                # Half deleted under its final name it would still count as complete.
                shutil.rmtree(old.path.rename(old.path.with_suffix(".partial")))


@torch.no_grad()
def load_tensors(path: Path, tensors: dict[str, Tensor], whole: str) -> None:
    """Fill ``tensors``, sharded or not, in place with those of the same names in a checkpoint folder.

    Args:
        whole: what must be loaded as a whole: every saved name that starts so has to be among ``tensors``.

    Raises:
        UserError: a tensor is missing there, has another shape, or is there and not asked for.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    target = _one_row(tensors)
    missing = sorted(target.keys() - saved.keys())
    shapes = [
        f"{name}: {tuple(saved[name].size)} saved, {tuple(tensor.shape)} needed"  # type: ignore[union-attr]
        for name, tensor in target.items()
        if name in saved and tuple(saved[name].size) != tuple(tensor.shape)  # type: ignore[union-attr]
    ]
    unexpected = sorted(name for name in saved.keys() - target.keys() if name.startswith(whole))
    if missing or shapes or unexpected:
        kinds = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
        listed = [f"{kind} ({len(names)}): {', '.join(names[:8])}" for kind, names in kinds.items() if names]
        raise UserError("\n".join([f"checkpoint {path} does not fit this model", *listed]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading alone is meant
        dcp.load(target, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, tensor in target.items():
        if tensor.shape != tensors[name].shape:
            tensors[name].copy_(tensor[0])


def _one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each number without dimension as a row of one: the file format slices along a dimension."""
    return {name: tensor.detach().reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a network's parameters and buffers, which loading may fill, under ``prefix.NAME``."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {f"{prefix}.{clean_name(name)}": tensor.detach() for name, tensor in named}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state, which loading may fill, under ``optimizer.PARAMETER.KIND``.

    State that does not exist before the first step is made here, as zeros. Learning rates and weight decays are not
    state: schedules set them at every step.
    """
    result = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state.update(_empty_state(optimizer, parameter))
            for kind, tensor in state.items():
                result[f"optimizer.{name}.{kind}"] = tensor
    return result


def _empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return {
            "step": torch.zeros((), dtype=torch.float32, device=local.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return {"momentum_buffer": torch.zeros_like(parameter)}
