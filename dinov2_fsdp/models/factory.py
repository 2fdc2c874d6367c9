"""Backbones and heads from a config, or from a short name."""

from __future__ import annotations

import re

from dinov2_fsdp.config import ARCHITECTURES, HeadConfig, ModelConfig, width_depth_heads
from dinov2_fsdp.errors import UserError, nearest
from dinov2_fsdp.models.head import ProjectionHead
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.models.vision_transformer import VisionTransformer


def build_backbone(model: ModelConfig, image_size: int, interpolation: str | None = None) -> VisionTransformer:
    """Return an uninitialised backbone whose position embedding stands for ``image_size`` pixels.

    ``interpolation``: how it is stretched to other sizes, see :class:`VisionTransformer`.
    """
    dim, depth, heads = width_depth_heads(model)
    ffn = model.ffn or ARCHITECTURES[model.arch]["ffn"]
    shape = (image_size, model.patch, dim, depth, heads, ffn, model.mlp_ratio, model.layer_scale, model.registers)
    return VisionTransformer(*shape, interpolation)


def build_head(head: HeadConfig, dim: int) -> ProjectionHead:
    """Return an uninitialised projection head over features of width ``dim``."""
    shape = (head.prototypes, head.hidden, head.bottleneck, head.layers)
    return ProjectionHead(dim, *shape, head.batch_norm, head.layer_norm, head.fixed_gain)


def create(name: str, registers: int = 0, image_size: int = 518, seed: int = 0) -> VisionTransformer:
    """Return an initialised backbone such as ``vits14``, ``vitb14`` or ``vitl16``, on the CPU, in fp32.

    ``image_size``: side of the images that the position embedding's grid stands for; the published models use 518.

    Raises:
        UserError: the name is unknown.
    """
    config = config_of(name, registers)
    backbone = build_backbone(config, image_size)
    initialise(backbone, seed, config.layer_scale)
    return backbone


def config_of(name: str, registers: int = 0) -> ModelConfig:
    """Return the config of a backbone such as ``vits14``.

    Raises:
        UserError: the name is unknown.
    """
    valid = [f"{arch}{patch}" for arch in ARCHITECTURES for patch in (14, 16)]
    match = re.fullmatch(r"(vit[a-z])([1-9]\d*)", name)
    if match is None or match[1] not in ARCHITECTURES:
        raise UserError(f"unknown model '{name}'{nearest(name, valid)}\nvalid: {', '.join(valid)}")
    return ModelConfig(arch=match[1], patch=int(match[2]), registers=registers)
