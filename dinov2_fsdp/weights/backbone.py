"""Whole backbones, ready to compute features: from a run, a file or another library's weights, or untrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2_fsdp.config import Config, ModelConfig
from dinov2_fsdp.models.factory import build_backbone
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.models.vision_transformer import VisionTransformer
from dinov2_fsdp.weights.reading import Weights, read_weights


@dataclass
class LoadedBackbone:
    """A backbone in evaluation mode and where it came from.

    ``config`` is the run's, None for a file; ``step`` None where the file does not say. ``architecture`` and
    ``image_size`` are what builds the model again.
    """

    model: VisionTransformer
    architecture: ModelConfig
    image_size: int
    config: Config | None
    step: int | None
    source: str


def load_backbone(
    path: str | Path,
    step: int | None = None,
    which: str = "teacher",
    device: str | torch.device = "cpu",
    heads: int | None = None,
    interpolation: str | None = None,
) -> LoadedBackbone:
    """Return the backbone of a run, checkpoint, exported or official file, Hugging Face folder, or timm's weights.

    Args:
        step: which checkpoint of a run; by default the newest.
        which: ``teacher`` or ``student``, where there are both.
        heads: attention heads, for files that do not say; see :func:`read_weights`.
        interpolation: how to stretch the position embedding to other sizes than its own; by default what the file
            says, or else what the published models do. See :class:`VisionTransformer`.

    Raises:
        UserError: nothing to load there, or its tensors do not fit the architecture; missing ones are listed.
    """
    return build(read_weights(path, step, which, heads), device, interpolation)


def build(weights: Weights, device: str | torch.device = "cpu", interpolation: str | None = None) -> LoadedBackbone:
    """Return the backbone that weights belong to, in fp32; see :func:`load_backbone`."""
    with torch.device("meta"):
        model = build_backbone(weights.model, weights.image_size, interpolation or weights.interpolation)
    model.to_empty(device=device)
    model.load_state_dict(weights.tensors)
    place = (weights.config, weights.step, weights.source)
    return LoadedBackbone(_frozen(model), weights.model, weights.image_size, *place)


def untrained_backbone(config: Config, device: str | torch.device = "cpu") -> VisionTransformer:
    """Return the backbone that a run of this config starts from, in evaluation mode."""
    from dinov2_fsdp.ssl.network import Network

    with torch.device("meta"):
        network = Network(config)
    network.backbone.to_empty(device="cpu")
    network.dino_head = network.ibot_head = None  # type: ignore[assignment]
    initialise(network, config.seed, config.model.layer_scale)
    return _frozen(network.backbone.to(device))


def _frozen(model: VisionTransformer) -> VisionTransformer:
    return model.eval().requires_grad_(False)
