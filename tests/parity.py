"""Backbones whose every weight shows in the output, and how far two outputs are apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dinov2_fsdp.config import ModelConfig
from dinov2_fsdp.models.factory import build_backbone
from dinov2_fsdp.weights.architecture import named_model
from dinov2_fsdp.weights.backbone import LoadedBackbone

TOLERANCE = 1e-5
"""Largest relative error that counts as equal in float32."""
SIZES = [(518, 518), (224, 224), (154, 280)]
"""Images: as large as the released position embeddings stand for, smaller, and not square; (height, width) pixels."""
SMALL_SIZES = [(70, 70), (42, 42), (28, 56)]
"""The same with position embeddings for 70 pixels."""
WHOLE = "PARITY_WHOLE" in os.environ
DEPTHS = {"vits": 12, "vitb": 12 if WHOLE else 4, "vitl": 24 if WHOLE else 3, "vitg": 40 if WHOLE else 2}
"""Blocks: the large ones are cut, but where the environment asks for all: ViT-g then needs 12 GB and half an hour."""
FULL = [(arch, depth, registers) for arch, depth in DEPTHS.items() for registers in (0, 4)]
LIMIT = 4 * 3600 if WHOLE else 900
"""Seconds of one test: whole backbones take longer than any other may."""
TINY = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)]


def published(arch: str, depth: int, registers: int) -> ModelConfig:
    """A published model, cut to ``depth`` blocks."""
    standard = {"vits": 12, "vitb": 12, "vitl": 24, "vitg": 40}[arch]
    return ModelConfig(arch=arch, registers=registers, depth=None if depth == standard else depth)


def tiny(ffn: str, registers: int, depth: int = 3) -> ModelConfig:
    """A model with heads of 64 channels, small enough for milliseconds."""
    return named_model(128, depth, 2, 14, registers, ffn, 4.0, 1e-5)


def loaded(
    model: ModelConfig, image_size: int = 518, seed: int = 0, interpolation: str | None = None
) -> LoadedBackbone:
    """A backbone of ours with random weights."""
    backbone = build_backbone(model, image_size, interpolation)
    randomise(backbone, seed)
    return LoadedBackbone(backbone.eval().requires_grad_(False), model, image_size, None, None, "random weights")


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter so large that it matters, whatever the library calls it.

    Linear layers keep the variance of their input, so that attention is neither uniform nor one-hot; LayerScale, by
    default 1e-5, is uniform in [.5, 1.5], since blocks would not show otherwise. What enters the first block is as
    small as in trained models, so that the epsilon of its norm shows.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("norm" in name and name.endswith("weight")) or "gamma" in name or "lambda1" in name:
            parameter.uniform_(0.5, 1.5, generator=rng)
        elif parameter.ndim == 2 and name.endswith("weight"):
            parameter.normal_(generator=rng).mul_(parameter.shape[1] ** -0.5)
        elif parameter.ndim == 1 and "patch_embed" not in name:
            parameter.normal_(generator=rng).mul_(0.2)
        else:
            parameter.normal_(generator=rng).mul_(0.03 if parameter.ndim < 4 else 0.03 * parameter[0].numel() ** -0.5)


def images(height: int, width: int, number: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def some_masks(number: int, patches: int) -> Tensor:
    """A third of the patches hidden."""
    return torch.rand(number, patches, generator=torch.Generator().manual_seed(1)) < 0.33


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest ‖ours − theirs‖ / ‖theirs‖ of a token."""
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


class Case(NamedTuple):
    """One image that both sides see; ``size`` is (height, width)."""

    size: tuple[int, int]
    masked: bool = False

    def masks(self) -> Tensor:
        return some_masks(1, (self.size[0] // 14) * (self.size[1] // 14))

    def __str__(self) -> str:
        return f"{self.size[0]}×{self.size[1]}{' masked' if self.masked else ''}"


def assert_equal_outputs(ours: Mapping[str, Any], theirs: Mapping[str, Any], case: str) -> None:
    """Compare class token, registers, patch tokens and intermediate layers; keep the errors where asked to."""
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    if path := os.environ.get("PARITY_ERRORS"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"case": case, **errors}) + "\n")
    assert max(errors.values()) <= TOLERANCE, errors


def outputs(of: Callable[..., dict[str, Tensor]], model: Any, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    """What ``of`` takes from a model for the images and masks of each case."""
    with torch.no_grad():
        return [of(model, images(*case.size), **({"masks": case.masks()} if case.masked else {})) for case in cases]


def our_outputs(model: Any, pictures: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
    """Class token, registers and patch tokens, normalised, and the tokens after some blocks, not normalised."""
    final, intermediates = model.forward_intermediates(
        pictures, blocks(len(model.blocks)), output_fmt="NLC", return_prefix_tokens=True, masks=masks
    )
    prefix = model.prefix_tokens
    return {
        "class token": final[:, 0],
        **({"registers": final[:, 1:prefix]} if prefix > 1 else {}),
        "patch tokens": final[:, prefix:],
        **{
            f"block {index}": torch.cat([before, patches], dim=1)
            for index, (patches, before) in zip(blocks(len(model.blocks)), intermediates, strict=True)
        },
    }


def blocks(depth: int) -> list[int]:
    """Blocks whose outputs are compared: four, evenly spaced, the last one among them."""
    return sorted({depth * part // 4 - 1 for part in (1, 2, 3, 4)} - {-1})


def needs(library: str) -> Any:
    """Return a library that only tests need, or skip."""
    return pytest.importorskip(library, reason=f"{library} is a test dependency: pip install -e '.[test]'")
