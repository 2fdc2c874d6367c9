"""Every recipe can be read, built and planned, and says how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2_fsdp.config import load
from dinov2_fsdp.planner import count_parameters, plan
from dinov2_fsdp.ssl.network import Network

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))


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
def test_a_recipe_builds_a_network_of_the_planned_size(recipe: Path) -> None:
    config = load(ROOT / recipe)
    with torch.device("meta"):
        network = Network(config)
    parameters = count_parameters(config)
    heads = [head for head in (network.dino_head, network.ibot_head) if head is not None]
    found = [sum(p.numel() for p in module.parameters()) for module in (network.backbone, *heads)]
    assert found == [n for n in (parameters.backbone, parameters.dino_head, parameters.ibot_head) if n]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_can_be_planned(recipe: Path) -> None:
    config = load(ROOT / recipe)
    processes = config.train.batch // config.train.microbatch
    text = plan(config, processes, "cuda", 1_281_167)
    assert config.output_dir in text
    assert f"{processes} processes × 1 microbatches × {config.train.microbatch}" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_has_a_run_directory_of_its_own(recipe: Path) -> None:
    others = [load(ROOT / other).output_dir for other in RECIPES if other != recipe]
    assert load(ROOT / recipe).output_dir not in others


@pytest.mark.parametrize(
    ("recipe", "millions"), [("vits14", 22), ("vitb14", 86), ("vitl14", 304), ("vitl16_in1k", 303), ("vitg14", 1136)]
)
def test_a_published_backbone_has_its_published_size(recipe: str, millions: int) -> None:
    assert count_parameters(load(ROOT / f"configs/{recipe}.yaml")).backbone / 1e6 == pytest.approx(millions, abs=1)
