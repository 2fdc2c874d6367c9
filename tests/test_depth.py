from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from evaluation import CPU
from PIL import Image
from ranks import run_on_ranks
from tiny import tiny_backbone, tiny_images

from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval.depth import (
    EIGEN_CROP,
    DepthEstimator,
    Settings,
    check,
    counted,
    depth_of,
    estimate,
    layer_numbers,
    open_both,
    silog_loss,
    tokens_with_class,
)
from eval.depth_crops import training_sample
from eval.features import frozen
from eval.pairs import Pairs

ALONE = World(0, 1, 0, CPU)
PATCH = 4
SMALL = Settings(crop=(0, 0), nyu=False, iterations=150, rate=0.05, warmup=5, train_batch=4, bins=32)


def grid(images: torch.Tensor) -> torch.Tensor:
    """The mean colour of each patch."""
    return F.avg_pool2d(images, PATCH)


class Ramps(Pairs):
    """Images whose brightness is their depth, from 1 to 9 metres, in patches."""

    spec = "ramps"

    def __init__(self, count: int, seed: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.count, self.seed, self.broken = count, seed, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"ramps:{index}"

    def size(self, index: int) -> tuple[int, int]:
        return 24, 32

    def target(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise BadImage(self.name(index), "truncated")
        rng = np.random.default_rng([self.seed, index])
        rows, columns = np.linspace(*rng.uniform(0, 4, 2), 24), np.linspace(*rng.uniform(1, 5, 2), 32)
        depth = (rows[:, None] + columns).astype(np.float32)
        depth[:2] = 0  # unknown
        return depth

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.repeat((self.target(index) * 25)[..., None], 3, axis=2).astype(np.uint8))


def measured(
    world: World = ALONE, settings: Settings = SMALL, broken: tuple[int, ...] = (), **more: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    return estimate(grid, PATCH, Ramps(20), Ramps(7, 1, broken), settings, world, progress=False, **more)


def test_a_head_learns_depth_that_brightness_tells() -> None:
    before, _ = measured(settings=replace(SMALL, iterations=1, rate=1e-9))
    after, more = measured()
    assert after["rmse"] < 0.5 * before["rmse"]
    assert after["delta_1"] > before["delta_1"] + 0.2
    assert more["images"] == 7


def _on_a_rank(broken: tuple[int, ...]) -> Any:
    world = World(dist.get_rank(), dist.get_world_size(), 0, CPU)
    metrics, more = measured(world, replace(SMALL, train_batch=5, iterations=103), broken)
    return metrics, (more["images"], more["bad_images"])


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("broken", [(), (5,)])
def test_ranks_share_images_and_find_what_one_finds(broken: tuple[int, ...]) -> None:
    alone, _ = measured(settings=replace(SMALL, train_batch=5, iterations=103), broken=broken)
    for metrics, counts in run_on_ranks(_on_a_rank, 2, broken):
        assert counts == (7 - len(broken), len(broken))
        assert metrics == pytest.approx(alone, rel=1e-3)


def test_images_whose_depth_cannot_be_read_are_left_out_and_named() -> None:
    with pytest.warns(UserWarning, match="left out of the evaluation: ramps:3: truncated"):
        _, more = measured(settings=replace(SMALL, iterations=1), broken=(3,))
    assert (more["images"], more["bad_images"]) == (6, 1)


def test_a_trained_head_is_not_trained_again_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = measured(partial=tmp_path)
    monkeypatch.setattr(DepthEstimator, "_loss", lambda *_: pytest.fail("a step was taken"))
    second, _ = measured(partial=tmp_path)
    assert first == second


def test_depth_is_the_mean_of_the_bins_under_linearly_normalised_weights() -> None:
    logits = 2 * torch.randn(2, 7, 3, 4, dtype=torch.float64)
    found = depth_of(logits, 1.0, 4.0)
    bins = [1.0 + 0.5 * number for number in range(7)]
    for image, row, column in np.ndindex(2, 3, 4):
        weights = [max(0.0, float(logits[image, n, row, column])) + 0.1 for n in range(7)]
        expected = sum(w * b for w, b in zip(weights, bins, strict=True)) / sum(weights)
        assert float(found[image, 0, row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [0, 99, 100, 5000])
def test_the_loss_is_the_scale_invariant_log_loss_over_valid_pixels(step: int) -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.uniform(0.5, 9, (2, 5, 6)), rng.uniform(0.5, 9, (2, 5, 6))
    valid = rng.random((2, 5, 6)) < 0.6
    g = [
        math.log(p + 0.001) - math.log(t + 0.001)
        for p, t in zip(predicted[valid].tolist(), truth[valid].tolist(), strict=True)
    ]
    mean = sum(g) / len(g)
    variance = sum((x - mean) ** 2 for x in g) / (len(g) - 1)
    expected = math.sqrt(0.15 * mean**2 + (variance if step >= 100 else 0))
    found = silog_loss(torch.tensor(predicted), torch.tensor(truth), torch.from_numpy(valid), step)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_valid_pixels_costs_nothing_and_has_finite_gradients() -> None:
    predicted = torch.ones(1, 2, 2, requires_grad=True)
    silog_loss(predicted, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)).backward()
    assert predicted.grad is not None
    assert float(predicted.grad.abs().max()) == 0


def test_doubling_every_prediction_changes_only_the_mean_term() -> None:
    truth = torch.rand(1, 4, 4) + 1
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    assert float(silog_loss(2 * truth, truth, valid, 200)) == pytest.approx(math.sqrt(0.15) * math.log(2), rel=2e-3)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(12, [3, 6, 9, 12]), (24, [5, 12, 18, 24]), (40, [10, 20, 30, 40]), (3, [1, 2, 3]), (1, [1])],
)
def test_four_layers_are_the_published_ones(depth: int, expected: list[int]) -> None:
    assert [number + 1 for number in layer_numbers(depth, 4)] == expected
    assert layer_numbers(depth, 1) == [depth - 1]


