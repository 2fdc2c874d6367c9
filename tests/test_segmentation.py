from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from coloured import ALONE, PATCH, SMALL, Coloured, grid, measured, sizes_of
from evaluation import CPU
from PIL import Image
from ranks import run_on_ranks
from torch import nn

from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval import segmentation
from eval.dense import InputNorm, LinearHead, Samples, keep_grids, on_pixels, short_side_size, warm, windows
from eval.segmentation import Segmenter, check, labels_of, segment
from eval.segmentation_crops import VOID, distort, training_sample


def test_a_head_learns_classes_that_colours_tell() -> None:
    metrics, more = measured()
    assert metrics["miou"] > 85
    expected = sum(int((labels_of(Coloured(7, seed=1), n, SMALL) != VOID).sum()) for n in range(7))
    assert more["pixels"] == expected
    assert len(more["iou"]) == 3


def test_without_training_a_head_knows_nothing() -> None:
    metrics, _ = measured(settings=replace(SMALL, iterations=1, rate=1e-9))
    assert metrics["miou"] < 45


def _on_a_rank(broken: tuple[int, ...]) -> Any:
    metrics, more = measured(
        World(dist.get_rank(), dist.get_world_size(), 0, CPU), replace(SMALL, train_batch=5, iterations=25), broken
    )
    return metrics, (more["pixels"], more["bad_images"])


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("broken", [(), (1, 4)])
def test_ranks_share_crops_and_images_and_find_what_one_finds(broken: tuple[int, ...]) -> None:
    alone, more = measured(settings=replace(SMALL, train_batch=5, iterations=25), broken=broken)
    assert more["bad_images"] == len(broken)
    for metrics, counts in run_on_ranks(_on_a_rank, 2, broken):
        assert counts == (more["pixels"], more["bad_images"])
        assert metrics == pytest.approx(alone, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The head.


def test_the_norm_is_batch_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = InputNorm(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    for _ in range(3):
        inputs = 3 * torch.randn(4, 5, 6, 7) + 2
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)


def test_places_without_a_sample_do_not_move_the_statistics() -> None:
    inputs = torch.randn(4, 2, 3, 3)
    some, whole = InputNorm(2), InputNorm(2)
    some(torch.cat([inputs, torch.full((2, 2, 3, 3), 99.0)]), 4)
    whole(inputs)
    torch.testing.assert_close(some.running_mean, whole.running_mean)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 9)])
def test_any_size_gets_an_output_for_every_pixel(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    found = on_pixels(images, PATCH, lambda inputs: inputs[:, :2], grid)
    assert found.shape == (2, 2, *size)
    constant = on_pixels(torch.zeros(1, 3, *size), PATCH, lambda inputs: inputs + 1, grid)
    torch.testing.assert_close(constant, torch.ones_like(constant))


def test_outputs_lie_where_their_patches_are() -> None:
    images = torch.zeros(1, 3, 18, 18)  # padded by one pixel on each side
    images[:, :, 3:7, 7:11] = 1.0  # exactly the patch in row 1, column 2
    found = on_pixels(images, PATCH, lambda inputs: inputs[:, :1], grid)[0, 0]
    row, column = divmod(int(found.argmax()), 18)
    assert row in (4, 5)
    assert column in (8, 9)


def test_the_head_starts_the_same_on_every_rank_and_as_published() -> None:
    first, second = (LinearHead(300, 40, True, seed=3) for _ in range(2))
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert abs(float(first.linear.weight.std()) - 0.01) < 5e-4


def test_the_rate_warms_up_and_falls_linearly_to_zero() -> None:
    settings = replace(SMALL, iterations=100, warmup=10, rate=2.0)
    rate = Segmenter(grid, PATCH, 3, settings, ALONE)._rate
    assert rate(0) == pytest.approx(2e-6)
    assert rate(5) == pytest.approx(2.0 * 0.95 * 0.5, rel=1e-4)
    assert rate(10) == pytest.approx(1.8)
    assert rate(99) == pytest.approx(0.02)
    assert warm(3, 0, 0.1) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Windows.


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (10, 33), (8, 8), (100, 37)])
def test_windows_cover_every_pixel_and_stay_inside(height: int, width: int) -> None:
    seen = np.zeros((height, width), int)
    for top, left, bottom, right in windows(height, width, 16, 7):
        assert (bottom - top, right - left) == (min(16, height), min(16, width))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1


