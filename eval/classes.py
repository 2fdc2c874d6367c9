"""Which classes two sets of labelled images share, and labels that are no class folders (ImageNet-ReaL)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinov2_fsdp.data.sources import Source
from dinov2_fsdp.errors import UserError

_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def check_sources(train: Source, test: Source) -> None:
    """Refuse data that cannot be compared.

    Raises:
        UserError: a source has no labels, or the two do not hold the same classes.
    """
    check_labelled(train)
    check_labelled(test)
    if train.classes is None or test.classes is None or list(train.classes) == list(test.classes):
        return
    only_train = sorted(set(train.classes) - set(test.classes))
    only_test = sorted(set(test.classes) - set(train.classes))
    lines = [f"the classes of '{train.spec}' and '{test.spec}' differ"]
    lines += [f"only in the first: {_some(only_train)}"] if only_train else []
    lines += [f"only in the second: {_some(only_test)}"] if only_test else []
    if not only_train and not only_test:
        lines.append("they hold the same classes in different order; list them in one order")
    raise UserError("\n".join([*lines, "use two splits of one data set"]))


def check_labelled(source: Source) -> None:
    """Raise :class:`UserError` for a source without labels."""
    if source.labels is None:
        raise UserError(
            f"'{source.spec}' has no labels, which this evaluation needs; use e.g. folder:PATH with a folder per class"
        )


def number_of_classes(train: Source) -> int:
    """Return how many classes a labelled source has. Raises :class:`UserError` for fewer than two."""
    check_labelled(train)
    assert train.labels is not None
    count = len(train.classes) if train.classes is not None else int(train.labels.max()) + 1
    if count < 2:
        raise UserError(f"'{train.spec}' has only {count} class; a classifier needs at least two")
    return count


def classes_in(train: Source, other: Source) -> NDArray[np.int64]:
    """Return, for each class of ``other``, the number of the same class of ``train``.

    Classes are the same by name (ImageNet-A and -R hold 200 of ImageNet's); where all names of ``other`` are numbers
    they count the classes of ``train`` in order (ImageNet-V2: folders 0 … 999).

    Raises:
        UserError: ``other`` has no labels, or a class that ``train`` has not.
    """
    check_labelled(other)
    names, known = other.classes or [], {name: number for number, name in enumerate(train.classes or [])}
    if all(name in known for name in names):
        return np.array([known[name] for name in names], np.int64)
    if all(name.isdigit() and int(name) < len(known) for name in names):
        return np.array([int(name) for name in names], np.int64)
    unknown = [name for name in names if name not in known]
    raise UserError(
        f"'{other.spec}' has classes that '{train.spec}' has not: {_some(unknown)}\n"
        "expected the same names, or folders that are named by the number of the class (from 0 on)"
    )


def real_labels(file: str | Path, test: Source, classes: int) -> list[NDArray[np.int64]]:
    """Return the sets of right classes of each image of ``test`` by ImageNet-ReaL (arXiv 2006.07159).

    Args:
        file: its ``real.json``: a list, by the number in the validation images' names, of lists of class numbers. An
            image with an empty list does not count.

    Raises:
        UserError: the file is no such list, or ``test`` is not ImageNet's validation set.
    """
    try:
        lists = json.loads(Path(file).read_text())
        sets = [np.array(entry, np.int64).reshape(-1) for entry in lists]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"real:{file} cannot be read as a list of lists of class numbers: {error}") from None
    chosen = []
    for index in range(len(test)):
        match = _VALIDATION_NUMBER.search(test.name(index))
        if match is None or not 1 <= int(match[1]) <= len(sets):
            raise UserError(
                f"real:{file} holds labels of {len(sets)} images named ILSVRC2012_val_00000001 and so on, "
                f"which {test.name(index)} is not\nuse ImageNet's validation set as --test"
            )
        chosen.append(sets[int(match[1]) - 1])
    if any(len(entry) and not 0 <= entry.min() <= entry.max() < classes for entry in chosen):
        raise UserError(f"real:{file} names classes beyond the {classes} of the training images")
    return chosen


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
