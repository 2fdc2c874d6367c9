"""The fast augmentation against the reference: the same draws, and pixels that differ by rounding."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_images import PUBLISHED, jpeg, natural, noise
from numpy.typing import NDArray
from PIL import Image

from dinov2_fsdp import native
from dinov2_fsdp.data import augment, fast_augment
from dinov2_fsdp.data.augment import CropParameters, MultiCrop, multi_crop
from dinov2_fsdp.data.fast_augment import FastMultiCrop, reduced_box, reduction
from dinov2_fsdp.data.sources.decoding import LazyImage

VARIANTS = [name.strip("_") for name in native.VARIANTS["AVX512"]]
COMPILED = (found := native.library()) is not None and "crops" in found.names


@pytest.fixture(autouse=True, params=["compiled", "OpenCV"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Colours by compiled code, and by what runs where there is none."""
    if request.param == "compiled" and not COMPILED:
        pytest.skip("compiled colours need AVX-512 and an installation with a compiler")
    with nullcontext() if request.param == "compiled" else native.switched_off():
        yield request.param


PLAIN = CropParameters(box=(0, 0, 96, 96), flip=False, jitter=(), gray=False, blur_sigma=None, solarize_threshold=None)


def difference(pixels: NDArray[np.uint8], parameters: CropParameters, size: int = 96) -> NDArray[np.int64]:
    """Fast minus reference, (size, size, 3)."""
    slow = augment.apply(Image.fromarray(pixels), parameters, size).astype(np.int64)
    return fast_augment.apply(pixels, parameters, size).astype(np.int64) - slow


def spectrum(crop: NDArray[Any]) -> NDArray[np.float64]:
    """Power by spatial frequency, in ten bands up to the finest that a crop holds."""
    size = len(crop)
    gray, window = crop.astype(float).mean(axis=2), np.hanning(size)
    power = np.abs(np.fft.fft2((gray - gray.mean()) * window[:, None] * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    return np.bincount(np.minimum((20 * frequency).astype(int), 9).ravel(), power.ravel(), 10)


# -- operation by operation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [noise(), natural()], ids=["noise", "natural"])
@pytest.mark.parametrize("box", [(0, 0, 96, 96), (3, 5, 20, 31), (40, 0, 8, 96), (95, 95, 1, 1), (8, 8, 56, 56)])
@pytest.mark.parametrize("size", [14, 56, 112])
def test_crop_and_resize_differ_by_rounding(
    pixels: NDArray[np.uint8], box: tuple[int, int, int, int], size: int
) -> None:
    """Pillow's weights have 22 bits, torch's 16: of ten thousand values one may be two off."""
    found = np.abs(difference(pixels, replace(PLAIN, box=box), size))
    assert found.max() <= 2
    assert (found > 1).mean() < 5e-4
    assert found.mean() < 0.05


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("height", [200, 96, 30, 1])
@pytest.mark.parametrize("width", [300, 96, 50, 17, 1])
def test_compiled_resampling_has_pillows_bits(
    variant: str, width: int, height: int, use_variant: Callable[[str], None]
) -> None:
    """Rows before columns, which Pillow does not for every box. Pixels are picked from a register and from memory."""
    use_variant(variant)
    image = noise(200, 300)
    box = Image.fromarray(image[:height, -width:])
    for size in (1, 15, 16, 33, 80, 99, 200):
        exact = np.array(box.resize((size, height), Image.Resampling.BICUBIC).resize((size, size)))
        for flip in (False, True):
            drawn = replace(PLAIN, box=(0, 300 - width, height, width), flip=flip)
            found = fast_augment.apply(image, drawn, size)
            np.testing.assert_array_equal(found[:, ::-1] if flip else found, exact)


@pytest.mark.parametrize("pixels", [noise(), natural()], ids=["noise", "natural"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.21, 1.4, 2.0])
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_differ_by_rounding(
    pixels: NDArray[np.uint8], operation: str, factor: float
) -> None:
    found = np.abs(difference(pixels, replace(PLAIN, jitter=((operation, factor),))))
    assert found.max() <= 2
    assert found.mean() < 0.05


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.031, 0.0, 0.003, 0.1, 0.5])
@pytest.mark.parametrize(("pixels", "mean"), [(noise(), 1.2), (natural(), 0.4)], ids=["noise", "natural"])
def test_hue_differs_by_its_own_rounding(pixels: NDArray[np.uint8], mean: float, factor: float) -> None:
    """Hue has 256 steps in both; Pillow cuts fractions off where OpenCV rounds, so that they lie one step apart."""
    found = difference(pixels, replace(PLAIN, jitter=(("hue", factor),)))
    assert np.abs(found).mean() < mean
    assert abs(found.mean()) < 0.3
    assert np.quantile(np.abs(found), 0.99) <= 8


