"""Faults of a cluster: named in bounded time, mended by a restart, and nothing of an earlier life touches the next.

One run loses a rank, a slurmd, a node and a network cable in turn; the tests read what it left behind.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from jobs import Job, config_of, lab, lines_of, resumed_steps, slurm, submit, wait_until
from training import differing, saved_steps, saved_tensors, train_alone

from dinov2_fsdp.config import load
from launchers.cluster.lives import FAILED, FINISHED, INTERRUPTED, Life

STEPS = 500
"""More than ranks that live on without their slurmd make at this pace before SLURM misses it."""
PACE = 0.3
EVERY = 5
"""Steps between two checkpoints: the most that a fault may cost, and one."""


@dataclass
class Story:
    job: Job
    undisturbed: Path
    lives: dict[str, Life] = field(default_factory=dict)
    """Those that a fault ended, by the fault."""
    seconds: dict[str, float] = field(default_factory=dict)
    """From the fault to the next life."""


def number_of(node: str) -> str:
    return "".join(character for character in node if character.isdigit())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    lab("init-pid", "1")
    folder = tmp_path_factory.mktemp("faults")
    config = config_of(
        folder, train__microbatch=4, train__duration=f"{STEPS}it", checkpoint__every=f"{EVERY}it", parallel__timeout=60
    )
    job = submit(config, folder / "job", "--nodes", "2", pace=PACE)
    told = Story(job, folder / "run")
    broken: list[str] = []

    def second_node() -> str:
        return number_of(job.lives[-1].nodes[1])

    def kill_rank() -> None:
        for process in job.processes(rank=1, life=len(job.lives)):
            os.kill(process, signal.SIGKILL)

    def on_node(action: str) -> Callable[[], None]:
        def act() -> None:
            broken.append(second_node())
            lab(action, broken[-1])

        return act

    try:
        train_alone(load(config))
        for name, act, mend in (
            ("a rank killed", kill_rank, ""),
            ("a slurmd killed", on_node("kill-slurmd"), "start-slurmd"),
            ("a node crashed", on_node("crash"), "boot"),
            ("a cable cut", on_node("cut"), "heal"),
        ):
            life = len(job.lives)
            job.wait_for_step((job.lives[-2].step if life > 1 else 0) + 2 * EVERY + 1, life=life)
            life, started = len(job.lives), time.monotonic()
            act()
            wait_until(lambda life=life: _next(job, life), f"a life after {name}; {job.log}")
            told.seconds[name], told.lives[name] = time.monotonic() - started, job.lives[life - 1]
            if mend:
                lab(mend, broken.pop())
        job.let_it_run()
        job.wait()
        yield told
    finally:
        job.cancel()
        for node in broken:
            lab("heal", node)


def _next(job: Job, life: int) -> bool:
    job.start_now()
    assert job.state not in ("FAILED", "CANCELLED"), job.log
    return len(job.lives) > life


FAULTS = ("a rank killed", "a slurmd killed", "a node crashed", "a cable cut")


def test_the_run_ends_with_the_weights_of_an_undisturbed_one(story: Story) -> None:
    # Where all ranks live on, as without a slurmd, they may still save before SLURM has taken their job away.
    assert {life.outcome for life in story.job.lives[:-1]} <= {FAILED, INTERRUPTED}
    # A node that comes back may get SLURM's word to end an earlier life a minute late, which then ends another one.
    assert 5 <= len(story.job.lives) <= 6, story.job.log
    assert story.job.lives[-1].outcome == FINISHED
    expected = saved_tensors(story.undisturbed, STEPS)
    assert expected
    assert differing(saved_tensors(story.job.run_dir, STEPS), expected) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_no_more_than_the_steps_since_the_last_save(story: Story, fault: str) -> None:
    stopped, resumed = resumed_steps(story.job)[story.lives[fault].number - 1]
    assert 0 <= stopped - resumed <= 2 * EVERY


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_over_in_bounded_time(story: Story, fault: str) -> None:
    print(f"{fault}: {story.seconds[fault]:.0f} s until the next life: {story.lives[fault].cause}")
    assert story.seconds[fault] < 180


def test_the_rank_that_died_is_named(story: Story) -> None:
    cause = story.lives["a rank killed"].cause
    assert cause is not None
    assert (cause.rank, cause.what) == (1, "Killed")
    assert f"failed first: rank 1; see {story.job.run_dir / 'logs' / 'rank_1.log'}" in story.job.log


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_the_node_that_was_lost_is_named(story: Story, fault: str) -> None:
    life = story.lives[fault]
    assert life.nodes[1] in str(life.cause)


def test_every_step_is_logged_once(story: Story) -> None:
    assert lines_of(story.job.run_dir) == list(range(1, STEPS + 1))


def test_an_orphan_that_still_steps_cannot_touch_the_checkpoints(tmp_path: Path) -> None:
    """A slurmd dies and its rank lives on, alone and able to step, while SLURM starts the run elsewhere."""
    lab("init-pid", "1")
    config = config_of(
        tmp_path, train__microbatch=4, train__duration="300it", checkpoint__every="1it", checkpoint__keep=1000
    )
    # Slow enough for the orphan to have steps left when the next life has loaded its libraries.
    job = submit(config, tmp_path / "job", pace=1.0)
    node = ""
    try:
        train_alone(load(config))
        job.wait_for_step(3)
        (orphan,) = job.processes(rank=0, life=1)
        node = number_of(job.lives[0].nodes[0])
        lab("kill-slurmd", node)

        def taken() -> bool:
            # Looked at before the record is: once life 2 stands there, the orphan's next save ends it.
            lives_on = alive(orphan)
            if _recorded_life(job.run_dir) == 2:
                return True
            assert lives_on, "the orphan was to live on"
            return _next(job, 2)

        wait_until(taken, "life 2 takes the run")
        wait_until(lambda: not alive(orphan), "the orphan gives up")
        refused_at = saved_steps(job.run_dir)[-1]
        job.wait_for_step(refused_at + 5, life=2)
    finally:
        job.cancel()
        if node:
            lab("start-slurmd", node)
    assert job.lives[1].nodes != job.lives[0].nodes
    output = (job.run_dir / "slurm" / "001" / f"{job.number}_0_log.err").read_text()
    assert "error: this is life 1 of the run" in output
    for step in saved_steps(job.run_dir)[-5:]:
        assert differing(saved_tensors(job.run_dir, step), saved_tensors(tmp_path / "run", step)) == []


def _recorded_life(run_dir: Path) -> int:
    return json.loads((run_dir / "life.json").read_text())["life"]


def alive(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_the_same_failure_at_the_same_step_is_not_tried_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__microbatch=4)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "logs").mkdir()
    (tmp_path / "job" / "checkpoints").write_text("a file where a folder must be")
    job = submit(config, tmp_path / "job")
    try:
        assert job.wait() == "FAILED"
    finally:
        job.cancel()
    assert [life.outcome for life in job.lives] == [FAILED, FAILED]
    assert "the run stops: it failed the same way before, in life 1, at step 4" in job.log


def test_a_mistake_that_only_the_job_can_see_is_not_tried_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__microbatch=4)
    job = submit(config, tmp_path / "job", "--remote-data", "--nodes", "2", "data.train=folder:/nowhere")
    try:
        assert job.wait() == "FAILED"
    finally:
        job.cancel()
    assert len(job.lives) == 1
    assert "mistake at step 0" in job.log
    assert "/nowhere" in job.log
    assert slurm("squeue", "--noheader", "-j", job.number) == ""
