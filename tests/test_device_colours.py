"""Colours on the training device: Pillow's values bit for bit, in the microbatch, in a run, without a wait."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import PUBLISHED, jpeg, natural, noise
from numpy.typing import NDArray
from PIL import Image
from tiny import tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from training import differing, saved_tensors, tiny_run, train_alone

import eval.views
from dinov2_fsdp.config import Config
from dinov2_fsdp.data import augment, device_colours
from dinov2_fsdp.data.augment import CropParameters, multi_crop
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.device_colours import plan_colours
from dinov2_fsdp.data.loader import Microbatches, build_loader
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.ssl.step import SelfDistillation

CPU = torch.device("cpu")
PLAIN = CropParameters(box=(0, 0, 48, 48), flip=False, jitter=(), gray=False, blur_sigma=None, solarize_threshold=None)
JITTER = {"brightness", "contrast", "saturation", "hue"}
DEVICE = {"crops__implementation": "fast", "crops__colours": "device"}


def coloured(crops: Sequence[NDArray[np.uint8]], drawn: Sequence[CropParameters]) -> NDArray[np.uint8]:
    """The crops (S, S, 3), all in one call of the plan."""
    stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return plan_colours(drawn).apply_(stacked).permute(0, 2, 3, 1).numpy()


def assert_as_pillow(crops: Sequence[NDArray[np.uint8]], drawn: Sequence[CropParameters]) -> None:
    for crop, parameters, found in zip(crops, drawn, coloured(crops, drawn), strict=True):
        size = len(crop)
        expected = augment.apply(Image.fromarray(crop), replace(parameters, box=(0, 0, size, size)), size)
        np.testing.assert_array_equal(found, expected, str(parameters))


def changes_drawn(number: int) -> list[CropParameters]:
    """Colours of so many crops, each kind of operation in them often, in every order."""
    crops = multi_crop(**{**PUBLISHED, "blur": "released"}, solarize_p=0.5, gray_p=0.3)
    rng = np.random.default_rng(0)
    drawn = [parameters for _ in range(-(-number // 10)) for parameters in crops.draw(60, 60, rng)][:number]
    return [replace(parameters, flip=False) for parameters in drawn]


# -- operation by operation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_pillows(operation: str) -> None:
    for factor in (0.0, 0.013, 0.2, 0.6, 0.77, 0.93, 0.999, 1.0, 1.001, 1.21, 1.4, 2.0, 7.7):
        assert_as_pillow([noise(48, 48), natural(48, 48)], [replace(PLAIN, jitter=((operation, factor),))] * 2)


def test_hue_is_pillows() -> None:
    drawn = [replace(PLAIN, jitter=(("hue", factor),)) for factor in np.linspace(-0.5, 0.5, 41).tolist()]
    assert_as_pillow([noise(48, 48, seed) for seed in range(len(drawn))], drawn)


def test_a_million_colours_turn_as_in_pillow() -> None:
    colours = noise(1024, 1024)
    colours[0, :256] = np.arange(256, dtype=np.uint8)[:, None]
    colours[1, :256, 1:] = np.arange(256, dtype=np.uint8)[:, None]
    assert_as_pillow([colours, colours], [replace(PLAIN, jitter=(("hue", factor),)) for factor in (0.0, 0.0627)])


def test_blur_is_pillows() -> None:
    drawn = [replace(PLAIN, blur_sigma=sigma) for sigma in np.linspace(0.1, 2.0, 60).tolist()]
    assert_as_pillow([noise(48, 48, seed) for seed in range(60)], drawn)
    assert_as_pillow([255 * (noise(48, 48, seed) // 128) for seed in range(60)], drawn)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blur_is_pillows_where_its_kernel_is_wider_than_the_crop(size: int) -> None:
    drawn = [replace(PLAIN, blur_sigma=sigma) for sigma in (0.01, 0.4, 1.7, 2.0, 5.5)]
    assert_as_pillow([noise(size, size, seed) for seed in range(5)], drawn)


def test_grey_and_solarisation_are_pillows() -> None:
    drawn = [replace(PLAIN, gray=True), *(replace(PLAIN, solarize_threshold=value) for value in (0, 1, 128, 255, 256))]
    assert_as_pillow([noise(48, 48)] * len(drawn), drawn)


@pytest.mark.parametrize("levels", [(10, 11), (255, 254), (0, 1)])
def test_a_mean_between_two_levels_is_rounded_as_in_the_reference(levels: tuple[int, int]) -> None:
    crop = np.full((48, 48, 3), levels[0], np.uint8)
    crop[::2] = levels[1]
    assert_as_pillow([crop], [replace(PLAIN, jitter=(("contrast", 0.0),))])


def test_the_mean_of_a_large_crop_is_exact() -> None:
    """Its sum has more bits than single precision, in which it would be rounded to 255."""
    crop = np.full((512, 512, 3), 254, np.uint8)
    crop.reshape(-1, 3)[: 512 * 512 // 2 - 1] = 255
    found = coloured([crop], [replace(PLAIN, jitter=(("contrast", 0.0),))])
    assert np.unique(found).tolist() == [254]
    assert_as_pillow([crop], [replace(PLAIN, jitter=(("contrast", 0.3),))])


# -- whole crops ------------------------------------------------------------------------------------------------------


def test_crops_as_drawn_are_pillows() -> None:
    drawn = changes_drawn(200)
    assert {operation for parameters in drawn for operation, _ in parameters.jitter} == JITTER
    crops = [(noise if number % 2 else natural)(24, 24, number) for number in range(len(drawn))]
    assert_as_pillow(crops, drawn)


def test_crops_of_which_nothing_was_drawn_stay_as_they_are() -> None:
    crops = [noise(48, 48, seed) for seed in range(3)]
    found = coloured(crops, [PLAIN, replace(PLAIN, blur_sigma=2.0), PLAIN])
    assert [np.array_equal(a, b) for a, b in zip(crops, found, strict=True)] == [True, False, True]


@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_how_many_are_worked_at_together_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = changes_drawn(40)
    crops = [noise(24, 24, seed) for seed in range(len(drawn))]
    expected = coloured(crops, drawn)
    monkeypatch.setattr(device_colours, "VALUES_AT_ONCE", rows * 3 * 24 * 24)
    np.testing.assert_array_equal(coloured(crops, drawn), expected)


def test_nothing_makes_the_host_wait_for_a_gpu() -> None:
    """Tensors without memory have no values to look at: who asks for one, or mixes devices, gets an error."""
    plan = plan_colours(changes_drawn(40))
    assert {segment.operation for segment in plan.segments} == {*JITTER, "gray", "blur", "solarize"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = plan.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        crops = torch.empty(40, 3, 24, 24, dtype=torch.uint8, device="cuda")
        assert there.apply_(crops).device.type == "cuda"


# -- microbatches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of runs over JPEG files, two of them cut short."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(12):
        data = jpeg(natural(60 + i, 80, i))
        (folder / f"{i:02d}.jpg").write_bytes(data[: len(data) // 2] if i in (3, 8) else data)
    return {"data__train": f"folder:{folder}", "data__cache": str(folder / "cache")}


def microbatches(**settings: Any) -> list[Microbatch]:
    config = tiny_config(**settings)
    return list(build_loader(config, open_source(config.data.train, config.data.cache), 0, 3, 0, 2, pin=False))


def mean_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def test_a_microbatch_is_the_workers_up_to_rounding(photographs: dict[str, Any]) -> None:
    """Replaced images, whose draws are others than those of the images that cannot be read, among them."""
    settings = {"crops__blur": "none", "crops__solarize": 0.0, **photographs}
    by_worker = microbatches(**settings)
    assert any(batch.bad for batch in by_worker)
    for expected, plain in zip(by_worker, microbatches(**settings, **DEVICE), strict=True):
        uncoloured = plain.global_crops.clone(), plain.local_crops.clone()
        found = plain.to(CPU).coloured()
        for name, before in zip(("global_crops", "local_crops"), uncoloured, strict=True):
            assert mean_difference(getattr(found, name), getattr(expected, name)) < 0.6
            assert mean_difference(before, getattr(expected, name)) > 10
        assert torch.equal(found.masks, expected.masks)
        assert torch.equal(found.samples, expected.samples)
        assert found.bad == expected.bad


def test_a_microbatch_is_the_references_but_for_the_resampling(photographs: dict[str, Any]) -> None:
    settings = {"crops__solarize": 0.0, **photographs}
    for expected, plain in zip(
        microbatches(crops__implementation="reference", **settings), microbatches(**settings, **DEVICE), strict=True
    ):
        found = plain.coloured()
        assert mean_difference(found.global_crops, expected.global_crops) < 0.05
        assert mean_difference(found.local_crops, expected.local_crops) < 0.05


def test_workers_make_the_same_plans_and_crops(photographs: dict[str, Any]) -> None:
    alone = microbatches(**DEVICE, **photographs)
    helped = microbatches(data__workers=2, data__prefetch=1, **DEVICE, **photographs)
    for a, b in zip(alone, helped, strict=True):
        assert a.global_colours is not None
        assert b.global_colours is not None
        assert a.global_colours.segments == b.global_colours.segments
        for x, y in ((a.coloured(), b.coloured()), (a.global_colours, b.global_colours)):
            for name, value in vars(x).items():
                assert not isinstance(value, Tensor) or torch.equal(value, vars(y)[name]), name


def test_a_coloured_microbatch_has_nothing_left_to_do(photographs: dict[str, Any]) -> None:
    batch = microbatches(**DEVICE, **photographs)[0].coloured()
    assert (batch.global_colours, batch.local_colours) == (None, None)
    crops = batch.global_crops.clone()
    assert batch.coloured() is batch
    assert torch.equal(batch.global_crops, crops)


def test_without_local_crops_there_is_nothing_to_colour_of_them(photographs: dict[str, Any]) -> None:
    batch = microbatches(crops__local_number=0, **DEVICE, **photographs)[0].coloured()
    assert batch.local_crops.shape == (0, 3, 8, 8)


def test_plans_move_with_their_microbatch(photographs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = microbatches(**DEVICE, **photographs)[0]
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    for moved in (batch.to(torch.device("meta")), batch.pin_memory(), pickle.loads(pickle.dumps(batch)).to("meta")):
        for plan in (moved.global_colours, moved.local_colours):
            assert plan.rows.is_meta
            assert plan.values.is_meta


# -- where microbatches go --------------------------------------------------------------------------------------------


def first_coloured(config: Config) -> Tensor:
    return Microbatches(config, open_source(config.data.train))[0, 0].coloured().global_crops


def test_the_method_sees_finished_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = SelfDistillation.loss, []

    def loss(self: SelfDistillation, batch: Microbatch, targets: Any) -> Any:
        seen.append(batch.global_crops)
        return original(self, batch, targets)

    monkeypatch.setattr(SelfDistillation, "loss", loss)
    config = tiny_run(tmp_path, train__duration="1it", **DEVICE)
    train_alone(config)
    assert torch.equal(seen[0], first_coloured(config))


def test_a_picture_of_the_crops_shows_them_coloured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(eval.views, "picture_grid", lambda rows, *_, **__: drawn.extend(rows))
    config = tiny_config(masks__probability=0.0, **DEVICE)
    eval.views.draw_crops(config, open_source(config.data.train), tmp_path / "crops.png")
    for (_, pictures), crop in zip(drawn, first_coloured(config), strict=False):
        np.testing.assert_array_equal(pictures[0].transpose(2, 0, 1), crop.numpy())


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_whatever_the_workers(tmp_path: Path) -> None:
    settings = {"checkpoint__every": "2it", **DEVICE}
    train_alone(tiny_run(tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    train_alone(tiny_run(tmp_path / "resumed", data__workers=2, **settings))
    assert differing(saved_tensors(tmp_path / "resumed", 4), saved_tensors(tmp_path / "whole", 4)) == []
    train_alone(tiny_run(tmp_path / "by workers", **{**settings, "crops__colours": "worker"}))
    # Not as a wait for data, which more workers would not shorten.
    for name, timed in (("whole", True), ("by workers", False)):
        assert ("time/colours" in (tmp_path / name / "metrics.jsonl").read_text()) == timed
    assert differing(saved_tensors(tmp_path / "by workers", 4), saved_tensors(tmp_path / "whole", 4)) != []
