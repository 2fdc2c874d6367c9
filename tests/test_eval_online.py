"""Evaluations of the sharded teacher, as a run calls them at an interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation import CPU
from PIL import Image
from ranks import run_on_ranks
from source_files import grow
from tiny import tiny_config

from dinov2_fsdp.config import Config
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.train import build_networks
from eval.online import TASKS, check_evaluations, online_evaluations

ONLINE = online_evaluations()


def config() -> Config:
    return tiny_config(
        data__train="scenes:n=41,size=16",
        eval__test="scenes:n=13,size=16,split=test",
        eval__size=16,
        eval__resize=16,
        eval__batch=8,
        eval__k=[1, 5],
        parallel__device="cpu",
    )


def alone() -> dict[str, float]:
    network = Network(config()).eval()
    initialise(network, 0, 0.1)
    return {
        name: value for task in TASKS for name, value in ONLINE[task](network.features, config(), 0, 1, CPU).items()
    }


def sharded() -> tuple[dict[str, float], bool]:
    from training import this_world

    world = this_world()
    _, teacher = build_networks(config(), world)
    initialise(teacher, 0, 0.1)
    teacher.eval()
    found: dict[str, float] = {}
    for task in TASKS:
        found |= ONLINE[task](teacher.features, config(), world.rank, world.size, CPU)
    # Weights that stay gathered would not see the next update.
    return found, all(isinstance(p, dist.tensor.DTensor) for p in teacher.parameters())


def test_images_of_other_classes_are_refused_before_the_run(tmp_path: Path) -> None:
    grow(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/horse/0.png")
    sets = {"eval__every": "1it", "eval__test": f"folder:{tmp_path}/test", "data__train": f"folder:{tmp_path}/train"}
    with pytest.raises(UserError, match="only in the first: dog"):
        check_evaluations(tiny_config(**sets))
    check_evaluations(tiny_config(**{**sets, "eval__every": "0it"}))


def test_dense_tasks_need_a_value_per_pixel_and_no_classes(tmp_path: Path) -> None:
    grow(tmp_path, *(f"{kind}/{split}/0.png" for kind in ("images", "annotations") for split in ("train", "val")))
    for split in ("train", "val"):
        size = Image.open(tmp_path / "images" / split / "0.png").size
        Image.new("L", size, 1).save(tmp_path / "annotations" / split / "0.png")
    sets = {"eval__every": "1it", "eval__tasks": ["segmentation"], "eval__train": f"folder:{tmp_path}#train"}
    check_evaluations(tiny_config(**sets, eval__test=f"folder:{tmp_path}#val"))
    Image.new("L", (7, 5)).save(tmp_path / "annotations" / "val" / "0.png")
    with pytest.raises(UserError, match="but its annotation 7×5"):
        check_evaluations(tiny_config(**sets, eval__test=f"folder:{tmp_path}#val"))
    with pytest.raises(UserError, match="names no images with annotations"):
        check_evaluations(tiny_config(**sets, eval__test=f"folder:{tmp_path}/images"))


def test_annotations_are_read_as_the_config_numbers_them_and_others_refused(tmp_path: Path) -> None:
    grow(tmp_path, *(f"{kind}/{split}/0.png" for kind in ("images", "annotations") for split in ("train", "val")))
    for split in ("train", "val"):
        width, height = Image.open(tmp_path / "images" / split / "0.png").size
        values = (np.arange(width * height) % 12).reshape(height, width)  # 11 classes from 0 on, and 11 for void
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "annotations" / split / "0.png")
    sets = {"eval__every": "1it", "eval__tasks": ["segmentation"]}
    sets |= {"eval__train": f"folder:{tmp_path}#train", "eval__test": f"folder:{tmp_path}#val"}
    numbering = {"eval__classes": 11, "eval__first_class": 0, "eval__void": [11]}
    check_evaluations(tiny_config(**sets, **numbering))
    with pytest.raises(UserError, match=r"neither a class .*\n.*eval\.classes, eval\.first_class or eval\.void"):
        check_evaluations(tiny_config(**sets, **{**numbering, "eval__void": []}))


@pytest.mark.slow
@pytest.mark.distributed
def test_tasks_on_a_sharded_teacher_find_what_they_find_on_the_whole_one() -> None:
    expected = alone()
    assert all(math.isfinite(value) for value in expected.values())
    assert {"knn_5", "linear_top1", "logistic_top1", "segmentation_miou", "depth_rmse", "retrieval_map"} <= set(
        expected
    )
    for found, resharded in run_on_ranks(sharded, 2):
        assert resharded
        assert set(found) == set(expected)
        for name, value in found.items():
            # One image of 13 may fall to the other side of a boundary by rounding.
            assert value == pytest.approx(expected[name], abs=8, rel=0.05), name


@pytest.mark.parametrize("task", TASKS)
def test_a_diverged_backbone_gives_nan_and_lets_the_run_decide(task: str) -> None:
    def features(images: torch.Tensor) -> dict[str, Any]:
        patches = images.new_full((len(images), images.shape[2] // 4 * (images.shape[3] // 4), 8), torch.nan)
        return {"x_norm_clstoken": patches[:, 0], "x_norm_patchtokens": patches}

    found = ONLINE[task](features, config(), 0, 1, CPU)
    assert found
    assert all(math.isnan(value) for value in found.values())
