from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation import CPU, blobs
from PIL import Image
from ranks import run_on_ranks
from sklearn.metrics.pairwise import cosine_similarity

from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval.retrieval import find_images, fit_inside, map_by_class, rank_gallery, read_lists, whole_image_features

ALONE = World(0, 1, 0, CPU)
CONTENT: dict[str, Any] = {
    "imlist": ["a", "b", "c"],
    "qimlist": ["a"],
    "gnd": [{"easy": [1], "hard": np.array([2]), "junk": [0], "bbx": [1.0, 2.0, 9.5, 8.0]}],
}


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, default=lambda array: array.tolist())


def test_the_gallery_is_ranked_by_cosine_similarity() -> None:
    (queries, _), (gallery, _) = blobs(9, 1), blobs(40, 2)
    expected = np.argsort(-cosine_similarity(queries.double(), gallery.double()), axis=1)
    assert np.array_equal(rank_gallery(queries, gallery), expected)


def test_by_class_every_image_of_the_class_is_relevant() -> None:
    (queries, asked), (gallery, labels) = blobs(20, 1), blobs(60, 2)
    rankings = rank_gallery(queries, gallery)
    values = []
    for ranking, label in zip(rankings, asked.tolist(), strict=True):
        hits = np.flatnonzero(labels.numpy()[ranking] == label)
        values.append(np.mean([((n / p if p else 1.0) + (n + 1) / (p + 1)) / 2 for n, p in enumerate(hits)]))
    assert map_by_class(queries, asked, gallery, labels, at_once=7) == pytest.approx(100 * np.mean(values))


@pytest.mark.parametrize("suffix", ["pkl", "json"])
def test_lists_are_read_from_a_pickle_or_from_json(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"gnd.{suffix}"
    file.write_bytes(pickle.dumps(CONTENT, protocol=2)) if suffix == "pkl" else file.write_text(as_json(CONTENT))
    lists = read_lists(file)
    assert (lists.gallery, lists.queries, lists.boxes) == (["a", "b", "c"], ["a"], [(1.0, 2.0, 9.5, 8.0)])
    assert {name: indices.tolist() for name, indices in lists.relevance[0].items()} == {
        "easy": [1], "hard": [2], "junk": [0]
    }  # fmt: skip


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({**CONTENT, "imlist": Hostile()}))
    with pytest.raises(UserError, match=r"mkdir, which is no list, number or array"):
        read_lists(tmp_path / "gnd.pkl")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qimlist": ["a", "b"]}, "an entry for each query"),
        ({"gnd": [{"easy": [3]}]}, "easy of a points outside the 3 images"),
        ({"gnd": 5}, "cannot be read as lists"),
    ],
)
def test_lists_that_do_not_fit_together_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "gnd.json"
    file.write_text(as_json({**CONTENT, **change}))
    with pytest.raises(UserError, match=message):
        read_lists(file)


def images(folder: Path, count: int = 5) -> Any:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 31, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'abcde'[number]}.png")
    return open_source(f"folder:{folder}", folder.parent / "cache")


def test_images_of_the_lists_are_found_by_name_and_missing_ones_are_named(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    assert find_images(source, ["c", "a.jpg"]) == [2, 0]
    with pytest.raises(UserError, match=r"lacks 1 of 2 images of the lists, the first is zebra"):
        find_images(source, ["a", "zebra"])


def test_a_whole_image_keeps_its_shape_in_whole_patches() -> None:
    assert fit_inside(Image.new("RGB", (400, 300)), 224, 14).size == (224, 168)
    assert fit_inside(Image.new("RGB", (30, 1000)), 224, 14).size == (14, 224)


def mean_colour(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x_norm_clstoken": pixels.mean(dim=(2, 3))}


def test_only_the_box_of_a_query_is_looked_at(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    whole, part = (
        whole_image_features(mean_colour, source, [1], [box], 28, 7, ALONE) for box in (None, (3.0, 4.0, 12.0, 13.0))
    )
    cut = source.image(1).crop((3, 4, 12, 13))
    cut.save(tmp_path / "images" / "e.png")
    again = whole_image_features(mean_colour, open_source(f"folder:{tmp_path / 'images'}"), [4], [None], 28, 7, ALONE)
    assert torch.equal(part, again)
    assert not torch.allclose(whole, part)


def test_whole_images_that_were_looked_at_before_an_interruption_are_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "images")
    seen: list[int] = []

    def stopping(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(seen) == 2:
            raise InterruptedError
        seen.append(1)
        return mean_colour(pixels)

    def look(features: Any, size: int = 28) -> torch.Tensor:
        return whole_image_features(features, source, [3, 0, 2], [None] * 3, size, 7, ALONE, "", tmp_path / "partial")

    # Rows are made sure of at least every ten seconds; here after each.
    monkeypatch.setattr("eval.rows._SECONDS_BETWEEN_SAVES", -1.0)
    with pytest.raises(InterruptedError):
        look(stopping)
    seen.clear()
    assert torch.equal(look(stopping), whole_image_features(mean_colour, source, [3, 0, 2], [None] * 3, 28, 7, ALONE))
    assert len(seen) == 1
    seen.clear()
    with pytest.raises(InterruptedError):  # of another size nothing is there
        look(stopping, size=14)


def _features(folder: str) -> Any:
    world = World(dist.get_rank(), dist.get_world_size(), 0, CPU)
    source = open_source(f"folder:{folder}")
    return whole_image_features(mean_colour, source, [3, 0, 2], [None] * 3, 28, 7, world)


@pytest.mark.distributed
def test_ranks_share_the_images_and_all_hold_all_rows_in_order(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    alone = whole_image_features(mean_colour, source, [3, 0, 2], [None] * 3, 28, 7, ALONE)
    for found in run_on_ranks(_features, 4, str(tmp_path / "images")):
        assert torch.equal(found, alone)
