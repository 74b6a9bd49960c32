"""Binds plain values (from YAML, flags, environment) to frozen dataclasses; every refusal says where, what, and what instead.

    layers, strongest first                  one value a key
    flags, file, environment  ── flatten ──► {path: Given} ── bind ──► ClusterConfig

The dataclasses are the schema: field names are the keys, types and `limited(...)` the limits, defaults the defaults. So a
package declares its configuration beside the code that reads it and needs nothing else to appear in files and flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from protocol.errors import ConfigError

KeyPath = tuple[str, ...]
T = TypeVar("T")

_TRUE_WORDS = ("true", "yes", "on", "1")
_FALSE_WORDS = ("false", "no", "off", "0")
_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "t": 10**12}


@dataclass(frozen=True, slots=True)
class Given:
    """A value somebody wrote, and where: "--port", "cluster.yaml:7 (http.port)", "BATON_PORT"."""

    value: object
    origin: str


Settings = dict[KeyPath, Given]


def limited(default: Any, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field with bounds (inclusive), checked by `check_limits`. None is never out of bounds."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def check_limits(record: Any) -> None:
    """For `__post_init__`: every `limited` field of `record` lies within its bounds.

    Raises:
        ConfigError: names the field, its value and the bound.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
        if value is None:
            continue
        if minimum is not None and value < minimum:
            raise ConfigError(f"{field.name} is {value}, the least is {minimum}")
        if maximum is not None and value > maximum:
            raise ConfigError(f"{field.name} is {value}, the most is {maximum}")


# --- flatten ----------------------------------------------------------------------------------------------------------


def flatten(schema: type, tree: Mapping[str, object], origin: Callable[[KeyPath], str]) -> Settings:
    """One entry for every leaf of `tree`; a leaf is what `schema` says is no section.

    Raises:
        ConfigError: a key `schema` does not have, or a plain value where a section belongs.
    """
    settings: Settings = {}

    def walk(section: type, branch: Mapping[str, object], at: KeyPath) -> None:
        hints = hints_of(section)
        for key, value in branch.items():
            path = (*at, key)
            if key not in hints:
                raise ConfigError(f"{origin(path)}: unknown key {'.'.join(path)!r}{_nearest(schema, section, key, at)}")
            inner = section_of(hints[key])
            if inner is None:
                settings[path] = Given(value, origin(path))
            elif isinstance(value, Mapping):
                walk(inner, value, path)
            elif value is not None:
                keys = ", ".join(list(hints_of(inner))[:4])
                raise ConfigError(f"{origin(path)}: {'.'.join(path)} is a section with keys such as {keys}; found {_show(value)}")

    walk(schema, tree, ())
    return settings


def merge(*layers: Settings) -> Settings:
    """The first layer that speaks of a key wins."""
    merged: Settings = {}
    for layer in reversed(layers):
        merged |= layer
    return merged


def leaf_paths(schema: type, at: KeyPath = ()) -> dict[KeyPath, Any]:
    """Every key of `schema` that holds a value, with its type, in the order declared."""
    paths: dict[KeyPath, Any] = {}
    for name, hint in hints_of(schema).items():
        section = section_of(hint)
        paths |= {(*at, name): hint} if section is None else leaf_paths(section, (*at, name))
    return paths


def default_of(schema: type, path: KeyPath) -> object:
    """The default of the key at `path`; None when it has none."""
    for field in dataclasses.fields(schema):
        if field.name == path[0]:
            section = section_of(hints_of(schema)[field.name])
            if section is not None:
                return default_of(section, path[1:])
            if field.default is not dataclasses.MISSING:
                return field.default
            return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    raise KeyError(path)


# --- bind -------------------------------------------------------------------------------------------------------------


def bind(schema: type[T], settings: Settings, *, at: KeyPath = ()) -> T:
    """An instance of `schema`: given values converted to the types of its fields, defaults for the rest.

    Raises:
        ConfigError: a value of the wrong type or outside its limits, or a key without default that nobody gave.
    """
    values: dict[str, object] = {}
    hints = hints_of(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if not field.init:
            continue
        path = (*at, field.name)
        section = section_of(hints[field.name])
        if section is not None:
            if any(key[: len(path)] == path for key in settings) or _has_no_default(field):
                values[field.name] = bind(section, settings, at=path)
        elif path in settings:
            given = settings[path]
            values[field.name] = _convert(given.value, hints[field.name], _Place(".".join(path), given.origin))
        elif _has_no_default(field):
            raise ConfigError(f"{'.'.join(path)} has no value and no default; set it in the configuration file")
    try:
        return schema(**values)
    except (ConfigError, ValueError) as error:
        raise ConfigError(_blame(error, settings, at)) from None


def convert(value: object, hint: Any, *, key: str, origin: str) -> object:
    """`value` as the type `hint`; `key` and `origin` are for the error text."""
    return _convert(value, hint, _Place(key, origin))


@dataclass(frozen=True, slots=True)
class _Place:
    key: str
    origin: str

    def refuse(self, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.origin}: {self.key} must be {expected}, found {_show(value)}")


def _convert(value: object, hint: Any, place: _Place) -> object:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), place)
    if origin is Literal:
        by_text = {str(choice): choice for choice in get_args(hint)}
        if isinstance(value, bool) or str(value) not in by_text:
            raise place.refuse(value, _choices(list(by_text), value))
        return by_text[str(value)]
    if origin in (tuple, list):
        return _convert_items(value, get_args(hint)[0], place)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise place.refuse(value, "a mapping")
        return {str(k): _convert(v, get_args(hint)[1], _Place(f"{place.key}.{k}", place.origin)) for k, v in value.items()}
    if isinstance(hint, type):
        if isinstance(value, hint) and hint not in _SCALARS:
            return value
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise place.refuse(value, f"a mapping with keys {', '.join(hints_of(hint))}")
            return bind(hint, flatten(hint, value, lambda path: f"{place.origin} ({place.key})"))
        if issubclass(hint, enum.Enum):
            by_value = {str(member.value): member for member in hint}
            if str(value) in by_value:
                return by_value[str(value)]
            raise place.refuse(value, _choices(list(by_value), value))
        if hint in _SCALARS:
            return _SCALARS[hint](value, place)
    raise AssertionError(f"{place.key}: a configuration field cannot have the type {hint}")


