"""launchers/eval.py between a run, its leaderboard and a cluster; the tasks themselves are tested elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from dinov2_fsdp.config import to_yaml
from dinov2_fsdp.errors import UserError
from launchers import eval as launcher
from launchers.cluster import evaluations
from launchers.cluster.evaluations import Work, gather, new_steps, why_stopped
from launchers.cluster.lives import FAILED, Cause, Lives
from launchers.cluster.options import JobOptions
from launchers.cluster.progress import is_over


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


def test_gathering_does_not_double_what_looked_at_a_part_of_the_images(run: Path) -> None:
    part = {"settings": {"max_train": 0, "max_test": 10}}
    write_results(run, 2, "knn", **part)
    (run / "leaderboard.csv").unlink(missing_ok=True)
    assert [line["test"] for line in gather(run)] == ["b (10 images)"]
    assert len(gather(run)) == 1


def test_a_part_is_told_apart_in_the_leaderboard_that_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(run, 2, "knn", value=2.0)
    write_results(run, 2, "knn_part_1a2b3c", value=1.0, settings={"max_train": 10})
    launcher.show_leaderboard(run)
    assert [line.partition("  on ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "b",
        "b, from a (10 images)",
    ]


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

    def evaluate(steps: list[int]) -> bool:
        seen.append(steps)
        if len(seen) == 1:
            (run / "checkpoints" / "step_00000006").mkdir()
            finish(run, 6)
        return True

    launcher.watch(run, ["knn"], evaluate, seconds=0)
    assert seen == [[2, 4], [6]]


@pytest.mark.parametrize("folder", ["knn", "knn_1a2b3c", "knn_part_1a2b3c"])
def test_watching_again_leaves_out_what_has_results_of_all_tasks(run: Path, folder: str) -> None:
    write_results(run, 2, folder)
    write_results(run, 4, "linear")
    write_results(run, 4, "knn_untrained")
    finish(run, 4)
    seen: list[list[int]] = []
    launcher.watch(run, ["knn"], lambda steps: seen.append(steps) is None, seconds=0)
    launcher.watch(run, ["knn", "linear"], lambda steps: seen.append(steps) is None, seconds=0)
    assert seen == [[4], [2, 4]]


def test_watching_ends_with_a_run_that_will_not_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lives = Lives(run)
    life = lives.begin("7", "001", 0, ["node1"], [])
    life.outcome, life.step, life.cause = FAILED, 4, Cause("exception", "no space left", 1)
    life.next = "requeued"
    assert why_stopped(run) == ""
    life.next = "nothing"
    lives.end(life)
    seen: list[list[int]] = []
    launcher.watch(run, ["knn"], lambda steps: seen.append(steps) is None, seconds=0)
    assert seen == [[2, 4]]
    assert "has stopped (failed at step 4: rank 1: no space left)" in capsys.readouterr().out
    lives.begin("8", "002", 0, ["node1"], [])
    assert why_stopped(run) == ""


def test_a_submission_that_fails_while_watching_is_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def submit(_run: Path, _tasks: list[str], steps: list[int], *_: object) -> dict[str, Work]:
        asked.append(steps)
        if len(asked) == 1:
            (run / "checkpoints" / "step_00000006").mkdir()
            finish(run, 6)
        if len(asked) == 2:
            raise UserError("SLURM's controller does not answer")
        return {str(len(asked)): Work("knn", steps[0], ())}

    monkeypatch.setattr("launchers.cluster.controller.there_is_a_cluster", lambda: True)
    monkeypatch.setattr(launcher, "evaluate_in_jobs", submit)
    monkeypatch.setattr(evaluations, "follow", lambda jobs, show: [])
    monkeypatch.setattr(evaluations, "SECONDS", 0)
    assert call(monkeypatch, "--run", str(run), "--watch") == 0
    assert asked == [[2, 4], [6], [6]]
    assert "does not answer; trying again" in capsys.readouterr().out


def test_ctrl_c_while_watching_ends_the_command_at_once_and_leaves_the_jobs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launchers.cluster.controller.there_is_a_cluster", lambda: True)
    monkeypatch.setattr(launcher, "watch", interrupt)
    assert call(monkeypatch, "--run", str(run), "--watch") == 0
    assert "jobs that were submitted go on" in capsys.readouterr().out


def test_watching_waits_for_a_run_whose_job_has_not_started(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "slurm" / "jobs").mkdir(parents=True)
    content = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    monkeypatch.setattr(launcher.time, "sleep", lambda _: (run / "config.yaml").write_text(content))
    launcher.await_start(run, 1)
    assert "has not started yet: waiting for its job" in capsys.readouterr().out
    (run / "config.yaml").unlink()
    (run / "slurm" / "jobs").rmdir()
    with pytest.raises(UserError, match="is no run directory"):
        call(monkeypatch, "--run", str(run), "--watch")


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ("Unable to contact slurm controller (connect failure)", None),
        ("resolve_ctls_from_dns_srv: Unknown host\nsinfo: fatal: Could not establish a configuration source", False),
    ],
)  # fmt: skip
def test_a_login_node_does_not_evaluate_because_its_controller_is_away(
    said: str, there: bool | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'sinfo: error: {said}' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher, "evaluate_here", lambda todo: 0)
    if there is None:
        with pytest.raises(UserError, match=r"controller does not answer.*\n.*--local"):
            call(monkeypatch, "--run", str(run))
    else:
        assert call(monkeypatch, "--run", str(run)) == 0
    assert call(monkeypatch, "--run", str(run), "--local") == 0


def test_a_site_s_words_on_whole_nodes_do_not_hold_for_an_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "site.yaml").write_text("nodes: 16\ngpus_per_node: 4\nmem: 900G\npartition: gpu\n")
    found: list[JobOptions] = []
    monkeypatch.setattr("launchers.cluster.controller.there_is_a_cluster", lambda: True)
    monkeypatch.setattr(launcher, "evaluate_in_jobs", lambda *arguments: found.append(arguments[-1]) or {})
    assert call(monkeypatch, "--run", str(run), "--site", str(run / "site.yaml"), "--mem", "20G") == 0
    assert (found[0].nodes, found[0].mem, found[0].partition) == (1, "20G", "gpu")
    assert evaluations.demand_of(run, tiny_config(), 1, found[0]).gpus == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "3"], "no checkpoint of step 3 in"),
        (["--step", "two"], "--step 'two' is not understood; valid: a number, several with commas, or all"),
        (["--step", "2", "--watch"], "--watch evaluates each new checkpoint; leave out --step"),
        (["--follow"], "there is no SLURM here, so --follow means nothing"),
        (["--time", "30"], "there is no SLURM here, so --time means nothing"),
        (["--time", "30", "--watch", "--tasks", "kn"], "task 'kn' is unknown"),
        (["--nodes", "0"], "--nodes 0 is impossible"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(
    run: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    if "--nodes" in arguments:
        monkeypatch.setattr("launchers.cluster.controller.there_is_a_cluster", lambda: True)
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


def test_flags_of_one_task_reach_that_task_alone(run: Path) -> None:
    words = ["segmentation.classes=11", "segmentation.ratios=[1,1.5]", "linear.augment=false", "linear.also=a=folder:x"]
    found = launcher.commands(run, ["knn", "linear", "segmentation"], 2, ["eval.max_test=5", *words])
    knn, linear, segmentation = ([*command[command.index("--step") + 2 :]] for command in found)
    assert knn == ["--max-test", "5"]
    assert linear == ["--max-test", "5", "--no-augment", "--also", "a=folder:x"]
    assert segmentation == ["--max-test", "5", "--classes", "11", "--ratios", "1", "1.5"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("segmentation.clases=11", "--clases 11; did you mean '--classes'"),
        ("segmentation.classes=many", "argument --classes: invalid int value: 'many'"),
        ("depth.layers=4", "'depth.layers=4' is a flag of depth, which is not among --tasks segmentation"),
    ],
)
def test_a_wrong_flag_of_a_task_is_refused_before_anything_starts(run: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        launcher.commands(run, ["segmentation"], 2, [word])


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