def test_a_hue_past_the_end_comes_round() -> None:
    red = np.full((4, 4, 3), (255, 0, 20), np.uint8)
    found = fast_augment.apply(red, replace(PLAIN, box=(0, 0, 4, 4), jitter=(("hue", 0.1),)), 4)[0, 0]
    hue = colorsys.rgb_to_hsv(*(found / 255))[0]
    assert hue == pytest.approx((colorsys.rgb_to_hsv(1, 0, 20 / 255)[0] + 0.1) % 1, abs=0.01)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 5, 16, 37, 56])
@pytest.mark.parametrize("order", range(24))
def test_compiled_colours_are_pillows_but_for_one_in_many(
    order: int, size: int, variant: str, use_variant: Callable[[str], None]
) -> None:
    """Pillow's own rounding decides where an exact hue or saturation is a whole number; all else is the same."""
    use_variant(variant)
    operations = (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2), ("hue", -0.08))
    jitter = tuple(operations[i] for i in augment.JITTER_ORDERS[order])
    for left_out in ("hue", None):
        chosen = tuple(operation for operation in jitter if operation[0] != left_out)
        for gray in (False, True):
            drawn = replace(PLAIN, box=(20, 20, size, size), flip=True, jitter=chosen, gray=gray, solarize_threshold=99)
            for pixels in (noise(), natural()):
                found = np.abs(difference(pixels, drawn, size))
                assert (found > 0).mean() <= (0.0 if left_out else 0.02)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_every_hue_and_saturation_comes_back_as_pillows() -> None:
    steps = np.array([*range(0, 256, 5), 1, 2, 254], np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    side = int(len(colours) ** 0.5)
    square = colours[: side * side].reshape(side, side, 3)
    for factor in (-0.1, 0.0, 0.07, 0.5):
        found = np.abs(difference(square, replace(PLAIN, box=(0, 0, side, side), jitter=(("hue", factor),)), side))
        assert (found > 0).mean() < 0.01
        assert found.max() <= 6  # a step of hue


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("size", [1, 3, 31, 32, 33, 70])
@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0, 6.0])
def test_a_compiled_blur_is_that_of_its_kernel(sigma: float, size: int) -> None:
    """Crops of fewer pixels than the kernel has weights, and of all rests of a vector."""
    pixels = noise(size, size)
    found = fast_augment.apply(pixels, replace(PLAIN, box=(0, 0, size, size), blur_sigma=sigma), size)
    kernel = fast_augment._blur_kernel(fast_augment._rounded(sigma)).astype(float)
    radius = len(kernel) // 2
    exact = np.pad(pixels.astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    for axis in (0, 1):
        exact = np.apply_along_axis(np.convolve, axis, exact, kernel, "valid")
    assert np.abs(found - exact).max() <= 0.5 + 0.1


@pytest.mark.parametrize("pixels", [noise(), natural()], ids=["noise", "natural"])
def test_grey_differs_by_at_most_one(pixels: NDArray[np.uint8]) -> None:
    found = np.abs(difference(pixels, replace(PLAIN, gray=True)))
    assert found.max() <= 1
    assert found.mean() < 0.05


@pytest.mark.parametrize("pixels", [noise(), natural()], ids=["noise", "natural"])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.3, 1.7, 2.0])
def test_blur_differs_by_the_rounding_of_six_passes(pixels: NDArray[np.uint8], sigma: float) -> None:
    """Pillow rounds after each of three boxes along each side. At the borders it repeats what is already blurred."""
    found = difference(pixels, replace(PLAIN, blur_sigma=sigma))
    inside = found[8:-8, 8:-8]
    assert np.abs(inside).max() <= 4
    assert np.abs(inside).mean() < 1.1
    assert abs(inside.mean()) < 0.02
    assert np.abs(found).mean() < 1.1


