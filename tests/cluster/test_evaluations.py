"""Evaluations as jobs, after a run and while it goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT, TIMEOUT, Job, config_of, submit
from training import saved_steps

EVAL = str(ROOT / "launchers" / "eval.py")
SETTINGS = {"eval__test": "scenes:n=24,size=32,split=test", "eval__size": 16, "eval__resize": 16, "eval__k": [1, 5]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A run with a checkpoint at every second step, watched from inside a job while it was trained."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = config_of(
        folder, train__microbatch=4, train__duration="6it", checkpoint__every="2it", eval__every="0it", **SETTINGS
    )
    job = submit(config, folder / "job", pace=2.0)
    try:
        job.wait_for_step(1)
        inside = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_PROCID": "3", "RANK": "3", "WORLD_SIZE": "7"}
        watching = evaluate(job.run_dir, "--tasks", "knn", "--watch", **inside)
        assert watching.returncode == 0, watching.stderr
        (folder / "watched.txt").write_text(watching.stdout)
        assert job.wait() == "COMPLETED", job.log
        yield job
    finally:
        job.cancel()


def evaluate(run: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EVAL, "--run", str(run), "--cpus-per-gpu", "1", "--time", "30", *arguments],
        capture_output=True, text=True, timeout=2 * TIMEOUT, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def metrics_of(run: Path, step: int) -> dict[str, float]:
    return json.loads((run / "eval" / f"step_{step:08d}" / "knn" / "results.json").read_text())["metrics"]


def leaderboard(run: Path) -> list[list[str]]:
    return [line.split(",")[1:3] for line in (run / "leaderboard.csv").read_text().splitlines()[1:]]


def test_each_new_checkpoint_is_evaluated_while_the_run_goes_on(trained: Job) -> None:
    watched = (trained.run_dir.parent / "watched.txt").read_text()
    assert saved_steps(trained.run_dir) == [2, 4, 6]
    for step in (2, 4, 6):
        assert f"knn at step {step}" in watched
        assert metrics_of(trained.run_dir, step)


def test_the_results_are_gathered_in_the_leaderboard(trained: Job) -> None:
    assert sorted(leaderboard(trained.run_dir)) == [["2", "knn"], ["4", "knn"], ["6", "knn"]]


def test_a_job_finds_what_this_machine_finds(trained: Job) -> None:
    in_a_job = metrics_of(trained.run_dir, 6)
    result = evaluate(trained.run_dir, "--tasks", "knn", "--local")
    assert result.returncode == 0, result.stderr
    assert "submitted" not in result.stdout
    assert metrics_of(trained.run_dir, 6) == in_a_job


def test_every_task_and_checkpoint_has_a_job_of_its_own(trained: Job) -> None:
    result = evaluate(trained.run_dir, "--tasks", "knn", "--step", "2,6", "--follow")
    assert result.returncode == 0, result.stderr
    assert "2 evaluation(s)" in result.stdout
    assert re.findall(r"  \d+_(\d): knn at step (\d)", result.stdout) == [("0", "2"), ("1", "6")]


def test_an_evaluation_that_fails_is_named(trained: Job) -> None:
    result = evaluate(trained.run_dir, "--tasks", "knn", "--follow", "eval.test=folder:/nowhere/at/all")
    assert result.returncode == 1
    assert "knn at step 6 failed: see job" in result.stderr
