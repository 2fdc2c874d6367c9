"""A step whose gradient is not finite leaves no trace, on any rank; too many in a row end the run with a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from training import differing, metrics, saved_tensors, tiny_run, train_alone, train_as_rank

from dinov2_fsdp.config import Config
from dinov2_fsdp.monitor.nonfinite import NonFiniteSteps, write_report
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.train import NonFiniteRun

CPU = torch.device("cpu")
STEPS = 5
BAD = 3
"""Step, counted from 1, whose loss is no number."""


# ---------------------------------------------------------------------------------------------------------------------
# The count


def counted(limit: int, skips: str) -> NonFiniteSteps:
    """Steps 1, 2, …, one for each letter: x is skipped, anything else is not."""
    steps = NonFiniteSteps(limit, CPU)
    for step, skip in enumerate(skips, start=1):
        value = torch.tensor(math.nan if skip == "x" else 1.0)
        steps.add(step, torch.tensor(float(skip == "x")), {"loss": value}, [torch.tensor([step, 10 * step])])
    return steps


@pytest.mark.parametrize(
    ("skips", "too_many"),
    [("", False), ("xx", False), ("xxx", True), ("xx.xx", False), ("xx.xxx", True), ("x.x.x.x", False)],
)
def test_only_steps_in_a_row_count(skips: str, too_many: bool) -> None:
    assert counted(2, skips).too_many() is too_many


def test_a_limit_of_none_bears_no_skipped_step() -> None:
    assert not counted(0, "....").too_many()
    assert counted(0, "...x").too_many()


def test_a_good_step_does_not_hide_the_row_before_it() -> None:
    """The host hears late: a step that follows the last bad one may be done by then."""
    steps = counted(2, "x.xxx.")
    assert steps.too_many()
    assert [entry["step"] for entry in steps.last_steps(str)] == [3, 4, 5]


def test_the_longest_row_is_the_one_that_is_reported() -> None:
    assert [entry["step"] for entry in counted(2, ".xxx.x").last_steps(str)] == [2, 3, 4]


def test_a_row_that_an_earlier_life_began_goes_on() -> None:
    steps = NonFiniteSteps(2, CPU)
    steps.in_a_row.fill_(2.0)  # as a checkpoint fills it
    steps.add(8, torch.tensor(1.0), {"loss": torch.tensor(math.inf)}, [torch.tensor([4])])
    assert steps.too_many()
    assert [(entry["step"], entry["in_a_row"]) for entry in steps.last_steps(str)] == [(8, 3)]


def test_without_skipped_steps_there_is_nothing_to_report() -> None:
    assert counted(2, "..").last_steps(str) == []


def test_a_report_names_step_terms_and_images_of_every_rank(tmp_path: Path) -> None:
    by_rank = [counted(1, ".xx").last_steps(lambda index: f"image {index}") for _ in range(2)]
    path, line = write_report(tmp_path, by_rank)
    assert path == tmp_path / "nonfinite_step_00000003.json"
    assert "2 steps in a row had no finite gradient, the last is step 3" in line
    assert "rank 0: loss nan; rank 1: loss nan" in line
    assert "its images are 3, 30, 3, 30" in line
    assert json.loads(path.read_text())["ranks"][1][-1] == {
        "step": 3, "in_a_row": 2, "values": {"loss": "nan"}, "samples": [3, 30], "names": ["image 3", "image 30"],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@contextmanager
def no_number_at(*steps: int, rank: int = 0) -> Iterator[None]:
    """Make the loss of some steps, counted from 1, NaN on one rank; what the forward pass leaves behind is sound."""
    original = SelfDistillation.loss

    def loss(self: SelfDistillation, batch: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, meters = original(self, batch, targets)
        mine = not dist.is_initialized() or dist.get_rank() == rank
        return value * math.nan if mine and batch.step + 1 in steps else value, meters

    SelfDistillation.loss = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        SelfDistillation.loss = original  # type: ignore[method-assign]


def run_of(run_dir: Path, **overrides: Any) -> Config:
    settings = {
        "train__duration": f"{STEPS}it", "checkpoint__every": "1it", "log__every": "1it", "optim__warmup": "0it",
        "optim__freeze_prototypes": "0it", "model__drop_path": 0.3,
    }  # fmt: skip
    return tiny_run(run_dir, **{**settings, **overrides})


def train_with_a_bad_step_of_rank_1(config: Config) -> None:
    with no_number_at(BAD, rank=1):
        train_as_rank(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank whose third step has no finite gradient."""
    run_dir = tmp_path_factory.mktemp("bad_step") / "run"
    with no_number_at(BAD):
        train_alone(run_of(run_dir))
    return run_dir


def changed(run_dir: Path, step: int) -> list[str]:
    """The tensors that a step changed."""
    return differing(saved_tensors(run_dir, step - 1), saved_tensors(run_dir, step))


def test_a_skipped_step_changes_neither_student_nor_teacher_nor_centres_nor_moments(run: Path) -> None:
    assert changed(run, BAD) == ["skipped_in_a_row"]
    moved = changed(run, BAD + 1)
    for part in ("student.", "teacher.", "centering.dino", "centering.ibot", "optimizer.", "skipped_in_a_row"):
        assert any(name.startswith(part) for name in moved), f"{part}: the steps around it do change it"


def test_schedules_go_on_over_a_skipped_step_and_meters_count_it(run: Path, tmp_path: Path) -> None:
    train_alone(run_of(tmp_path / "sound"))
    lines, sound = metrics(run), metrics(tmp_path / "sound")
    assert [line["skipped"] for line in lines] == [float(step == BAD) for step in range(1, STEPS + 1)]
    assert [line["skipped"] for line in sound] == [0.0] * STEPS
    for key in ("lr", "weight_decay", "teacher_momentum", "teacher_temperature"):
        assert [line[key] for line in lines] == [line[key] for line in sound], key
    assert len({line["lr"] for line in lines}) == STEPS


@pytest.mark.distributed
def test_a_step_that_is_bad_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    run_on_ranks(train_with_a_bad_step_of_rank_1, 2, run_of(tmp_path / "run"))
    assert changed(tmp_path / "run", BAD) == ["skipped_in_a_row"]
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [float(s == BAD) for s in range(1, STEPS + 1)]
    # Had a rank gone on alone, the shards that it holds would be those of another network.
    assert all(tensor.isfinite().all() for tensor in saved_tensors(tmp_path / "run").values())


def test_a_run_ends_though_the_step_after_the_last_bad_one_is_sound(tmp_path: Path) -> None:
    with no_number_at(2, 3), pytest.raises(NonFiniteRun, match=r"2 steps in a row .* the last is step 3;") as caught:
        train_alone(run_of(tmp_path, checkpoint__every="0it"))
    (report,) = tmp_path.glob("nonfinite_step_*.json")
    assert str(report) in str(caught.value)
    assert [entry["step"] for entry in json.loads(report.read_text())["ranks"][0]] == [2, 3]


def test_as_many_skipped_steps_as_are_borne_do_not_end_a_run(tmp_path: Path) -> None:
    with no_number_at(2, 3):
        train_alone(run_of(tmp_path, train__max_nonfinite=2, checkpoint__every="0it"))
    assert metrics(tmp_path)[-1]["step"] == STEPS
