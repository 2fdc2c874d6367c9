"""The masks: as many, as large and as shaped as iBOT and DINOv2 say, and the same for every world size."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dinov2_fsdp.data.masks import block_mask, masks_for, step_masks
from dinov2_fsdp.rng import generator

GRID = (16, 16)
RATIO = (0.1, 0.5)


def covered_by(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Return which patches lie in a wholly hidden height × width rectangle."""
    covered = np.zeros_like(mask)
    for top in range(mask.shape[0] - height + 1):
        for left in range(mask.shape[1] - width + 1):
            block = np.s_[top : top + height, left : left + width]
            covered[block] |= mask[block].all()
    return covered


def sides(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return height and width of the box around the hidden patches."""
    return int(np.ptp(np.flatnonzero(mask.any(1)))) + 1, int(np.ptp(np.flatnonzero(mask.any(0)))) + 1


def test_exactly_half_of_the_global_crops_are_masked_in_every_step() -> None:
    for step in range(50):
        assert np.count_nonzero(step_masks(0, step, 33, 0.5, RATIO)) == 33


def test_a_share_that_does_not_divide_the_batch_is_rounded_down() -> None:
    assert np.count_nonzero(step_masks(0, 0, 5, 0.35, RATIO)) == 3


def test_the_ratios_of_a_step_are_stratified() -> None:
    ratios = step_masks(0, 7, 64, 0.5, RATIO)
    edges = np.linspace(*RATIO, 65)
    ordered = np.sort(ratios[ratios > 0])
    assert (edges[:-1] <= ordered).all()
    assert (ordered <= edges[1:]).all()


def test_a_ratio_is_uniform_within_its_stratum() -> None:
    one_per_step = np.array([step_masks(0, step, 1, 0.5, RATIO).max() for step in range(2000)])
    uniform = np.linspace(*RATIO, 2000)
    assert np.abs(np.sort(one_per_step) - uniform).max() < 0.4 * 1.63 / np.sqrt(2000)


def test_every_place_in_the_batch_is_masked_as_often_and_as_much() -> None:
    plans = np.array([step_masks(0, step, 4, 0.5, RATIO) for step in range(2000)])
    np.testing.assert_allclose((plans > 0).mean(0), 0.5, atol=4 * 0.5 / np.sqrt(2000))
    np.testing.assert_allclose(plans.sum(0) / (plans > 0).sum(0), 0.3, atol=4 * 0.115 / np.sqrt(1000))


@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (4, 4), (2, 2), (1, 1), (12, 20), (1, 30), (30, 1)])
def test_a_mask_never_exceeds_its_target_and_is_never_empty(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    n_patches = grid[0] * grid[1]
    for target in [*range(1, n_patches // 2 + 1), 1, n_patches]:
        for _ in range(5):
            mask = block_mask(grid, target, rng)
            assert mask.shape == grid
            assert 1 <= mask.sum() <= target


@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (5, 9)])
def test_no_single_block_spans_the_grid(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for side in grid:
        # Blocks of 1 × side, or side × 1, are all that would fit this aspect and area.
        for aspect in (1 / side, side):
            mask = block_mask(grid, side, rng, min_patches=side, aspect=(aspect, aspect))
            assert mask.sum() == 1 or max(sides(mask)) < max(grid)


def test_a_target_of_nothing_hides_nothing() -> None:
    assert not block_mask(GRID, 0, np.random.default_rng(0)).any()


def test_all_but_the_last_few_hidden_patches_belong_to_blocks_of_four_or_more() -> None:
    rng = np.random.default_rng(0)
    for target in range(4, 128):
        mask = block_mask(GRID, target, rng)
        blocks = covered_by(mask, 2, 2) | covered_by(mask, 1, 4) | covered_by(mask, 4, 1)
        assert np.count_nonzero(mask & ~blocks) <= 3


def test_the_aspect_of_blocks_is_bounded() -> None:
    # Of all the rectangles of 36 patches only these have an aspect in [.3, 3.3]; 3 × 12 and 2 × 18 have not.
    rng = np.random.default_rng(0)
    masks = [block_mask((40, 40), 36, rng, min_patches=36) for _ in range(300)]
    assert {sides(mask) for mask in masks if mask.sum() == 36} == {(4, 9), (6, 6), (9, 4)}


def test_aspect_is_height_over_width() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = block_mask(GRID, 40, rng, aspect=(0.25, 0.25))
        assert np.count_nonzero(mask & ~covered_by(mask, 1, 4)) <= 3


def test_the_aspect_of_blocks_is_as_often_tall_as_wide() -> None:
    rng = np.random.default_rng(0)
    heights, widths = np.array([sides(block_mask((64, 64), 36, rng, min_patches=36)) for _ in range(2000)]).T
    tall, wide = np.count_nonzero(heights > widths), np.count_nonzero(heights < widths)
    assert abs(tall - wide) < 4 * np.sqrt(tall + wide)


def test_blocks_fall_everywhere_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([block_mask((8, 8), 20, rng) for _ in range(500)], axis=0)
    assert share.min() > 0.03
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.12)


def test_the_hidden_share_is_close_to_the_ratios_asked_for() -> None:
    # Rounding the target down costs half a patch, .002; blocks that do not fit cost a tenth of a patch.
    masks = np.concatenate([masks_for(0, step, range(32), 32, GRID, 0.5, RATIO).reshape(64, -1) for step in range(20)])
    shares = masks.mean(1)[masks.any(1)]
    assert len(shares) == 20 * 32
    assert shares.mean() == pytest.approx(0.2977, abs=0.001)
    assert shares.min() >= 0.08
    assert shares.max() <= 0.5
    assert shares.std() == pytest.approx(0.4 / np.sqrt(12), abs=0.01)


def test_each_mask_aims_at_its_own_ratio_of_the_plan() -> None:
    ratios = step_masks(3, 9, 32, 0.5, RATIO).reshape(2, 32)
    hidden = masks_for(3, 9, range(32), 32, GRID, 0.5, RATIO).sum(2)
    targets = (ratios * 256).astype(int)
    assert ((hidden > 0) == (ratios > 0)).all()
    assert (hidden <= targets).all()
    assert (targets - hidden).max() <= 8
    assert (targets == hidden).mean() > 0.85


def test_the_masks_of_an_image_do_not_depend_on_who_asks_for_them() -> None:
    whole = masks_for(0, 5, range(8), 8, GRID, 0.5, RATIO)
    halves = [masks_for(0, 5, images, 8, GRID, 0.5, RATIO) for images in (range(4), range(4, 8))]
    strided = masks_for(0, 5, range(1, 8, 3), 8, GRID, 0.5, RATIO)
    assert whole.shape == (2, 8, 256)
    assert whole.dtype == bool
    assert (whole == np.concatenate(halves, axis=1)).all()
    assert (whole[:, 1::3] == strided).all()


def test_masks_are_a_function_of_seed_and_step() -> None:
    def masks(seed: int, step: int) -> NDArray[np.bool_]:
        return masks_for(seed, step, range(8), 8, GRID, 0.5, RATIO)

    assert (masks(0, 5) == masks(0, 5)).all()
    assert (masks(0, 5) != masks(0, 6)).any()
    assert (masks(0, 5) != masks(1, 5)).any()


def test_crops_of_equal_ratio_get_different_masks() -> None:
    masks = masks_for(0, 0, range(8), 8, GRID, 1.0, (0.3, 0.3)).reshape(16, -1)
    assert len({mask.tobytes() for mask in masks}) == 16


def test_a_mask_is_laid_out_row_by_row() -> None:
    ratios = step_masks(0, 0, 2, 1.0, RATIO)
    expected = block_mask((6, 10), int(ratios[3] * 60), generator(0, "mask", 0, 3))
    assert (masks_for(0, 0, [1], 2, (6, 10), 1.0, RATIO)[1, 0].reshape(6, 10) == expected).all()


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (7, 7)])
def test_tiny_grids_hide_something_in_every_masked_crop(grid: tuple[int, int]) -> None:
    for step in range(20):
        masks = masks_for(0, step, range(8), 8, grid, 0.5, RATIO)
        assert np.count_nonzero(masks.any(2)) == 8


def test_probability_zero_masks_nothing_and_one_masks_all() -> None:
    assert not masks_for(0, 0, range(4), 4, GRID, 0.0, RATIO).any()
    assert masks_for(0, 0, range(4), 4, GRID, 1.0, RATIO).any(2).all()
