"""ImageNet-1k and ImageNet-22k in the layouts in which they are usually unpacked."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dinov2_fsdp.data.sources.folder import open_folder
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.tar import open_tar_per_class
from dinov2_fsdp.errors import UserError

SPLITS = ("train", "val")

_WNID = re.compile(r"n\d{8}")
_LAYOUT_1K = "ROOT/train/n01440764/*.JPEG and ROOT/val/n01440764/*.JPEG"
_LAYOUT_22K = "ROOT/n01440764/*.JPEG or ROOT/n01440764.tar for every class"


def open_imagenet(spec: str, text: str, cache_dir: Path | None) -> ListedSource:
    """Return a split of ImageNet-1k from ``ROOT[:train|val]``, labelled in the order of the WNIDs.

    Raises :class:`UserError` when the layout is another one, or when val has other classes than train, because then
    its labels would mean something else.
    """
    root, split = _split(text)
    root = _directory(spec, root, _LAYOUT_1K)
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        hint = f"\n  for classes right below the root write imagenet22k:{root}" if _wnids(root) else ""
        raise UserError(f"{spec}: there is no {folder}\n  expected {_LAYOUT_1K}{hint}")
    source = open_folder(spec, folder, cache_dir, fewest_classes=1)
    classes = _require_wnids(spec, source, _LAYOUT_1K)
    train = os.path.join(root, "train")
    if split != "train" and os.path.isdir(train) and (trained := _wnids(train)) != classes:
        odd = sorted(set(trained) ^ set(classes))
        raise UserError(
            f"{spec}: {split} has {len(classes):,} classes, train has {len(trained):,}, so labels would not agree\n"
            f"  only one of them has {', '.join(odd[:5])}{' …' if len(odd) > 5 else ''}"
        )
    return source


def open_imagenet22k(spec: str, text: str, cache_dir: Path | None) -> ListedSource:
    """Return ImageNet-22k, from one folder or one plain tar per class, labelled in the order of the WNIDs."""
    root = _directory(spec, text, _LAYOUT_22K)
    folders, tars = _wnids(root), _wnids(root, ".tar")
    if folders and tars:
        raise UserError(
            f"{spec}: {root} has both class folders ({folders[0]}) and class tars ({tars[0]}.tar)\n"
            "  finish unpacking and move the tars away, or remove the folders"
        )
    if not folders and not tars:
        raise UserError(f"{spec}: {root} has no classes\n  expected {_LAYOUT_22K}")
    source: ListedSource
    source = open_tar_per_class(spec, root, cache_dir) if tars else open_folder(spec, root, cache_dir, fewest_classes=1)
    _require_wnids(spec, source, _LAYOUT_22K)
    return source


def _split(text: str) -> tuple[str, str]:
    root, colon, split = text.rpartition(":")
    return (root, split) if colon and split in SPLITS else (text, "train")


def _directory(spec: str, root: str, layout: str) -> str:
    path = os.path.abspath(os.path.expanduser(root))
    if not root or not os.path.isdir(path):
        raise UserError(f"{spec}: the directory '{root}' does not exist\n  expected {layout}")
    return path


def _wnids(directory: str, suffix: str = "") -> list[str]:
    with os.scandir(directory) as entries:
        stems = (entry.name[: len(entry.name) - len(suffix)] for entry in entries if entry.name.endswith(suffix))
        return sorted(stem for stem in stems if _WNID.fullmatch(stem))


def _require_wnids(spec: str, source: ListedSource, layout: str) -> list[str]:
    classes = source.classes
    if classes is None:
        first = source.name(0)
        raise UserError(f"{spec}: {first} is in no class folder\n  expected {layout}")
    for name in classes:
        if not _WNID.fullmatch(name):
            raise UserError(
                f"{spec}: '{name}' is no WordNet id\n  expected {layout}\n  for other class names use folder: or tar:"
            )
    return classes
