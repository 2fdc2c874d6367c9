"""The fast crops in the loader: chosen by the config, the same in workers, damaged files, memory."""

from __future__ import annotations

import gc
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from made_images import PUBLISHED, jpeg, natural, noise
from tiny import tiny_config

from dinov2_fsdp.config import Config
from dinov2_fsdp.data import fast_augment
from dinov2_fsdp.data.augment import MultiCrop, multi_crop
from dinov2_fsdp.data.fast_augment import FastMultiCrop
from dinov2_fsdp.data.loader import Microbatches, build_crops, build_loader
from dinov2_fsdp.data.sources import BadImage, open_source
from dinov2_fsdp.data.sources.decoding import LazyImage
from dinov2_fsdp.errors import UserError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of runs over twelve JPEG files."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(12):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(natural(60 + i, 80, i)))
    return {"data__train": f"folder:{folder}", "data__cache": str(folder / "cache")}


def batches(config: Config, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = open_source(config.data.train, config.data.cache)
    per_rank = config.train.batch // config.train.microbatch
    return [(b.global_crops, b.local_crops) for b in build_loader(config, source, 0, steps, 0, per_rank, pin=False)]


def test_the_config_chooses_the_implementation() -> None:
    assert type(build_crops(tiny_config(crops__implementation="fast"))) is FastMultiCrop
    assert type(build_crops(tiny_config(crops__implementation="reference"))) is MultiCrop


def test_without_opencv_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dinov2_fsdp.data.fast_augment", None)
    with pytest.raises(UserError, match=r"opencv-python-headless, or choose crops\.implementation=reference"):
        build_crops(tiny_config(crops__implementation="fast"))
    build_crops(tiny_config(crops__implementation="reference"))


def test_microbatches_of_both_paths_show_the_same(photographs: dict[str, Any]) -> None:
    config = tiny_config(crops__implementation="reference", crops__blur="none", crops__solarize=0.0, **photographs)
    slow = batches(config, 2)
    fast = batches(replace(config, crops=replace(config.crops, implementation="fast")), 2)
    for a, b in zip(slow, fast, strict=True):
        for crops_a, crops_b in zip(a, b, strict=True):
            assert (crops_a.float() - crops_b.float()).abs().mean() < 0.6


def test_several_workers_give_the_same_after_a_fork(photographs: dict[str, Any]) -> None:
    cv2.blur(noise(512, 512), (5, 5))  # OpenCV has run in the parent
    alone = batches(tiny_config(crops__implementation="fast", **photographs), 3)
    helped = batches(tiny_config(crops__implementation="fast", data__workers=2, data__prefetch=1, **photographs), 3)
    assert len(alone) == len(helped) == 6
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_opencv_starts_no_threads_of_its_own() -> None:
    cv2.setNumThreads(4)
    runpy.run_path(fast_augment.__file__)
    assert cv2.getNumThreads() == 1


def test_a_truncated_photograph_is_bad_in_the_fast_path_too(tmp_path: Path) -> None:
    whole = jpeg(natural(200, 300))
    crops = multi_crop(**PUBLISHED, kind=FastMultiCrop)
    outputs = np.empty((2, 3, 112, 112), np.uint8), np.empty((8, 3, 56, 56), np.uint8)
    for part in (0.5, 0.9, 0.99):
        image = LazyImage(whole[: int(part * len(whole))], "x.jpg")
        drawn = crops.draw(300, 200, np.random.default_rng(0))
        with pytest.raises(BadImage, match=r"x\.jpg"):
            crops.fill(image, drawn, *outputs)


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(microbatches: Microbatches, steps: int) -> int:
    """How much memory grows over so many steps, once everything has been seen."""
    for step in range(20):
        microbatches[step, 0]
    gc.collect()
    before = resident()
    for step in range(20, 20 + steps):
        microbatches[step, 0]
    gc.collect()
    return resident() - before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "steps", [150, pytest.param(2_500, marks=pytest.mark.slow)], ids=["600 images", "10,000 images"]
)
def test_memory_stays_flat(photographs: dict[str, Any], steps: int) -> None:
    config = tiny_config(crops__implementation="fast", **photographs)
    source = open_source(config.data.train, config.data.cache)
    assert growth(Microbatches(config, source), steps) < 4 * 2**20
