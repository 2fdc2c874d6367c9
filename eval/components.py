"""Principal components of the patch features, as colours (DINOv2, figure 1 and section 7.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinov2_fsdp.errors import UserError
from eval.features import frozen, normalise, prepare
from eval.figures import Row, picture_grid


def pca_patches(
    models: nn.Module | Mapping[str, nn.Module],
    images: Sequence[Image.Image],
    png: str | Path,
    size: int,
    device: torch.device,
    foreground: bool = False,
) -> Path:
    """Draw a row of images and below it, for each model, the first three components of its patches; return the file.

    The components are shared by all images of a row, so that one colour means one thing everywhere in it. Each is
    scaled so that its 1st and 99th percentiles are black and full.

    Args:
        models: a backbone, or several by the name of their row.
        size: side of the central crop that is shown, pixels; a multiple of the patch. A size above the training's gives
            finer maps.
        foreground: keep only the patches on one side of the first component, and find the colours among those.

    Raises:
        UserError: there are no images, or the patch does not divide the size.
    """
    if not images:
        raise UserError("there are no images to draw; give at least one")
    rows = models if isinstance(models, Mapping) else {"patch features": models}
    crops = np.stack([prepare(image, size, size) for image in images])
    maps = {name: pca_colours(patch_tokens(model, crops, size, device), foreground) for name, model in rows.items()}

    shown: list[Row] = [("image", list(crops)), *((name, list(pictures)) for name, pictures in maps.items())]
    return picture_grid(shown, png)


def pca_colours(tokens: NDArray[np.float32], foreground: bool = False) -> NDArray[np.float32]:
    """Return the colours (images, rows, columns, 3) in [0, 1] of patch features (images, rows, columns, D)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    keep = np.ones(len(flat), bool)
    if foreground:
        keep = _foreground(_components(flat, 1)[:, 0].reshape(tokens.shape[:3])).ravel()
    colours = np.zeros((len(flat), 3))
    parts = _components(flat[keep], 3)
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours[keep, : parts.shape[1]] = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens.shape[:3], 3).astype(np.float32)


def _components(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the first principal components (n, count); the sign is such that the longer tail is positive."""
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    parts = centred @ axes[:, ::-1][:, :count]
    tails = np.sum(parts**3, axis=0)
    return parts * np.where(tails < 0, -1.0, 1.0)


def _foreground(first: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the side of the first component (images, rows, columns) that touches the images' borders less."""
    side = first > 0
    border = np.ones(first.shape[1:], bool)
    border[1:-1, 1:-1] = False
    inside_share = side[:, ~border].mean() if (~border).any() else 0.5
    chosen = side if side[:, border].mean() <= inside_share else ~side
    return chosen if chosen.sum() > 3 else np.ones_like(side)


def patch_tokens(model: nn.Module, crops: NDArray[np.uint8], size: int, device: torch.device) -> NDArray[np.float32]:
    """Return the patch tokens (images, rows, columns, D) of crops (images, size, size, 3)."""
    forward = frozen(model, size, device)
    side = size // int(model.patch_size)  # type: ignore[arg-type]
    tokens = []
    with torch.no_grad():
        for crop in crops:
            outputs = forward(normalise(torch.from_numpy(crop[None]).to(device)))
            tokens.append(outputs["x_norm_patchtokens"].float().cpu().numpy())
    return np.concatenate(tokens).reshape(len(crops), side, side, -1)
