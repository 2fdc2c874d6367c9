"""Hugging Face's ``Dinov2Model`` and ``Dinov2WithRegistersModel``: names, config and preprocessor.

On disk their tensors keep the names of the library's first versions (``encoder.layer.0.attention.attention.query``),
which later versions translate when they load; a state dict taken from such a later version has other names. Both are
read, the names on disk are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.config import ModelConfig, width_depth_heads
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.block import LAYER_NORM_EPS
from dinov2_fsdp.weights.architecture import check_heads, ffn_of, named_model

MODELS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""``model_type`` in ``config.json`` and the class that loads it."""

_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_QKV = ("query", "key", "value")
_LATER = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}
_PREFIXES = ("dinov2.", "dinov2_with_registers.")
_OFFICIAL = {theirs: ours for ours, theirs in _NAMES.items()}
_TAIL = re.compile(r"\.(weight|bias)$")


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors under the names on disk, without a classifier and the prefix that comes with it."""
    found = {}
    for full_name, tensor in tensors.items():
        name = full_name
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name.startswith("classifier."):
            continue
        for later, first in _LATER.items():
            name = name.replace(later, first)
        found[name] = tensor
    for name in [name for name in found if ".mlp.gate_proj." in name]:
        up = name.replace(".gate_proj.", ".up_proj.")
        if up in found:
            found[name.replace(".gate_proj.", ".weights_in.")] = torch.cat([found.pop(name), found.pop(up)])
    return found


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the names on disk for tensors under official names."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, short = _split(name, "blocks.", "encoder.layer.")
        if short.startswith("attn.qkv."):
            for kind, part in zip(_QKV, tensor.chunk(3), strict=True):
                result[f"{prefix}attention.attention.{kind}.{short.removeprefix('attn.qkv.')}"] = part
        else:
            result[prefix + _rename(short, _NAMES)] = tensor
    return result


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the official names for a whole set of tensors under the names on disk."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, short = _split(name, "encoder.layer.", "blocks.")
        if short.startswith("attention.attention."):
            if ".query." in short:
                parts = [tensors[name.replace(".query.", f".{kind}.")] for kind in _QKV]
                result[f"{prefix}attn.qkv.{short.rsplit('.', 1)[1]}"] = torch.cat(parts)
        else:
            result[prefix + _rename(short, _OFFICIAL)] = tensor
    return result


def with_layer_scale(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under official names with a LayerScale of one in blocks that have none.

    Hugging Face's models, and timm's under their published names, always have one.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("norm1.weight", "norm2.weight")):
            gamma = name.replace("norm", "ls").replace(".weight", ".gamma")
            result.setdefault(gamma, torch.ones_like(tensor))
    return result


def config_json(model: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the contents of ``config.json``.

    Raises:
        UserError: the library has no such model (a fractional ``mlp_ratio``).
    """
    if model.mlp_ratio != int(model.mlp_ratio):
        raise UserError(f"mlp_ratio={model.mlp_ratio} cannot be written for Hugging Face, which knows whole ones only")
    dim, depth, heads = width_depth_heads(model)
    model_type = "dinov2_with_registers" if model.registers else "dinov2"
    registers = {"num_register_tokens": model.registers} if model.registers else {}
    return {
        "architectures": [MODELS[model_type]],
        "model_type": model_type,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": int(model.mlp_ratio),
        "hidden_act": "gelu",
        "use_swiglu_ffn": ffn_of(model) == "swiglu",
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "layerscale_value": model.layer_scale or 1.0,
        "image_size": image_size,
        "patch_size": model.patch,
        "num_channels": 3,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **registers,
        "torch_dtype": "float32",
    }


def preprocessor_json(size: int, resize: int) -> dict[str, Any]:
    """Return the contents of ``preprocessor_config.json``: bicubic to ``resize``, central ``size``, ImageNet's mean."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def read_config(config: Mapping[str, Any], source: str) -> tuple[ModelConfig, int]:
    """Return the model and image size that a ``config.json`` describes.

    Raises:
        UserError: it is another kind of model, or has parts that this project's models have not.
    """
    if config.get("model_type") not in MODELS:
        raise UserError(f"{source} is a model of type {config.get('model_type')}; expected: {' or '.join(MODELS)}")
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    patch = config.get("patch_size", 16 if registers else 14)
    wrong = {
        key: config.get(key, standard)
        for key, standard in {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}.items()
        if config.get(key, standard) != standard
    }
    if config.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
        wrong["layer_norm_eps"] = config["layer_norm_eps"]
    sizes = {key: config[key] for key in ("patch_size", "image_size") if not isinstance(config.get(key, 0), int)}
    if wrong := {**wrong, **sizes}:
        raise UserError(f"{source} describes a model that is not a DINOv2 backbone as published: {wrong}")
    dim, heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    check_heads(dim, heads, source)
    model = named_model(
        dim,
        config.get("num_hidden_layers", 12),
        heads,
        patch,
        registers,
        "swiglu" if config.get("use_swiglu_ffn", False) else "mlp",
        float(config.get("mlp_ratio", 4)),
        ModelConfig.layer_scale,
    )
    return model, config.get("image_size", 224)


def _split(name: str, prefix: str, new: str) -> tuple[str, str]:
    """Return (new prefix with the block's number, rest of the name)."""
    match = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return (f"{new}{match[1]}.", name[match.end() :]) if match else ("", name)


def _rename(name: str, names: Mapping[str, str]) -> str:
    tail = _TAIL.search(name)
    stem = name[: tail.start()] if tail else name
    return names.get(stem, stem) + (tail[0] if tail else "")
