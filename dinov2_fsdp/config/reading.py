"""Reading a config: the file, the files it extends, then overrides. Every error names the key, and the file if one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_fsdp.config.complaints import ConfigError, nearest_key, quoted, shown, shown_path
from dinov2_fsdp.config.files import parse, read_layers
from dinov2_fsdp.config.knobs import Config
from dinov2_fsdp.config.references import resolve
from dinov2_fsdp.config.schema import defaults, description, names, section_of
from dinov2_fsdp.config.validation import validate
from dinov2_fsdp.errors import UserError, nearest

_PATHS = ("output_dir", "data.cache", "init.backbone")
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated config of a YAML file with ``key=value`` overrides applied.

    A file may name another one that it changes with ``extends: FILE`` (relative to itself), demand a key with ``???``,
    and refer to another key with ``${train.batch}``. It is read in bounded time and memory, and executes nothing.

    Raises:
        UserError: the file is missing or no YAML; a key is unknown; a value has the wrong type or is impossible.
    """
    values: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for file, nested in [] if path is None else read_layers(Path(path)):
        try:
            found = _flatten(nested)
        except ConfigError as error:
            raise UserError(f"{error}\nin config file {shown_path(file)}") from None
        values.update(found)
        files.update(dict.fromkeys(found, file))
    for text in overrides:
        found = _flatten(_parse_override(text))
        values.update(found)
        for key in found:
            files.pop(key, None)
    try:
        return _build(values)
    except ConfigError as error:
        where = [f"\n{key} is set in config file {shown_path(files[key])}" for key in error.keys if key in files]
        raise UserError(f"{error}{''.join(where[:2])}") from None


def from_dict(values: dict[str, Any]) -> Config:
    """Return the validated config of a nested dictionary of keys that differ from the defaults."""
    return _build(_flatten(values))


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that :func:`load` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_as_lists(dataclasses.asdict(config))))


def _build(values: dict[str, Any]) -> Config:
    schema = copy.deepcopy(_typed_defaults())
    for key, value in resolve(values).items():
        # A shell leaves the ~ of output_dir=~/run alone; taken literally it would be a folder of that name.
        home = key in _PATHS and isinstance(value, str)
        _set(schema, key, os.path.expanduser(value) if home else value)
    config: Config = _instantiate(Config, OmegaConf.to_container(schema))  # type: ignore[arg-type]
    validate(config)
    return config


def _parse_override(text: str) -> dict[str, Any]:
    """Return ``train.batch=256`` as ``{"train": {"batch": "256"}}``."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"override {quoted(text)} is not of the form key=value, e.g. train.batch=256")
    try:
        nested = parse(value)
    except ValueError as error:
        raise UserError(f"override {quoted(text)} cannot be read as YAML: {error}") from None
    typed = not value.lstrip().startswith("{")
    if isinstance(nested, dict) and typed and key in defaults() and description(key)[0].startswith("str"):
        nested = value  # `scenes:` and `a: b` are mappings to YAML, and names to whoever types them
    # A key has two parts; whatever follows them stays together and is unknown.
    for part in reversed(key.split(".", 1)):
        nested = {part: nested}
    return nested


def _flatten(values: Any, schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return ``{"train.batch": 256}`` of ``{"train": {"batch": 256}}``; a key that is unknown is refused."""
    if not isinstance(values, dict):
        held = "nothing" if values is None else shown(values)
        raise ConfigError(f"'{prefix.rstrip('.')}' holds {held}; it needs keys: {', '.join(names(schema))}")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names(schema):
            where = f"in '{prefix[:-1]}'" if prefix else "at the top level"
            hint = _nearest(f"{prefix}{key}", isinstance(value, dict))
            unknown = f"unknown key {quoted(f'{prefix}{key}')}{hint}"
            raise ConfigError(f"{unknown}\nvalid {where}: {', '.join(names(schema))}")
        section = section_of(schema, key)
        if section is None:
            flat[f"{prefix}{key}"] = value
        else:
            flat.update(_flatten(value, section, f"{prefix}{key}."))
    return flat


def _nearest(key: str, is_section: bool) -> str:
    if key in defaults():
        section, _, name = key.partition(".")
        return f"; in a file it is written {section}: {{{name}: …}}"
    if is_section and "." not in key:
        return nearest(key[:80], [name for name in names(Config) if section_of(Config, name)])
    return nearest_key(key, defaults())


# ---------------------------------------------------------------------------------------------------------------------
# The dataclasses as a schema. omegaconf knows lists but no tuples of fixed length; a tuple keeps configs hashable.


def _set(schema: Any, key: str, value: Any) -> None:
    try:
        OmegaConf.update(schema, key, value, merge=False)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        kind, text = description(key)
        place = re.search(r"\[(\d+)\]$", str(getattr(error, "full_key", "") or ""))
        if isinstance(value, list) and place:
            wrong = f"{shown(value[int(place[1])])} in {shown(value)} is no {_element(kind).__name__}"
        else:
            wrong = f"{shown(value)} is no {'list' if kind.startswith('tuple') else kind}"
        raise ConfigError(f"{key}: {wrong}\nvalid: {kind} — {text}", key) from None


@functools.cache
def _typed_defaults() -> DictConfig:
    return OmegaConf.structured(_as_schema(Config))


def _as_schema(schema: type) -> type:
    fields: list[Any] = []
    for f in dataclasses.fields(schema):
        section = section_of(schema, f.name)
        if section is not None:
            inner = _as_schema(section)
            fields.append((f.name, inner, field(default_factory=inner)))
        elif isinstance(f.default, tuple):
            items: Any = field(default_factory=partial(list, f.default))
            fields.append((f.name, list[_element(str(f.type))], items))  # type: ignore[misc]
        else:
            base, _, optional = str(f.type).partition(" | ")
            fields.append((f.name, _TYPES[base] | None if optional else _TYPES[base], field(default=f.default)))
    return dataclasses.make_dataclass(schema.__name__, fields)


def _element(kind: str) -> type:
    """Return float of ``tuple[float, float]``."""
    return _TYPES[kind.removeprefix("tuple[").removesuffix("]").split(",")[0]]


def _instantiate(schema: type, values: dict[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for f in dataclasses.fields(schema):
        section = section_of(schema, f.name)
        value = values[f.name]
        if section is not None:
            value = _instantiate(section, value, f"{prefix}{f.name}.")
        elif isinstance(f.default, tuple):
            value = tuple(value or ())
            if "..." not in str(f.type) and len(value) != len(f.default):
                key, expected = f"{prefix}{f.name}", f"{len(f.default)} values like {list(f.default)}"
                raise ConfigError(f"{key} needs {expected}, got {shown(list(value))}", key)
        arguments[f.name] = value
    return schema(**arguments)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _as_lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
