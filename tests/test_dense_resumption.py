"""Dense heads where images cannot be read, and where an evaluation was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from coloured import ALONE, SMALL, Coloured, grid, measured
from evaluation import CPU
from ranks import run_on_ranks

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval import resumption
from eval.dense import Samples, keep_grids
from eval.segmentation import Segmenter, labels_of
from eval.segmentation_crops import VOID


def test_test_images_that_cannot_be_read_are_left_out_and_named() -> None:
    with pytest.warns(UserWarning, match="left out of the evaluation: coloured:2: truncated"):
        _, more = measured(settings=replace(SMALL, iterations=1), broken=(2,))
    expected = sum(int((labels_of(Coloured(7, seed=1), n, SMALL) != VOID).sum()) for n in range(7) if n != 2)
    assert (more["pixels"], more["bad_images"]) == (expected, 1)


@pytest.mark.filterwarnings("ignore:left out")
def test_a_training_image_that_cannot_be_read_is_replaced_by_one_of_the_others() -> None:
    def colours_of(broken: tuple[int, ...]) -> list[float]:
        pairs = Plain(6, broken=broken)
        samples = Samples(len(pairs), lambda index, _: pairs.sample(index), 3, 0, 0, 1, VOID)
        return [float(value) for step in range(12) for value in samples[step][0][:, 0, 0, 0]]

    whole, without = colours_of(()), colours_of((2,))
    assert 2.0 in whole
    assert 2.0 not in without
    assert all(a == b for a, b in zip(whole, without, strict=True) if a != 2.0)
    assert without == colours_of((2,))
    with pytest.raises(UserError, match="100 training pairs in a row cannot be read, the last is coloured:"):
        colours_of(tuple(range(6)))


class Plain(Coloured):
    """Samples of one value, the number of their pair."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.image(index)
        return np.full((3, 2, 2), index, np.float32), np.zeros((2, 2))


class Interrupted(Exception):
    pass


def test_a_training_that_was_interrupted_goes_on_from_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = measured(settings=replace(SMALL, iterations=30))
    monkeypatch.setattr(resumption, "_SECONDS_BETWEEN_SAVES", 0.0)
    steps: list[int] = []
    original = Segmenter._loss

    def loss(self: Segmenter, images: torch.Tensor, targets: torch.Tensor, count: int, step: int) -> torch.Tensor:
        if step == 17 and 17 not in steps:
            steps.append(17)
            raise Interrupted
        steps.append(step)
        return original(self, images, targets, count, step)

    monkeypatch.setattr(Segmenter, "_loss", loss)
    with pytest.raises(Interrupted):
        measured(settings=replace(SMALL, iterations=30), partial=tmp_path, key={"step": 1})
    steps[:] = [17]
    again, _ = measured(settings=replace(SMALL, iterations=30), partial=tmp_path, key={"step": 1})
    assert steps[1:] == list(range(17, 30))
    assert again == whole
    steps[:] = [17]
    measured(settings=replace(SMALL, iterations=30), partial=tmp_path, key={"step": 2})
    assert steps[1:] == list(range(30)), "the head of another checkpoint was gone on from"


def _goes_on(folder: str) -> Any:
    world = World(dist.get_rank(), dist.get_world_size(), 0, CPU)
    found = [measured(world, replace(SMALL, train_batch=5, iterations=25), partial=Path(folder))[0] for _ in range(2)]
    return found


@pytest.mark.distributed
def test_ranks_go_on_together_from_what_one_of_them_wrote(tmp_path: Path) -> None:
    alone, _ = measured(settings=replace(SMALL, train_batch=5, iterations=25))
    for first, second in run_on_ranks(_goes_on, 2, str(tmp_path)):
        assert first == second
        assert first == pytest.approx(alone, abs=0.05)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.filterwarnings("ignore:left out")
def test_kept_features_of_a_pair_that_cannot_be_read_count_nowhere() -> None:
    pairs = Coloured(5, broken=(3,))
    _, targets = keep_grids(grid, pairs, lambda index: labels_of(pairs, index, SMALL), 5, 24, 2, ALONE, VOID)
    assert torch.all(targets[3] == VOID)
    assert all((targets[index] != VOID).any() for index in (0, 1, 2, 4))
    nothing = Coloured(3, broken=(0, 1, 2))
    with pytest.raises(UserError, match="none of 3 pairs can be read"):
        keep_grids(grid, nothing, lambda index: labels_of(nothing, index, SMALL), 3, 24, 2, ALONE, VOID)
