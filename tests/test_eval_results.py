from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from eval.results import add_to_leaderboard, read_leaderboard, record, run_of, task_folder

LINE = {
    "step": 10,
    "task": "knn",
    "backbone": "teacher",
    "metric": "knn_20",
    "value": 50.0,
    "train": "a,b",
    "test": "c",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def results(**changes: Any) -> dict[str, Any]:
    found = {"task": "knn", "backbone": "teacher", "step": 1000, "metrics": {"knn_20": 61.2345}}
    return {**found, "data": {"train": "a,b", "test": "c"}, **changes}


def test_results_go_to_their_step_and_one_line_to_the_leaderboard(run: Path) -> None:
    file = record(results(), "knn", "knn_20", run)
    assert file == run / "eval" / "step_00001000" / "knn" / "results.json"
    found = json.loads(file.read_text())
    assert (found["metric"], found["value"], found["step"]) == ("knn_20", 61.2345, 1000)
    with (run / "leaderboard.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["step"], line["metric"], line["value"], line["train"]) for line in lines] == [
        ("1000", "knn_20", "61.234", "a,b")
    ]


def test_an_evaluation_that_is_repeated_replaces_its_line_and_no_other(run: Path) -> None:
    for step, value in ((10, 1.0), (20, 2.0), (10, 3.0)):
        add_to_leaderboard(run, {**LINE, "step": step, "value": value})
    assert [(line["step"], line["value"]) for line in read_leaderboard(run)] == [("20", "2.0"), ("10", "3.0")]


@pytest.mark.parametrize("column", ["task", "backbone", "metric", "train", "test"])
def test_lines_that_differ_in_what_was_measured_stand_side_by_side(run: Path, column: str) -> None:
    add_to_leaderboard(run, LINE)
    add_to_leaderboard(run, {**LINE, column: "other"})
    assert len(read_leaderboard(run)) == 2


def test_part_of_a_data_set_does_not_replace_the_whole(run: Path) -> None:
    for limit in (0, 100, 0):
        record(results(settings={"max_test": limit}), "knn", "knn_20", run)
    assert sorted(line["test"] for line in read_leaderboard(run)) == ["c", "c (100 images)"]


@pytest.mark.parametrize("limit", ["max_train", "max_test"])
def test_results_of_part_of_a_data_set_do_not_take_the_place_of_those_of_the_whole(run: Path, limit: str) -> None:
    whole = record(results(), "knn", "knn_20", run)
    part = record(results(settings={limit: 100}, metrics={"knn_20": 1.0}), "knn", "knn_20", run)
    assert whole is not None
    assert part not in (None, whole)
    assert json.loads(whole.read_text())["value"] == 61.2345
    assert part == record(results(settings={limit: 100}), "knn", "knn_20", run)
    assert len(list(run.glob("eval/*/*/results.json"))) == 2


@pytest.mark.parametrize("limit", ["max_train", "max_test"])
def test_the_plain_name_is_never_that_of_a_part(run: Path, limit: str) -> None:
    part = record(results(settings={limit: 100}), "knn", "knn_20", run)
    assert part is not None
    assert part.parent.name.startswith("knn_part_")
    whole = record(results(), "knn", "knn_20", run)
    assert whole == run / "eval" / "step_00001000" / "knn" / "results.json"
    assert part == record(results(settings={limit: 100}), "knn", "knn_20", run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_test": 100}, "part of the images: on c (100 images)\n"),
        ({"max_train": 50}, "part of the images: on c, from a,b (50 images)\n"),
        ({}, ""),
    ],
)
def test_a_part_is_called_so_when_it_is_measured(
    settings: dict[str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(results(settings=settings), "knn", "knn_20")
    assert capsys.readouterr().out.partition("not written")[0] == said


def _write(run: Path, number: int) -> None:
    for step in range(20):
        add_to_leaderboard(run, {**LINE, "step": 100 * number + step})


def test_writers_at_the_same_time_lose_no_line(run: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(run, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    steps = sorted(int(line["step"]) for line in read_leaderboard(run))
    assert steps == sorted(100 * number + step for number in range(4) for step in range(20))


def test_results_of_other_data_keep_their_place(run: Path) -> None:
    first = record(results(), "knn", "knn_20", run)
    second = record(results(data={"train": "a,b", "test": "other"}), "knn", "knn_20", run)
    assert first != second
    assert first == record(results(), "knn", "knn_20", run)
    assert second == record(results(data={"train": "a,b", "test": "other"}), "knn", "knn_20", run)
    assert [line["test"] for line in read_leaderboard(run)] == ["c", "other"]


def test_numbers_that_json_does_not_know_become_null(run: Path) -> None:
    file = record(results(metrics={"knn_20": float("nan"), "other": [float("inf"), 1.0]}), "knn", "knn_20", run)
    assert file is not None
    found = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["metrics"] == {"knn_20": None, "other": [None, 1.0]}


def test_weights_without_a_run_say_that_nothing_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert record(results(), "knn", "knn_20") is None
    assert "--output DIR" in capsys.readouterr().out


def test_a_checkpoint_belongs_to_the_run_around_it(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00001000"
    checkpoint.mkdir()
    assert run_of(run) == run_of(checkpoint) == run
    assert run_of(run.parent) is None
    assert task_folder(run, 7, "knn") == run / "eval" / "step_00000007" / "knn"
