"""Whole runs of the tiny model, alone or on several ranks, and what they saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks
from tiny import tiny_config
from torch import Tensor

from dinov2_fsdp.checkpoint import find_checkpoint, list_checkpoints
from dinov2_fsdp.config import Config
from dinov2_fsdp.parallel.pulse import Pulse
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.signals import StopSignals
from dinov2_fsdp.train import run, train

CLOCK = ("seconds", "time", "img_per_s", "eta", "data_wait", "memory", "core_hours", "gpu_hours")
"""Keys of a line of metrics that two equal runs do not share, beside those of PHASES."""


def tiny_run(run_dir: Path, **overrides: Any) -> Config:
    """The tiny config as a run of four steps, on the CPU with one thread, that saves at its end."""
    settings: dict[str, Any] = {
        "output_dir": str(run_dir),
        "train__duration": "4it",
        "train__max_nonfinite": 1,
        "loss__teacher_temperature_warmup": "2it",
        "optim__warmup": "1it",
        "optim__freeze_prototypes": "1it",
        "parallel__device": "cpu",
        "parallel__threads": 1,
        "checkpoint__every": "0it",
        "checkpoint__keep": 10,
        "log__every": "2it",
        "log__tensorboard": False,
    }
    return tiny_config(**{**settings, **overrides})


def train_alone(config: Config) -> None:
    """Run a config to its end in this process."""
    train(config, console=False)


def train_on_ranks(config: Config, ranks: int) -> None:
    """Run a config to its end on several processes."""
    run_on_ranks(train_as_rank, ranks, config)


def train_as_rank(config: Config) -> None:
    """Run a config to its end as one of the processes of `run_on_ranks`."""
    world = this_world()
    with StopSignals() as signals, Pulse(world, config.parallel.timeout) as pulse:
        run(config, world, {}, False, signals, pulse)


def this_world() -> World:
    """The processes of `run_on_ranks`, seen from one of them."""
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def saved_tensors(run_dir: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a run's checkpoint, whole."""
    reader = dcp.HuggingFaceStorageReader(str(find_checkpoint(run_dir, step).path))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype)  # type: ignore[union-attr]
        for name, saved in metadata.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def saved_steps(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run_dir)]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what depends on the time of day or the speed of the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in CLOCK and not key.startswith(("time/", "pause/"))}
        for line in lines
        if "checkpoint/stall_s" not in line
    ]


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names whose tensors do not hold the same bits, or that one side lacks."""
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    )
