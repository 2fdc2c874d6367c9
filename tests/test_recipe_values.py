"""The published recipes, key by key, against the values that the published models were trained with.

The values are those of the published configs (``ssl_default``, ``vitl16_short``, ``vitl14``, ``vitg14``), and of the
released code where it has no key for them. What a recipe does otherwise on purpose stands in its head, and only there.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.optim.schedules import scaled_learning_rate

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGENET: dict[str, Any] = {
    "crops.global_size": 224, "crops.global_scale": (0.32, 1.0),
    "crops.local_size": 96, "crops.local_scale": (0.05, 0.32), "crops.local_number": 8,
    "crops.blur": "released", "crops.flip": 0.5, "crops.jitter": 0.8, "crops.jitter_strength": (0.4, 0.4, 0.2, 0.1),
    "crops.gray": 0.2, "crops.solarize": 0.2,
    "masks.probability": 0.5, "masks.ratio": (0.1, 0.5),
    "model.arch": "vitl", "model.patch": 16, "model.registers": 0, "model.drop_path": 0.3, "model.layer_scale": 1e-5,
    "model.dim": None, "model.depth": None, "model.heads": None, "model.ffn": "mlp", "model.mlp_ratio": 4.0,
    "dino_head.prototypes": 65536, "dino_head.hidden": 2048, "dino_head.bottleneck": 256, "dino_head.layers": 3,
    "dino_head.batch_norm": False, "dino_head.layer_norm": False, "dino_head.fixed_gain": False,
    "ibot_head.separate": False,
    "loss.dino": 1.0, "loss.ibot": 1.0, "loss.koleo": 0.1, "loss.koleo_global": False,
    "loss.student_temperature": 0.1, "loss.teacher_temperature_start": 0.04, "loss.teacher_temperature": 0.07,
    "loss.teacher_temperature_warmup": "30ep", "loss.centering": "softmax", "loss.centre_momentum": 0.9,
    "loss.sinkhorn_iterations": 3,
    "teacher.momentum": (0.992, 1.0),
    "optim.name": "adamw", "optim.lr": 4e-3, "optim.lr_scaling": "sqrt", "optim.min_lr": 1e-6, "optim.warmup": "10ep",
    "optim.weight_decay": (0.04, 0.4), "optim.betas": (0.9, 0.999), "optim.clip": 3.0, "optim.clip_scope": "part",
    "optim.layer_decay": 0.9, "optim.patch_embed_lr": 0.2, "optim.freeze_prototypes": "1ep",
    "train.duration": "100ep", "train.epoch": 1250, "train.batch": 32 * 64, "train.microbatch": 64,
    "train.precision": "fp16",
}  # fmt: skip
IMAGENET_22K: dict[str, Any] = {
    **IMAGENET,
    "crops.local_size": 98,
    "model.patch": 14, "model.drop_path": 0.4, "model.ffn": "swiglu",
    "dino_head.prototypes": 131072, "dino_head.bottleneck": 384,
    "ibot_head.separate": True, "ibot_head.prototypes": 131072, "ibot_head.hidden": 2048, "ibot_head.bottleneck": 256,
    "ibot_head.layers": 3, "ibot_head.batch_norm": False, "ibot_head.layer_norm": False, "ibot_head.fixed_gain": False,
    "loss.centering": "sinkhorn",
    "teacher.momentum": (0.994, 1.0),
    "optim.lr": 2e-4, "optim.warmup": "80ep", "optim.weight_decay": (0.04, 0.2), "optim.layer_decay": 1.0,
    "train.duration": "500ep", "train.batch": 96 * 32, "train.microbatch": 32,
}  # fmt: skip
PUBLISHED = {
    "vitl16_in1k": IMAGENET,
    "vitl14": IMAGENET_22K,
    "vitg14": {**IMAGENET_22K, "model.arch": "vitg", "train.batch": "unknown", "train.microbatch": 12},
}
OF_THE_METHOD = ("crops", "masks", "model", "dino_head", "ibot_head", "loss", "teacher", "optim")
_DIFFERENCE = re.compile(r"^#   (?P<key>[a-z_.]+): (?P<ours>\S+) \(published: (?P<theirs>\S+)\) \S", re.MULTILINE)


def values(config: Config) -> dict[str, Any]:
    """Every key of a config with its value; the architecture's own feed-forward part is spelt out."""
    plain = dataclasses.asdict(config)
    flat = {
        f"{section}.{key}": value
        for section in plain
        if isinstance(plain[section], dict)
        for key, value in plain[section].items()
    }
    flat["model.ffn"] = flat["model.ffn"] or {"vitg": "swiglu"}.get(config.model.arch, "mlp")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}


def differences(recipe: str) -> dict[str, tuple[str, str]]:
    """(ours, theirs) of every key that a recipe's head lists as deliberately different."""
    head = (CONFIGS / f"{recipe}.yaml").read_text().split("output_dir:")[0]
    return {match["key"]: (match["ours"], match["theirs"]) for match in _DIFFERENCE.finditer(head)}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_values_but_for_the_differences_in_its_head(recipe: str) -> None:
    ours, stated = values(load(CONFIGS / f"{recipe}.yaml")), differences(recipe)
    found = {key: (str(ours[key]), str(theirs)) for key, theirs in PUBLISHED[recipe].items() if ours[key] != theirs}
    assert found == stated


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_no_key_of_the_method_is_left_out_of_the_comparison(recipe: str) -> None:
    config = load(CONFIGS / f"{recipe}.yaml")
    keys = {key for key in values(config) if key.split(".")[0] in OF_THE_METHOD}
    if not config.ibot_head.separate:
        keys -= {key for key in keys if key.startswith("ibot_head.") and key != "ibot_head.separate"}
    of_ours = {"optim.momentum", "crops.implementation", "crops.colours"}  # LARS's; where and how crops are made
    assert keys - PUBLISHED[recipe].keys() == of_ours


def test_learning_rates_and_lengths_are_the_published_ones() -> None:
    """What the keys come to: peak learning rate and steps."""
    for recipe, rate, steps in (("vitl16_in1k", 4e-3 * 2**0.5, 125_000), ("vitl14", 2e-4 * 3**0.5, 625_000)):
        config = load(CONFIGS / f"{recipe}.yaml")
        assert scaled_learning_rate(config.optim.lr, config.train.batch, "sqrt") == pytest.approx(rate)
        assert int(config.train.duration.removesuffix("ep")) * config.train.epoch == steps
