"""Where this process stands among the others: read from the environment here, and nowhere else. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2_fsdp.errors import UserError

LIFE = "DINOV2_FSDP_LIFE"
LAUNCHER = "DINOV2_FSDP_LAUNCHER"


@dataclass(frozen=True)
class Place:
    """Rank among all processes and among those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = 0
    """Port at which rank 0 meets the others."""
    life: int | None = None
    """Number of the run's life, where a scheduler's job counts them: an earlier one may not save any more."""
    attempt: int = 0
    """How often torchrun has started these processes before."""
    launcher: int | None = None
    """Process of this machine that started this one and answers for it."""

    def to_environment(self, address: str, port: int) -> dict[str, str]:
        """Return the variables that a child process needs to stand here."""
        life = {} if self.life is None else {LIFE: str(self.life)}
        launcher = {} if self.launcher is None else {LAUNCHER: str(self.launcher)}
        return {
            **life,
            **launcher,
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }


def started_by_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher (ours or torchrun) has already given this process a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place; alone when no launcher said otherwise."""
    if not started_by_launcher(environment):
        return Place()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Place(
        rank,
        size,
        int(environment.get("LOCAL_RANK", rank)),
        int(environment.get("LOCAL_WORLD_SIZE", size)),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        int(environment.get("MASTER_PORT", 0)),
        int(environment[LIFE]) if LIFE in environment else None,
        int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        int(environment[LAUNCHER]) if LAUNCHER in environment else None,
    )


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """Return how many NVIDIA GPUs a process started now may use, without loading a GPU library."""
    present = len([p for p in devices.glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return min(present, len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"]))


def available_cores() -> int:
    """Return how many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_devices(device: str, processes: int, gpus: int) -> str:
    """Return ``cuda`` or ``cpu``, whichever ``processes`` on this machine will use.

    Raises:
        UserError: ``device`` is cuda and there are fewer GPUs than processes.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return "cpu"
    if processes > gpus:
        way_out = f"--nproc {gpus}" if gpus else "parallel.device=cpu"
        raise UserError(f"{processes} processes need {processes} GPUs, but this machine shows {gpus}; use {way_out}")
    return "cuda"
