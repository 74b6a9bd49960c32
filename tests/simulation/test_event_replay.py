"""A router's record, run again, is the same run; a record that was changed, and a router that was, are told at the event where they part.

How: a seeded run of all a router can be told (tests/router_digest.py) is written by the recorder of a live router, policies are switched in
it, and the file is run again: here, and by the command in a process of its own, whose hashes have another seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from cluster.recorder import FileRecorder, RecordSpec
from protocol.errors import ConfigError
from protocol.messages import PlaceAck
from router import policies
from router.config import RouterConfig
from router.events import Command, Event, FromGateway, ToGateway
from router.policies.prefix_cost import PrefixCost
from router.recording import PolicySwitched, RecordingEnded, RouterBegan, Turn, frame, records
from simulator.event_replay import replay_events
from tests.router_digest import run
from tests.unit.router.router_world import World, pools

pytestmark = pytest.mark.pure

NUM_STEPS = 400
SEED = 7
POLICIES = ("prefix_cost", "power_of_two", "e2", "prefix_cost:beta=2")
PLENTY = 1 << 30
TOLD = ToGateway(gateway="nobody", message=PlaceAck(request_id="0", attempt=0, queue_position=0))


class RecordedWorld(World):
    """Tells a recorder what a live router's process tells it."""

    def __init__(self, recorder: FileRecorder, config: RouterConfig) -> None:
        self.recorder = recorder
        super().__init__(pools(3, 3, 2), policy=policies.load(config.policy), seed=SEED, policy_time_limit_s=config.policy_time_limit_s)

    def on(self, event: Event) -> list[Command]:
        commands = super().on(event)
        self.recorder.take(Turn(now=self.now, event=event, commands=tuple(commands)))
        self.core.catch_up()
        self.recorder.settle()
        return commands

    def switch(self, spec: str, *, forget: bool) -> None:
        self.recorder.take(PolicySwitched(now=self.now, policy=spec, decode_policy="", forget=forget))
        self.core.use_policy(policies.load(spec), spec, self.now, forget=forget)