def _convert_union(value: object, options: tuple[Any, ...], place: _Place) -> object:
    kinds = [option for option in options if option is not type(None)]
    if value is None and len(kinds) < len(options):
        return None
    refusals: list[str] = []
    for kind in kinds:
        try:
            return _convert(value, kind, place)
        except ConfigError as error:
            refusals.append(str(error))
    if len(refusals) == 1:
        raise ConfigError(refusals[0])
    expected = " or ".join(text.split(" must be ", 1)[-1].split(", found", 1)[0] for text in refusals)
    raise place.refuse(value, expected)


def _convert_items(value: object, item: Any, place: _Place) -> tuple[object, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(_convert(entry, item, _Place(f"{place.key}[{index}]", place.origin)) for index, entry in enumerate(value))


def _to_bool(value: object, place: _Place) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in _TRUE_WORDS or word in _FALSE_WORDS:
        return word in _TRUE_WORDS
    raise place.refuse(value, "true or false")


def _to_int(value: object, place: _Place) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        if place.key.endswith("_bytes"):
            return _to_size(value, place)
        if re.fullmatch(r"\s*[+-]?\d[\d_]*\s*", value):
            return int(value)
    raise place.refuse(value, "a number of bytes such as 2GiB" if place.key.endswith("_bytes") else "a whole number")


def _to_size(text: str, place: _Place) -> int:
    """ "2GiB", "2G", "512MiB", "1.5gib", "1000"; i is for powers of 1024, as everywhere but in disk shops."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _SIZE_UNITS:
        raise place.refuse(text, "a number of bytes such as 2GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _to_float(value: object, place: _Place) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise place.refuse(value, "a number")


def _to_str(value: object, place: _Place) -> str:
    if isinstance(value, str):
        return value
    raise place.refuse(value, "text (quote it in YAML)")


def _to_path(value: object, place: _Place) -> Path:
    return Path(_to_str(value, place)).expanduser()


_SCALARS: dict[type, Callable[[object, _Place], object]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: _to_path,
}


# --- reading the schema -----------------------------------------------------------------------------------------------


def hints_of(schema: type) -> dict[str, Any]:
    """Types of the fields of a dataclass by name, in the order declared."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def section_of(hint: Any) -> type | None:
    """The dataclass behind `X` or `X | None`; None when the field holds a plain value."""
    options = [o for o in get_args(hint) if o is not type(None)] if get_origin(hint) in (Union, types.UnionType) else [hint]
    if len(options) == 1 and isinstance(options[0], type) and dataclasses.is_dataclass(options[0]):
        return options[0]
    return None


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# --- words ------------------------------------------------------------------------------------------------------------


def _nearest(schema: type, section: type, key: str, at: KeyPath) -> str:
    """The end of an unknown-key error: the nearest known key here, or the same word in another section."""
    word = key.replace("-", "_").lower()
    known = list(hints_of(section))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*at, near[0]))!r}?"
    elsewhere = {path[-1]: ".".join(path) for path in reversed(leaf_paths(schema))}
    near = difflib.get_close_matches(word, elsewhere, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {elsewhere[near[0]]!r}?"
    return f"; known here: {', '.join(known)}"


def _choices(choices: list[str], value: object) -> str:
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.6)
    return f"one of {', '.join(choices)}" + (f" (did you mean {near[0]}?)" if near else "")


def _blame(error: Exception, settings: Settings, at: KeyPath) -> str:
    """Prefix a section's own refusal with where its value was given: the first word of the text is the field's name."""
    text = str(error)
    field = text.split(" ", 1)[0].rstrip(":,")
    given = settings.get((*at, field))
    if given is not None:
        return f"{given.origin}: {'.'.join((*at, text))}"
    return ".".join((*at, text)) if at and field.isidentifier() else text


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
