"""`baton sim --events FILE`: whether a recorded router, run again, says what it said; and where it first does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.progress import say

if TYPE_CHECKING:
    from router.events import Command
    from simulator.event_replay import Difference, EventReplay

SCHEMA = "baton.sim_events.v1"
SHOWN_CHARS = 600  # of an event or a command: a prompt of 10k tokens has 600 block hashes


def run_again(file: Path, *, as_json: bool) -> bool:
    """Print what came of it; False: an event was answered otherwise than in the record.

    Raises:
        ConfigError: it is no record that this code can run.
    """
    from simulator.event_replay import replay_events

    found = replay_events(file, on_progress=lambda num_turns: say(f"{num_turns:,} events"))
    say("")
    if as_json:
        print(json.dumps(_document(file, found)))
    else:
        print("\n".join(_lines(found)))
    return found.difference is None


def _document(file: Path, found: EventReplay) -> dict[str, object]:
    difference = found.difference
    return {
        "schema": SCHEMA,
        "file": str(file),
        "identical": difference is None,
        "router": found.router,
        "code": found.code,
        "is_same_code": found.is_same_code,
        "policies": list(found.policies),
        "events": found.num_turns,
        "commands": found.num_commands,
        "duration_s": found.duration_s,
        "ended": found.ended,
        "difference": None
        if difference is None
        else {
            "index": difference.index,
            "now": difference.now,
            "event": _shown(difference.event),
            "expected": [_shown(command) for command in difference.expected],
            "actual": [_shown(command) for command in difference.actual],
        },
    }


def _lines(found: EventReplay) -> list[str]:
    lines = [f"{found.router}, {found.duration_s:,.1f} s, placed by {' then '.join(found.policies)}"]
    if not found.is_same_code:
        lines.append(f"  recorded by other code than this ({found.code}): a difference may be a change of ours")
    lines.append(f"  the record ends because {found.ended}" if found.ended else "  the record breaks off, as when its process is killed")
    if found.difference is None:
        return [*lines, f"  {found.num_turns:,} events gave the identical {found.num_commands:,} commands"]
    return [*lines, *_told(found.difference)]


def _told(difference: Difference) -> list[str]:
    return [
        f"  event {difference.index:,} at {difference.now:.6f} s is the first that differs",
        f"    event     {_shown(difference.event)}",
        *_commands("expected", difference.expected),
        *_commands("actual", difference.actual),
    ]


def _commands(title: str, commands: Sequence[Command]) -> list[str]:
    return [f"    {title:<9} {_shown(command)}" for command in commands] or [f"    {title:<9} nothing"]


def _shown(what: object) -> str:
    text = repr(what)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text):,} characters)"


__all__ = ["run_again"]
