"""Several gloo processes on this machine, for the tests of what happens between ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 180.0
"""Seconds after which ranks that have met count as hung."""
STARTUP_TIMEOUT = 300.0
"""Seconds that ranks may take to meet: on a busy machine importing torch alone takes half a minute."""


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return what ``function(*args)`` returns on each of ``world_size`` ranks, in the order of ranks.

    ``function`` and ``args`` must be picklable; inside, ``torch.distributed`` is initialised (gloo), one thread each.

    Raises:
        AssertionError: a rank raised (with its traceback), died or hung.
    """
    # Fresh processes, as with spawn, but torch is imported once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, world_size, folder, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline, met = time.monotonic() + STARTUP_TIMEOUT, False
        try:
            # A rank that failed leaves the others waiting for it, so the first failure ends all.
            while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
                if not met and len(list(Path(folder).glob("met.*"))) == world_size:
                    deadline, met = time.monotonic() + TIMEOUT, True
                assert time.monotonic() < deadline, f"ranks hang: exit codes {[p.exitcode for p in processes]}"
                time.sleep(0.02)
            if any(p.exitcode for p in processes):
                time.sleep(0.5)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error.*"))]
        assert not errors, "\n".join(errors)
        assert not any(p.exitcode for p in processes), f"exit codes {[p.exitcode for p in processes]}"
        return [torch.load(Path(folder, f"result.{rank}"), weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT / 2)
        )
        Path(folder, f"met.{rank}").touch()
        torch.save(function(*args), Path(folder, f"result.{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error.{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
