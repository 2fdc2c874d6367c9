"""What goes wrong on real machines: each ends in bounded time, says which rank and why, and loses nothing saved."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import PATIENCE, LaunchedRun, kill, launch
from training import differing, metrics, saved_steps, saved_tensors, tiny_run, train_alone

from dinov2_fsdp.config import Config
from dinov2_fsdp.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 40


def run_of(run_dir: Path, **overrides: Any) -> Config:
    settings = {
        "train__duration": f"{STEPS}it", "log__every": "1it", "checkpoint__every": "10it", "optim__warmup": "5it",
        "model__drop_path": 0.3,
    }  # fmt: skip
    return tiny_run(run_dir, **{**settings, **overrides})


def endless(run_dir: Path, **overrides: Any) -> Config:
    return run_of(run_dir, **{"train__duration": "100000it", **overrides})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_alone(run_of(run_dir))
    return run_dir


def only_error(errors: str) -> str:
    """The one message that a failed run leaves on stderr."""
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, f"expected one message, got:\n{errors}"
    assert "Traceback" not in errors, errors
    return lines[0]


def assert_resumes_to_the_same_end(config: Config, undisturbed: Path) -> None:
    code, _, errors = launch(config)
    assert code == 0, errors
    run_dir = Path(config.output_dir)
    assert differing(saved_tensors(run_dir), saved_tensors(undisturbed)) == []
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGUSR1, 0), (signal.SIGUSR2, 1), (signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGTERM, None)],
    ids=lambda value: getattr(value, "name", f"rank {value}"),
)
def test_a_signal_to_any_rank_saves_the_step_and_asks_to_be_started_again(
    tmp_path: Path, undisturbed: Path, number: signal.Signals, rank: int | None
) -> None:
    config = run_of(tmp_path / "run", checkpoint__every="0it")
    with LaunchedRun(config) as run:
        run.wait_for_step(3)
        kill(run.process.pid if rank is None else run.rank_pids()[rank], number)
        code, output, errors = run.end("a signal")
    assert code == EXIT_INTERRUPTED, errors
    assert errors == ""
    stopped = saved_steps(tmp_path / "run")
    assert len(stopped) == 1
    assert 3 <= stopped[0] < STEPS
    assert f"stopped by {number.name}" in output
    assert f"after step {stopped[0]}, which is saved; the same command continues" in output
    assert_resumes_to_the_same_end(config, undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_a_killed_rank_is_named_and_nothing_saved_is_lost(tmp_path: Path, undisturbed: Path) -> None:
    config = run_of(tmp_path / "run")
    with LaunchedRun(config) as run:
        run.wait_for_step(15)
        start = time.monotonic()
        kill(run.rank_pids()[1], signal.SIGKILL)
        code, _, errors = run.end("SIGKILL to a rank")
        seconds = time.monotonic() - start
    assert code == EXIT_FAILED
    assert "rank 1 was ended by SIGKILL" in only_error(errors)
    assert seconds < 30
    assert saved_steps(tmp_path / "run")[-1] in (10, 20, 30)
    assert_resumes_to_the_same_end(config, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_within_the_time_limit(tmp_path: Path, rank: int) -> None:
    with LaunchedRun(endless(tmp_path / "run", parallel__timeout=30.0)) as run:
        run.wait_for_step(3)
        start = time.monotonic()
        kill(run.rank_pids()[rank], signal.SIGSTOP)
        code, _, errors = run.end("SIGSTOP to a rank, parallel.timeout=30")
        seconds = time.monotonic() - start
    assert code == EXIT_FAILED
    message = only_error(errors)
    assert f"rank {rank}" in message
    assert "does not answer" in message or "cannot be reached any more" in message
    assert seconds < 30 + 30


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_rank_that_hangs_is_named_with_its_step_and_phase(tmp_path: Path) -> None:
    """Rank 1 is alive and waits for a data worker that answers no more, as when its storage does not."""
    workers = []
    with LaunchedRun(endless(tmp_path / "run", parallel__timeout=15.0, data__workers=1)) as run:
        try:
            run.wait_for_step(3)
            workers = children(run.rank_pids()[1])
            assert len(workers) == 1
            kill(workers[0], signal.SIGSTOP)
            start = time.monotonic()
            run.process.wait(PATIENCE)
            seconds = time.monotonic() - start
        finally:
            for worker in workers:
                kill(worker, signal.SIGKILL)  # it holds the launcher's stdout open
        code, _, errors = run.end()
    assert code == EXIT_FAILED
    message = only_error(errors)
    assert re.search(r"rank 1 \(\S+, step \d+, in data\) hangs; nothing has moved for parallel.timeout=15 s", message)
    assert seconds < 15 + 30


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_is_the_message_and_ends_the_other(tmp_path: Path, rank: int) -> None:
    """A rank can open no file any more: any exception of one rank alone will do."""
    config = endless(tmp_path / "run", data__train=f"folder:{images(tmp_path / 'images', 64)}")
    with LaunchedRun(config) as run:
        run.wait_for_step(3)
        resource.prlimit(run.rank_pids()[rank], resource.RLIMIT_NOFILE, (3, 3))
        code, _, errors = run.end("no file can be opened any more on a rank")
    assert code == EXIT_FAILED
    assert f"rank {rank} " in only_error(errors)


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_named_and_the_last_checkpoint_is_whole(tmp_path: Path, rank: int) -> None:
    """Rank 0 writes metrics and logs too, which may not add messages of their own."""
    with LaunchedRun(endless(tmp_path / "run", checkpoint__every="5it")) as run:
        run.wait_for_step(7)
        resource.prlimit(run.rank_pids()[rank], resource.RLIMIT_FSIZE, (4096, 4096))
        code, _, errors = run.end("disk full on a rank")
    assert code == EXIT_FAILED
    message = only_error(errors)
    assert f"rank {rank} could not write the checkpoint of step" in message
    assert "File too large" in message
    kept = saved_steps(tmp_path / "run")
    assert kept
    assert all(step % 5 == 0 for step in kept)
    saved_tensors(tmp_path / "run")


def images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanishes_is_named(tmp_path: Path, workers: int) -> None:
    folder = images(tmp_path / "images", 64)
    with LaunchedRun(endless(tmp_path / "run", data__train=f"folder:{folder}", data__workers=workers)) as run:
        run.wait_for_step(3)
        shutil.rmtree(folder)
        code, _, errors = run.end("the images are deleted")
    assert code == EXIT_FAILED
    message = only_error(errors)
    assert "cannot be read" in message
    assert ".png" in message


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_too_many_non_finite_steps_end_the_run_with_a_report(tmp_path: Path) -> None:
    code, _, errors = launch(endless(tmp_path / "run", optim__lr=1e30, optim__clip=0.0, optim__warmup="1it"))
    assert code == EXIT_FAILED
    message = only_error(errors)
    # The host hears of a step's skip while the next one runs.
    assert "2 steps in a row had no finite gradient" in message or "3 steps in a row" in message
    reports = list((tmp_path / "run").glob("nonfinite_step_*.json"))
    assert len(reports) == 1
    assert str(reports[0]) in message
    ranks = json.loads(reports[0].read_text())["ranks"]
    assert len(ranks) == 2
    for steps in ranks:
        assert len(steps) >= 2
        assert steps[-1]["values"]["grad_norm/backbone"] in ("nan", "inf")
        assert {"loss", "loss/dino", "loss/ibot", "loss/koleo"} <= steps[-1]["values"].keys()
        assert len(steps[-1]["samples"]) == len(steps[-1]["names"]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def test_a_directory_in_use_is_refused_and_its_run_goes_on(tmp_path: Path) -> None:
    config = endless(tmp_path / "run")
    with LaunchedRun(config) as run:
        run.wait_for_step(2)
        code, _, errors = launch(config, 1)
        assert code == EXIT_USER_ERROR
        assert f"{tmp_path / 'run'} is in use: process {run.process.pid} on " in only_error(errors)
        run.wait_for_step(run.step() + 2)


def test_ranks_whose_launcher_was_killed_save_and_end(tmp_path: Path) -> None:
    with LaunchedRun(endless(tmp_path / "run", checkpoint__every="0it")) as run:
        run.wait_for_step(2)
        ranks = run.rank_pids()
        kill(run.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(saved_steps(tmp_path / "run")) == 1
