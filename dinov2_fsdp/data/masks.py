"""Which patches of the global crops are hidden from the student, for iBOT's loss.

The masks of a step are a function of the seed, the step and the place in the global batch, so that every
world size sees the same ones. Global crops are numbered crop-major: ``crop * batch_size + image``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dinov2_fsdp.rng import generator

BLOCK_TRIES = 10


def block_mask(
    grid: tuple[int, int],
    target: int,
    rng: np.random.Generator,
    min_patches: int = 4,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> NDArray[np.bool_]:
    """Return a mask (height, width) of rectangular blocks that hides at most ``target`` patches.

    Blockwise masking of BEiT (2106.08254, algorithm 1), ended as in DINOv2's code: the first block for which
    ten tries fail is the last, so that a few masks fall short of the target, by a patch or more. With
    ``target >= 1`` at least one patch is hidden.

    Args:
        grid: height and width in patches.
        target: how many patches to hide.
        min_patches: least area of a block, but for those that hide the last few patches (and on tiny grids, where
            the target itself may be less).
        aspect: bounds of a block's height over width before rounding to patches; log-uniform between them.
    """
    height, width = grid
    mask = np.zeros(grid, bool)
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    least_area = min(min_patches, target)
    hidden = 0
    while hidden < target:
        added, missing = 0, target - hidden
        least = min(least_area, missing)
        for u_area, u_aspect, u_top, u_left in rng.random((BLOCK_TRIES, 4)).tolist():
            area = least_area + (missing - least_area) * u_area
            ratio = math.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * u_aspect)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            # As in the published code no block spans the grid.
            if not (0 < h < height and 0 < w < width and h * w >= least):
                continue
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            block = mask[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(block))
            if 0 < new <= missing:
                block[...] = True
                added = new
                break
        if added == 0:
            break
        hidden += added
    if hidden == 0 and target > 0:
        mask[rng.integers(height), rng.integers(width)] = True
    return mask


def step_masks(
    seed: int, step: int, batch_size: int, probability: float, ratio: tuple[float, float]
) -> NDArray[np.float64]:
    """Return each global crop's target mask ratio at a step, (2 · batch_size,), crop-major; 0 for unmasked ones.

    Exactly int(2 · batch_size · probability) crops are masked. Their ratios are stratified, one in each of as
    many equal parts of ``ratio``, so that every step hides nearly the same share (DINOv2's code; iBOT 2111.07832
    draws them independently).

    Args:
        batch_size: images in the global batch, over all ranks and microbatches.
        probability: share of the global crops that are masked.
        ratio: least and greatest share of a masked crop's patches.
    """
    n_crops = 2 * batch_size
    n_masked = int(n_crops * probability)
    rng = generator(seed, "mask-plan", step)
    edges = np.linspace(*ratio, n_masked + 1)
    ratios = np.zeros(n_crops)
    ratios[:n_masked] = edges[:-1] + np.diff(edges) * rng.random(n_masked)
    return rng.permutation(ratios)


def masks_for(
    seed: int,
    step: int,
    images: Sequence[int],
    batch_size: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
) -> NDArray[np.bool_]:
    """Return the masks of some images of a step's global batch, (2, len(images), height · width), True where hidden.

    Costs the plan of the step, which is linear in ``batch_size`` but cheap, and the masks asked for.

    Args:
        images: positions in the global batch, in [0, batch_size).
        batch_size, probability, ratio: as for :func:`step_masks`.
        grid: height and width of a global crop in patches.
    """
    n_patches = grid[0] * grid[1]
    ratios = step_masks(seed, step, batch_size, probability, ratio)
    masks = np.zeros((2, len(images), n_patches), bool)
    for crop in range(2):
        for i, image in enumerate(images):
            index = crop * batch_size + image
            if ratios[index] > 0:
                target = max(1, int(ratios[index] * n_patches))
                masks[crop, i] = block_mask(grid, target, generator(seed, "mask", step, index)).ravel()
    return masks
