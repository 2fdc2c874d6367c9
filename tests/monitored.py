"""A monitor to test, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dinov2_fsdp.monitor.monitor import Monitor

CPU = torch.device("cpu")


def make(run_dir: Path, **changes: Any) -> Monitor:
    arguments: dict[str, Any] = {
        "rank": 0, "world_size": 1, "total_steps": 100, "batch": 8, "device": CPU, "tensorboard": False,
        "console": False,
    }  # fmt: skip
    return Monitor(run_dir, **arguments | changes)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
