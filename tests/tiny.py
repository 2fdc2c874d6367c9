"""A model and batches small enough for milliseconds: 16-pixel global crops, 8-pixel local ones, patches of 4."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_fsdp.config import Config, from_dict
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.masks import masks_for
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.models.vision_transformer import VisionTransformer
from dinov2_fsdp.ssl.network import Network

TINY: dict[str, Any] = {
    "data": {"train": "scenes:n=24,size=32", "workers": 0},
    "crops": {"global_size": 16, "local_size": 8, "local_number": 2},
    "model": {"arch": "vits", "patch": 4, "dim": 24, "depth": 2, "heads": 3, "drop_path": 0.0, "layer_scale": 0.1},
    "dino_head": {"prototypes": 40, "hidden": 32, "bottleneck": 12},
    "ibot_head": {"prototypes": 40, "hidden": 32, "bottleneck": 12},
    "train": {"batch": 8, "microbatch": 4, "precision": "fp32"},
}


def tiny_config(**overrides: Any) -> Config:
    """The tiny config with keys changed; ``section__key=value`` is ``section.key``."""
    values = {name: dict(section) for name, section in TINY.items()}
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return from_dict(values)


def tiny_network(config: Config, seed: int = 0) -> Network:
    """An unsharded, initialised network."""
    network = Network(config)
    initialise(network, seed, config.model.layer_scale)
    return network


def tiny_batch(config: Config, step: int = 0, index: int = 0, masked: bool = True) -> Microbatch:
    """A microbatch of noise with real masks."""
    rng = np.random.default_rng([step, index])
    images, crops = config.train.microbatch, config.crops

    def noise(number: int, size: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, (number * images, 3, size, size), dtype=np.uint8))

    grid = (crops.global_size // config.model.patch,) * 2
    probability = config.masks.probability if masked else 0.0
    places = range(index * images, (index + 1) * images)
    masks = masks_for(config.seed, step, places, config.train.batch, grid, probability, config.masks.ratio)
    masks = masks.reshape(2 * images, -1)
    weights = (1 / np.maximum(masks.sum(axis=1), 1))[np.nonzero(masks)[0]]
    return Microbatch(
        step=step,
        index=index,
        global_crops=noise(2, crops.global_size),
        local_crops=noise(crops.local_number, crops.local_size),
        masks=torch.from_numpy(masks),
        masked_patches=torch.from_numpy(np.flatnonzero(masks)),
        mask_weights=torch.from_numpy(weights.astype(np.float32)),
        samples=torch.arange(images),
    )


def tiny_backbone(ffn: str = "mlp", registers: int = 0, layer_scale: float = 0.5, depth: int = 2) -> VisionTransformer:
    """A small backbone for 4 × 4 patches whose every parameter matters."""
    model = VisionTransformer(16, 4, 24, depth, 3, ffn, 4.0, layer_scale, registers)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (0.2 if parameter.ndim > 1 else 0.5))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def tiny_images(number: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(seed))
