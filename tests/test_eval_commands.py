"""The commands of all tasks on a run that has just been trained: from the command line to the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import tiny_run, train_alone

from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval import command, depth, knn, linear, logistic, pictures, report, retrieval, segmentation
from eval.report import write_report
from eval.results import read_leaderboard

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = "scenes:n=40,size=16", "scenes:n=20,size=16,split=test"
DATA = ("--train", TRAIN, "--test", TEST)
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "knn": (knn, (*DATA, "--k", "1", "5", "--per-class", "2", "--tries", "2")),
    "linear": (linear, (*DATA, "--epochs", "1", "--epoch-length", "3", "--train-batch", "8", "--also", f"a={TEST}")),
    "logistic": (logistic, (*DATA, "--c-values", "3", "--max-iterations", "30")),
    "segmentation": (segmentation, (*DATA, "--iterations", "4")),
    "segmentation_ms": (segmentation, (*DATA, "--iterations", "2", "--multi-scale", "--crop", "16", "--stride", "8",
                                       "--short-side", "16")),
    "depth": (depth, (*DATA, "--iterations", "4")),
    "depth_4_layers": (depth, (*DATA, "--iterations", "2", "--layers", "4")),
    "retrieval": (retrieval, ("--gallery", TRAIN, "--queries", TEST)),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train_alone(
        tiny_run(
            folder,
            train__duration="2it",
            log__every="1it",
            eval__size=16,
            eval__resize=16,
            eval__batch=8,
            eval__test=TEST,
        )
    )
    return folder


def evaluated(module: Any, run: Path, *words: str) -> dict[str, Any]:
    file = module.run(module._parser().parse_args(["--weights", str(run), *words]))
    assert file is not None
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("task", COMMANDS)
def test_a_task_writes_what_it_measured_and_how(run: Path, task: str) -> None:
    module, words = COMMANDS[task]
    found = evaluated(module, run, *words)
    assert found["task"] == task
    assert found["step"] == 2
    assert found["backbone"] == "teacher"
    assert found["checkpoint"].endswith("step_00000002")
    assert found["data"]["train"] == TRAIN
    assert found["value"] == found["metrics"][found["metric"]]
    assert found["settings"]["processes"] == 1
    assert found["seconds"] > 0
    assert found["peak_memory_gib"] > 0.01
    assert (run / "eval" / "step_00000002" / task / "results.json").is_file()
    assert not list((run / "eval").rglob("features.partial"))
    line = read_leaderboard(run)[-1]
    assert (line["task"], line["metric"]) == (task, found["metric"])
    assert float(line["value"]) == pytest.approx(found["value"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_limit_that_reaches_the_test_set_but_not_another_one_is_kept(run: Path) -> None:
    words = (*COMMANDS["linear"][1][:-1], "v2=scenes:n=30,size=16,split=test", "--max-test", "25")
    assert evaluated(linear, run, *words)["settings"]["max_test"] == 25
    assert evaluated(linear, run, *words[:-1], "30")["settings"]["max_test"] == 0


@pytest.mark.slow
def test_the_untrained_twin_has_a_folder_and_a_line_of_its_own(run: Path) -> None:
    found = evaluated(knn, run, *DATA, "--k", "1", "--untrained")
    assert (found["backbone"], found["step"], found["checkpoint"]) == ("untrained", 0, None)
    assert (run / "eval" / "step_00000000" / "knn_untrained" / "results.json").is_file()


@pytest.mark.slow
def test_a_run_is_shown_in_pictures_and_a_report(run: Path) -> None:
    files = pictures.draw_all(run, pictures.choose_device("cpu"), images=3)
    assert [file.stem for file in files] == ["curves", "pca", "pca_foreground", "attention", "neighbours", "crops"]
    evaluated(segmentation, run, *COMMANDS["segmentation"][1])
    text = write_report(run).read_text()
    assert text.count("data:image/png;base64,") == 6 + len(list((run / "eval").rglob("examples.png")))
    assert "segmentation of teacher, step 2" in text


@pytest.mark.parametrize("kind", ["attentions", "curve"])
def test_an_unknown_kind_of_picture_is_answered_with_the_nearest(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=rf"--only {kind} is unknown; did you mean '(attention|curves)'"):
        pictures.draw_all(tmp_path, pictures.choose_device("cpu"), [kind])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_task_on_two_processes_finds_what_it_finds_on_one(run: Path, tmp_path: Path) -> None:
    words = ["--weights", str(run), *DATA, "--k", "1", "5", "--device", "cpu"]
    alone = evaluated(knn, run, *words[2:])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "eval/knn.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *words, "--output", str(tmp_path)], cwd=ROOT, check=True, env=environment, timeout=400,
        capture_output=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["processes"] == 2
    assert found["data"] == alone["data"]
    for name in ("knn_1", "knn_5"):  # rounding may move an image across a boundary
        assert found["metrics"][name] == pytest.approx(alone["metrics"][name], abs=5.1)


@pytest.mark.parametrize("module", [knn, linear, logistic, segmentation, depth, retrieval, pictures, report])
def test_an_unknown_flag_is_one_message_with_the_nearest_one(module: Any) -> None:
    with pytest.raises(UserError) as caught:
        module._parser().parse_args(["--run", "x", "--devcie", "cpu", "--rnu", "x"])
    assert len(str(caught.value).splitlines()) == 2
    assert "unrecognized arguments: " in str(caught.value)


def test_an_image_that_cannot_be_read_where_all_count_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_load", lambda *_: None)
    arguments = knn._parser().parse_args(["--weights", "x"])
    with pytest.raises(UserError, match=r"a\.jpg: truncated\nmend or remove"), command.open_subject(arguments):
        raise BadImage("a.jpg", "truncated")


def test_what_is_kept_for_an_interruption_is_told_apart_by_its_images(tmp_path: Path) -> None:
    subject: Any = SimpleNamespace(run=None, step=0, name=str)

    def partial(test: str = "a", limit: int = 0) -> Path | None:
        settings = knn.Settings(max_test=limit)
        return command.Evaluation(
            subject, "knn", settings, {"train": "b", "test": test}, (9, 9), str(tmp_path)
        ).partial("x")

    assert partial() == partial()
    assert len({partial(), partial("c"), partial(limit=5)}) == 3


def test_a_limit_that_reaches_the_whole_set_makes_no_part_of_it(tmp_path: Path) -> None:
    import torch

    for limit, kept in ((500, 0), (499, 499)):
        subject: Any = SimpleNamespace(
            run=tmp_path, step=5, backbone="teacher", checkpoint=None, precision="fp32", name=str,
            world=World(0, 1, 0, torch.device("cpu")),
        )  # fmt: skip
        evaluation = command.Evaluation(
            subject, "knn", knn.Settings(max_test=limit), {"train": "b", "test": "a"}, (20, 500)
        )
        partial = evaluation.partial("x")
        assert partial is not None
        partial.mkdir(parents=True)
        file = evaluation.finish("knn_20", {"knn_20": 1.0})
        assert file is not None
        assert file.parent.name == "knn" if not kept else file.parent.name.startswith("knn_part_")
        assert json.loads(file.read_text())["settings"]["max_test"] == kept
        assert partial.is_relative_to(file.parent)
        assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def _complain(rank: int, port: int, messages: list[str | None], answers: Any) -> None:
    import torch
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    message = messages[rank]
    if message is not None:
        answers.put((rank, command.rank_0_says(World(rank, 2, rank, torch.device("cpu"), store), message)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("messages", "silent"), [(["same", "same"], True), (["other", "same"], False), ([None, "same"], False)]
)
def test_a_mistake_that_all_ranks_find_is_shown_by_the_first(
    messages: list[str | None], silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(command, "_SECONDS_FOR_RANK_0", 1.0 if messages[0] is None else 60.0)
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_complain, args=(rank, served.port, messages, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=100) for message in messages if message is not None)
    for rank in ranks:
        rank.join()
    assert found[1] is silent
    assert not found.get(0)


@pytest.mark.parametrize("module", [knn, linear, logistic, segmentation, depth, retrieval])
def test_a_command_without_weights_says_what_is_missing(module: Any) -> None:
    with pytest.raises(UserError, match=r"--weights PATH is needed"):
        module.run(module._parser().parse_args([]))
