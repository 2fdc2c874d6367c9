"""What folders and tars have in common: a listing that is mapped, not copied, into every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_fsdp.data.sources.base import UNLABELLED, Source
from dinov2_fsdp.data.sources.listing import Listing, reload_listing
from dinov2_fsdp.errors import UserError


class ListedSource(Source):
    """A source whose images were found by looking: names and labels come from a :class:`Listing`."""

    def __init__(self, spec: str, listing: Listing) -> None:
        self.spec = spec
        self.listing = listing
        self._classes = listing.class_names()

    @property
    def classes(self) -> list[str] | None:
        return self._classes

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return None if self._classes is None else self.listing.labels.astype(np.int64)

    @property
    def fingerprint(self) -> str:
        return self.listing.fingerprint

    def __len__(self) -> int:
        return len(self.listing)

    def label(self, index: int) -> int:
        index = range(len(self))[index]
        return UNLABELLED if self._classes is None else int(self.listing.labels[index])

    def __reduce__(self) -> tuple[Any, ...]:
        path = self.listing.path
        return _reopen, (type(self), self.spec, None if path is None else str(path), self.fingerprint)


def _reopen(kind: type[ListedSource], spec: str, listing_path: str | None, fingerprint: str) -> Source:
    """Return the pickled source in this process: from the mapped file, else by listing again.

    Raises :class:`UserError` when the images are no longer those that the pickling process listed, because an index
    would then mean different images in different processes.
    """
    from dinov2_fsdp.data.sources import open_uncached  # the chooser imports every kind, so it cannot be imported above

    listing = None if listing_path is None else reload_listing(Path(listing_path), fingerprint)
    if listing is not None:
        return kind(spec, listing)
    source = open_uncached(spec)
    if source.fingerprint != fingerprint:
        raise UserError(
            f"{spec}: images were added, removed or renamed while this run was using them\n"
            "  let the copying finish, then start the run again; it resumes from its last checkpoint"
        )
    return source
