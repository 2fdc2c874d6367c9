"""Pictures of what a backbone attends to, what it finds alike, and what it is shown in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.loader import Microbatches
from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.errors import UserError
from eval.features import class_token, frozen, normalise, prepare, subset
from eval.figures import Row, picture_grid

_HIDDEN = np.array([120, 124, 130], np.uint8)
_GALLERY = 2000


def attention_maps(model: nn.Module, crops: NDArray[np.uint8], size: int, device: torch.device) -> NDArray[np.float32]:
    """Return how much the last block's class token attends to each patch: (images, heads, rows, columns).

    Args:
        crops: (images, size, size, 3) uint8.
    """
    forward = frozen(model, size, device)
    caught: list[Tensor] = []
    block: Any = model.blocks[-1]  # type: ignore[index]
    handle = block.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    side, prefix = size // int(model.patch_size), int(model.prefix_tokens)  # type: ignore[arg-type]
    maps = []
    try:
        with torch.no_grad():
            for crop in crops:
                caught.clear()
                forward(normalise(torch.from_numpy(crop[None]).to(device)))
                weights = block.attn.attention_map(block.norm1(caught[0])[None])[0, :, 0, prefix:]
                maps.append(weights.float().cpu().numpy().reshape(-1, side, side))
    finally:
        handle.remove()
    return np.stack(maps)


def draw_attention(
    model: nn.Module, images: Sequence[Image.Image], png: str | Path, size: int, device: torch.device, heads: int = 8
) -> Path:
    """Draw each image and, beside it, the attention of its class token by head (at most ``heads``); return the file.

    Raises:
        UserError: there are no images, or the patch does not divide the size.
    """
    if not images:
        raise UserError("there are no images to draw; give at least one")
    crops = np.stack([prepare(image, size, size) for image in images])
    maps = attention_maps(model, crops, size, device)
    rows: list[Row] = [("", [crop, *parts[:heads]]) for crop, parts in zip(crops, maps, strict=True)]
    titles = ["image", *(f"head {number + 1}" for number in range(min(heads, maps.shape[1])))]
    return picture_grid(rows, png, titles=titles)


def nearest(queries: Tensor, gallery: Tensor, count: int) -> NDArray[np.int64]:
    """Return the ``count`` most similar rows of ``gallery`` (n, D) for each query (m, D), by cosine, nearest first."""
    similarity = normalize(queries.double(), dim=1) @ normalize(gallery.double(), dim=1).T
    return (-similarity).argsort(dim=1, stable=True)[:, :count].numpy()


def draw_neighbours(
    model: nn.Module,
    queries: Sequence[Image.Image],
    gallery: Source,
    png: str | Path,
    size: int,
    resize: int,
    device: torch.device,
    count: int = 7,
    limit: int = _GALLERY,
) -> Path:
    """Draw each query and its nearest images of ``gallery`` (``limit`` of those are looked at); return the file.

    An image that is the query itself is passed over.

    Raises:
        UserError: there are no queries, or the patch does not divide the size.
    """
    if not queries:
        raise UserError("there are no images to draw; give at least one")
    forward = frozen(model, size, device)

    def look(crops: Sequence[NDArray[np.uint8]]) -> Tensor:
        parts = [
            class_token(forward(normalise(torch.from_numpy(np.stack(crops[at : at + 64])).to(device)))).float().cpu()
            for at in range(0, len(crops), 64)
        ]
        return torch.cat(parts)

    asked = [prepare(image, resize, size) for image in queries]
    found = []
    for index in subset(gallery, limit):
        try:
            found.append(prepare(gallery.image(int(index)), resize, size))
        except BadImage:
            continue
    with torch.no_grad():
        order = nearest(look(asked), look(found), count + 1)
    rows: list[Row] = []
    for crop, places in zip(asked, order, strict=True):
        others = [found[place] for place in places if not np.array_equal(found[place], crop)]
        rows.append(("", [crop, *others[:count]]))
    return picture_grid(rows, png, titles=["query", *(f"nearest {n + 1}" for n in range(count))])


def shown(
    batch: Microbatch, image: int, grid: tuple[int, int]
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Return the global crops of an image as the student sees them (hidden patches grey), and its local crops."""
    count = batch.images
    wholes = []
    for crop in (image, count + image):
        pixels = batch.global_crops[crop].permute(1, 2, 0).numpy().copy()
        mask = batch.masks[crop].reshape(grid).numpy()
        hidden = mask.repeat(pixels.shape[0] // grid[0], 0).repeat(pixels.shape[1] // grid[1], 1)
        pixels[hidden] = _HIDDEN
        wholes.append(pixels)
    parts = [batch.local_crops[place].permute(1, 2, 0).numpy() for place in range(image, len(batch.local_crops), count)]
    return wholes, parts


def draw_crops(config: Config, source: Source, png: str | Path, step: int = 0, images: int = 6, local: int = 8) -> Path:
    """Draw what the student sees of the first images of a step: global crops with their masks, local crops."""
    batch = Microbatches(config, source)[step, 0].coloured()
    side = config.crops.global_size // config.model.patch
    rows: list[Row] = []
    for image in range(min(images, batch.images)):
        wholes, parts = shown(batch, image, (side, side))
        rows.append(("", [*wholes, *parts[:local]]))
    count = min(local, config.crops.local_number)
    return picture_grid(rows, png, titles=["global 1", "global 2", *(f"local {n + 1}" for n in range(count))])