@pytest.mark.parametrize("change", [{"flip": True}, {"solarize_threshold": 128}, {"solarize_threshold": 0}], ids=str)
def test_flip_and_solarize_are_exact(change: dict[str, Any]) -> None:
    assert not difference(noise(), replace(PLAIN, **change)).any()


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_a_factor_of_one_changes_nothing(operation: str) -> None:
    found = fast_augment.apply(noise(), replace(PLAIN, jitter=((operation, 1.0),)), 96)
    np.testing.assert_array_equal(found, noise())


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize(
    "change",
    [
        {"jitter": (("saturation", 1.2),)},
        {"jitter": (("contrast", 1.4),)},
        {"jitter": (("hue", 0.1),)},
        {"gray": True},
        {"blur_sigma": 1.7},
    ],
    ids=str,
)
def test_a_plain_grey_picture_stays_as_it_is(value: int, change: dict[str, Any]) -> None:
    plain = np.full((96, 96, 3), value, np.uint8)
    np.testing.assert_array_equal(fast_augment.apply(plain, replace(PLAIN, **change), 96), plain)


# -- strengths --------------------------------------------------------------------------------------------------------


def strength(operation: str, crop: NDArray[Any]) -> float:
    pixels = crop.astype(float)
    if operation == "brightness":
        return float(pixels.mean())
    if operation == "contrast":
        return float(pixels.mean(axis=2).std())
    if operation == "saturation":
        return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())
    return float(np.abs(np.diff(pixels, axis=1)).mean())  # sharpness


@pytest.mark.parametrize(
    ("operation", "low", "high"), [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2)]
)
def test_an_operation_is_as_strong_as_in_the_reference(operation: str, low: float, high: float) -> None:
    for seed, factor in enumerate(np.linspace(low, high, 9).tolist()):
        parameters = replace(PLAIN, jitter=((operation, factor),))
        slow = augment.apply(Image.fromarray(natural(seed=seed)), parameters, 96)
        fast = fast_augment.apply(natural(seed=seed), parameters, 96)
        assert strength(operation, fast) == pytest.approx(strength(operation, slow), rel=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.4, 0.7, 1.0, 1.4, 2.0])
def test_blur_takes_as_much_sharpness_as_in_the_reference(sigma: float) -> None:
    parameters = replace(PLAIN, blur_sigma=sigma)
    slow, fast = [], []
    for seed in range(5):
        slow.append(strength("blur", augment.apply(Image.fromarray(natural(seed=seed)), parameters, 96)))
        fast.append(strength("blur", fast_augment.apply(natural(seed=seed), parameters, 96)))
    assert np.mean(fast) == pytest.approx(np.mean(slow), rel=0.03)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_spreads_a_line_by_the_standard_deviation_drawn(sigma: float) -> None:
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[:, 48] = 255
    profile = fast_augment.apply(pixels, replace(PLAIN, blur_sigma=sigma), 96)[48, :, 0].astype(float)
    spread = np.sqrt((profile * (np.arange(96) - 48) ** 2).sum() / profile.sum())
    assert spread == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("factor", [-0.1, -0.04, 0.05, 0.1])