@torch.no_grad()
def test_every_patch_has_the_class_token_beside_it() -> None:
    model = tiny_backbone(depth=3, registers=4).eval()
    images = tiny_images(2, 16, 24)
    outputs = frozen(model, 16, CPU)(images)
    found = tokens_with_class(outputs, 4, 6)
    assert found.shape == (2, 48, 4, 6)
    torch.testing.assert_close(found[1, :24, 2, 3], outputs["x_norm_patchtokens"][1, 2 * 6 + 3])
    torch.testing.assert_close(found[1, 24:, 2, 3], outputs["x_norm_clstoken"][1])
    several = tokens_with_class(frozen(model, 16, CPU, blocks=(0, 2))(images), 4, 6)
    assert several.shape == (2, 96, 4, 6)
    torch.testing.assert_close(several[:, 48:], found)


def test_a_prediction_is_the_mean_with_its_mirror_image_and_within_the_limits() -> None:
    estimator = DepthEstimator(grid, PATCH, 3, replace(SMALL, min_depth=2.0, max_depth=6.0), ALONE)
    image = Ramps(1).image(0)
    found = estimator.predict(image)
    mirrored = estimator.predict(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert found.shape == (24, 32)
    np.testing.assert_allclose(found, mirrored[:, ::-1], rtol=1e-6)
    assert found.min() >= 2.0
    assert found.max() <= 6.0


def test_the_eigen_crop_and_the_limits_decide_what_counts() -> None:
    truth = np.full((480, 640), 5.0, np.float32)
    truth[100, 100], truth[100, 101], truth[100, 102] = 0.0, 10.0, 11.0
    mask = counted(truth, Settings())
    top, left, bottom, right = EIGEN_CROP
    assert mask.sum() == (bottom - top) * (right - left) - 3
    assert (EIGEN_CROP[0], EIGEN_CROP[1]) == tuple(np.argwhere(mask)[0])
    assert counted(truth, replace(Settings(), nyu=False)).sum() == 480 * 640 - 3


def test_training_images_and_depth_are_changed_alike() -> None:
    values = np.linspace(1, 9, 640, dtype=np.float32)
    depth = np.tile(values, (480, 1))
    image = Image.fromarray(np.repeat((depth * 28)[..., None], 3, axis=2).astype(np.uint8))
    for place in range(6):
        pixels, target = training_sample(image, depth, (416, 544), True, np.random.default_rng(place))
        assert pixels.shape == (3, 416, 544)
        assert target.shape == (416, 544)
        assert target.dtype == np.float32
        known = target > 0
        assert np.corrcoef(pixels[1][known], target[known])[0, 1] > 0.97


def test_images_that_are_not_nyus_are_refused_unless_asked_for() -> None:
    scenes = ("scenes:n=2,size=16", "scenes:n=2,size=16,split=test")
    with pytest.raises(UserError, match=r"scenes:0 has 16×16 pixels, NYUv2's have 640×480"):
        open_both(*scenes, Settings(), None, progress=False)
    assert len(open_both(*scenes, SMALL, None, progress=False)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "--layers 3 is impossible"),
        ({"min_depth": 11.0}, "--min-depth 11.0 is not below"),
        ({"crop": (416,)}, "a height and a width"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(Settings(), **changes))


def test_a_head_learns_from_features_that_are_made_once() -> None:
    metrics, _ = estimate(grid, PATCH, Ramps(20), Ramps(7, seed=1), SMALL, ALONE, kept=(16, 24, 5), progress=False)
    untrained, _ = measured(settings=replace(SMALL, iterations=1, rate=1e-9))
    assert metrics["rmse"] < 0.6 * untrained["rmse"]
