"""The augmentation: equal to torchvision's bit for bit, and as strong and as frequent as DINOv2 specifies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as F

from dinov2_fsdp.data.augment import CropParameters, CropSpec, MultiCrop, apply, draw, multi_crop
from dinov2_fsdp.errors import UserError

N_DRAWS = 2000
SPEC = CropSpec(size=32, scale=(0.32, 1.0), blur_p=0.5, solarize_p=0.2)
PLAIN = CropParameters(box=(0, 0, 48, 48), flip=False, jitter=(), gray=False, blur_sigma=None, solarize_threshold=None)
PUBLISHED: dict[str, Any] = {
    "global_size": 28,
    "global_scale": (0.32, 1.0),
    "local_size": 14,
    "local_scale": (0.05, 0.32),
    "n_local": 6,
    "blur": "paper",
}


def picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    """Return smooth colour with noise on it, over the full range of values."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse) + rng.integers(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8))


def reference(image: Image.Image, p: CropParameters, size: int) -> NDArray[np.uint8]:
    """Apply the parameters with torchvision's functions."""
    crop = F.resized_crop(image, *p.box, [size, size], transforms.InterpolationMode.BICUBIC)
    if p.flip:
        crop = F.hflip(crop)
    for operation, factor in p.jitter:
        crop = getattr(F, f"adjust_{operation}")(crop, factor)
    if p.gray:
        crop = F.to_grayscale(crop, 3)
    if p.blur_sigma is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=p.blur_sigma))
    if p.solarize_threshold is not None:
        crop = F.solarize(crop, p.solarize_threshold)
    return np.asarray(crop)


def draws(spec: CropSpec = SPEC, width: int = 480, height: int = 480) -> list[CropParameters]:
    rng = np.random.default_rng(0)
    return [draw(spec, width, height, rng) for _ in range(N_DRAWS)]


def assert_rate(events: list[bool], p: float) -> None:
    """Assert that the events' rate is within four standard deviations of a binomial's."""
    assert abs(np.mean(events) - p) <= 4 * math.sqrt(p * (1 - p) / len(events))


def assert_uniform(values: ArrayLike, low: float, high: float) -> None:
    """Assert uniformity by the Kolmogorov–Smirnov statistic at 0.1 %."""
    ordered = (np.sort(np.asarray(values)) - low) / (high - low)
    assert ordered[0] >= 0
    assert ordered[-1] <= 1
    assert np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max() < 1.95 / math.sqrt(len(ordered))


def assert_same_distribution(a: ArrayLike, b: ArrayLike) -> None:
    """Assert that two samples agree by the two-sample Kolmogorov–Smirnov statistic at 0.1 %."""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    at = np.concatenate([a, b])
    difference = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    assert np.abs(difference).max() < 1.95 * math.sqrt(1 / len(a) + 1 / len(b))


# Equality with torchvision


@pytest.mark.parametrize("box", [(0, 0, 48, 48), (3, 5, 20, 31), (40, 0, 8, 48), (47, 47, 1, 1), (8, 8, 32, 32)])
@pytest.mark.parametrize("size", [14, 32, 98])
def test_crop_and_resize_equal_torchvision(box: tuple[int, int, int, int], size: int) -> None:
    parameters = replace(PLAIN, box=box)
    np.testing.assert_array_equal(apply(picture(), parameters, size), reference(picture(), parameters, size))


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.21, 1.4, 2.0])
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_enhancements_equal_torchvision(operation: str, factor: float) -> None:
    parameters = replace(PLAIN, jitter=((operation, factor),))
    np.testing.assert_array_equal(apply(picture(), parameters, 48), reference(picture(), parameters, 48))


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.031, -0.001, 0.0, 0.003, 0.1, 0.5])
def test_hue_equals_torchvision(factor: float) -> None:
    parameters = replace(PLAIN, jitter=(("hue", factor),))
    np.testing.assert_array_equal(apply(picture(), parameters, 48), reference(picture(), parameters, 48))