def recorded(folder: Path, *, max_bytes: int = PLENTY) -> tuple[Path, FileRecorder]:
    config = RouterConfig(policy=POLICIES[0], policy_time_limit_s=0.06)
    recorder = FileRecorder(RecordSpec(folder=folder, max_bytes=max_bytes), name="router-0", epoch=3, seed=SEED, config=config)
    world = RecordedWorld(recorder, config)
    for number, _ in enumerate(run(world, Random("recorded"), NUM_STEPS)):
        if number % 100 == 99 and number < NUM_STEPS - 1:
            world.switch(POLICIES[(number + 1) // 100], forget=number == 199)
        if number % 7 == 0:
            world.core.status(world.now + 0.01)  # who only looks changes nothing, whenever that is
    recorder.close()
    return recorder.path, recorder


def changed(path: Path, index: int, change: object) -> Path:
    """A copy of a record in which the turn `index` is `change(turn)`."""
    other, number = path.with_suffix(".changed"), -1
    with path.open("rb") as file, other.open("wb") as out:
        for record in records(file):
            if isinstance(record, Turn):
                number += 1
                record = change(record) if number == index else record  # type: ignore[operator]
            out.write(frame(record))
    return other


def turns(path: Path) -> list[Turn]:
    with path.open("rb") as file:
        return [record for record in records(file) if isinstance(record, Turn)]


def test_a_record_run_again_gives_the_identical_commands(tmp_path: Path) -> None:
    """Seen to fail with the seed of the record not used, and with a policy that draws from a generator of its own."""
    path, recorder = recorded(tmp_path)
    found = replay_events(path)
    assert found.difference is None and found.is_same_code and found.ended == "the router stopped"
    assert found.policies == POLICIES and recorder.note is None
    assert found.num_turns == len(turns(path)) > NUM_STEPS / 2 and found.num_commands > 200
    assert path.stat().st_mode & 0o077 == 0, "tenants and sessions stand in it"


def test_the_command_says_so_and_fails_where_it_differs(tmp_path: Path) -> None:
    """How: two processes, so that sets of names are walked in another order than here. Seen to fail with an exit of 0 in both cases."""
    path, _ = recorded(tmp_path)
    command = [sys.executable, "-P", "-m", "baton", "sim", "--json", "--events"]
    same = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert same.returncode == 0, same.stdout + same.stderr
    document = json.loads(same.stdout)
    assert document["identical"] and document["schema"] == "baton.sim_events.v1" and document["events"] == len(turns(path))
    other = changed(path, 150, lambda turn: Turn(now=turn.now, event=turn.event, commands=(*turn.commands, TOLD)))
    differs = subprocess.run([*command, str(other)], capture_output=True, text=True, timeout=60, check=False)
    assert differs.returncode == 1 and json.loads(differs.stdout)["difference"]["index"] == 150


@pytest.mark.parametrize("what", ["now", "commands", "event"])
def test_a_record_that_was_changed_is_told_at_its_event(tmp_path: Path, what: str) -> None:
    """How: one turn that placed a request is changed in the file: a command taken away, its time, or the event itself. Whatever was
    answered before it stays; of a changed time the first answer that depends on it is told, there or later.

    Seen to fail with turns compared by the number of their commands.
    """
    path, _ = recorded(tmp_path)
    original = turns(path)
    index = next(i for i, turn in enumerate(original) if i > 200 and isinstance(turn.event, FromGateway) and len(turn.commands) == 2)

    def change(turn: Turn) -> Turn:
        if what == "commands":
            return Turn(now=turn.now, event=turn.event, commands=turn.commands[::-1])
        if what == "now":
            return Turn(now=turn.now + 500.0, event=turn.event, commands=turn.commands)
        return Turn(now=turn.now, event=original[index + 1].event, commands=turn.commands)

    difference = replay_events(changed(path, index, change)).difference
    assert difference is not None and difference.index >= index
    if what != "now":
        assert difference.index == index and difference.now == original[index].now
        assert difference.expected != difference.actual


def test_a_router_that_was_changed_is_told_at_the_first_request_it_places_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How: prefix_cost with one line changed, which takes the dearest worker. Seen to fail with turns compared by the number of
    their commands."""
    path, _ = recorded(tmp_path)
    told = PrefixCost.price_pool

    def dearest(self: PrefixCost, *arguments: object) -> object:
        prices = told(self, *arguments)  # type: ignore[arg-type]
        prices.seconds[:] = [-s for s in prices.seconds]
        return prices

    monkeypatch.setattr(PrefixCost, "price_pool", dearest)
    difference = replay_events(path).difference
    assert difference is not None and isinstance(difference.event, FromGateway)
    assert difference.event == turns(path)[difference.index].event
    assert [type(c) for c in difference.actual] == [type(c) for c in difference.expected], "it answers, with another worker"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_record_is_bounded_says_so_and_can_be_run_until_there(tmp_path: Path) -> None:
    """Seen to fail with the bound not looked at."""
    path, recorder = recorded(tmp_path, max_bytes=150_000)
    assert path.stat().st_size <= 150_000 + 200
    assert recorder.note is not None and "150,000" in recorder.note and str(path) in recorder.note
    found = replay_events(path)
    assert found.difference is None and 20 < found.num_turns < NUM_STEPS and "150,000" in found.ended
    with path.open("rb") as file:
        *_, last = records(file)
    assert isinstance(last, RecordingEnded)


def test_a_killed_router_leaves_a_record_up_to_its_last_whole_event(tmp_path: Path) -> None:
    """Seen to fail with a short read taken for a record."""
    path, _ = recorded(tmp_path)
    torn = path.with_suffix(".torn")
    torn.write_bytes(path.read_bytes()[:-5_003])
    found = replay_events(torn)
    assert found.difference is None and found.ended == "" and 0 < found.num_turns < len(turns(path))


def test_what_is_no_record_or_one_of_other_fields_is_refused(tmp_path: Path) -> None:
    """Seen to fail with the digest of declarations not looked at."""
    path, _ = recorded(tmp_path)
    with path.open("rb") as file:
        began = next(records(file))
    assert isinstance(began, RouterBegan)
    other = tmp_path / "other"
    other.write_bytes(frame(RouterBegan(**{**{n: getattr(began, n) for n in began.__slots__}, "declarations": b"x" * 16})))
    with pytest.raises(ConfigError, match="written by other code"):
        replay_events(other)
    other.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(ConfigError, match=r"no record of a router's events|is damaged"):
        replay_events(other)
    with pytest.raises(ConfigError, match="cannot be read"):
        replay_events(tmp_path / "nothing")
