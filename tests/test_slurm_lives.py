"""What is written about the lives of a run on a cluster, and what follows from how they end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launchers.cluster.lives import FAILED, FINISHED, INTERRUPTED, MISTAKE, Cause, Life, Lives, decide, judge

KILLED = Cause("signal", "Killed", 3, "node2")
RAISED = Cause("exception", "rank 3 (node2, step 57, in backward) failed: ValueError: 0x7f21 is bad", 3)
NODE = Cause("node", "node node2 failed", node="node2")


def life(number: int, outcome: str, cause: Cause | None = None, step: int = 10) -> Life:
    return Life(number, "1", "/s", 0, ["node1"], 0.0, [1, 2], outcome, cause, step)


def begin(lives: Lives) -> Life:
    return lives.begin("1", "/s", 0, ["node1"], [1, 2])


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_no_two_starts_share_a_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: begin(Lives(tmp_path)).number, range(64)))
    assert sorted(numbers) == list(range(1, 65))


def test_numbers_go_on_from_lives_outside_of_jobs(tmp_path: Path) -> None:
    """Otherwise the checkpoints' guard would take the job for a left-over of the past."""
    assert begin(Lives(tmp_path)).number == 1
    (tmp_path / "life.json").write_text('{"life": 41}')
    assert begin(Lives(tmp_path)).number == 42


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    first = begin(lives)
    first.outcome, first.cause, first.step = FAILED, KILLED, 7
    lives.end(first)
    second = begin(lives)
    assert lives.all() == [first, second]
    assert lives.latest() == 2


def test_the_first_word_about_an_end_counts(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    one = begin(lives)
    one.outcome = INTERRUPTED
    lives.end(one)
    one.outcome = FAILED
    lives.end(one)
    assert lives.all()[0].outcome == INTERRUPTED


# -- how a life ended --------------------------------------------------------------------------------------------------

KILL_LOG = """srun: cluster configuration lacks support for cpu binding
srun: error: node2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=5416105.0
srun: error: node1: task 0: Terminated
srun: Force Terminated StepId=5416105.0
"""


@pytest.mark.parametrize(
    ("code", "outcome", "failures", "log", "expected"),
    [
        (0, FINISHED, [], "", (FINISHED, None)),
        (0, INTERRUPTED, [], "slurmstepd: error: *** JOB 1 CANCELLED AT 2026-11-23T06:44:27 DUE TO JOB REQUEUE ***",
         (INTERRUPTED, None)),
        # What a signal ended could say nothing; what the others say comes of it.
        (137, None, [RAISED], KILL_LOG, (FAILED, KILLED)),
        (137, INTERRUPTED, [], KILL_LOG, (FAILED, KILLED)),
        (1, None, [RAISED, Cause("exception", "later")], "srun: error: node2: task 3: Exited with exit code 1\n",
         (FAILED, RAISED)),
        (137, None, [Cause("mistake", "no such data", 0)], "srun: error: node1: task 0: Exited with exit code 2\n",
         (MISTAKE, Cause("mistake", "no such data", 0))),
        # SLURM takes its time to notice that a node is gone.
        (1, None, [], "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: Node failure on node2\n",
         (FAILED, NODE)),
        (140, None, [], "srun: error: node1: tasks 0-1: User defined signal 2\n",
         (INTERRUPTED, Cause("signal", "User defined signal 2", 0, "node1"))),
        (5, None, [], "srun: error: node1: task 1: Exited with exit code 5\n",
         (FAILED, Cause("exit", "Exited with exit code 5", 1, "node1"))),
        (1, None, [], "srun: error: Unable to create step for job 9: More processors requested than permitted\n",
         (FAILED, Cause("launch", "Unable to create step for job 9: More processors requested than permitted"))),
    ],
)  # fmt: skip
def test_the_first_cause_is_named(
    code: int, outcome: str | None, failures: list[Cause], log: str, expected: tuple[str, Cause | None]
) -> None:
    assert judge(code, outcome, failures, log) == expected


@pytest.mark.parametrize("reason", ["TIME LIMIT", "PREEMPTION", "JOB REQUEUE"])
def test_a_life_that_slurm_ended_before_it_had_saved_is_no_fault(reason: str) -> None:
    log = f"slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-23T06:44:27 DUE TO {reason} ***\n{KILL_LOG}"
    outcome, cause = judge(137, None, [], log)
    assert outcome == INTERRUPTED
    assert cause is not None
    assert reason.lower() in str(cause)


def test_a_cause_tells_rank_and_node() -> None:
    assert str(KILLED) == "rank 3 on node2: Killed"
    assert str(RAISED) == RAISED.what


# -- what follows ------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_up_to_the_limit() -> None:
    lives = [life(number, INTERRUPTED) for number in range(1, 4)]
    assert decide(lives, max_requeues=3, max_restarts=0).again
    assert "--max-requeues 2" in decide(lives, max_requeues=2, max_restarts=0).reason
    assert not decide(lives, max_requeues=2, max_restarts=9).again


def test_a_fault_restarts_the_run_up_to_the_limit() -> None:
    lives = [life(1, FAILED, KILLED, 5), life(2, INTERRUPTED, None, 9), life(3, FAILED, KILLED, 15)]
    assert decide(lives, 9, max_restarts=2).again
    assert "--max-restarts 1" in decide(lives, 9, max_restarts=1).reason


def test_the_same_failure_at_the_same_step_is_not_tried_again() -> None:
    other_numbers = Cause("exception", RAISED.what.replace("0x7f21", "0x8888"), 3)
    decision = decide([life(1, FAILED, RAISED), life(2, INTERRUPTED), life(3, FAILED, other_numbers)], 9, 9)
    assert not decision.again
    assert "failed the same way before, in life 1, at step 10" in decision.reason


@pytest.mark.parametrize(
    ("first", "second", "step"),
    [
        (RAISED, RAISED, 11),  # further than before
        (RAISED, Cause("exception", "OSError: stale file handle"), 10),
        (KILLED, Cause("signal", "Killed", 1, "node1"), 10),  # not the same rank
        # One slow node after the other is left out.
        (Cause("preflight", "node2 is slow: 9 ms", nodes=("node2",)),
         Cause("preflight", "node5 is slow: 7 ms", nodes=("node5",)), 10),
        (NODE, NODE, 10),  # says nothing about the run
    ],
)  # fmt: skip
def test_another_failure_is_tried_again(first: Cause, second: Cause, step: int) -> None:
    assert decide([life(1, FAILED, first), life(2, FAILED, second, step)], 9, 9).again


def test_neither_a_finished_run_nor_a_mistake_is_started_again() -> None:
    assert not decide([life(1, FINISHED)], 9, 9).again
    assert not decide([life(1, MISTAKE, RAISED)], 9, 9).again
