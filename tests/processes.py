"""Runs as a user starts them, through the launcher, and what can be done to their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dinov2_fsdp.config import Config, to_yaml

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0
"""Seconds that anything may take on a busy machine before a test gives up."""


class LaunchedRun:
    """``launchers/local.py`` at work on a config, with any number of ranks."""

    def __init__(self, config: Config, ranks: int = 2, **popen: Any) -> None:
        self.run_dir, self.ranks = Path(config.output_dir), ranks
        file = self.run_dir.parent / f"{self.run_dir.name}.yaml"
        file.write_text(to_yaml(config))
        command = [sys.executable, str(ROOT / "launchers" / "local.py"), "--config", str(file), "--nproc", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes, **popen)

    def __enter__(self) -> LaunchedRun:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in [*self.rank_pids(), self.process.pid]:
            kill(pid, signal.SIGKILL)
        self.process.communicate()

    def step(self) -> int:
        """The last step of which metrics were written."""
        path = self.run_dir / "metrics.jsonl"
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
        return steps[-1] if steps else 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.step() < step:
            assert self.process.poll() is None, f"ended early ({self.process.returncode}): {self.process.communicate()}"
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.05)

    def rank_pids(self) -> list[int]:
        """The processes of the ranks, in their order; the launcher itself if there is only one."""
        if self.ranks == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return sorted(int(pid) for pid in children.read_text().split())
        except FileNotFoundError:
            return []

    def end(self, after: str = "") -> tuple[int, str, str]:
        """Wait for the end; return exit code, stdout, stderr.

        The seconds that it took ``after`` some event are appended to the file that FAULT_TIMES names, if it does.
        """
        start = time.monotonic()
        output, errors = self.process.communicate(timeout=PATIENCE)
        if after and (times := os.environ.get("FAULT_TIMES")):
            with open(times, "a") as file:
                file.write(f"{after}\t{time.monotonic() - start:.1f}\t{errors.strip()}\n")
        return self.process.returncode, output, errors


def launch(config: Config, ranks: int = 2) -> tuple[int, str, str]:
    """Run to the end; return exit code, stdout, stderr."""
    with LaunchedRun(config, ranks) as run:
        return run.end()


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
