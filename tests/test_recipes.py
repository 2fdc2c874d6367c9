"""Every recipe can be read, built and planned, and says how to run it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.counts import count_parameters
from dinov2_fsdp.planner import plan
from dinov2_fsdp.ssl.network import Network

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))


@functools.cache
def read(recipe: Path) -> Config:
    return load(ROOT / recipe)


def head_comment(recipe: Path) -> str:
    lines = (ROOT / recipe).read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def test_there_are_recipes() -> None:
    assert {Path("configs/debug.yaml"), Path("configs/vitl16_in1k.yaml"), Path("configs/vitg14.yaml")} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_headed_by_its_command_hardware_and_expectation(recipe: Path) -> None:
    head = head_comment(recipe)
    assert "python launchers/" in head
    assert f"--config {recipe}" in head
    for word in ("Hardware", "xpect"):
        assert word in head, word


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_command_in_a_head_says_where_all_the_images_are(recipe: Path) -> None:
    """Who has them elsewhere sees what to change: images of one key left behind would stop the run."""
    config = read(recipe)
    images = {"data.train": config.data.train, "eval.train": config.eval.train, "eval.test": config.eval.test}
    on_disk = [key for key, spec in images.items() if spec is not None and not spec.startswith("scenes:")]
    lines = head_comment(recipe).replace("\\\n#", "").splitlines()
    commands = [line for line in lines if f"--config {recipe}" in line]
    assert commands
    for command in commands:
        assert [key for key in on_disk if f"{key}=" not in command] == [], command


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_builds_a_network_of_the_planned_size(recipe: Path) -> None:
    config = read(recipe)
    with torch.device("meta"):
        network = Network(config)
    parameters = count_parameters(config)
    heads = [head for head in (network.dino_head, network.ibot_head) if head is not None]
    found = [sum(p.numel() for p in module.parameters()) for module in (network.backbone, *heads)]
    assert found == [n for n in (parameters.backbone, parameters.dino_head, parameters.ibot_head) if n]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_can_be_planned(recipe: Path) -> None:
    config = read(recipe)
    processes = config.train.batch // config.train.microbatch
    text = plan(config, processes, "cuda", 1_281_167)
    assert config.output_dir in text
    assert f"{processes} processes × 1 microbatches × {config.train.microbatch}" in text


def test_every_recipe_has_a_run_directory_of_its_own() -> None:
    directories = [read(recipe).output_dir for recipe in RECIPES]
    assert sorted(set(directories)) == sorted(directories)


@pytest.mark.parametrize(
    ("recipe", "millions"), [("vits14", 22), ("vitb14", 86), ("vitl14", 303), ("vitl16_in1k", 303), ("vitg14", 1135)]
)
def test_a_published_backbone_has_its_published_size(recipe: str, millions: int) -> None:
    """With position embeddings for 224 pixels; the released files, for 518, hold up to 1.7 million more."""
    assert count_parameters(read(Path(f"configs/{recipe}.yaml"))).backbone / 1e6 == pytest.approx(millions, abs=1)
