"""--data: both splits of a data set from one text."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from source_files import grow

from dinov2_fsdp.errors import UserError
from eval import knn
from eval.command import _split_data
from eval.splits import splits_of


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("scenes:n=20", ("scenes:n=20", "scenes:n=20,split=test")),
        ("scenes:", ("scenes:", "scenes:split=test")),
        ("imagenet:/data/in1k", ("imagenet:/data/in1k", "imagenet:/data/in1k:val")),
        ("imagenet:/data/in1k:train", ("imagenet:/data/in1k:train", "imagenet:/data/in1k:val")),
    ],
)
def test_forms_that_have_splits_need_no_look(data: str, expected: tuple[str, str]) -> None:
    assert splits_of(data, "labels") == expected


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("train", "val"), ("training", "validation")])
def test_a_folder_holds_a_folder_for_each_split(tmp_path: Path, train: str, test: str) -> None:
    grow(tmp_path, f"{train}/cat/0.png", f"{test}/cat/0.png")
    grow(tmp_path / "ade", *(f"{kind}/{split}/0.png" for kind in ("images", "annotations") for split in (train, test)))
    for split in (train, test):
        (tmp_path / f"nyu_{split}.txt").write_text("")
    assert splits_of(f"folder:{tmp_path}", "labels") == (f"folder:{tmp_path}/{train}", f"folder:{tmp_path}/{test}")
    ade = f"folder:{tmp_path}/ade"
    assert splits_of(ade, "segmentation") == (f"{ade}#{train}", f"{ade}#{test}")
    assert splits_of(f"folder:{tmp_path}", "depth") == (f"folder:{tmp_path}#{train}", f"folder:{tmp_path}#{test}")


def test_a_tar_holds_a_folder_for_each_split(tmp_path: Path) -> None:
    grow(tmp_path / "a", "images/train/0.png", "images/val/0.png", "images/test/0.png", "annotations/train/0.png")
    file = tmp_path / "camvid.tar"
    with tarfile.open(file, "w") as tar:
        tar.add(tmp_path / "a", ".")
    assert splits_of(f"tar:{file}", "segmentation") == (f"tar:{file}#train", f"tar:{file}#test")


def test_a_training_tar_has_its_test_tar_beside_it(tmp_path: Path) -> None:
    grow(tmp_path / "a", "train/cat/0.png")
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"cifar10-{name}.tar", "w") as tar:
            tar.add(tmp_path / "a", ".")
    expected = (f"tar:{tmp_path}/cifar10-train.tar", f"tar:{tmp_path}/cifar10-test.tar")
    assert splits_of(expected[0], "labels") == expected


@pytest.mark.parametrize("kind", ["labels", "segmentation", "depth"])
def test_data_without_two_splits_are_refused_with_the_way_out(tmp_path: Path, kind: str) -> None:
    grow(tmp_path / "data", "cat/0.png", "dog/0.png")
    for place in ("data", "nowhere"):
        with pytest.raises(UserError, match=r"no two splits(.|\n)*--train SPEC --test SPEC"):
            splits_of(f"folder:{tmp_path / place}", kind)


def test_data_stand_for_both_flags_and_not_beside_one() -> None:
    arguments = knn._parser().parse_args(["--weights", "x", "--data", "scenes:n=20"])
    _split_data(arguments)
    assert (arguments.train, arguments.test) == ("scenes:n=20", "scenes:n=20,split=test")
    arguments = knn._parser().parse_args(["--weights", "x", "--data", "scenes:n=20", "--test", "scenes:n=3"])
    with pytest.raises(UserError, match="--data is both splits"):
        _split_data(arguments)