@pytest.mark.parametrize(
    "change",
    [{"flip": True}, {"gray": True}, {"blur_sigma": 0.1}, {"blur_sigma": 1.3}, {"solarize_threshold": 128}],
    ids=str,
)
def test_flip_gray_blur_and_solarize_equal_torchvision_and_pillow(change: dict[str, Any]) -> None:
    parameters = replace(PLAIN, **change)
    result = apply(picture(), parameters, 48)
    np.testing.assert_array_equal(result, reference(picture(), parameters, 48))
    assert (result != np.asarray(picture())).any() or change == {"blur_sigma": 0.1}


def test_the_value_of_the_threshold_itself_is_solarized() -> None:
    image = Image.fromarray(np.array([[[127, 128, 255]]], np.uint8))
    parameters = replace(PLAIN, box=(0, 0, 1, 1), solarize_threshold=128)
    assert apply(image, parameters, 1).tolist() == [[[127, 127, 0]]]


@pytest.mark.parametrize(("width", "height"), [(48, 48), (120, 60), (31, 64)])
def test_the_whole_chain_equals_torchvision(width: int, height: int) -> None:
    image = picture(width, height)
    rng = np.random.default_rng(0)
    for _ in range(150):
        parameters = draw(SPEC, width, height, rng)
        np.testing.assert_array_equal(apply(image, parameters, 32), reference(image, parameters, 32))


# The distribution of what is drawn


def test_areas_and_positions_are_uniform_and_aspect_ratios_log_uniform() -> None:
    # No box of this scale is ever rejected, and the image is so large that rounding does not show.
    boxes = np.array([p.box for p in draws(replace(SPEC, scale=(0.05, 0.32)), 20_000, 20_000)])
    top, left, height, width = boxes.T
    assert_uniform(height * width / 20_000**2, 0.05 - 1e-3, 0.32 + 1e-3)
    assert_uniform(np.log(width / height), math.log(0.75) - 1e-3, math.log(4 / 3) + 1e-3)
    assert_uniform(top / (20_000 - height), 0, 1)
    assert_uniform(left / (20_000 - width), 0, 1)


def test_every_position_of_a_box_is_as_likely() -> None:
    corners = [p.box[:2] for p in draws(replace(SPEC, scale=(0.25, 0.25), ratio=(1.0, 1.0)), 4, 4)]
    for corner in [(top, left) for top in range(3) for left in range(3)]:
        assert_rate([other == corner for other in corners], 1 / 9)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (32, 32), (500, 100)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    ours = np.array([p.box for p in draws(SPEC, width, height)])
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, list(SPEC.scale), list(SPEC.ratio)) for _ in range(N_DRAWS)]
    )
    for side in range(4):
        assert_same_distribution(ours[:, side], theirs[:, side])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])


@pytest.mark.parametrize(("width", "height"), [(1, 500), (500, 1), (2000, 3)])
def test_an_image_that_no_box_fits_gives_torchvisions_central_crop(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height))
    expected = transforms.RandomResizedCrop.get_params(image, [1.0, 1.0], list(SPEC.ratio))
    assert draw(replace(SPEC, scale=(1.0, 1.0)), width, height, np.random.default_rng(0)).box == tuple(expected)


def test_every_operation_is_as_frequent_as_specified() -> None:
    drawn = draws()
    assert_rate([p.flip for p in drawn], 0.5)
    assert_rate([bool(p.jitter) for p in drawn], 0.8)
    assert_rate([p.gray for p in drawn], 0.2)
    assert_rate([p.blur_sigma is not None for p in drawn], 0.5)
    assert_rate([p.solarize_threshold is not None for p in drawn], 0.2)


def test_the_operations_are_drawn_independently() -> None:
    drawn = draws()
    events = np.array(
        [
            [p.flip, bool(p.jitter), p.gray, p.blur_sigma is not None, p.solarize_threshold is not None, p.box[0] > 40]
            for p in drawn
        ]
    )
    correlation = np.corrcoef(events.T) - np.eye(6)
    assert np.abs(correlation).max() < 4 / math.sqrt(N_DRAWS)


