"""Backbones by ``torch.hub``, under the names of the published ones, with weights from this machine.

    model = torch.hub.load("PATH/OF/THIS/REPOSITORY", "dinov2_vitb14_reg", source="local", weights="FILE_OR_FOLDER")

Nothing is downloaded: ``weights`` is anything that ``dinov2_fsdp.weights.load_backbone`` reads (a run, an export, an
official file, a Hugging Face folder, timm's weights).
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import Any as _Any
from typing import Protocol as _Protocol

from dinov2_fsdp.config import ModelConfig as _ModelConfig
from dinov2_fsdp.config import width_depth_heads as _width_depth_heads
from dinov2_fsdp.errors import UserError as _UserError
from dinov2_fsdp.models.factory import config_of as _config_of
from dinov2_fsdp.models.factory import create as _create
from dinov2_fsdp.models.vision_transformer import VisionTransformer as _VisionTransformer
from dinov2_fsdp.weights import architecture as _architecture
from dinov2_fsdp.weights import backbone as _backbone
from dinov2_fsdp.weights import reading as _reading

dependencies = ["torch", "numpy", "omegaconf", "safetensors", "fvcore"]


_OPTIONS = ("image_size", "seed")


class _Entry(_Protocol):
    def __call__(self, weights: str | _Path | None = None, **options: int) -> _VisionTransformer: ...


def backbone(weights: str | _Path) -> _VisionTransformer:
    """Return whatever backbone ``weights`` holds, in evaluation mode."""
    return _backbone.load_backbone(weights).model


def _published(name: str, registers: int) -> _Entry:
    def entry(weights: str | _Path | None = None, **options: int) -> _VisionTransformer:
        if unknown := options.keys() - _OPTIONS:
            raise _UserError(f"{', '.join(sorted(unknown))}: unknown here; valid: weights, {', '.join(_OPTIONS)}")
        if weights is None:
            return _create(name, registers, **options).eval()
        if options:
            raise _UserError(
                f"{', '.join(options)}: a model with weights takes no options, the weights bring their own"
            )
        held, asked = _reading.read_weights(weights), _config_of(name, registers)
        if _shape(held.model) != _shape(asked):
            found = _architecture.describe(held.model, held.image_size)
            raise _UserError(f"{held.source} holds {found}, not {name} with {registers} registers")
        return _backbone.build(held).model

    entry.__doc__ = f"""Return {name} with {registers} registers, in evaluation mode.

    Args:
        weights: a run, file or folder that holds them; without it the model has its initial values.
        options: ``image_size`` and ``seed`` of a model without weights, see ``dinov2_fsdp.models.create``.
    """
    return entry


def _shape(model: _ModelConfig) -> tuple[_Any, ...]:
    return (*_width_depth_heads(model), model.patch, model.registers, _architecture.ffn_of(model))


dinov2_vits14 = _published("vits14", 0)
dinov2_vitb14 = _published("vitb14", 0)
dinov2_vitl14 = _published("vitl14", 0)
dinov2_vitg14 = _published("vitg14", 0)
dinov2_vits14_reg = _published("vits14", 4)
dinov2_vitb14_reg = _published("vitb14", 4)
dinov2_vitl14_reg = _published("vitl14", 4)
dinov2_vitg14_reg = _published("vitg14", 4)
