from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from dinov2_fsdp.data.scenes import CLASSES, Scene, render


@cache
def _scenes(count: int, size: int = 32) -> tuple[Scene, ...]:
    return tuple(render(7, index, size) for index in range(count))


def _between_class_share(values: np.ndarray, labels: np.ndarray) -> float:
    """Return F of a one-way analysis of variance: about 1 where the classes do not differ."""
    groups = [values[labels == label] for label in np.unique(labels)]
    between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups) / (len(groups) - 1)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (len(values) - len(groups))
    return float(between / within)


# The 99.99 % point of F with 9 and many degrees of freedom; all draws are fixed by the seed.
_F_LIMIT = 3.8


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    for index in range(20):
        one, again = render(3, index), render(3, index)
        assert one.label == again.label
        for name in ("image", "mask", "depth"):
            assert getattr(one, name).tobytes() == getattr(again, name).tobytes(), name


@pytest.mark.parametrize("other", [(3, 6), (4, 5)])
def test_another_index_or_seed_gives_another_scene(other: tuple[int, int]) -> None:
    assert np.abs(render(3, 5).image.astype(int) - render(*other).image).mean() > 10


@pytest.mark.parametrize("size", [32, 64, 96])
def test_every_part_of_a_scene_has_its_shape_and_dtype(size: int) -> None:
    scene = render(0, 0, size)
    assert (scene.image.shape, scene.image.dtype) == ((size, size, 3), np.uint8)
    assert (scene.mask.shape, scene.mask.dtype) == ((size, size), np.uint8)
    assert (scene.depth.shape, scene.depth.dtype) == ((size, size), np.float32)
    assert scene.image.flags.c_contiguous


def test_the_size_changes_the_sampling_and_not_the_scene() -> None:
    for index in range(30):
        fine, coarse = render(1, index, 96), render(1, index, 32)
        assert fine.label == coarse.label
        pooled = fine.image.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
        # Coats as fine as the coarse grid differ a little; another scene differs by 37 and more.
        assert np.abs(pooled - coarse.image).mean() < 12
        assert (fine.mask[1::3, 1::3] != coarse.mask).mean() < 0.02
        np.testing.assert_allclose(np.median(fine.depth[1::3, 1::3] / coarse.depth), 1.0, rtol=1e-3)


def test_the_mask_holds_the_label_of_the_objects() -> None:
    for scene in _scenes(200):
        assert set(np.unique(scene.mask)) == {0, 1 + scene.label}
        assert 0.08 < (scene.mask > 0).mean() < 0.75


def test_objects_are_nearer_than_the_background_around_them() -> None:
    for scene in _scenes(200):
        inside = scene.mask > 0
        assert np.isfinite(scene.depth).all()
        assert scene.depth.min() > 0.3
        assert scene.depth.max() < 12
        beside = inside[:, 1:] != inside[:, :-1]
        near = np.where(inside[:, 1:], scene.depth[:, 1:], scene.depth[:, :-1])[beside]
        far = np.where(inside[:, 1:], scene.depth[:, :-1], scene.depth[:, 1:])[beside]
        assert (near < far).all()


def test_ten_scenes_on_end_hold_every_class_once() -> None:
    labels = np.array([render(5, index, 8).label for index in range(400)])
    assert (np.sort(labels.reshape(-1, 10), axis=1) == np.arange(10)).all()
    assert len(CLASSES) == len(set(CLASSES)) == 10


@pytest.mark.slow
def test_a_label_does_not_depend_on_its_place_among_the_ten() -> None:
    labels = np.array([render(5, index, 8).label for index in range(1000)])
    table = np.zeros((10, 10))
    np.add.at(table, (np.arange(1000) % 10, labels), 1)
    assert ((table - 10) ** 2 / 10).sum() < 140  # chi-squared of 81 degrees of freedom, p < 0.0001


@pytest.mark.slow
@pytest.mark.parametrize("nuisance", ["area", "column", "row", "red", "green", "blue", "background", "distance"])
def test_a_nuisance_does_not_depend_on_the_class(nuisance: str) -> None:
    measures = {
        "area": lambda scene: (scene.mask > 0).mean(),
        "column": lambda scene: np.nonzero(scene.mask)[1].mean(),
        "row": lambda scene: np.nonzero(scene.mask)[0].mean(),
        "red": lambda scene: scene.image[..., 0].mean(),
        "green": lambda scene: scene.image[..., 1].mean(),
        "blue": lambda scene: scene.image[..., 2].mean(),
        "background": lambda scene: scene.image[scene.mask == 0].mean(),
        "distance": lambda scene: np.median(scene.depth[scene.mask == 0]),
    }
    scenes = _scenes(1500)
    values = np.array([measures[nuisance](scene) for scene in scenes], dtype=np.float64)
    assert _between_class_share(values, np.array([scene.label for scene in scenes])) < _F_LIMIT


def test_the_statistic_for_nuisances_sees_a_class_that_differs() -> None:
    scenes = _scenes(1500)
    labels = np.array([scene.label for scene in scenes])
    area = np.array([(scene.mask > 0).mean() for scene in scenes])
    assert _between_class_share(area * np.where(labels == 3, 1.3, 1.0), labels) > _F_LIMIT


def test_nearest_neighbours_in_pixels_stay_near_chance() -> None:
    scenes = _scenes(1500)
    labels = np.array([scene.label for scene in scenes])
    pixels = np.stack([scene.image for scene in scenes]).reshape(1500, -1).astype(np.float32)
    pixels -= pixels[:1200].mean(axis=0)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    nearest = np.argsort(-pixels[1200:] @ pixels[:1200].T, axis=1)[:, :20]
    guess = np.array([np.bincount(row, minlength=10).argmax() for row in labels[:1200][nearest]])
    assert (guess == labels[1200:]).mean() < 0.22
