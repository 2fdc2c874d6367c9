"""Where images come from. One text chooses: a folder, tars, ImageNet, or the embedded scenes."""

from __future__ import annotations

import os
from pathlib import Path

from dinov2_fsdp.data.sources.base import UNLABELLED, Source
from dinov2_fsdp.data.sources.decoding import IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode
from dinov2_fsdp.data.sources.embedded import ScenesSource
from dinov2_fsdp.data.sources.folder import FolderSource, open_folder
from dinov2_fsdp.data.sources.imagenet import open_imagenet, open_imagenet22k
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.listing import default_cache_dir
from dinov2_fsdp.data.sources.tar import TarSource, open_tar
from dinov2_fsdp.errors import UserError, nearest

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "UNLABELLED",
    "BadImage",
    "FolderSource",
    "ListedSource",
    "ScenesSource",
    "Source",
    "TarSource",
    "decode",
    "open_source",
]

_FORMS = {
    "folder": "folder:PATH",
    "tar": "tar:PATH[#FOLDER]",
    "imagenet": "imagenet:ROOT[:train|val]",
    "imagenet22k": "imagenet22k:ROOT",
    "scenes": "scenes:[n=50000,size=64,seed=0,split=train]",
}


def open_source(spec: str, cache_dir: str | Path | None = None) -> Source:
    """Return the images that ``spec`` names.

    ``folder:PATH``, ``tar:PATH[#FOLDER]`` (a path, a glob, or braces as in ``shard-{000..127}.tar``),
    ``imagenet:ROOT[:train|val]``, ``imagenet22k:ROOT`` or ``scenes:[KEY=VALUE,…]``. What a folder or tar holds is
    remembered in ``cache_dir``, by default ``dinov2_fsdp/listings`` in the user's cache directory.

    Raises :class:`UserError` for an unknown form, and for a place that is missing, unreadable or without images.
    """
    return _open(spec, default_cache_dir() if cache_dir is None else Path(cache_dir))


def open_uncached(spec: str) -> Source:
    """Return the images that ``spec`` names, listed anew and kept in memory."""
    return _open(spec, None)


def _open(spec: str, cache_dir: Path | None) -> Source:
    kind, colon, place = spec.partition(":")
    if kind not in _FORMS or not colon:
        raise UserError(f"data source '{spec}' {_why_not(spec, kind)}\n  valid: {', '.join(_FORMS.values())}")
    if kind == "scenes":
        return ScenesSource(spec)
    if kind == "folder":
        return open_folder(spec, place, cache_dir)
    if kind == "tar":
        return open_tar(spec, place, cache_dir)
    if kind == "imagenet":
        return open_imagenet(spec, place, cache_dir)
    return open_imagenet22k(spec, place, cache_dir)


def _why_not(spec: str, kind: str) -> str:
    if spec in _FORMS:
        return f"says which kind it is but not where; write {_FORMS[spec]}"
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return f"does not say what kind it is; write folder:{spec}"
    if os.path.exists(path) or spec.endswith(".tar"):
        return f"does not say what kind it is; write tar:{spec}"
    return f"has no known kind{nearest(kind, _FORMS)}"
