"""A router's recorded events through a fresh core: it answers as it did, or the first event where it does not is told.

Same code, same file, same commands: whoever reads a clock, draws from a generator of its own or walks a set in the order of its hashes is
found here. With other code it says where the two first part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from control.code_version import code_version
from protocol.errors import ConfigError
from router import policies
from router.core import RouterCore
from router.events import Command, Event
from router.recording import ROOMS, PolicySwitched, Record, RecordingEnded, RouterBegan, Turn, records

PROGRESS_TURNS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first turn that gave other commands."""

    index: int  # of the turn, from 0
    now: float  # on the router's clock
    event: Event
    expected: tuple[Command, ...]  # as recorded
    actual: tuple[Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventReplay:
    """What came of a file."""

    router: str
    code: str  # that recorded it
    is_same_code: bool
    policies: tuple[str, ...]  # in the order in which they placed
    num_turns: int  # run again, with the one that differs
    num_commands: int
    duration_s: float  # on the router's clock
    ended: str  # as the record says; empty: it breaks off, as when the process is killed
    difference: Difference | None


def replay_events(path: Path, *, on_progress: Callable[[int], None] = lambda num_turns: None) -> EventReplay:
    """Run the file's events, up to the first that differs.

    on_progress(turns so far) is called now and then.

    Raises:
        ConfigError: no such file, none of a router, of other records, or of a policy that cannot be loaded.
    """
    try:
        with path.open("rb") as file:
            return _replayed(records(file), on_progress)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _replayed(run: Iterator[Record], on_progress: Callable[[int], None]) -> EventReplay:
    began = next(run)
    assert isinstance(began, RouterBegan), "the first record of a file"
    core = _core_of(began)
    specs, num_turns, num_commands = [core.config.policy], 0, 0
    first_s: float | None = None
    last_s, ended, difference = 0.0, "", None
    for record in run:
        if isinstance(record, RecordingEnded):
            ended = record.reason
        elif isinstance(record, PolicySwitched):
            _switch(core, record)
            specs.append(record.policy)
        elif isinstance(record, Turn):
            first_s, last_s = record.now if first_s is None else first_s, record.now
            actual = tuple(core.on(record.event, record.now))
            num_turns, num_commands = num_turns + 1, num_commands + len(actual)
            if actual != record.commands:
                difference = Difference(index=num_turns - 1, now=record.now, event=record.event, expected=record.commands, actual=actual)
                break
            if num_turns % PROGRESS_TURNS == 0:
                on_progress(num_turns)
    return EventReplay(
        router=began.name,
        code=began.code,
        is_same_code=began.code == code_version(ROOMS),
        policies=tuple(specs),
        num_turns=num_turns,
        num_commands=num_commands,
        duration_s=last_s - (first_s or 0.0),
        ended=ended,
        difference=difference,
    )


def _core_of(began: RouterBegan) -> RouterCore:
    """As the router's process makes it. The stopwatch around its policies is left out: what it found is in the events."""
    config = began.config
    decode_policy = policies.load(config.decode_policy) if config.decode_policy else None
    return RouterCore(config, policy=policies.load(config.policy), decode_policy=decode_policy, rng=Random(began.seed), name=began.name)


def _switch(core: RouterCore, switched: PolicySwitched) -> None:
    decode_policy = policies.load(switched.decode_policy) if switched.decode_policy else None
    core.use_policy(
        policies.load(switched.policy),
        switched.policy,
        switched.now,
        forget=switched.forget,
        decode_policy=decode_policy,
        decode_spec=switched.decode_policy,
    )


__all__ = ["Difference", "EventReplay", "replay_events"]