def test_one_window_is_one_forward_of_the_whole_image() -> None:
    segmenter = Segmenter(grid, PATCH, 3, replace(SMALL, short_side=24, crop=64, stride=64), ALONE)
    segmenter.head.eval()
    image = Coloured(1).image(0)
    from eval.dense import to_input

    pixels = torch.from_numpy(to_input(image))[None]
    with torch.no_grad():
        expected = on_pixels(pixels, PATCH, segmenter.head, grid)[0].softmax(dim=0)
    torch.testing.assert_close(segmenter.probabilities(image), expected)


def test_probabilities_are_the_mean_over_the_ratios() -> None:
    image = Coloured(1).image(0)
    parts = []
    for ratios in ((1.0,), (2.0,), (1.0, 2.0)):
        segmenter = Segmenter(grid, PATCH, 3, replace(SMALL, ratios=ratios), ALONE)
        segmenter.head.eval()
        parts.append(segmenter.probabilities(image))
    torch.testing.assert_close(parts[2], (parts[0] + parts[1]) / 2)
    assert not torch.allclose(parts[0], parts[1], atol=1e-5)
    torch.testing.assert_close(parts[2].sum(dim=0), torch.ones(24, 32))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("ratios", [(1.0,), (1.0, 1.73)])
def test_the_number_of_forwards_is_known_beforehand(ratios: tuple[float, ...], mirror: bool) -> None:
    calls: list[int] = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return grid(images)

    segmenter = Segmenter(counting, PATCH, 3, replace(SMALL, ratios=ratios, mirror=mirror), ALONE)
    segmenter.head.eval()
    for index in range(2):
        calls.clear()
        image = Coloured(2).image(index)
        segmenter.probabilities(image)
        assert len(calls) == segmenter.calls((image.height, image.width))


def test_a_mirrored_image_has_mirrored_probabilities() -> None:
    def lopsided(images: torch.Tensor) -> torch.Tensor:
        return grid(images) * torch.linspace(0, 1, images.shape[3] // PATCH)

    image = Coloured(1).image(0)
    segmenter = Segmenter(lopsided, PATCH, 3, replace(SMALL, mirror=True), ALONE)
    segmenter.head.eval()
    there = segmenter.probabilities(image)
    back = segmenter.probabilities(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).flip(-1)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.sum(dim=0), torch.ones(24, 32))
    segmenter.settings = SMALL
    alone = segmenter.probabilities(image)
    mirrored = segmenter.probabilities(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).flip(-1)
    torch.testing.assert_close(there, (alone + mirrored) / 2)
    assert not torch.allclose(alone, there, atol=1e-5)


def test_the_scales_of_training_images_are_those_asked_for() -> None:
    def widths(scales: tuple[float, float], longest: float) -> set[int]:
        image, labels = Image.new("RGB", (60, 10)), np.zeros((10, 60), np.uint8)
        found = [
            training_sample(image, labels, 10, 400, np.random.default_rng(place), scales, longest)[1]
            for place in range(12)
        ]
        return {int((target != VOID).any(axis=0).sum()) for target in found}

    assert all(60 <= width <= 180 for width in widths((1.0, 3.0), 0.0))
    assert max(widths((1.0, 3.0), 0.0)) > 120
    assert all(20 <= width <= 80 for width in widths((0.5, 2.0), 4.0))


def test_the_short_side_decides_unless_the_long_one_is_too_long() -> None:
    assert short_side_size(100, 200, 50) == (50, 100)
    assert short_side_size(100, 1000, 50, 200) == (20, 200)


# ---------------------------------------------------------------------------------------------------------------------
# Training crops.


def test_image_and_classes_are_changed_alike() -> None:
    pairs = Coloured(1, sizes=((64, 96),))
    labels = labels_of(pairs, 0, SMALL)
    agreeing = []
    for place in range(30):
        image, target = training_sample(pairs.image(0), labels, 48, 32, np.random.default_rng(place))
        assert image.shape == (3, 32, 32)
        assert target.shape == (32, 32)
        known = target != VOID
        # Hue moves by 18° at most, so the strongest colour stays.
        strongest = (image * [[[0.229]], [[0.224]], [[0.225]]] + [[[0.485]], [[0.456]], [[0.406]]]).argmax(axis=0)
        agreeing.append((strongest == target)[known].mean())
    assert np.mean(agreeing) > 0.8


def test_beyond_the_edge_nothing_counts() -> None:
    pairs = Coloured(1, sizes=((16, 16),))
    image, target = training_sample(pairs.image(0), labels_of(pairs, 0, SMALL), 16, 64, np.random.default_rng(0))
    assert image.shape == (3, 64, 64)
    inside = np.flatnonzero((target != VOID).any(axis=1)).max() + 1
    assert inside < 64
    assert np.all(target[inside:] == VOID)
    assert np.all(image[:, inside:] == 0)


