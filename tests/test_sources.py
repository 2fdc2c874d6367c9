from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_files import Open, encode, grow, names, pack_images, values

from dinov2_fsdp.data.sources import BadImage, open_source
from dinov2_fsdp.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(cache: Path) -> Open:
    return lambda spec: open_source(spec, cache)


# ------------------------------------------------------------------------------------------------------------ choosing


def test_a_kind_without_a_place_is_answered_with_its_form(opened: Open) -> None:
    with pytest.raises(UserError, match="says which kind it is but not where; write folder:PATH"):
        opened("folder")


def test_an_unknown_kind_is_answered_with_the_nearest_one(opened: Open) -> None:
    with pytest.raises(UserError, match=r"(?s)did you mean 'folder'.*valid: folder:PATH.*scenes:"):
        opened("foldr:/x")


def test_a_bare_directory_is_answered_with_what_to_write(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"write folder:{tmp_path}"):
        opened(str(tmp_path))


def test_a_bare_tar_is_answered_with_what_to_write(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "a.png")
    with pytest.raises(UserError, match=f"write tar:{path}"):
        opened(str(path))


def test_every_kind_of_error_is_at_most_five_lines(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    specs = ["x", "x:", "folder:", f"folder:{tmp_path}/empty", "tar:", "tar:/no/*.tar", "imagenet:", "scenes:size"]
    for spec in [*specs, f"imagenet:{tmp_path}", f"imagenet22k:{tmp_path}", f"tar:{tmp_path}", str(tmp_path)]:
        with pytest.raises(UserError) as caught:
            opened(spec)
        assert str(caught.value).count("\n") < 5, spec


# ------------------------------------------------------------------------------------------------------------- folders


def test_nested_folders_are_listed_in_the_byte_order_of_their_paths(opened: Open, tmp_path: Path) -> None:
    found = ["b/x.png", "a/z.png", "a-b/y.png", "a.png", "a/b/c/d.png", "B/x.png", "ä/x.png", "a/c.png"]
    source = opened(f"folder:{grow(tmp_path / 'images', *found)}")
    ordered = sorted(found, key=str.encode)
    assert names(source) == [str(tmp_path / "images" / name) for name in ordered]
    assert values(source) == [found.index(name) for name in ordered]


def test_images_in_the_root_make_a_folder_unlabelled(opened: Open, tmp_path: Path) -> None:
    source = opened(f"folder:{grow(tmp_path / 'images', 'cat/0.png', 'dog/0.png', 'stray.png')}")
    assert source.classes is None
    assert source.labels is None
    assert source.label(0) == -1


def test_one_top_level_folder_is_no_class(opened: Open, tmp_path: Path) -> None:
    assert opened(f"folder:{grow(tmp_path / 'images', 'all/a/0.png', 'all/b/0.png')}").classes is None


def test_the_first_folder_of_a_path_is_its_class(opened: Open, tmp_path: Path) -> None:
    source = opened(f"folder:{grow(tmp_path / 'images', 'a/0.png', 'a-b/0.png', 'a/deep/1.png')}")
    assert source.classes == ["a", "a-b"]
    assert [(Path(source.name(i)).parts[len(tmp_path.parts) + 1], source.label(i)) for i in range(3)] == [
        ("a-b", 1),
        ("a", 0),
        ("a", 0),
    ]
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [1, 0, 0]


def test_folders_without_images_are_no_classes(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a/0.png", "b/0.png")
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("x")
    assert opened(f"folder:{root}").classes == ["a", "b"]


def test_only_visible_files_with_image_extensions_of_any_case_are_listed(opened: Open, tmp_path: Path) -> None:
    wanted = ["a.JPG", "b.jpeg", "c.Png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif", "i.ppm"]
    root = grow(tmp_path / "images", *wanted, ".hidden.png", ".cache/x.png", "x.txt", "png", "x.png.part")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    assert [Path(name).name for name in names(opened(f"folder:{root}"))] == wanted


def test_a_linked_directory_is_entered_once(opened: Open, tmp_path: Path) -> None:
    outside = grow(tmp_path / "outside", "x.png", "deep/y.png")
    root = grow(tmp_path / "images", "a/0.png")
    for link, target in [("first", outside), ("second", outside), ("third", outside / "deep")]:
        (root / link).symlink_to(target)
    listed = [Path(name).relative_to(root).as_posix() for name in names(opened(f"folder:{root}"))]
    assert listed == ["a/0.png", "first/deep/y.png", "first/x.png"]


def test_a_link_into_the_tree_or_above_it_is_not_entered(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "b/0.png")
    (root / "a").symlink_to(root / "b")
    (root / "b" / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    assert names(opened(f"folder:{root}")) == [str(root / "b/0.png")]


def test_a_name_that_is_not_utf8_is_read_and_printable(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.png")
    with open(os.fsencode(root) + b"/\xff.png", "wb") as file:
        file.write(encode(7))
    source = opened(f"folder:{root}")
    assert values(source) == [0, 7]
    source.name(1).encode()


def test_a_missing_folder_is_named(opened: Open) -> None:
    with pytest.raises(UserError, match="'/no/such/place' does not exist"):
        opened("folder:/no/such/place")


def test_a_file_in_place_of_a_folder_is_named(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "a.png")
    with pytest.raises(UserError, match=f"(?s)a.tar' is not a directory.*tar:{path}"):
        opened(f"folder:{path}")


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_images_is_named(opened: Open, tmp_path: Path, files: list[str]) -> None:
    root = tmp_path / "images"
    root.mkdir()
    grow(root, *files)
    with pytest.raises(UserError, match=rf"(?s)no images in {root}.*\.jpg \.jpeg"):
        opened(f"folder:{root}")


def test_an_unreadable_directory_is_named(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow(tmp_path / "images", "a/0.png", "b/0.png")
    scandir: Callable[..., Any] = os.scandir

    def forbidden(path: bytes) -> Any:
        if path.rstrip(b"/").endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=f"cannot list {root}/b/ \\(Permission denied"):
        opened(f"folder:{root}")


def test_an_image_deleted_since_is_bad_and_named(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.png")
    source = opened(f"folder:{root}")
    (root / "a.png").unlink()
    with pytest.raises(BadImage) as caught:
        source.image(0)
    assert caught.value.name == str(root / "a.png")
    assert "No such file" in caught.value.reason


def test_an_empty_file_is_bad_and_named(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.png")
    (root / "a.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"a\.png: the file is empty"):
        opened(f"folder:{root}").encoded(0)


def test_text_in_place_of_an_image_is_bad_and_named(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.jpg")
    (root / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(BadImage, match=f"{root}/a.jpg: not an image"):
        opened(f"folder:{root}").image(0)


def test_encoded_gives_the_bytes_of_the_file(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.png")
    assert opened(f"folder:{root}").encoded(0) == (root / "a.png").read_bytes()


def test_an_index_past_the_end_is_an_index_error(opened: Open, tmp_path: Path) -> None:
    source = opened(f"folder:{grow(tmp_path / 'images', 'a.png')}")
    for read in (source.image, source.label, source.name, source.encoded):
        with pytest.raises(IndexError):
            read(1)


# ------------------------------------------------------------------------------------------------------------ ImageNet


def test_imagenet_is_labelled_by_sorted_wnid(opened: Open, tmp_path: Path) -> None:
    wnids = ["n02000000", "n01000000"]
    root = grow(tmp_path, *(f"{split}/{wnid}/{wnid}_1.JPEG" for split in ("train", "val") for wnid in wnids))
    for spec, split in [("", "train"), (":train", "train"), (":val", "val")]:
        source = opened(f"imagenet:{root}{spec}")
        assert source.classes == sorted(wnids)
        assert [source.label(0), source.label(1)] == [0, 1]
        assert names(source)[0] == f"{root}/{split}/n01000000/n01000000_1.JPEG"


def test_imagenet_in_another_layout_says_what_was_expected(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "flat", "n01000000/a.JPEG")
    with pytest.raises(UserError, match=rf"(?s)no {root}/train.*ROOT/train/n01440764.*imagenet22k:{root}"):
        opened(f"imagenet:{root}")
    for file in ("train/a.JPEG", "train/cat/a.JPEG"):
        with pytest.raises(UserError, match="expected ROOT/train/n01440764"):
            opened(f"imagenet:{grow(tmp_path / file.replace('/', '-'), file)}")


def test_imagenet_val_with_other_classes_than_train_is_refused(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path, "train/n01000000/a.JPEG", "train/n02000000/a.JPEG", "val/n02000000/a.JPEG")
    with pytest.raises(UserError, match="only one of them has n01000000"):
        opened(f"imagenet:{root}:val")


def test_imagenet22k_is_read_from_folders_or_from_tars_alike(opened: Open, tmp_path: Path) -> None:
    grow(tmp_path / "folders", "n02000000/a.JPEG", "n01000000/b.JPEG")
    pack_images(tmp_path / "tars" / "n02000000.tar", "a.JPEG")
    pack_images(tmp_path / "tars" / "n01000000.tar", "unused/c.JPEG", "b.JPEG")
    for place, labels in [("folders", [0, 1]), ("tars", [0, 0, 1])]:
        source = opened(f"imagenet22k:{tmp_path}/{place}")
        assert source.classes == ["n01000000", "n02000000"]
        assert source.labels is not None
        assert source.labels.tolist() == labels


def test_imagenet22k_half_unpacked_is_refused(opened: Open, tmp_path: Path) -> None:
    grow(tmp_path, "n02000000/a.JPEG")
    pack_images(tmp_path / "n01000000.tar", "a.JPEG")
    with pytest.raises(UserError, match=r"both class folders \(n02000000\) and class tars \(n01000000\.tar\)"):
        opened(f"imagenet22k:{tmp_path}")


# -------------------------------------------------------------------------------------------------------------- scenes


def test_scenes_give_images_labels_masks_and_depth_that_agree(opened: Open) -> None:
    source = opened("scenes:n=12,size=32")
    assert len(source) == 12
    scene = source.scene(5)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(source.image(5)), scene.image)
    assert source.label(5) == scene.label
    assert source.labels is not None
    assert source.labels[5] == scene.label
    assert source.classes is not None
    assert source.labels.max() < len(source.classes)
    assert scene.mask.shape == scene.depth.shape == (32, 32)
    assert source.encoded(5) is None
    assert source.name(5) == "scenes:5"


def test_no_two_splits_or_seeds_of_scenes_share_an_image(opened: Open) -> None:
    specs = [f"scenes:n=3,size=16,seed={seed},split={split}" for seed in (0, 1, 2) for split in ("train", "test")]
    images = {opened(spec).image(index).tobytes() for spec in specs for index in range(3)}
    assert len(images) == 18


def test_scenes_have_documented_defaults(opened: Open) -> None:
    source = opened("scenes:")
    assert len(source) == 50_000
    assert source.image(0).size == (64, 64)
    assert source.image(0).tobytes() == opened("scenes:seed=0,split=train").image(0).tobytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("sise=3", "did you mean 'size'"),
        ("n", "'n' is no option"),
        ("n=many", "n=many is not a whole number"),
        ("n=0", "n=0 is too small"),
        ("size=1", "size=1 is too small"),
        ("seed=-1", "seed=-1 is too small"),
        ("split=tset", "did you mean 'test'"),
    ],
)
def test_a_wrong_option_of_scenes_is_named(opened: Open, options: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        opened(f"scenes:{options}")
