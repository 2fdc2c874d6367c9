"""Tests against a real SLURM: whichever is reachable, skipped where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: submits jobs to a real SLURM; skipped where none is reachable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from launchers.cluster.controller import reachable

    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if not mine:
        return
    there = reachable()
    for item in mine:
        for mark in ("slow", "cluster"):
            item.add_marker(mark)
        if not there:
            item.add_marker(pytest.mark.skip(reason="no SLURM is reachable: sbatch is not on PATH, or nobody answers"))
