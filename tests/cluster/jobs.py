"""Jobs of tiny runs on the cluster that is reachable, and what a test may do to them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training import tiny_run

from dinov2_fsdp.config import to_yaml
from launchers.cluster.lives import Life, Lives
from launchers.cluster.progress import last_step

ROOT = Path(__file__).resolve().parents[2]
PACE_FOLDER = Path(__file__).with_name("pace")
TIMEOUT = 420.0
"""Bounds every wait; minutes, because all nodes of a lab may share two cores."""


def lab(*arguments: str) -> str:
    """Do something to a node of the lab (``crash 3``), or skip the test on a cluster that is none."""
    script = Path(os.environ.get("SLURMLAB_SCRIPTS", ROOT.parent / "shared" / "slurmlab")) / "node.sh"
    if not script.is_file() or "SLURMLAB" not in os.environ:
        pytest.skip("breaking nodes needs the lab (start.sh, then its env.sh)")
    environment = {**os.environ, "BASE": os.environ["SLURMLAB"]}
    result = subprocess.run([str(script), *arguments], env=environment, capture_output=True, text=True, timeout=60)
    return result.stdout.strip()


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT, every: float = 0.2) -> Any:
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(every)
    return value


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@dataclass
class Job:
    """A submitted run."""

    number: str
    run_dir: Path
    pending_since: float | None = None

    def let_it_run(self) -> None:
        """End the pace that ``submit`` set."""
        _end_of_pace(self.run_dir).touch()

    @property
    def lives(self) -> list[Life]:
        return Lives(self.run_dir).all()

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run_dir.glob("slurm/*/*_batch.log")))

    @property
    def state(self) -> str:
        listing = slurm("squeue", "--noheader", "--states=all", "-o", "%T", "-j", self.number)
        return (listing.split() or ["FORGOTTEN"])[0]

    def start_now(self) -> None:
        """Spare a requeued job most of the two minutes that SLURM makes it wait.

        Not all: nodes refuse a job that starts within the second in which they gave up its last life.
        """
        listing = slurm("squeue", "--noheader", "-o", "%T %r", "-j", self.number)
        if not listing.startswith("PENDING BeginTime"):
            self.pending_since = None
        elif self.pending_since is None:
            self.pending_since = time.monotonic()
        elif time.monotonic() - self.pending_since > 4:
            slurm("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait_for_step(self, step: int, life: int = 1) -> None:
        """Wait until the run has done ``step`` steps in a life that has at least this number."""

        def there() -> bool:
            self.start_now()
            lives = self.lives
            assert not lives or lives[-1].next != "nothing", self.log
            assert self.state not in ("FAILED", "CANCELLED"), self.log
            return bool(lives) and lives[-1].number >= life and last_step(self.run_dir) >= step

        wait_until(there, f"step {step} of life {life}; {self.log}")

    def wait_for_end_of(self, life: int) -> Life:
        """Wait until a life has ended and return it."""
        return wait_until(
            lambda: next((one for one in self.lives if one.number == life and one.outcome), None),
            f"end of life {life}; {self.log}",
        )

    def wait(self) -> str:
        """Wait until the job is over and return its state."""

        def over() -> str:
            self.start_now()
            state = self.state
            return state if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "FORGOTTEN") else ""

        return wait_until(over, f"end of job {self.number}; {self.log}", every=0.5)

    def processes(self, rank: int, life: int) -> list[int]:
        """Return a rank's process, not its children, as this machine sees it: the lab's nodes are all here."""
        wanted = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", f"DINOV2_FSDP_LIFE={life}"}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            # The batch script's srun bears the marks of rank 0 as well.
            if wanted <= set(variables) and b"submitit.core._submit" in command and not command.startswith(b"srun"):
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return [process for process, parent in found.items() if parent not in found]

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], timeout=60, check=False)


def config_of(folder: Path, **overrides: Any) -> Path:
    """Write the tiny run's config and return the file."""
    file = folder / "run.yaml"
    settings = {"data__cache": str(folder / "cache"), "log__every": "1it", "train__batch": 8, **overrides}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(tiny_run(folder / "run", **settings)))
    return file


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers" / "slurm.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def _end_of_pace(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name} at full pace")


def paced(seconds: float, run_dir: Path) -> list[str]:
    """Return the arguments that make each step of a run last so long, until ``Job.let_it_run``."""
    variables = {"PYTHONPATH": PACE_FOLDER, "PACE": seconds, "PACE_UNTIL": _end_of_pace(run_dir)}
    return [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]


def submit(config: Path | None, run_dir: Path, *arguments: str, pace: float = 0.0) -> Job:
    """Submit a run and return its job."""
    slow = paced(pace, run_dir) if pace else []
    named = ["--config", str(config)] if config else []
    result = launch(
        *named, "--output-dir", str(run_dir), "--cpus-per-gpu", "1", "--time", "60", *slow, *arguments
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    match = re.search(r"job (\d+) submitted", result.stdout)
    assert match, result.stdout
    return Job(match[1], run_dir)


def resumed_steps(job: Job) -> list[tuple[int, int]]:
    """Return (last step of a life, first step of the next) for each restart, from the batch log."""
    starts = [int(step) for step in re.findall(r"=== life .* from step (\d+)", job.log)]
    return [(life.step, start) for life, start in zip(job.lives, starts[1:], strict=False)]


def lines_of(run_dir: Path) -> list[int]:
    """Return the steps whose losses are in the metrics, in the order of the file."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]
