from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.errors import UserError
from eval.pairs import check_pairs, decode_values, open_pairs

RNG = np.random.default_rng(0)


def write(folder: Path, split: str, sizes: list[tuple[int, int]], values: int = 4, name: str = "scene/a") -> None:
    """Write images of (height, width) and annotations of the same size with values below ``values``."""
    for number, size in enumerate(sizes):
        stem = f"{name}{number:03d}"
        for kind, data, suffix in (
            ("images", RNG.integers(0, 256, (*size, 3), np.uint8), "jpg"),
            ("annotations", RNG.integers(0, values, size, np.uint8), "png"),
        ):
            file = folder / kind / split / f"{stem}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data).save(file)


def packed(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False)
    return file


def test_folders_and_tars_hold_the_same_pairs(tmp_path: Path) -> None:
    write(tmp_path / "data", "training", [(8, 12), (6, 5)])
    write(tmp_path / "data", "validation", [(8, 12)])
    tar = packed(tmp_path / "data", tmp_path / "data.tar")
    first = open_pairs(f"folder:{tmp_path / 'data'}#training", "segmentation", tmp_path / "cache")
    second = open_pairs(f"tar:{tar}#training", "segmentation", tmp_path / "cache")
    assert len(first) == len(second) == 2
    for index in range(2):
        expected = np.asarray(Image.open(tmp_path / "data" / "annotations" / "training" / f"scene/a{index:03d}.png"))
        assert np.array_equal(first.target(index), expected)
        assert np.array_equal(second.target(index), expected)
        assert np.array_equal(first.image(index), second.image(index))
    assert check_pairs(first, 4) == check_pairs(second, 4) == [(8, 12), (6, 5)]


def test_an_image_without_annotation_is_named(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 8), (8, 8)])
    (tmp_path / "annotations" / "training" / "scene" / "a001.png").unlink()
    with pytest.raises(UserError, match=r"1 images have no annotation, the first is .*a001.jpg"):
        open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache")


def test_a_size_that_differs_is_named_with_both_sizes(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 8), (8, 10)])
    Image.new("L", (10, 9)).save(tmp_path / "annotations" / "training" / "scene" / "a001.png")
    pairs = open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache")
    with pytest.raises(UserError, match=r"a001.jpg has 10×8 pixels, but its annotation 10×9"):
        check_pairs(pairs, 4)


def test_pairs_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 12), (6, 5), (9, 9)])
    Image.new("L", (3, 3)).save(tmp_path / "annotations" / "training" / "scene" / "a002.png")
    pairs = open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache")
    assert check_pairs(pairs, limit=2) == [(8, 12), (6, 5)]
    with pytest.raises(UserError, match="a002"):
        check_pairs(pairs)


def test_an_image_that_lies_on_its_side_has_its_upright_size(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 10)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 10)).save(tmp_path / "images" / "training" / "scene" / "a000.jpg", exif=exif)
    pairs = open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache")
    assert check_pairs(pairs, 4) == [(8, 10)]
    assert pairs.image(0).size == (10, 8)


@pytest.mark.parametrize(("classes", "first", "void"), [(3, 0, ()), (3, 1, (7,)), (2, 0, (2,))])
def test_a_value_that_is_neither_class_nor_void_is_named(
    tmp_path: Path, classes: int, first: int, void: tuple[int, ...]
) -> None:
    write(tmp_path, "training", [(20, 20)], values=4)
    pairs = open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache")
    wrong = 3 if first == 0 else 0
    with pytest.raises(UserError, match=rf"holds the value {wrong}, which is\s+neither"):
        check_pairs(pairs, classes, first, void)
    assert check_pairs(pairs, 3, 1, (0,)) == [(20, 20)]


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 8)])
    with pytest.raises(UserError, match=r"did you mean 'training'\?\nsplits there: training"):
        open_pairs(f"folder:{tmp_path}#trainin", "segmentation", tmp_path / "cache")


@pytest.mark.parametrize("spec", ["folder:somewhere", "imagenet:somewhere#train", "tar:x.tar"])
def test_a_text_that_names_no_split_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"expected folder:PATH#SPLIT"):
        open_pairs(spec, "segmentation")


def test_an_annotation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "training", [(8, 8)])
    (tmp_path / "annotations" / "training" / "scene" / "a000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a000.png"):
        check_pairs(open_pairs(f"folder:{tmp_path}#training", "segmentation", tmp_path / "cache"), 4)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_values_are_the_numbers_in_the_file(mode: str) -> None:
    values = RNG.integers(0, 60_000 if mode == "I;16" else 200, (5, 7))
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette(RNG.permutation(768).astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    assert np.array_equal(decode_values(file.getvalue(), "x"), values)


def test_a_coloured_annotation_is_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).save(file, "PNG")
    with pytest.raises(BadImage, match="expected one number per pixel"):
        decode_values(file.getvalue(), "x")


# ---------------------------------------------------------------------------------------------------------------------
# Depth, and scenes.


def write_nyu(folder: Path) -> Path:
    (folder / "kitchen").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).save(folder / "kitchen" / f"rgb_{number}.jpg")
        Image.fromarray((1000 * (number + 1) + np.arange(48).reshape(6, 8)).astype(np.uint16)).save(
            folder / "kitchen" / f"sync_depth_{number}.png"
        )
    lines = [f"/kitchen/rgb_{n}.jpg /kitchen/sync_depth_{n}.png 518.8579" for n in (2, 0)]
    (folder / "nyu_train.txt").write_text("\n".join([*lines, "/kitchen/rgb_1.jpg None 518.8579"]) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_listed_pairs_have_their_depth_in_metres(tmp_path: Path, kind: str) -> None:
    folder = write_nyu(tmp_path / "nyu")
    spec = f"folder:{folder}#train" if kind == "folder" else f"tar:{packed(folder, tmp_path / 'nyu.tar')}#train"
    pairs = open_pairs(spec, "depth", tmp_path / "cache")
    assert len(pairs) == 2
    assert pairs.target(0)[0, :3].tolist() == pytest.approx([3.0, 3.001, 3.002])
    assert pairs.target(1)[0, 0] == pytest.approx(1.0)
    assert check_pairs(pairs) == [(6, 8), (6, 8)]


def test_a_list_that_names_missing_files_or_is_missing_is_an_error(tmp_path: Path) -> None:
    folder = write_nyu(tmp_path / "nyu")
    with pytest.raises(UserError, match=r"no readable nyu_test.txt"):
        open_pairs(f"folder:{folder}#test", "depth", tmp_path / "cache")
    (folder / "nyu_test.txt").write_text("kitchen/rgb_9.jpg kitchen/sync_depth_9.png\n")
    with pytest.raises(UserError, match=r"lists 'kitchen/rgb_9.jpg kitchen/sync_depth_9.png'"):
        open_pairs(f"folder:{folder}#test", "depth", tmp_path / "cache")


def test_scenes_have_classes_and_depth() -> None:
    masks: Any = open_pairs("scenes:n=5,size=16", "segmentation")
    depths = open_pairs("scenes:n=5,size=16", "depth")
    scene = masks.source.scene(3)
    assert np.array_equal(masks.target(3), scene.mask)
    assert np.array_equal(depths.target(3), scene.depth)
    assert masks.classes == 11
    assert check_pairs(masks, 11) == [(16, 16)] * 5