def test_jitter_is_as_strong_as_specified() -> None:
    factors = [dict(p.jitter) for p in draws() if p.jitter]
    assert_uniform([f["brightness"] for f in factors], 0.6, 1.4)
    assert_uniform([f["contrast"] for f in factors], 0.6, 1.4)
    assert_uniform([f["saturation"] for f in factors], 0.8, 1.2)
    assert_uniform([f["hue"] for f in factors], -0.1, 0.1)


def test_a_strength_above_one_does_not_make_factors_negative() -> None:
    factors = [dict(p.jitter) for p in draws(replace(SPEC, color_jitter=(2.0, 0.4, 0.2, 0.1))) if p.jitter]
    assert_uniform([f["brightness"] for f in factors], 0.0, 3.0)


def test_the_jitter_comes_in_all_orders_alike() -> None:
    orders = [tuple(operation for operation, _ in p.jitter) for p in draws() if p.jitter]
    for order in set(orders):
        assert_rate([other == order for other in orders], 1 / 24)
    assert len(set(orders)) == 24


def test_a_jitter_of_strength_zero_is_left_out() -> None:
    kept = {operation for p in draws(replace(SPEC, color_jitter=(0.4, 0.0, 0.2, 0.0))) for operation, _ in p.jitter}
    assert kept == {"brightness", "saturation"}


def test_blur_is_as_strong_as_specified() -> None:
    assert_uniform([p.blur_sigma for p in draws() if p.blur_sigma is not None], 0.1, 2.0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_spreads_a_line_by_the_standard_deviation_drawn(sigma: float) -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:, 24] = 255
    profile = apply(Image.fromarray(pixels), replace(PLAIN, blur_sigma=sigma), 48)[24, :, 0].astype(float)
    spread = math.sqrt((profile * (np.arange(48) - 24) ** 2).sum() / profile.sum())
    assert spread == pytest.approx(sigma, rel=0.1)


def test_brightness_in_pixels_is_as_strong_as_specified() -> None:
    only_brightness = CropSpec(
        size=4, scale=(0.32, 1.0), blur_p=0, solarize_p=0, jitter_p=1, gray_p=0, color_jitter=(0.4, 0, 0, 0)
    )
    uniform = Image.new("RGB", (8, 8), (150, 150, 150))
    values = [apply(uniform, p, 4)[0, 0, 0] for p in draws(only_brightness, 8, 8)]
    assert_uniform(np.asarray(values, float) + 0.5, 89, 212)


# Multi-crop


@pytest.mark.parametrize(("blur", "rates"), [("paper", (1.0, 0.1, 0.5)), ("released", (0.0, 0.9, 0.5))])
def test_blur_is_the_papers_or_the_released_codes(blur: str, rates: tuple[float, float, float]) -> None:
    crops = multi_crop(**{**PUBLISHED, "blur": blur})
    for spec, rate in zip((crops.global_1, crops.global_2, crops.local), rates, strict=True):
        assert_rate([p.blur_sigma is not None for p in draws(spec, 64, 64)], rate)


def test_only_the_second_global_crop_is_solarized() -> None:
    crops = multi_crop(**PUBLISHED)
    for spec, rate in ((crops.global_1, 0.0), (crops.global_2, 0.2), (crops.local, 0.0)):
        assert_rate([p.solarize_threshold is not None for p in draws(spec, 64, 64)], rate)


def test_keywords_reach_all_three_kinds_of_crop() -> None:
    changes: dict[str, Any] = {
        "flip_p": 0.0,
        "jitter_p": 0.1,
        "color_jitter": (0.1, 0.2, 0.3, 0.4),
        "gray_p": 0.3,
        "blur_sigma": (1.0, 1.5),
    }
    crops = multi_crop(**PUBLISHED, **changes, solarize_p=0.6)
    for spec in (crops.global_1, crops.global_2, crops.local):
        assert {name: getattr(spec, name) for name in changes} == changes
    assert crops.global_2.solarize_p == 0.6


