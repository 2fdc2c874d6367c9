"""Which model a set of tensors is, and whether it is all there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.config import ARCHITECTURES, ModelConfig, width_depth_heads
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.block import swiglu_width
from dinov2_fsdp.models.factory import build_backbone

HEAD_DIM = 64
"""Width of an attention head in all published models; the tensors do not tell it."""
SHOWN = 6
"""Keys that an error lists before it says how many more there are."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def infer(tensors: Mapping[str, Tensor], source: str, heads: int | None = None) -> tuple[ModelConfig, int]:
    """Return the model that tensors under official names belong to, and the image size of its position embedding.

    Args:
        heads: attention heads; by default one for every 64 channels, as in all published models.

    Raises:
        UserError: what tells the architecture is missing, ``dim`` is no multiple of 64 and ``heads`` not given, or no
            multiple of ``heads``.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise UserError(
            f"{source} holds no backbone that is known here\n"
            f"missing: {', '.join(missing)}\nfound {listed(tensors)}\n"
            "expected: official DINOv2 names, a Hugging Face Dinov2 folder, a timm vit_*_dinov2, or a run or export"
        )
    dim = tensors["cls_token"].shape[-1]
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    if heads is None:
        if dim % HEAD_DIM:
            raise UserError(
                f"{source}: nothing says how many attention heads its width of {dim} has, and {dim} is no multiple of "
                f"{HEAD_DIM}\ngive them once: python -m dinov2_fsdp.weights import --from {source} --heads N --out FILE"
            )
        heads = dim // HEAD_DIM
    check_heads(dim, heads, source)
    depth = 1 + max(int(match[1]) for name in tensors if (match := _BLOCK.match(name)))
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    ffn, mlp_ratio = _feed_forward(tensors, dim)
    layer_scale = ModelConfig.layer_scale if "blocks.0.ls1.gamma" in tensors else 0.0
    grid = isqrt(tensors["pos_embed"].shape[1] - 1)
    return named_model(dim, depth, heads, patch, registers, ffn, mlp_ratio, layer_scale), grid * patch


def check_heads(dim: int, heads: int, source: str) -> None:
    """Raise UserError unless the width is a multiple of the number of attention heads."""
    if heads < 1 or dim % heads:
        raise UserError(f"{source}: {heads} attention heads are impossible; valid: a divisor of its width, {dim}")


def named_model(
    dim: int, depth: int, heads: int, patch: int, registers: int, ffn: str, mlp_ratio: float, layer_scale: float
) -> ModelConfig:
    """Return the config of a model, under the name of the published one with as many heads where there is one."""
    arch = next((name for name, known in ARCHITECTURES.items() if (known["dim"], known["heads"]) == (dim, heads)), None)
    base = ARCHITECTURES[arch or "vits"]
    return ModelConfig(
        arch=arch or "vits",
        patch=patch,
        registers=registers,
        layer_scale=layer_scale,
        dim=None if arch else dim,
        depth=None if depth == base["depth"] else depth,
        heads=None if arch else heads,
        ffn=None if ffn == base["ffn"] else ffn,
        mlp_ratio=mlp_ratio,
    )


def _feed_forward(tensors: Mapping[str, Tensor], dim: int) -> tuple[str, float]:
    """Return the kind of feed-forward part and its ``mlp_ratio``."""
    if (down := tensors.get("blocks.0.mlp.w3.weight")) is not None:
        return "swiglu", swiglu_ratio(dim, down.shape[-1])
    up = tensors.get("blocks.0.mlp.fc1.weight")
    return "mlp", 4.0 if up is None else up.shape[0] / dim


def swiglu_ratio(dim: int, width: int) -> float:
    """Return the ``mlp_ratio`` that gives SwiGLU this hidden width: 4 if that does."""
    return 4.0 if swiglu_width(4 * dim) == width else 1.5 * width / dim


def ffn_of(model: ModelConfig) -> str:
    """Return ``mlp`` or ``swiglu``."""
    return model.ffn or str(ARCHITECTURES[model.arch]["ffn"])


def describe(model: ModelConfig, image_size: int) -> str:
    """Return a model in words, such as ``vitb14, 4 registers, positions for 518 pixels``."""
    dim, depth, heads = width_depth_heads(model)
    changed = (dim, depth, heads) != tuple(ARCHITECTURES[model.arch][key] for key in ("dim", "depth", "heads"))
    shape = f" (width {dim}, {depth} blocks, {heads} heads)" if changed else ""
    registers = f", {model.registers} registers" if model.registers else ""
    return f"{model.arch}{model.patch}{shape}, {ffn_of(model)}{registers}, positions for {image_size} pixels"


def shapes_of(model: ModelConfig, image_size: int) -> dict[str, Tensor]:
    """Return a model's parameters under official names, on the meta device."""
    with torch.device("meta"):
        return dict(build_backbone(model, image_size).named_parameters())


def check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, model: str) -> None:
    """Compare names and shapes.

    Raises:
        UserError: they differ; lists the first names of each kind and how many there are.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        lines = [f"{kind} {listed(names)}" for kind, names in kinds.items() if names]
        raise UserError("\n".join([f"{source} does not fit {model}", *lines]))


def listed(names: Iterable[str]) -> str:
    """Return ``(12): first, second, …``: how many names there are, and the first few."""
    ordered: list[Any] = list(names)
    more = ", …" if len(ordered) > SHOWN else ""
    return f"({len(ordered)}): {', '.join(ordered[:SHOWN])}{more}"
