"""YAML as far as a config needs it: mappings, lists and plain text, read in bounded time and memory.

Nothing in a file is ever executed or constructed. Scalars stay text (``null`` is None), because the knob that they are
for knows its type better than YAML does: ``output_dir: 0123`` is a name and ``lr: 1e-5`` a number.
"""

from __future__ import annotations

import codecs
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov2_fsdp.config.complaints import quoted, shown, shown_path
from dinov2_fsdp.errors import UserError, nearest

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_TEXT = 4096
MAX_FILES = 16

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = ("", "~", "null", "Null", "NULL")


def read_layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, its values) of a config file and of all that it extends, the innermost base first.

    Raises:
        UserError: naming the file that is missing, is no YAML, or extends itself.
    """
    layers: list[tuple[Path, dict[str, Any]]] = []
    visited: set[Path] = set()
    while True:
        try:
            values = _read(path)
        except UserError as error:
            named_by = f"\nnamed by extends in {shown_path(layers[0][0])}" if layers else ""
            raise UserError(f"{error}{named_by}") from None
        if path.resolve() in visited:
            raise UserError(f"config file {shown_path(path)} extends itself (through {shown_path(layers[0][0])})")
        visited.add(path.resolve())
        layers.insert(0, (path, values))
        if "extends" not in values:
            return layers
        base = values.pop("extends")
        if not isinstance(base, str) or not base:
            wrong = f"extends={shown(base)} is no file name"
            raise UserError(f"config file {shown_path(path)}: {wrong}; write e.g. extends: base.yaml")
        if len(layers) == MAX_FILES:
            raise UserError(f"config file {shown_path(path)} is the {MAX_FILES}th that extends another; flatten them")
        path = path.parent / base


def parse(text: str) -> Any:
    """Return the YAML document ``text`` as dicts, lists, strings and None.

    Raises:
        ValueError: it is no YAML, or more than a config can need; the message says where and why, on one line.
    """
    try:
        return _Document(text).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "".join(text.splitlines()[mark.line : mark.line + 1])
        hint = "; YAML wants spaces where this line has a tab" if "\t" in line else ""
        hint = "; between braces or brackets, ??? must stand in quotes" if "???" in line else hint
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"line {mark.line + 1}: {reason}{hint}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _read(path: Path) -> dict[str, Any]:
    """Return one file's values.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"config file {shown_path(path)} is a folder; name a YAML file")
        if not stat.S_ISREG(kind):
            raise UserError(f"config file {shown_path(path)} is no regular file; name a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_unreadable(path, error)) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"config file {shown_path(path)} is larger than {MAX_BYTES:,} bytes; is it a config at all?")
    try:
        values = parse(_decode(content))
    except ValueError as error:
        raise UserError(f"config file {shown_path(path)} cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config file {shown_path(path)} must hold `key: value` lines at its top level")
    return values


def _unreadable(path: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"config file {shown_path(path)} cannot be read: {reason}"
    try:
        siblings = [p.name for p in path.parent.glob("*.yaml") if p.name.isprintable()]
    except OSError:
        siblings = []
    return f"config file {shown_path(path)} does not exist{nearest(path.name, siblings)}"


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ValueError("it holds zero bytes, so it is UTF-16 or no text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8") from None


@dataclass
class _Anchored:
    value: Any
    count: int
    """Values that it consists of, itself included."""


class _Document:
    """A YAML document on its way from parser events to values, counted as if every alias were written out."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.count = 0
        self.anchors: dict[str, _Anchored] = {}

    def read(self) -> Any:
        events = iter(yaml.parse(self.text, Loader=_LOADER))
        value = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document starts; a config is one document")
                value = self._value(next(events), events, depth=0)
        return value

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
        before = self.count
        self._add(event, 1)
        if isinstance(event, yaml.AliasEvent):
            anchored = self.anchors.get(event.anchor)
            if anchored is None:
                raise self._error(event, f"alias *{shown(event.anchor)} has no anchor before it")
            self._add(event, anchored.count)
            return anchored.value
        if event.tag is not None:
            raise self._error(event, f"tags such as {shown(event.tag)} are not allowed; write the plain value")
        if depth > MAX_DEPTH:
            raise self._error(event, f"values nest deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            value: Any = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                value.append(self._value(item, events, depth + 1))
        else:
            value = self._mapping(events, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = _Anchored(value, self.count - before)
        return value

    def _scalar(self, event: yaml.ScalarEvent) -> str | None:
        if len(event.value) > MAX_TEXT:
            raise self._error(event, f"a value has {len(event.value):,} characters, more than {MAX_TEXT:,}")
        # `implicit` tells a bare null from a quoted one.
        return None if event.implicit[0] and event.value in _NULLS else event.value

    def _mapping(self, events: Iterator[yaml.Event], depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(name := next(events), yaml.MappingEndEvent):
            if not isinstance(name, yaml.ScalarEvent):
                raise self._error(name, "a key must be a plain word")
            self._value(name, events, depth + 1)
            key = name.value
            value = self._value(next(events), events, depth + 1)
            if key == "<<" and name.implicit[0]:
                for source in value if isinstance(value, list) else [value]:
                    if not isinstance(source, dict):
                        raise self._error(name, "<< merges mappings only")
                    merged = {**source, **merged}
            elif key in values:
                raise self._error(name, f"key {quoted(key)} stands here a second time")
            else:
                values[key] = value
        return {**merged, **values}

    def _add(self, event: yaml.Event, values: int) -> None:
        self.count += values
        if self.count > MAX_VALUES:
            raise self._error(event, f"more than {MAX_VALUES:,} values, aliases written out; is it a config at all?")

    def _error(self, event: yaml.Event, reason: str) -> ValueError:
        return ValueError(f"line {event.start_mark.line + 1}: {reason}")
