"""Images with a value for every pixel: classes (ADE20K's layout), depth (NYUv2's lists), or both (rendered scenes).

What stands for the data is the text of a source with a split behind a hash: ``folder:PATH#training``,
``tar:PATH.tar#train``. Scenes say their split themselves: ``scenes:n=1000,split=test``.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dinov2_fsdp.data.sources import BadImage, ScenesSource, Source, open_source
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.listing import printable
from dinov2_fsdp.data.sources.tar_index import members
from dinov2_fsdp.errors import UserError, nearest
from eval.features import progress_bar

_LAYOUT = "images/SPLIT/*.jpg and annotations/SPLIT/*.png"
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION_TAG = 0x0112
_THREADS = 4


class Pairs(ABC):
    """Images, each with an array of its height and width.

    Targets are int64 class numbers, or float32 depths in metres (0 where unknown).
    """

    spec: str

    @property
    def fingerprint(self) -> str:
        """What tells these pairs from others."""
        return self.spec

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pairs."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message should call this image."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return the image as RGB. Raises :class:`BadImage`."""

    @abstractmethod
    def target(self, index: int) -> NDArray[Any]:
        """Return the values (height, width). Raises :class:`BadImage`."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Return the image's (height, width). Raises :class:`BadImage`."""

    def target_size(self, index: int) -> tuple[int, int]:
        """Return the target's (height, width). Raises :class:`BadImage`."""
        height, width = self.target(index).shape
        return height, width


class ScenePairs(Pairs):
    """Rendered scenes with their classes (0: background, 1 + label: an object) or depth."""

    def __init__(self, source: ScenesSource, depth: bool) -> None:
        self.source, self.depth, self.spec = source, depth, source.spec
        self.classes = len(source.classes) + 1

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def target(self, index: int) -> NDArray[Any]:
        scene = self.source.scene(index)
        return scene.depth if self.depth else scene.mask.astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        return self.source.options.size, self.source.options.size

    target_size = size


class FilePairs(Pairs):
    """Image files and files of values, in folders or tars.

    Args:
        pairs: indices (n, 2) of an image in ``images`` and of its values in ``targets``.
        scale: depths are the file's numbers divided by this; 0: the numbers are classes.
    """

    def __init__(
        self, spec: str, images: Source, targets: Source, pairs: NDArray[np.int64], scale: float = 0.0
    ) -> None:
        self.spec, self.images, self.targets, self.pairs, self.scale = spec, images, targets, pairs, scale

    @property
    def fingerprint(self) -> str:
        return f"{self.spec} {self.images.fingerprint} {self.targets.fingerprint}"

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.images.name(int(self.pairs[index, 0]))

    def image(self, index: int) -> Image.Image:
        return self.images.image(int(self.pairs[index, 0]))

    def target(self, index: int) -> NDArray[Any]:
        place = int(self.pairs[index, 1])
        values = decode_values(self.targets.encoded(place) or b"", self.targets.name(place))
        return (values / self.scale).astype(np.float32) if self.scale else values.astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        return _size_of(self.images, int(self.pairs[index, 0]), upright=True)

    def target_size(self, index: int) -> tuple[int, int]:
        return _size_of(self.targets, int(self.pairs[index, 1]), upright=False)


