"""A run that SLURM disturbs ends with the weights of one that nobody disturbs, and loses no step on the way.

One run goes through a requeue, a preemption and its time limit; the tests read what it left behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import Job, config_of, lines_of, resumed_steps, slurm, submit, wait_until
from training import differing, saved_tensors, train_alone

from dinov2_fsdp.config import load
from launchers.cluster.lives import FINISHED, INTERRUPTED

STEPS = 500
"""More than SLURM, which may look at its clock a minute late, lets pass at this pace."""
PACE = 0.3


@dataclass
class Story:
    job: Job
    undisturbed: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("interrupted")
    config = config_of(folder, train__microbatch=4, train__duration=f"{STEPS}it")
    job = submit(config, folder / "run of the job", "--nodes", "2", "--signal-seconds", "60", pace=PACE)
    try:
        train_alone(load(config))
        job.wait_for_step(5)
        slurm("scontrol", "requeue", job.number)
        job.wait_for_end_of(1)
        job.wait_for_step(job.lives[0].step + 5, life=2)
        preempt(job)
        job.wait_for_end_of(2)
        job.wait_for_step(job.lives[1].step + 5, life=3)
        # A minute is the shortest limit; the signal is due a minute before its end, so at SLURM's next look.
        slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
        job.wait_for_end_of(3)
        job.let_it_run()
        wait_until(lambda: job.state == "PENDING", "the job is pending")
        slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        job.wait()
        yield Story(job, folder / "run")
    finally:
        job.cancel()


def preempt(job: Job) -> None:
    """Take the job's nodes for a moment, for a job of a higher priority."""
    kinds = {line.split()[0].rstrip("*") for line in slurm("sinfo", "--noheader", "-o", "%P").splitlines()}
    if "high" not in kinds:
        pytest.skip("this cluster has no partition `high` that preempts")
    nodes = ",".join(job.lives[-1].nodes)
    number = slurm(
        "sbatch", "--parsable", "-p", "high", "--exclusive", "-w", nodes, "-o", "/dev/null", "--wrap", "true"
    )
    wait_until(lambda: not slurm("squeue", "--noheader", "-j", number.strip()), "the other job is over")


def test_the_run_ends_with_the_weights_of_an_undisturbed_one(story: Story) -> None:
    assert [life.outcome for life in story.job.lives] == [INTERRUPTED] * 3 + [FINISHED], story.job.log
    expected = saved_tensors(story.undisturbed, STEPS)
    assert expected
    assert differing(saved_tensors(story.job.run_dir, STEPS), expected) == []


@pytest.mark.parametrize(("life", "how"), [(1, "scontrol requeue"), (2, "preemption"), (3, "time limit")])
def test_no_step_is_lost(story: Story, life: int, how: str) -> None:
    stopped, resumed = resumed_steps(story.job)[life - 1]
    assert stopped == resumed, how
    assert stopped > 0


def test_every_step_is_logged_once(story: Story) -> None:
    assert lines_of(story.job.run_dir) == list(range(1, STEPS + 1))


def test_the_log_tells_each_life(story: Story) -> None:
    assert re.findall(r"^=== life (\d) ", story.job.log, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "interrupted after saving (requeue 3 of at most 100)" in story.job.log


def test_a_requeue_that_the_cluster_refuses_becomes_a_new_job(tmp_path: Path) -> None:
    """Some sites do not let users requeue; then the same script is submitted again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = requeue ] && { echo "Requested operation is presently disabled" >&2; exit 1; }\n'
        f'exec {slurm("which", "scontrol").strip()} "$@"\n'
    )
    (commands / "scontrol").chmod(0o755)
    config = config_of(tmp_path, train__microbatch=4, train__duration="100it")
    job = submit(config, tmp_path / "job", "--setup", f"export PATH={commands}:$PATH", pace=PACE)
    second = ""
    try:
        job.wait_for_step(3)
        slurm("scancel", "--signal=USR2", job.number)
        job.wait_for_end_of(1)
        job.let_it_run()
        (second,) = wait_until(lambda: re.findall(r"Submitted batch job (\d+)", job.log), "a second job")
        again = Job(second, job.run_dir)
        assert again.wait() == "COMPLETED", job.log
    finally:
        job.cancel()
        if second:
            Job(second, job.run_dir).cancel()
    assert [life.job for life in again.lives] == [job.number, second]
    assert [life.outcome for life in again.lives] == [INTERRUPTED, FINISHED]
    assert [stopped == resumed for stopped, resumed in resumed_steps(job)] == [True]


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__microbatch=4, train__duration="400it")
    job = submit(config, tmp_path / "job", pace=PACE)
    job.wait_for_step(3)
    job.cancel()
    assert job.wait() == "CANCELLED"
    assert len(job.lives) == 1
