"""Both splits of a data set from one text: what ``--data`` stands for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dinov2_fsdp.data.sources.tar_index import members
from dinov2_fsdp.errors import UserError

_TRAIN = ("train", "training")
_TEST = ("test", "val", "validation", "valid")


def splits_of(data: str, kind: str) -> tuple[str, str]:
    """Return the specs of the training and of the test split of ``data``.

    ``scenes:…`` and ``imagenet:ROOT`` have both; ``folder:ROOT`` and ``tar:FILE`` hold a folder for each; otherwise
    the text names the training split (``tar:cifar10-train.tar``), beside which there is one whose name says test or
    val instead of train.

    Args:
        kind: ``labels`` (folders per class below the split), ``segmentation`` (``images/SPLIT``) or ``depth``
            (``nyu_SPLIT.txt``).

    Raises:
        UserError: there is no such pair of splits.
    """
    form, _, place = data.partition(":")
    if form == "scenes":
        return data, f"{data}{',' if place else ''}split=test"
    if form == "imagenet":
        return data, f"{data.removesuffix(':train')}:val"
    between = "/" if form == "folder" and kind == "labels" else "#"
    there = _splits(data, place, kind) if form in ("folder", "tar") else []
    train, test = (next((name for name in names if name in there), None) for names in (_TRAIN, _TEST))
    if train and test:
        return f"{data}{between}{train}", f"{data}{between}{test}"
    head, word, tail = place.rpartition("train")
    for name in _TEST if word else ():
        other = f"{head}{name}{tail}"
        if Path(os.path.expanduser(other.partition("#")[0])).exists():
            return data, f"{form}:{other}"
    raise UserError(
        f"--data {data}: no two splits, {' or '.join(_TRAIN)} and {', '.join(_TEST)}, were found in it or beside it\n"
        "name them with --train SPEC --test SPEC"
    )


def _splits(data: str, place: str, kind: str) -> list[str]:
    """Return the names of the splits in a folder or a tar."""
    path = Path(os.path.expanduser(place))
    below = "images" if kind == "segmentation" else "."
    if path.is_dir():
        names: Iterable[str] = [str(entry.relative_to(path)) for entry in (path / below).glob("*")]
    elif path.is_file():
        names = {member.name.decode(errors="replace").removeprefix("./") for member in members(str(path), data)}
    else:
        return []
    if kind == "depth":
        return [name[4:-4] for name in names if name.startswith("nyu_") and name.endswith(".txt")]
    parts = [name.removeprefix("images/") for name in names if kind == "labels" or name.startswith("images/")]
    return list(dict.fromkeys(part.partition("/")[0] for part in parts))
