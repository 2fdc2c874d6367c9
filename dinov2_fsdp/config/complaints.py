"""How a message names a value, a file and the key that was meant."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from dinov2_fsdp.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = 8
_LONGEST_PATH = 400

_OTHER_SECTION = 0.15
"""How much less likely a key of another section was meant than one of the same section that looks as alike."""
_ALIKE = 0.6
"""Likeness (difflib's ratio) below which nothing is proposed."""


class ConfigError(UserError):
    """A mistake in the config. ``keys`` are those at fault, by which the reader knows the file that set them."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def shown(value: Any, longest: int = 80) -> str:
    """Return ``value`` on one line of at most about ``longest`` characters."""
    if isinstance(value, str):
        return value if len(value) <= longest and value.isprintable() else _SHORT.repr(value)
    return _SHORT.repr(value)


def quoted(value: str) -> str:
    """Return a text in quotes, on one line of at most about 80 characters."""
    return _SHORT.repr(value)


def shown_path(path: Any) -> str:
    """Return a path on one line; whole, unless it is hundreds of characters long."""
    return shown(str(path), _LONGEST_PATH)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'train.batch'?"`` for the dotted key most like ``key``, or an empty string."""
    if len(key) > 80:
        return ""
    # Of keys that are as alike, the first that is declared.
    likeness, best = max(((_likeness(key, other), other) for other in known), key=lambda pair: pair[0])
    return f"; did you mean '{best}'?" if likeness >= _ALIKE else ""


def _likeness(key: str, other: str) -> float:
    section, _, name = key.rpartition(".")
    other_section, _, other_name = other.rpartition(".")
    alike = SequenceMatcher(None, name, other_name).ratio()
    if min(len(name), len(other_name)) > 3 and (name.startswith(other_name) or other_name.startswith(name)):
        alike = max(alike, 0.8)
    if section == other_section:
        return alike
    return max(alike - _OTHER_SECTION, SequenceMatcher(None, key, other).ratio())