def decode_values(data: bytes, name: str) -> NDArray[np.integer]:
    """Return the numbers (height, width) in a PNG of one channel, of 1 to 16 bits or a palette's indices.

    Raises:
        BadImage: the bytes are no such picture.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from None
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise BadImage(
            name, f"is a picture of mode {image.mode}; expected one number per pixel (a grey or palette PNG)"
        )
    return np.asarray(image)


def open_pairs(spec: str, kind: str, cache: str | Path | None = None, *, depth_scale: float = 1000.0) -> Pairs:
    """Return the images with values that ``spec`` names.

    Args:
        kind: ``segmentation``: ``images/SPLIT`` and ``annotations/SPLIT``, files of equal names; ``depth``: the pairs
            that ``nyu_SPLIT.txt`` lists, a line ``IMAGE DEPTH [FOCAL]`` each. Scenes have both.
        depth_scale: the depth files' unit: so many to a metre.

    Raises:
        UserError: it names nothing of this kind, or images and values do not pair up.
    """
    if spec.startswith("scenes:"):
        return ScenePairs(ScenesSource(spec), kind == "depth")
    base, hash_sign, split = spec.rpartition("#")
    if not hash_sign or not spec.startswith(("folder:", "tar:")):
        raise UserError(
            f"'{spec}' names no images with {'depth' if kind == 'depth' else 'annotations'}\n"
            "expected folder:PATH#SPLIT, tar:PATH.tar#SPLIT or scenes:…, e.g. folder:ADEChallengeData2016#training"
        )
    return (
        _open_listed(spec, base, split, cache, depth_scale)
        if kind == "depth"
        else _open_layout(spec, base, split, cache)
    )


def _open_layout(spec: str, base: str, split: str, cache: str | Path | None) -> Pairs:
    images, annotations = (_part(spec, base, folder, split, cache) for folder in ("images", "annotations"))
    known = {_stem(name, f"annotations/{split}/"): index for index, name in enumerate(_names(annotations))}
    pairs, lonely = [], []
    for index, name in enumerate(_names(images)):
        stem = _stem(name, f"images/{split}/")
        if stem in known:
            pairs.append((index, known[stem]))
        else:
            lonely.append(name)
    if lonely:
        raise UserError(
            f"'{spec}': {len(lonely)} images have no annotation, the first is {lonely[0]}; expected {_LAYOUT}"
        )
    return FilePairs(spec, images, annotations, np.array(pairs, np.int64))


def _part(spec: str, base: str, folder: str, split: str, cache: str | Path | None) -> Source:
    kind, _, path = base.partition(":")
    if kind == "tar":
        return open_source(f"{base}#{folder}/{split}", cache)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise UserError(f"'{spec}': the directory '{path}' does not exist; expected {_LAYOUT} in it")
    if not (root / folder / split).is_dir():
        there = sorted(entry.name for entry in (root / folder).glob("*") if entry.is_dir())
        raise UserError(
            f"'{spec}': there is no {root / folder / split}{nearest(split, there)}\n"
            f"splits there: {', '.join(there) or 'none'}; expected {_LAYOUT}"
        )
    return open_source(f"{base}/{folder}/{split}", cache)


def _open_listed(spec: str, base: str, split: str, cache: str | Path | None, scale: float) -> Pairs:
    lines = _list_file(spec, base, f"nyu_{split}.txt").splitlines()
    source = open_source(base, cache)
    known = {name: index for index, name in enumerate(_names(source))}
    pairs = []
    for line in filter(None, map(str.strip, lines)):
        words = line.split()
        if len(words) > 1 and words[1] == "None":  # the list's word for an image without depth
            continue
        names = [word.lstrip("/") for word in words[:2]]
        if len(names) < 2 or any(name not in known for name in names):
            raise UserError(f"'{spec}': nyu_{split}.txt lists '{line[:120]}', of which there is no such pair of files")
        pairs.append([known[name] for name in names])
    if not pairs:
        raise UserError(f"'{spec}': nyu_{split}.txt lists no pair of an image and its depth")
    return FilePairs(spec, source, source, np.array(pairs, np.int64), scale)


def _list_file(spec: str, base: str, name: str) -> str:
    kind, _, path = base.partition(":")
    path = os.path.expanduser(path)
    try:
        if kind == "folder":
            return (Path(path) / name).read_text()
        for member in members(path, spec):
            if printable(member.name) == name:
                with open(path, "rb") as file:
                    file.seek(member.offset)
                    return file.read(member.size).decode()
    except (OSError, UnicodeDecodeError):
        pass
    raise UserError(
        f"'{spec}': there is no readable {name} in {path}\n"
        "expected the NYUv2 layout: nyu_train.txt and nyu_test.txt with a line `IMAGE DEPTH` for each pair"
    )


def check_pairs(
    pairs: Pairs, classes: int = 0, first: int = 0, void: tuple[int, ...] = (), title: str = "", limit: int = 0
) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of all images, after a look at every pair.

    Args:
        limit: only so many pairs, the first ones; 0: all.
        classes: how many, from the value ``first`` on; other values must be in ``void``. 0: values are not looked at.
        title: of a progress bar; empty: none.

    Raises:
        UserError: there are no pairs, or a pair cannot be read, differs in size, or holds another value.
    """
    if not len(pairs):
        raise UserError(f"'{pairs.spec}' is empty; name a split with images")

    def look(index: int) -> tuple[int, int]:
        try:
            size, target_size = pairs.size(index), pairs.target_size(index)
            if size != target_size:
                raise UserError(
                    f"'{pairs.spec}': {pairs.name(index)} has {size[1]}×{size[0]} pixels, but its annotation "
                    f"{target_size[1]}×{target_size[0]}\nexpected one value per pixel of the image"
                )
            if classes and isinstance(pairs, FilePairs):
                values = np.flatnonzero(np.bincount(pairs.target(index).ravel()))
                wrong = [int(v) for v in values if not first <= v < first + classes and v not in void]
                if wrong:
                    raise UserError(
                        f"'{pairs.spec}': the annotation of {pairs.name(index)} holds the value {wrong[0]}, which is "
                        f"neither a class ({first} … {first + classes - 1}) nor void {list(void)}\n"
                        "set --classes, --first-class or --void"
                    )
        except BadImage as error:
            raise UserError(f"'{pairs.spec}': {error}") from None
        return size

    count = min(limit or len(pairs), len(pairs))
    with ThreadPoolExecutor(_THREADS) as threads, progress_bar(title, count) as advance:
        sizes = []
        for size in threads.map(look, range(count)):
            sizes.append(size)
            advance(1)
    return sizes


def _size_of(source: Source, index: int, upright: bool) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(source.encoded(index) or b"")) as image:
            width, height = image.size
            turned = upright and image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadImage(source.name(index), f"{type(error).__name__}: {error}") from None
    return (width, height) if turned else (height, width)


def _names(source: Source) -> list[str]:
    assert isinstance(source, ListedSource)
    return [printable(source.listing.names[index]) for index in range(len(source))]


def _stem(name: str, prefix: str) -> str:
    """Return a file's name without its extension, from below the split's folder on."""
    return os.path.splitext(name.rpartition(prefix)[2])[0]
