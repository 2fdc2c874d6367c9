"""The process world of a run: devices, process groups, threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from dinov2_fsdp.config import ParallelConfig
from dinov2_fsdp.memory import keep_freed_memory
from dinov2_fsdp.parallel.place import Place, available_cores, check_devices

_PRIMITIVES = 96
"""Some more than come again in the next step: fewer would be made anew in every step, more would keep more memory."""


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """What threads share short texts with other ranks through; None for a world of one."""
    served: dist.Store | None = None
    """The same store as rank 0 serves it, which lives as long as the world does."""

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_world(config: ParallelConfig, place: Place, deterministic: bool = False) -> World:
    """Join the other processes and return the world; a process alone becomes a world of one.

    CPU processes talk through gloo, GPU processes through nccl (and gloo for what lies on the CPU).

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
    kind = check_devices(config.device, place.local_world_size, torch.cuda.device_count())
    device = torch.device("cuda", place.local_rank) if kind == "cuda" else torch.device("cpu")
    torch.set_num_threads(config.threads or max(1, available_cores() // place.local_world_size))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over memory
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        keep_few_primitives()
    # A hung rank is named by `Pulse` after the configured time; the collectives' own limit comes after that.
    limit = timedelta(seconds=1.2 * config.timeout + 30)
    common: dist.Store
    if place.world_size == 1:
        common = dist.HashStore()
    else:
        common, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=limit))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
        store=dist.PrefixStore("groups", common),
        device_id=device if kind == "cuda" else None,
    )
    return World(place.rank, place.world_size, place.local_rank, device, _store(place), common)


def keep_few_primitives() -> None:
    """Let oneDNN and torch's layer over it remember their last few kernels alone; call it before either is used.

    They keep one for every shape that they ever met, up to a thousand, with some MiB of memory each; and hardly two
    steps hide as many patches. A run would grow by a hundred MiB a step, for kernels that it never needs again.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRIMITIVES))


def _store(place: Place) -> dist.Store | None:
    """Return a connection of its own to the ranks' store: one that a waiting collective does not block."""
    if place.world_size == 1:
        return None
    return dist.TCPStore(place.address, place.port, is_master=False, timeout=timedelta(seconds=60))


def cpu_group(world: World) -> dist.ProcessGroup | None:
    """Return a group of all ranks for what lies in host memory, apart from the step's; None for a world of one."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world.size > 1 else None


def end_world() -> None:
    """Leave the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
