"""launchers/eval.py between a run, its leaderboard and a cluster; the tasks themselves are tested elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from dinov2_fsdp.config import to_yaml
from dinov2_fsdp.errors import UserError
from launchers import eval as launcher
from launchers.cluster import evaluations
from launchers.cluster.evaluations import Work, gather, is_over, new_steps
from launchers.cluster.options import JobOptions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 2 and 4, as far as names go."""
    folder = tmp_path / "run"
    for step in (2, 4):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000006.life1.partial").mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny_config(parallel__device="cpu")))
    return folder


def finish(run: Path, step: int, eta: float = 0.0) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": step, "images": 8 * step, "eta": eta}) + "\n")


def write_results(run: Path, step: int, task: str, **more: Any) -> None:
    folder = run / "eval" / f"step_{step:08d}" / task
    folder.mkdir(parents=True)
    content = {"step": step, "task": task, "backbone": "teacher", "metric": "top", "value": 12.3456,
               "data": {"train": "a", "test": "b"}, **more}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    return launcher.main()


def test_gathering_completes_the_leaderboard_and_doubles_nothing(run: Path) -> None:
    write_results(run, 2, "knn")
    write_results(run, 4, "linear", value=0.5)
    assert [(line["step"], line["task"], line["value"]) for line in gather(run)] == [
        ("2", "knn", "12.346"),
        ("4", "linear", "0.5"),
    ]
    assert len(gather(run)) == 2


def test_results_that_are_being_written_are_left_for_later(run: Path) -> None:
    (run / "eval" / "step_00000002" / "knn").mkdir(parents=True)
    (run / "eval" / "step_00000002" / "knn" / "results.json").write_text('{"step": 2, "ta')
    write_results(run, 4, "pictures", value=None)
    assert gather(run) == []


def test_only_whole_checkpoints_are_new(run: Path) -> None:
    assert new_steps(run, set()) == [2, 4]
    assert new_steps(run, {2}) == [4]


def test_a_run_is_over_when_its_last_step_is_saved(run: Path) -> None:
    assert not is_over(run)
    finish(run, 4, eta=3.0)
    assert not is_over(run)
    finish(run, 6)
    assert not is_over(run)
    finish(run, 4)
    assert is_over(run)


def test_watching_evaluates_each_checkpoint_once_until_the_run_is_over(run: Path) -> None:
    seen: list[list[int]] = []

    def evaluate(steps: list[int]) -> None:
        seen.append(steps)
        if len(seen) == 1:
            (run / "checkpoints" / "step_00000006").mkdir()
            finish(run, 6)

    launcher.watch(run, evaluate, seconds=0)
    assert seen == [[2, 4], [6]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "3"], "no checkpoint of step 3 in"),
        (["--step", "two"], "--step 'two' is not understood; valid: a number, several with commas, or all"),
        (["--step", "2", "--watch"], "--watch evaluates each new checkpoint; leave out --step"),
        (["--follow"], "no SLURM answers here"),
        (["--nodes", "0"], "--nodes 0 is impossible"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(
    run: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    if "--nodes" in arguments:
        monkeypatch.setattr("launchers.cluster.controller.reachable", lambda: True)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        call(monkeypatch, "--run", str(run), *arguments)


def test_without_a_cluster_evaluations_run_here_without_the_ranks_of_the_caller(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    called: list[tuple[list[str], dict[str, str]]] = []

    class Done:
        returncode = 0

    def start(command: list[str], env: dict[str, str], **_: Any) -> Done:
        called.append((command, env))
        return Done()

    monkeypatch.setattr(launcher.subprocess, "run", start)
    assert call(monkeypatch, "--run", str(run), "--step", "all") == 0
    assert [command[command.index("--step") + 1] for command, _ in called] == ["2", "4"]
    for _, environment in called:
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & environment.keys()
        assert environment["CUDA_VISIBLE_DEVICES"] == "5"


def test_every_task_and_step_becomes_a_piece_of_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Work] = []
    monkeypatch.setattr(evaluations, "submit", lambda _, work, options: submitted.extend(work))
    launcher.evaluate_in_jobs(run, ["knn", "pictures", "knn"], [2, 4], [], JobOptions())
    assert [str(work) for work in submitted] == [
        "knn at step 2", "pictures at step 2", "knn at step 4", "pictures at step 4",
    ]  # fmt: skip
    assert submitted[0].command[:1] == ("eval/knn.py",)


def test_an_evaluation_asks_for_one_gpu_unless_the_run_was_trained_on_cpus(run: Path) -> None:
    on_gpus = evaluations.demand_of(run, tiny_config(), 3, JobOptions(time="20"))
    assert (on_gpus.gpus, on_gpus.tasks, on_gpus.members, on_gpus.trains) == (1, 1, 3, False)
    assert on_gpus.signal_seconds == 300
    on_cpus = evaluations.demand_of(run, tiny_config(parallel__device="cpu"), 1, JobOptions())
    assert (on_cpus.gpus, on_cpus.tasks) == (0, 1)


def test_an_evaluation_of_several_ranks_tells_each_its_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
                 "MASTER_ADDR": "n1", "MASTER_PORT": "7"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    probe = "import os, json; json.dump(dict(os.environ), open('seen.json', 'w'))"
    script = run / "probe.py"
    script.write_text(probe)
    evaluations.EvaluationRank(str(run), str(run), ("probe.py",))()
    seen = json.loads((run / "seen.json").read_text())
    assert [seen[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["3", "4", "1", "2"]
    assert seen["PYTHONPATH"] == str(run)
    assert "RANK" not in os.environ


def test_a_failing_evaluation_fails_its_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                        "MASTER_ADDR": "n1", "MASTER_PORT": "7"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (run / "probe.py").write_text("raise SystemExit(2)")
    with pytest.raises(SystemExit) as caught:
        evaluations.EvaluationRank(str(run), str(run), ("probe.py",))()
    assert caught.value.code == 2