def test_a_crop_of_one_class_is_drawn_anew() -> None:
    labels = np.zeros((40, 400), np.uint8)
    labels[:, 390:] = 1
    image = Image.new("RGB", (400, 40))
    found = [
        len(np.unique(training_sample(image, labels, 40, 24, np.random.default_rng(place))[1])) for place in range(40)
    ]
    chance = 24 / 400
    assert np.mean(np.array(found) > 1) > 3 * chance


def test_distortion_keeps_the_shape_and_often_changes_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    found = [distort(pixels, np.random.default_rng(place)) for place in range(30)]
    assert all(p.shape == pixels.shape and p.dtype == np.uint8 for p in found)
    same = sum(np.array_equal(p, pixels) for p in found)
    assert 0 <= same < 8


def test_a_step_holds_the_same_samples_on_any_number_of_ranks() -> None:
    def make(index: int, rng: np.random.Generator) -> Any:
        value = 1000 * index + rng.integers(1000)
        return np.full((3, 2, 2), value, np.float32), np.full((2, 2), index, np.int64)

    def step(world_size: int) -> list[float]:
        found: list[float] = []
        for rank in range(world_size):
            images, targets, count = Samples(11, make, 5, 0, rank, world_size, void=VOID)[7]
            assert images.shape[0] == targets.shape[0] == -(-5 // world_size)
            assert torch.all(targets[count:] == VOID)
            found += images[:count, 0, 0, 0].tolist()
        return found

    assert step(1) == step(2) == step(4) == step(7)
    assert len(set(step(1))) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Settings and mistakes.


def arguments(*words: str) -> Any:
    return segmentation._parser().parse_args(["--weights", "x", *words])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for weights; keeps the settings that a command comes to."""
    from tiny import tiny_backbone

    from eval import command

    kept: dict[str, Any] = {}

    def stop(*positional: Any, **_: Any) -> Any:
        kept["settings"] = positional[5]
        raise InterruptedError

    subject = command.Subject("teacher", tiny_backbone(depth=2), 1, None, "x", None, ALONE)
    monkeypatch.setattr(command, "_load", lambda *_: subject)
    monkeypatch.setattr(segmentation, "segment", stop)
    return kept


_SCENES = ("--train", "scenes:n=3,size=16", "--test", "scenes:n=2,size=16,split=test")


def test_flags_go_before_what_the_data_suggest(loaded: dict[str, Any]) -> None:
    with pytest.raises(InterruptedError):
        segmentation.run(arguments(*_SCENES, "--crop", "12", "--stride", "6"))
    settings = loaded["settings"]
    assert (settings.classes, settings.short_side, settings.crop, settings.blocks) == (11, 16, 12, 1)


def test_multi_scale_reads_four_blocks_or_as_many_as_there_are(loaded: dict[str, Any]) -> None:
    with pytest.raises(InterruptedError):
        segmentation.run(arguments(*_SCENES, "--multi-scale", "--ratios", "1", "2"))
    settings = loaded["settings"]
    assert (settings.blocks, settings.crop, settings.ratios) == (2, 640, (1.0, 2.0))
    assert (settings.scales, settings.longest, settings.mirror) == ((1.0, 3.0), 0.0, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 20}, "--stride 20 leaves gaps"),
        ({"classes": 300}, "--classes 300 is impossible"),
        ({"ratios": (1.0, 0.0)}, "--ratios 0.0 is impossible"),
        ({"iterations": 0}, "--iterations 0 is impossible"),
        ({"scales": (2.0, 1.0)}, r"--scales \[2.0, 1.0\] is impossible"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(SMALL, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# Features that are made once, as during pretraining.


def test_kept_features_and_classes_lie_on_each_other() -> None:
    pairs = Coloured(5)
    grids, targets = keep_grids(grid, pairs, lambda index: labels_of(pairs, index, SMALL), 5, 24, 2, ALONE, VOID)
    assert grids.shape == (5, 3, 6, 6)
    assert targets.shape == (5, 24, 24)
    # Squares of 8 pixels cover whole patches here, so a patch's strongest colour is the class of its pixels.
    classes = targets.reshape(5, 6, 4, 6, 4)[:, :, 1, :, 1]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    normal = grids * deviation + mean
    known = classes != VOID
    assert float((normal.argmax(dim=1) == classes)[known].float().mean()) > 0.95


def test_a_head_learns_from_kept_features_too() -> None:
    test = Coloured(7, seed=1)
    settings = replace(SMALL, crop=24, stride=24)
    metrics, _ = segment(grid, PATCH, Coloured(20), test, sizes_of(test), settings, ALONE, kept=12, progress=False)
    assert metrics["miou"] > 80
