"""What a router core was told and what it answered, as a file of typed frames: a live run that can be run again, event by event.

    file  = frame*                       frame = uint32-LE length ‖ msgpack [kind of record, fields]
    RouterBegan, then Turn | PolicySwitched in the order of the core's calls, at last RecordingEnded where it did not just break off

A core reads no clock and draws from no generator of its own: what it does follows from RouterBegan (config, policy, seed) and the calls.
What it is asked for without being changed (status, explanations) is not recorded. Nothing is unpickled; fields travel in order of their
declaration, so RouterBegan carries a digest of all declarations, and a file of others is refused.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import BinaryIO, Protocol, get_args

from protocol.codec import from_wire, pack, to_wire, unpack
from protocol.errors import ConfigError, MalformedFrame
from protocol.wire import ALL_MESSAGES, MAX_FRAME_BYTES
from router.config import RouterConfig
from router.events import Command, Event

SCHEMA = "baton.router_events.v1"
ROOMS = ("protocol", "router")  # whose code decides
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBegan:
    """All a core is made from."""

    schema: str
    declarations: bytes  # `declarations()` of whoever wrote it
    code: str  # version of the code, with a digest of its sources: another may decide otherwise
    name: str
    epoch: int
    seed: int
    config: RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One call of `on`, in the order of the calls."""

    now: float  # seconds on the router's own steady clock
    event: Event
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySwitched:
    """One call of `use_policy`."""

    now: float
    policy: str
    decode_policy: str
    forget: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingEnded:
    """The run may have gone on."""

    reason: str


Record = RouterBegan | Turn | PolicySwitched | RecordingEnded
_KINDS: tuple[type[Record], ...] = get_args(Record)


class Recorder(Protocol):
    """Takes what happens to a core; where it goes is its own affair (cluster/recorder.py)."""

    def take(self, record: Turn | PolicySwitched) -> None:
        """Called right after the core: it only remembers."""

    def settle(self) -> None:
        """The answers are out: write down what was taken."""

    def close(self) -> None: ...

    @property
    def note(self) -> str | None:
        """Why the record is not whole; None while it is."""


def frame(record: Record) -> bytes:
    """With its length."""
    body = pack([_KINDS.index(type(record)), to_wire(record)])
    return _LENGTH.pack(len(body)) + body


def records(file: BinaryIO) -> Iterator[Record]:
    """Those of a file, up to its end or to the record in which a process that was killed broke off.

    Raises:
        ConfigError: it is none of a router, one of other declarations, or damaged.
    """
    head = next(_bodies(file), None)
    try:
        began = None if head is None else _decoded(head)
    except MalformedFrame:
        began = None
    if not isinstance(began, RouterBegan) or began.schema != SCHEMA:
        raise ConfigError(f"this is no record of a router's events ({SCHEMA}); `baton serve --record DIR` writes them")
    if began.declarations != declarations():
        raise ConfigError(f"written by other code ({began.code}), whose records have other fields; run it again with that code")
    yield began
    for number, body in enumerate(_bodies(file)):
        try:
            yield _decoded(body)
        except MalformedFrame as error:
            raise ConfigError(f"record {number} is damaged: {error}") from None


@cache
def declarations() -> bytes:
    """A digest of all records that can stand in a file, their fields and types, and of enums: equal where frames mean the same."""
    seen: dict[type, str] = {}
    waiting: list[type] = [*_KINDS, *ALL_MESSAGES]
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen[cls] = _declaration(cls)
            # Whatever a record is made of is declared or imported where the record is.
            waiting += [other for other in vars(sys.modules[cls.__module__]).values() if isinstance(other, type) and _is_declared(other)]
    return hashlib.sha256("\n".join(sorted(seen.values())).encode()).digest()[:16]


def _is_declared(cls: type) -> bool:
    return is_dataclass(cls) or (issubclass(cls, Enum) and cls is not Enum)


def _declaration(cls: type) -> str:
    if is_dataclass(cls):
        return f"{cls.__qualname__}({', '.join(f'{field.name}: {field.type}' for field in fields(cls))})"
    return f"{cls.__qualname__}({', '.join(map(str, cls.__members__.values()))})" if issubclass(cls, Enum) else cls.__qualname__


def _decoded(body: bytes) -> Record:
    value = unpack(body)
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not int or not 0 <= value[0] < len(_KINDS):
        raise MalformedFrame("a record is [kind, fields]")
    return from_wire(_KINDS[value[0]], value[1])


def _bodies(file: BinaryIO) -> Iterator[bytes]:
    while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME_BYTES:
            raise ConfigError(f"a record claims {length:,} bytes, more than the limit of {MAX_FRAME_BYTES:,}: the file is damaged")
        body = file.read(length)
        if len(body) < length:
            return
        yield body


__all__ = [
    "ROOMS",
    "Record",
    "Recorder",
    "RecordingEnded",
    "RouterBegan",
    "SCHEMA",
    "Turn",
    "PolicySwitched",
    "declarations",
    "frame",
    "records",
]