def test_hue_turns_as_far_as_in_the_reference(factor: float) -> None:
    colours = np.array([[[200, 60, 40], [40, 180, 90], [50, 80, 210], [190, 170, 30]]], np.uint8).repeat(4, axis=0)
    parameters = replace(PLAIN, box=(0, 0, 4, 4), jitter=(("hue", factor),))
    slow, fast = augment.apply(Image.fromarray(colours), parameters, 4), fast_augment.apply(colours, parameters, 4)
    for x in range(4):
        turned = [colorsys.rgb_to_hsv(*(crop[0, x] / 255))[0] for crop in (slow, fast)]
        assert abs((turned[1] - turned[0] + 0.5) % 1 - 0.5) < 1.5 / 256


# -- whole crops ------------------------------------------------------------------------------------------------------


def both(image: NDArray[np.uint8], seed: int, **changes: Any) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Reference and fast crops of an image from the same draws, global and local ones in one list."""
    settings = {**PUBLISHED, **changes}
    slow = multi_crop(**settings)(Image.fromarray(image), np.random.default_rng(seed))
    fast = multi_crop(**settings, kind=FastMultiCrop)(Image.fromarray(image), np.random.default_rng(seed))
    return [pair for kind in zip(slow, fast, strict=True) for pair in zip(*kind, strict=True)]


def test_whole_crops_differ_by_less_than_a_level_on_average() -> None:
    found = []
    for seed in range(12):
        for slow, fast in both(natural(150, 200, seed), seed, solarize_p=0.0):
            found.append(np.abs(fast.astype(int) - slow).mean())
    assert np.mean(found) < 0.6
    assert np.max(found) < 2.5


def test_solarized_crops_are_the_same_but_for_pixels_at_the_threshold() -> None:
    for seed in range(12):
        slow, fast = both(natural(150, 200, seed), seed, solarize_p=1.0)[1]
        assert (np.abs(fast.astype(int) - slow) > 12).mean() < 0.04


def test_the_mean_spectra_agree() -> None:
    for kind in ("global", "local"):
        slow_power, fast_power = np.zeros(10), np.zeros(10)
        for seed in range(12):
            pairs = both(natural(150, 200, seed), seed, solarize_p=0.0)
            for slow, fast in pairs[:2] if kind == "global" else pairs[2:]:
                slow_power += spectrum(slow)
                fast_power += spectrum(fast)
        np.testing.assert_allclose(fast_power, slow_power, rtol=0.03)


def test_mean_and_spread_of_every_colour_agree() -> None:
    slow, fast = [], []
    for seed in range(12):
        for a, b in both(natural(150, 200, seed), seed):
            slow.append([*a.mean(axis=(0, 1)), *a.std(axis=(0, 1))])
            fast.append([*b.mean(axis=(0, 1)), *b.std(axis=(0, 1))])
    np.testing.assert_allclose(np.mean(fast, 0), np.mean(slow, 0), atol=0.25)


def test_both_paths_draw_the_same_and_as_much() -> None:
    states = []
    for kind in (MultiCrop, FastMultiCrop):
        rng, crops = np.random.default_rng(3), multi_crop(**PUBLISHED, kind=kind)
        drawn = crops.draw(200, 150, np.random.default_rng(3))
        crops(Image.fromarray(natural(150, 200)), rng)
        states.append((drawn, rng.bit_generator.state["state"]["state"]))
    assert states[0] == states[1]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_images_work(width: int, height: int) -> None:
    for seed in range(20):
        for slow, fast in both(noise(height, width, seed), seed, solarize_p=0.0):
            assert np.abs(fast.astype(int) - slow).mean() < 6


def test_without_local_crops_their_array_is_empty() -> None:
    crops = multi_crop(**{**PUBLISHED, "n_local": 0}, kind=FastMultiCrop)
    assert crops(Image.fromarray(natural()), np.random.default_rng(0))[1].shape == (0, 56, 56, 3)


def test_the_image_is_left_as_it_was() -> None:
    image = Image.fromarray(natural())
    before = image.tobytes()
    multi_crop(**PUBLISHED, kind=FastMultiCrop)(image, np.random.default_rng(0))
    assert image.tobytes() == before


def test_crops_may_lie_anywhere() -> None:
    """Spread, upside down, with the channels last; of an image whose rows are."""
    pixels, drawn = natural(60, 80), [replace(PLAIN, box=(3, 5, 50, 60), flip=True), replace(PLAIN, box=(0, 0, 60, 80))]
    expected = [fast_augment.apply(pixels, one, 16).transpose(2, 0, 1) for one in drawn]
    places = {
        "spread": np.zeros((4, 3, 16, 16), np.uint8)[::2],
        "upside down": np.zeros((2, 3, 16, 16), np.uint8)[::-1],
        "channels last": np.zeros((2, 16, 16, 3), np.uint8).transpose(0, 3, 1, 2),
        "in rows of their own": np.zeros((2, 3, 16, 20), np.uint8)[..., :16],
    }
    for name, crops in places.items():
        fast_augment.make(pixels, drawn, crops[:1], crops[1:])
        for found, exact in zip(crops, expected, strict=True):
            assert np.abs(found.astype(int) - exact).max() <= 2, name
    spread = np.zeros((60, 100, 3), np.uint8)[:, :80]
    spread[...] = pixels
    assert np.abs(fast_augment.apply(spread, drawn[0], 16).transpose(2, 0, 1).astype(int) - expected[0]).max() <= 2


def test_a_crop_of_the_whole_image_leaves_it_as_it_was() -> None:
    pixels = noise(56, 56)
    everything = replace(
        PLAIN, box=(0, 0, 56, 56), jitter=(("brightness", 1.2), ("contrast", 0.8), ("saturation", 1.1))
    )
    fast_augment.apply(pixels, everything, 56)
    np.testing.assert_array_equal(pixels, noise(56, 56))


def test_weights_of_a_blur_that_are_left_out_move_no_value_by_more_than_a_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edge = np.zeros((96, 96, 3), np.uint8)
    edge[:, 48:] = 255
    for sigma in np.linspace(0.1, 2, 39).tolist():
        found = fast_augment.apply(edge, replace(PLAIN, blur_sigma=sigma), 96)
        with monkeypatch.context() as patch:
            patch.setattr(fast_augment, "NEGLIGIBLE", 0.0)
            for kernel in ("_blur_kernel", "_kernel_in_memory"):
                patch.setattr(fast_augment, kernel, getattr(fast_augment, kernel).__wrapped__)
            whole = fast_augment.apply(edge, replace(PLAIN, blur_sigma=sigma), 96)
        assert np.abs(found.astype(int) - whole).max() <= 1


# -- reduced decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "expected"),
    [([671, 5000], 1), ([672, 5000], 2), ([1343, 1344], 2), ([1344, 5000], 4), ([2688, 2688], 8), ([56, 9000], 1)],
)
def test_an_image_is_reduced_as_far_as_its_least_shrunk_crop_bears(sides: list[int], expected: int) -> None:
    parameters = [replace(PLAIN, box=(0, 0, side, side + 7)) for side in sides]
    assert reduction(parameters, [112] * len(sides)) == expected


def test_no_crop_is_ever_enlarged_because_of_a_reduction() -> None:
    crops = multi_crop(**PUBLISHED, kind=FastMultiCrop)
    factors = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        width, height = rng.integers(30, 6000, 2).tolist()
        parameters, sizes = crops.draw(width, height, rng), [112] * 2 + [56] * 8
        factor = reduction(parameters, sizes)
        factors.add(factor)
        reduced = np.empty((-(-height // factor), -(-width // factor), 0), np.uint8)
        for drawn, size in zip(parameters, sizes, strict=True):
            top, left, h, w = reduced_box(drawn.box, factor, reduced)
            assert 0 <= top <= top + h <= reduced.shape[0]
            assert 0 <= left <= left + w <= reduced.shape[1]
            assert factor == 1 or min(h, w) >= 2 * size
    assert factors == {1, 2, 4, 8}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_crops_of_a_reduced_image_are_as_sharp(factor: int) -> None:
    size = 28
    side = int(factor * size * fast_augment.SHARPNESS_MARGIN) + 1
    parameters = replace(PLAIN, box=(9, 5, side, side))
    assert reduction([parameters], [size]) == factor
    full_power, reduced_power = np.zeros(10), np.zeros(10)
    for seed in range(5):
        image = LazyImage(jpeg(natural(side + 20, side + 31, seed)), "x")
        reduced = image.pixels(factor)
        moved = replace(parameters, box=reduced_box(parameters.box, factor, reduced))
        full_power += spectrum(augment.apply(image.rgb(), parameters, size))
        reduced_power += spectrum(fast_augment.apply(reduced, moved, size))
    np.testing.assert_allclose(reduced_power, full_power, rtol=0.15)


def test_a_crop_of_a_reduced_image_shows_the_same_place() -> None:
    pixels = np.asarray(Image.fromarray(natural(16, 24)).resize((1201, 801), Image.Resampling.BICUBIC))
    image = LazyImage(jpeg(pixels), "x")
    reduced = image.pixels(8)
    parameters = replace(PLAIN, box=(123, 301, 500, 610))
    moved = replace(parameters, box=reduced_box(parameters.box, 8, reduced))
    slow, fast = augment.apply(image.rgb(), parameters, 16), fast_augment.apply(reduced, moved, 16)
    assert np.abs(fast.astype(int) - slow).mean() < 3  # 6 where it is eight pixels off


@pytest.mark.parametrize(("side", "expected"), [(300, 1), (1000, 2)])
def test_large_photographs_are_decoded_smaller_and_small_ones_whole(
    monkeypatch: pytest.MonkeyPatch, side: int, expected: int
) -> None:
    asked = []
    original = LazyImage.pixels

    def pixels(self: LazyImage, reduction: int = 1) -> NDArray[np.uint8]:
        asked.append(reduction)
        return original(self, reduction)

    monkeypatch.setattr(LazyImage, "pixels", pixels)
    crops = multi_crop(
        global_size=112, global_scale=(0.9, 1.0), local_size=56, local_scale=(0.3, 0.32), n_local=1, blur="none",
        kind=FastMultiCrop,
    )  # fmt: skip
    smooth = Image.fromarray(natural(60, 60)).resize((side, side))
    outputs = np.empty((2, 3, 112, 112), np.uint8), np.empty((1, 3, 56, 56), np.uint8)
    crops.fill(LazyImage(jpeg(np.asarray(smooth)), "x"), crops.draw(side, side, np.random.default_rng(0)), *outputs)
    assert asked == [expected]


def test_large_files_of_other_kinds_are_cropped_where_they_were_drawn() -> None:
    pixels = np.asarray(Image.fromarray(natural(16, 16)).resize((900, 900), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    settings = {**PUBLISHED, "global_size": 56, "local_size": 14, "global_scale": (0.9, 1.0), "blur": "none"}
    found = []
    for kind in (MultiCrop, FastMultiCrop):
        outputs = np.empty((2, 3, 56, 56), np.uint8), np.empty((8, 3, 14, 14), np.uint8)
        crops = multi_crop(**settings, kind=kind, solarize_p=0.0)
        crops.fill(LazyImage(buffer.getvalue(), "x"), crops.draw(900, 900, np.random.default_rng(0)), *outputs)
        found.append(outputs)
    for slow, fast in zip(*found, strict=True):
        assert np.abs(fast.astype(int) - slow).mean() < 0.6
