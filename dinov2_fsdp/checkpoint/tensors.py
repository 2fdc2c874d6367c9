"""The tensors that a checkpoint holds: their names, and how they come back."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.optim.groups import clean_name


@torch.no_grad()
def load_tensors(path: Path, tensors: dict[str, Tensor], whole: str) -> None:
    """Fill ``tensors``, sharded or not, in place with those of the same names in a checkpoint folder.

    Args:
        whole: what must be loaded as a whole: every saved name that starts so has to be among ``tensors``.

    Raises:
        UserError: a tensor is missing there, has another shape, or is there and not asked for.
        RunFailed: the files could not be read.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    target = one_row(tensors)
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
        try:
            dcp.load(target, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # derives from BaseException, so nobody else would catch it
            rank, (cause, _) = sorted(error.failures.items())[0]
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise RunFailed(f"rank {rank} could not read the checkpoint {path}: {reason}") from error
    for name, tensor in target.items():
        if tensor.shape != tensors[name].shape:
            tensors[name].copy_(tensor[0])


def one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each number without dimension as a row of one: the file format slices along a dimension."""
    return {name: tensor.detach().reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def module_tensors(module: nn.Module, prefix: str, parameters: bool = True, buffers: bool = True) -> dict[str, Tensor]:
    """Return a network's parameters and buffers, which loading may fill, under ``prefix.NAME``."""
    named = [*(module.named_parameters() if parameters else ()), *(module.named_buffers() if buffers else ())]
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
