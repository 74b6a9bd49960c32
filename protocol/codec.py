"""Frozen dataclasses <-> msgpack, by their type hints: typed on arrival, nothing executed, nothing guessed.

Supported hints: bool, int, float, str, bytes, None unions, Enum, array[int] ("I"), tuple[X, ...], dict[str, int], and
dataclasses of these. A record travels as the list of its fields in declaration order, so both ends must speak one version
(HELLO checks it). `array[int]` of generations travels as 8-byte words when the field is listed in WIDE_FIELDS.
"""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from protocol.errors import MalformedFrame

T = TypeVar("T")
Encode = Callable[[Any], Any]
Decode = Callable[[Any], Any]

WIDE_FIELDS = frozenset({"generations"})  # uint64 arrays; every other array is uint32


def pack(value: object) -> bytes:
    """Bytes of a plain msgpack value (what `to_wire` returns)."""
    return typing.cast(bytes, msgpack.packb(value, use_bin_type=True))


def unpack(raw: bytes | memoryview) -> Any:
    """Plain value of `raw`; msgpack bounds every nested length by the size of `raw`."""
    try:
        return msgpack.unpackb(raw, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MalformedFrame(f"frame of {len(raw)} bytes is not msgpack: {error}") from None


def to_wire(record: object) -> list[Any]:
    """Field values of a dataclass as plain msgpack values."""
    encode, _ = _record_codec(type(record))
    return typing.cast("list[Any]", encode(record))


def from_wire(cls: type[T], value: Any) -> T:
    """A `cls` from what `to_wire` made.

    Raises:
        MalformedFrame: a field is missing or has another type; names class and field.
    """
    _, decode = _record_codec(cls)
    return typing.cast(T, decode(value))


_CODECS: dict[type, tuple[Encode, Decode]] = {}


def _record_codec(cls: type) -> tuple[Encode, Decode]:
    if cls not in _CODECS:
        _CODECS[cls] = _make_record_codec(cls)
    return _CODECS[cls]


class _ArrayHint:
    """Stands for `array` while hints are evaluated: `array[int]` cannot be subscripted at run time before Python 3.12."""

    def __class_getitem__(cls, _: object) -> type:
        return array


def _make_record_codec(cls: type) -> tuple[Encode, Decode]:
    hints = get_type_hints(cls, localns={"array": _ArrayHint})
    names = [f.name for f in fields(cls)]
    codecs = [_codec(hints[name], wide=name in WIDE_FIELDS) for name in names]
    changing = [(i, e) for i, (e, _) in enumerate(codecs) if e is not _identity]  # what msgpack cannot take as it is
    decoders = list(zip(names, (d for _, d in codecs), strict=True))

    def encode(record: Any) -> list[Any]:
        values = [getattr(record, name) for name in names]
        for i, e in changing:
            values[i] = e(values[i])
        return values

    def decode(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(decoders):
            raise MalformedFrame(f"{cls.__name__} needs a list of {len(decoders)} fields, got {_kind(value)}")
        try:
            return cls(**{name: d(v) for (name, d), v in zip(decoders, value, strict=True)})
        except MalformedFrame:
            raise _named_error(cls, decoders, value) from None
        except AssertionError as error:
            raise MalformedFrame(f"{cls.__name__}: {error}") from None

    return encode, decode


def _named_error(cls: type, decoders: list[tuple[str, Decode]], values: list[Any]) -> MalformedFrame:
    """What is wrong, with the field it is wrong with: looked for only once something is."""
    for (name, d), v in zip(decoders, values, strict=True):
        try:
            d(v)
        except MalformedFrame as error:
            return MalformedFrame(f"{cls.__name__}.{name}: {error}")
    raise AssertionError("the same values decode now")


def _codec(hint: Any, *, wide: bool) -> tuple[Encode, Decode]:
    origin, args = get_origin(hint), get_args(hint)
    if hint in (bool, str, bytes):
        return _identity, _exactly(hint)
    if hint is int:
        return _identity, _int
    if hint is float:
        return _identity, _float
    if origin in (Union, types.UnionType):
        return _union_codec(args, wide=wide)
    if hint is array:
        return _array_codec("Q" if wide else "I")
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if args[0] in _JOINED:
            return _identity, _joined_tuple(args[0])
        return _tuple_codec(_codec(args[0], wide=wide))
    if origin is tuple:
        return _fixed_tuple_codec([_codec(a, wide=wide) for a in args])
    if origin is dict and args == (str, int):
        return _identity, _str_int_dict
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_codec(hint)
    if is_dataclass(hint):
        return _record_codec(typing.cast(type, hint))
    raise TypeError(f"no wire form for {hint!r}; see the list atop protocol/codec.py")


def _union_codec(args: tuple[Any, ...], *, wide: bool) -> tuple[Encode, Decode]:
    some = [a for a in args if a is not type(None)]
    if len(some) == 1:
        encode, decode = _codec(some[0], wide=wide)
        encode_some = _identity if encode is _identity else lambda v: None if v is None else encode(v)
        return encode_some, (lambda v: None if v is None else decode(v))
    # A union of records: tagged by the class name.
    codecs = {cls.__name__: _record_codec(cls) for cls in some}

    def encode_tagged(v: Any) -> Any:
        name = type(v).__name__
        return [name, codecs[name][0](v)]

    def decode_tagged(v: Any) -> Any:
        if not isinstance(v, list) or len(v) != 2 or not isinstance(v[0], str) or v[0] not in codecs:
            raise MalformedFrame(f"expected one of {sorted(codecs)}, got {_kind(v)}")
        return codecs[v[0]][1](v[1])

    return encode_tagged, decode_tagged


def _array_codec(typecode: str) -> tuple[Encode, Decode]:
    def decode(v: Any) -> array[int]:
        item = array(typecode)
        if not isinstance(v, bytes) or len(v) % item.itemsize:
            raise MalformedFrame(f"expected a buffer of {item.itemsize}-byte words, got {_kind(v)}")
        item.frombytes(v)
        return item

    return (lambda a: a.tobytes()), decode


def _tuple_codec(item: tuple[Encode, Decode]) -> tuple[Encode, Decode]:
    encode, decode = item

    def decode_all(v: Any) -> tuple[Any, ...]:
        if not isinstance(v, list):
            raise MalformedFrame(f"expected a list, got {_kind(v)}")
        return tuple([decode(x) for x in v])

    return (_identity if encode is _identity else lambda t: [encode(x) for x in t]), decode_all


# Joining takes items of its own type only, and takes them at C speed: a prompt of 4k tokens has 256 hashes.
_JOINED: dict[Any, Callable[[Any], object]] = {bytes: b"".join, str: "".join}


def _joined_tuple(item: type) -> Decode:
    join = _JOINED[item]

    def decode_all(v: Any) -> tuple[Any, ...]:
        if not isinstance(v, list):
            raise MalformedFrame(f"expected a list, got {_kind(v)}")
        try:
            join(v)
        except TypeError:
            raise MalformedFrame(f"expected a list of {item.__name__}") from None
        return tuple(v)

    return decode_all


def _fixed_tuple_codec(items: list[tuple[Encode, Decode]]) -> tuple[Encode, Decode]:
    def decode(v: Any) -> tuple[Any, ...]:
        if not isinstance(v, list) or len(v) != len(items):
            raise MalformedFrame(f"expected a list of {len(items)}, got {_kind(v)}")
        return tuple([d(x) for (_, d), x in zip(items, v, strict=True)])

    return (lambda t: [e(x) for (e, _), x in zip(items, t, strict=True)]), decode


def _enum_codec(hint: type[Enum]) -> tuple[Encode, Decode]:
    def decode(v: Any) -> Enum:
        try:
            return hint(v)
        except ValueError:
            raise MalformedFrame(f"{v!r} is not a {hint.__name__}") from None

    return (lambda e: e.value), decode


def _identity(v: Any) -> Any:
    return v


def _exactly(cls: type) -> Decode:
    def decode(v: Any) -> Any:
        if type(v) is not cls:
            raise MalformedFrame(f"expected {cls.__name__}, got {_kind(v)}")
        return v

    return decode


def _int(v: Any) -> int:
    if type(v) is not int:
        raise MalformedFrame(f"expected int, got {_kind(v)}")
    return v


def _float(v: Any) -> float:
    if type(v) not in (int, float):
        raise MalformedFrame(f"expected float, got {_kind(v)}")
    return float(v)


def _str_int_dict(v: Any) -> dict[str, int]:
    if not isinstance(v, dict) or not all(type(k) is str and type(n) is int for k, n in v.items()):
        raise MalformedFrame(f"expected a map of str to int, got {_kind(v)}")
    return v


def _kind(v: Any) -> str:
    return f"{type(v).__name__} of {len(v)}" if isinstance(v, (list, bytes, str, dict)) else type(v).__name__
