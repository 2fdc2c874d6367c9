"""Values that refer to other keys (``${train.batch}``) or only say that one is missing (``???``)."""

from __future__ import annotations

import re
from typing import Any

from dinov2_fsdp.config.complaints import ConfigError, nearest_key, shown
from dinov2_fsdp.config.files import MAX_TEXT
from dinov2_fsdp.config.schema import defaults, description

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.]*)\}")
_MISSING = "???"


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values``, by dotted key, with every reference replaced by the value or default of its key.

    Raises:
        ConfigError: a value is ``???``; a reference is circular, names no key, or asks for more than another key.
    """
    references = _References(values)
    return {key: references.value(key) for key in values}


class _References:
    def __init__(self, values: dict[str, Any]) -> None:
        self.given = values
        # Every key is resolved once: texts that refer to each other many times over would take for ever.
        self.resolved: dict[str, Any] = {}
        self.pending: list[str] = []

    def value(self, key: str) -> Any:
        if key not in self.resolved:
            if key in self.pending:
                last = self.pending[-1]
                raise ConfigError(f"{last}: ${{{key}}} refers back to {last} itself", last)
            self.pending.append(key)
            self.resolved[key] = self._resolve(key, self.given.get(key, defaults()[key]))
            self.pending.pop()
        return self.resolved[key]

    def _resolve(self, key: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._text(key, item) for item in value]
        if isinstance(value, str) and (whole := _REFERENCE.fullmatch(value)):
            return self._referred(key, whole)
        return self._text(key, value)

    def _text(self, key: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        # omegaconf takes backslashes before ??? for an escape, and nobody means them.
        if value.strip("\\") == _MISSING:
            kind, text = description(key)
            raise ConfigError(f"{key} needs a value: {_MISSING} marks a missing one\nvalid: {kind} — {text}", key)
        if "${" in _REFERENCE.sub("", value):
            raise ConfigError(
                f"{key}: {shown(value)} is refused: a config reads no environment and computes nothing\n"
                "valid: plain values, and references to other keys such as ${train.batch}",
                key,
            )
        text = _REFERENCE.sub(lambda match: str(self._scalar(key, match)), value)
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{key}: {shown(value)} grows beyond {MAX_TEXT:,} characters by its references", key)
        return text

    def _scalar(self, key: str, match: re.Match[str]) -> Any:
        value = self._referred(key, match)
        if isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: {match[0]} is a list, which fits nowhere but in place of a whole value", key)
        return value

    def _referred(self, key: str, match: re.Match[str]) -> Any:
        if match[1] not in defaults():
            hint = nearest_key(match[1], defaults())
            raise ConfigError(f"{key}: {shown(match[0])} refers to a key that does not exist{hint}", key)
        return self.value(match[1])