def test_an_image_gives_two_global_and_the_local_crops() -> None:
    global_crops, local_crops = multi_crop(**PUBLISHED)(picture(), np.random.default_rng(0))
    assert (global_crops.shape, global_crops.dtype) == ((2, 28, 28, 3), np.uint8)
    assert (local_crops.shape, local_crops.dtype) == ((6, 14, 14, 3), np.uint8)


def test_each_crop_is_drawn_from_its_own_spec() -> None:
    crops = multi_crop(**PUBLISHED)
    first, second, *local = zip(*(crops.draw(400, 400, np.random.default_rng(i)) for i in range(200)), strict=True)
    area = [np.array([p.box[2] * p.box[3] / 400**2 for p in kind]) for kind in (first, second, sum(local, ()))]
    assert min(area[0].min(), area[1].min()) > 0.31
    assert area[2].max() < 0.33
    assert area[2].min() < 0.06
    assert all(p.solarize_threshold is None for p in first)
    assert any(p.solarize_threshold is not None for p in second)


@pytest.mark.parametrize("size", [(500, 375), (1000, 300), (3000, 40)], ids=str)
def test_all_crops_have_the_numbers_that_one_after_the_other_would_draw(size: tuple[int, int]) -> None:
    """The longer an image, the more boxes are tried in vain, and the sooner more numbers are wanted than were drawn."""
    crops = multi_crop(**PUBLISHED)
    specs = [crops.global_1, crops.global_2, *[crops.local] * crops.n_local]
    for seed in range(100):
        rng = np.random.default_rng(seed)
        assert crops.draw(*size, np.random.default_rng(seed)) == [draw(spec, *size, rng) for spec in specs]


def test_the_crops_are_what_was_drawn() -> None:
    crops = multi_crop(**PUBLISHED)
    parameters = crops.draw(48, 48, np.random.default_rng(3))
    global_crops, local_crops = crops(picture(), np.random.default_rng(3))
    for crop, p in zip([*global_crops, *local_crops], parameters, strict=True):
        np.testing.assert_array_equal(crop, reference(picture(), p, len(crop)))


def test_without_local_crops_their_array_is_empty() -> None:
    global_crops, local_crops = multi_crop(**{**PUBLISHED, "n_local": 0})(picture(), np.random.default_rng(0))
    assert global_crops.shape == (2, 28, 28, 3)
    assert local_crops.shape == (0, 14, 14, 3)


def test_the_crops_are_a_function_of_image_and_generator() -> None:
    crops, image = multi_crop(**PUBLISHED), picture()
    before = image.tobytes()
    first, other, again = (crops(image, np.random.default_rng(seed)) for seed in (0, 1, 0))
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()
    assert image.tobytes() == before


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_images_work(width: int, height: int) -> None:
    crops: MultiCrop = multi_crop(**PUBLISHED)
    for seed in range(50):
        for p in crops.draw(width, height, np.random.default_rng(seed)):
            top, left, h, w = p.box
            assert top >= 0 <= left
            assert 1 <= h <= height - top
            assert 1 <= w <= width - left
    assert crops(picture(width, height), np.random.default_rng(0))[0].shape == (2, 28, 28, 3)


# Mistakes


def test_an_unknown_blur_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"paper, released, none; got 'relased'; did you mean 'released'"):
        multi_crop(**{**PUBLISHED, "blur": "relased"})


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.3, 1.2)])
def test_an_impossible_scale_is_named(scale: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="scale is a"):
        multi_crop(**{**PUBLISHED, "local_scale": scale})


def test_an_impossible_hue_is_named() -> None:
    with pytest.raises(UserError, match="hue jitter"):
        multi_crop(**PUBLISHED, color_jitter=(0.4, 0.4, 0.2, 0.6))
