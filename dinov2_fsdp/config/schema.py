"""What the dataclasses say about themselves: keys, types, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from dinov2_fsdp.config.knobs import Config


def describe_keys() -> list[tuple[str, str, Any, str]]:
    """Return (key, type, default, docstring) of every knob, in the order of declaration."""
    return list(_described())


@functools.cache
def _described() -> tuple[tuple[str, str, Any, str], ...]:
    return tuple(_describe(Config, prefix=""))


@functools.cache
def defaults() -> dict[str, Any]:
    """Return the default of every knob by its dotted key, in the order of declaration."""
    return dict(_defaults(Config, prefix=""))


def description(key: str) -> tuple[str, str]:
    """Return (type, docstring) of one knob."""
    return next((kind, text) for name, kind, _, text in describe_keys() if name == key)


def names(schema: type) -> list[str]:
    """Return the names of the knobs and sections of a dataclass."""
    return [f.name for f in dataclasses.fields(schema)]


def section_of(schema: type, key: str) -> type | None:
    """Return the dataclass of a section, or None for a knob."""
    factory = next(f.default_factory for f in dataclasses.fields(schema) if f.name == key)
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _defaults(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(schema):
        section = section_of(schema, f.name)
        if section is None:
            yield f"{prefix}{f.name}", f.default
        else:
            yield from _defaults(section, f"{prefix}{f.name}.")


def _field_docs(schema: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[attr-defined,union-attr]
    return docs


def _describe(schema: type, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    docs = _field_docs(schema)
    for f in dataclasses.fields(schema):
        section = section_of(schema, f.name)
        if section is not None:
            yield from _describe(section, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", str(f.type), f.default, docs[f.name]
