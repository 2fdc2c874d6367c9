"""launchers/local.py as a user meets it: one process, several, torchrun, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training import metrics, saved_steps, saved_tensors, tiny_run, train_alone

from dinov2_fsdp.config import load, to_yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = str(ROOT / "launchers" / "local.py")
TIMEOUT = 240.0
"""Bounds a command; several minutes, because tests share the machine."""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def command(run_dir: Path, *arguments: str, **overrides: Any) -> list[str]:
    """Return the launcher's command for the tiny config, whose file lies beside the run directory."""
    config = run_dir.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    settings = {"data__cache": str(run_dir.parent / "cache"), "train__duration": "2it", **overrides}
    config.write_text(to_yaml(tiny_run(run_dir, **settings)))
    return [LAUNCHER, "--config", str(config), *arguments]


def launch(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *before, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher takes its processes with it
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def refusal(*arguments: str) -> str:
    """The message with which a command is refused: at most five lines, no traceback, exit code 2."""
    result = launch(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 5
    return result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, made in this process; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    command(run_dir)
    train_alone(load(run_dir.with_suffix(".yaml")))
    return run_dir


# ---------------------------------------------------------------------------------------------------------------------
# Before anything starts.


def test_a_wrong_option_is_answered_with_the_nearest_and_not_with_all() -> None:
    assert "unrecognized arguments: --confg; did you mean '--config'?" in refusal(LAUNCHER, "--confg", "x.yaml")


def test_a_directory_with_another_run_is_refused_with_the_ways_out(finished: Path) -> None:
    arguments = ["--config", str(finished.with_suffix(".yaml")), "seed=7", "optim.lr=0.5"]
    message = refusal(LAUNCHER, *arguments)
    assert f"{finished} holds another run" in message
    assert "seed (0 there)" in message
    assert "optim.lr (0.004 there)" in message
    for way_out in ("--config", "--overwrite", "--output-dir"):
        assert way_out in message
    assert saved_steps(finished) == [2]


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    arguments = command(tmp_path / "run")
    message = refusal(*arguments, "--output-dir", str(tmp_path / "thesis"))
    assert f"{tmp_path / 'thesis'} is not empty and holds no run; choose another output_dir" in message


def test_overwrite_deletes_nothing_but_a_run(tmp_path: Path) -> None:
    """Many projects have a config.yaml."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("seed: 3\n")
    (tmp_path / "project" / "thesis.txt").write_text("years of work")
    refusal(*command(tmp_path / "run"), "--overwrite", "--output-dir", str(tmp_path / "project"))
    assert (tmp_path / "project" / "thesis.txt").exists()


def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(*command(tmp_path / "run"), "--output-dir", str(tmp_path / "file" / "run"))
    assert f"output_dir={tmp_path / 'file' / 'run'} cannot be written: Not a directory" in message


@pytest.mark.parametrize("spec", ["folder:/nowhere/at/all", "tar:/nowhere/*.tar", "imgnet:/data", "/nowhere"])
def test_data_that_is_not_there_is_refused(tmp_path: Path, spec: str) -> None:
    assert spec.split(":")[-1] in refusal(*command(tmp_path / "run"), f"data.train={spec}")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path: Path) -> None:
    message = refusal(*command(tmp_path / "run"), "train.batch=64")
    assert "train.batch=64 is larger than the data set: scenes:n=24,size=32 holds 24 images" in message
    assert "use train.batch=24 or less" in message
    message = refusal(*command(tmp_path / "run"), "train.batch=64", "train.microbatch=32")
    assert "use train.batch=24 train.microbatch=24" in message


def test_microbatches_that_the_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    assert "valid numbers of processes: 1, 2" in refusal(*command(tmp_path / "run"), "--nproc", "3")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"optim__warmup": "200it"}, "warm"),
        ({"parallel__attention": "xformers"}, "parallel.attention=xformers runs on CUDA only"),
        ({"eval__every": "1it", "eval__test": "scenes:n=10,size=32", "eval__tasks": ["kn"]}, "did you mean 'knn'?"),
        ({"parallel__replicate": 2}, "parallel.replicate=2 does not divide 1 processes"),
        ({"init__backbone": "/nowhere"}, "/nowhere is no run directory"),
        ({"eval__every": "1it", "eval__test": "folder:/nowhere"}, "eval.test: folder:/nowhere"),
    ],
    ids=lambda value: str(value),
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, overrides: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(*command(tmp_path / "run", "--dry-run", **overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_looks_at_the_run_directory_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "holds no run" in refusal(*command(tmp_path / "other"), "--dry-run")
    assert "cannot be written" in refusal(*command(tmp_path / "other" / "file"), "--dry-run")
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    shown = launch(*command(run), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    (run / "config.yaml").write_text("train: {duration: 7it}\n")
    assert "holds another run" in refusal(*command(run), "--dry-run")
    assert launch(*command(run), "--dry-run", "--overwrite").returncode == 0
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "logs"]


def test_a_backbone_that_is_not_there_leaves_no_run_directory(tmp_path: Path) -> None:
    assert "is no run directory" in refusal(*command(tmp_path / "run", init__backbone="/nowhere"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_run_is_to_start_from_is_not_overwritten(finished: Path) -> None:
    arguments = (LAUNCHER, "--config", str(finished.with_suffix(".yaml")), "--overwrite")
    for inside in (finished, finished / "checkpoints" / "step_00000002"):
        assert "which --overwrite would delete" in refusal(*arguments, f"init.backbone={inside}")
    assert "is no run directory" in refusal(*arguments, "init.backbone=/nowhere")
    assert saved_steps(finished) == [2]


def test_no_process_is_refused(tmp_path: Path) -> None:
    assert "--nproc 0 is impossible" in refusal(*command(tmp_path / "run"), "--nproc", "0")


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    message = refusal(*command(tmp_path / "run"), "--nproc", "2", "parallel.device=cuda", "train.batch=512")
    assert "2 processes need 2 GPUs" in message or "larger than the data set" in message


def test_evaluations_need_labels_only_where_there_are_evaluations(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 8)
    arguments = command(tmp_path / "run")
    test_set = f"eval.test=folder:{tmp_path / 'images'}"
    assert "has no labels" in refusal(*arguments, "--dry-run", test_set, "eval.every=1it")
    assert launch(*arguments, "--dry-run", test_set, "eval.every=0it").returncode == 0


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    result = launch(*command(tmp_path / "run"), "--nproc", "2", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "2 processes × 1 microbatches × 4" in result.stdout
    assert not (tmp_path / "run").exists()


def test_keys_lists_every_key() -> None:
    result = launch(LAUNCHER, "--keys")
    assert "train.microbatch=64\n" in result.stdout
    assert "optim.betas=(0.9, 0.999)\n" in result.stdout


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def test_a_corrupt_image_is_named_in_the_log_and_the_run_goes_on(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 11)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    command(tmp_path / "run", data__train=f"folder:{tmp_path / 'images'}", train__duration="3it")
    train_alone(load(tmp_path / "run.yaml"))
    assert "broken.png" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert metrics(tmp_path / "run")[-1]["bad_images"] == 1
    assert saved_steps(tmp_path / "run") == [3]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_finish_and_the_same_command_has_nothing_left_to_do(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "--nproc", "2")
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr
    assert "2 process(es) on cpu" in result.stdout
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    assert "run is complete: it holds step 2, its last; a new run needs another output_dir" in again.stdout
    assert "resuming" not in again.stdout
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_learns_what_the_launcher_learns(tmp_path: Path, finished: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = launch(*command(tmp_path / "run"), before=torchrun)
    assert result.returncode == 0, result.stderr
    found, expected = saved_tensors(tmp_path / "run"), saved_tensors(finished)
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_that_all_ranks_of_torchrun_find_is_shown_by_the_first(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    result = launch(*command(tmp_path / "run"), "traim.batch=3", before=torchrun)
    assert result.returncode == 1  # torchrun's own
    assert result.stderr.count("error: unknown key 'traim'; did you mean 'train'?") == 1
    assert "exitcode  : 2" in result.stderr


def test_one_rank_of_torchrun_checks_what_the_launcher_checks(tmp_path: Path, finished: Path) -> None:
    def as_rank(rank: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        places = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        return subprocess.run(
            [sys.executable, LAUNCHER, "--config", str(finished.with_suffix(".yaml")), *arguments],
            capture_output=True,
            text=True,
            env={**environment(), **places},
            timeout=TIMEOUT,
        )

    assert "holds another run" in as_rank(0, "seed=7").stderr
    assert "larger than the data set" in as_rank(0, "train.batch=64").stderr
    assert "delete" in as_rank(1, "--overwrite").stderr
    planned, silent = as_rank(0, "--dry-run"), as_rank(1, "--dry-run")
    assert "2 processes × 1 microbatches × 4" in planned.stdout
    assert (silent.returncode, silent.stdout) == (0, "")
    assert saved_steps(finished) == [2]


@pytest.mark.slow
@pytest.mark.distributed
def test_overwrite_starts_another_run_in_the_directory(tmp_path: Path) -> None:
    train_alone(load(Path(command(tmp_path / "run")[2])))
    before = saved_tensors(tmp_path / "run")
    (tmp_path / "run" / "exports").mkdir()
    result = launch(*command(tmp_path / "run", "--nproc", "2", "--overwrite"), "seed=7")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run" / "exports").exists()
    assert load(tmp_path / "run" / "config.yaml").seed == 7
    assert not saved_tensors(tmp_path / "run")["student.backbone.pos_embed"].equal(before["student.backbone.pos_embed"])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_that_cannot_be_written_is_named_in_one_message(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 16)
    arguments = command(tmp_path / "run", "--nproc", "2", data__train=f"folder:{tmp_path / 'images'}")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder must be")
    result = launch(*arguments)
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1
    assert "error: rank 0 could not write the checkpoint of step 2: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_dry_run_plans_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "--nproc", "2", "--gpu", "H200")
    assert "add --dry-run" in refusal(*arguments)
    result = launch(*arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "2 on cuda" in result.stdout
    assert "hours on H200" in result.stdout
    assert not (tmp_path / "run").exists()
