"""Submitting runs from a test's own process, to the SLURM of the fixture ``stub``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dinov2_fsdp.errors import UserError
from launchers import slurm
from launchers.cluster.training import launch

CPU = ("parallel.device=cpu", "train.batch=8", "train.microbatch=2", "data.workers=1", "data.train=scenes:n=24,size=32")
Stub = Callable[..., Path]


def start(*arguments: str) -> int:
    return launch(slurm.parse([*arguments]))


def refusal(*arguments: str) -> str:
    """The message with which a command is refused: at most four lines."""
    with pytest.raises(UserError) as caught:
        start(*arguments)
    assert len(str(caught.value).splitlines()) <= 4
    return str(caught.value)
