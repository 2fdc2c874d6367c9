"""timm's ``vit_*_patch14_dinov2`` and ``vit_*_patch14_reg4_dinov2``: names, and the ``config.json`` of a folder.

They have no mask token. With registers the class token's position is part of the class token, and the position
embedding holds patches alone. SwiGLU's two layers are called ``fc1`` and ``fc2`` like those of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.config import ModelConfig, width_depth_heads
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.block import swiglu_width
from dinov2_fsdp.weights.architecture import ffn_of

_SIZES = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}
_RENAMED = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
_CLASSIFIER = ("head.", "fc_norm.")


def is_timm(names: Mapping[str, Any]) -> bool:
    """Return whether names are timm's: a ``reg_token``, or a class token and neither mask token nor names of ours."""
    if "reg_token" in names:
        return True
    ours = ("mask_token", "register_tokens")
    return (
        "cls_token" in names
        and not any(name in names for name in ours)
        and not any(".mlp.w12." in name for name in names)
    )


def without_classifier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors alone."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_CLASSIFIER)}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the official names for a backbone's tensors; what is missing stays missing.

    The mask token, which timm's models have not, is zero as it is before training.
    """
    result = dict(tensors)
    up, down = result.get("blocks.0.mlp.fc1.weight"), result.get("blocks.0.mlp.fc2.weight")
    if up is not None and down is not None and up.shape[0] == 2 * down.shape[1]:
        for ours, theirs in _RENAMED.items():
            result = {name.replace(theirs, ours): tensor for name, tensor in result.items()}
    if "reg_token" in result:
        result["register_tokens"] = result.pop("reg_token")
        if "pos_embed" in result:
            position = result["pos_embed"]
            result["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    if "cls_token" in result:
        result["mask_token"] = torch.zeros_like(result["cls_token"][0])
    return result


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's names for a whole backbone under official names."""
    result = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    if "register_tokens" in result:
        result["reg_token"] = result.pop("register_tokens")
        position = result["pos_embed"]
        result["cls_token"] = result["cls_token"] + position[:, :1]
        result["pos_embed"] = position[:, 1:]
    for ours, theirs in _RENAMED.items():
        result = {name.replace(ours, theirs): tensor for name, tensor in result.items()}
    return result


def config_json(model: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the ``config.json`` of a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""
    dim, depth, heads = width_depth_heads(model)
    swiglu = ffn_of(model) == "swiglu"
    # timm's names fix the kind of feed-forward part; all else can be overridden.
    size = "giant" if swiglu else {"vitg": "large"}.get(model.arch, _SIZES[model.arch])
    width = swiglu_width(int(dim * model.mlp_ratio)) if swiglu else 0
    arguments: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": model.patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        # Cut down to a whole number there, so half a unit is added against rounding.
        "mlp_ratio": (2 * width + 0.5) / dim if swiglu else model.mlp_ratio,
        "dynamic_img_size": True,
    }
    if model.registers:
        arguments["reg_tokens"] = model.registers
    registers = "_reg4" if model.registers else ""
    return {
        "architecture": f"vit_{size}_patch14{registers}_dinov2",
        "num_classes": 0,
        "num_features": dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": False,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def heads_in(config: Mapping[str, Any], source: str) -> int | None:
    """Return the attention heads that a folder's ``config.json`` states, or None if its architecture's name implies it.

    Raises:
        UserError: it is of another architecture.
    """
    architecture = str(config.get("architecture"))
    if not (architecture.startswith("vit_") and "_dinov2" in architecture):
        raise UserError(f"{source} is timm's {architecture}; expected: a vit_*_dinov2")
    heads: int | None = config.get("model_args", {}).get("num_heads")
    return heads
