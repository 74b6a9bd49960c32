"""One-line bugs, planted one at a time, are each found by the laws within 500 seeds of simulated faults: what the seeds are worth.

How: the bug is patched into the product, seeds run until a law is broken (simulator/fault_run.py), and which law is compared with what the
bug breaks. Without any of them the same seeds pass (test_sim_routed_faults.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from engine.core import worker_core
from engine.core.intake import Intake
from engine.core.landing import Landing
from engine.core.offers import Offers
from engine.core.residence import Residence
from gateway.events import TellRouter
from gateway.routers import Routers
from gateway.session import Session
from kvtransfer.handoff import TargetHandoff
from protocol.kv import Outcome, TransferError
from protocol.lifecycle import AttemptState, HandoffState, advance
from protocol.messages import TokenRun
from router.bookings import Bookings
from router.prefix_index import PrefixIndex
from router.waiting_room import WaitingRoom
from simulator.fault_run import run_seed
from simulator.laws import Law
from simulator.sim_transport import SimTransport

pytestmark = [pytest.mark.pure, pytest.mark.slow]

NUM_SEEDS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """`replacement` takes the place of `owner.name`; `laws`: one of these is seen to break."""

    owner: Any
    name: str
    replacement: Callable[..., Any]
    laws: frozenset[Law]


def bug(owner: Any, name: str, replacement: Callable[..., Any], *laws: Law) -> Bug:
    return Bug(owner=owner, name=name, replacement=replacement, laws=frozenset(laws))


# --- worker -----------------------------------------------------------------------------------------------------------


def give_back_without_pins(self: Residence, block_ids: array[int], _: int) -> None:
    for block_id in reversed(block_ids):
        self._pool.disown(block_id)


def forget_quarantine(self: Intake, live: Any, target: TargetHandoff) -> Any:
    command = INTAKE_ABANDON(self, live, target)
    self._scheduler.residence.give_back(self._quarantine.pop(target.handoff_id), -1)  # a copy may still write them
    return command


def keep_reservation(self: Intake, handoff_id: str, outcome: Outcome, now: float) -> Any:
    if self._quarantine.pop(handoff_id, None) is not None:
        return []
    return INTAKE_FINISH(self, handoff_id, outcome, now)


def ignore_digests(self: TargetHandoff, outcome: Outcome) -> None:
    if outcome.error is TransferError.DIGEST_MISMATCH:
        self.state = advance(self.state, HandoffState.VERIFIED)
    else:
        FINISH_PULL(self, outcome)


def one_root_for_all(live: Any, submit: Any, **rest: Any) -> None:
    OPEN_SEQUENCES(live, submit, **rest)
    for sequence in live.sequences.values():
        sequence.cache_root = b"the same root..."


def count_from_the_retry(live: Any, submit: Any, **rest: Any) -> None:
    OPEN_SEQUENCES(live, submit, **rest)
    for choice, sequence in live.sequences.items():
        sequence.num_prompt_tokens += len(submit.attempt.delivered[choice])


def keep_what_failed(self: Landing) -> None:
    self.keep()


def never_expire(self: Offers, now: float) -> None:
    return


def believe_any_generation(self: SimTransport, command: Any) -> bool:
    return self._source(command.handoff) is not None


def believe_any_epoch(self: SimTransport, peer: Any) -> Any:
    worker = self.workers.get(peer.worker_id)
    return worker if worker is not None and worker.is_alive else None


# --- gateway ----------------------------------------------------------------------------------------------------------


def lost_done(self: Session, state: AttemptState, reason: str) -> None:
    END_ATTEMPT(self, state, reason)
    if state is AttemptState.CANCELLED:
        self._out = [command for command in self._out if not isinstance(command, TellRouter)]


def tell_ends_once(self: Routers, name: str, connection: Any) -> None:
    self._over.clear()
    ROUTER_UP(self, name, connection)


def depend_on_nobody_while_waiting(self: Session) -> tuple[str, ...]:
    return () if self.state is AttemptState.WAITING_KV else WORKERS.fget(self)  # type: ignore[misc]


def one_token_too_many(self: Session, now: float, *, pause_s: float) -> None:
    NEXT_ATTEMPT(self, now, pause_s=pause_s)
    self.attempt = replace(self.attempt, delivered=tuple(tokens + tokens[-1:] for tokens in self.attempt.delivered))


def cached_of_the_last_run(self: Session, run: TokenRun, now: float) -> None:
    DELIVER(self, run, now)
    self.num_cached_tokens = run.num_cached_tokens


# --- router -----------------------------------------------------------------------------------------------------------


def booked_here_and_there(self: Bookings[Any], booking: Any, hold: Any, now: float) -> None:
    earlier = booking.holds.get(hold.phase)
    before = self._fleet.get(earlier.worker_id) if earlier is not None else None
    MOVE_DECODE(self, booking, hold, now)
    if before is not None and before.worker_id != hold.worker_id:
        before.add_hold(earlier, now, pending=True)


def waits_for_ever(self: WaitingRoom, key: Any) -> bool:
    return False


def keep_bits_of_the_dead(self: PrefixIndex, holdings: Any) -> None:
    holdings.device.clear()


def overlook_gaps(self: PrefixIndex, frame: Any) -> Any:
    holdings = self._holdings.get(frame.worker_id)
    if holdings is not None and holdings.next_number is not None and frame.events:
        holdings.next_number = (
            min(holdings.next_number, frame.events[0].number) if frame.events[0].number < holdings.next_number else frame.events[0].number
        )
    return APPLY(self, frame)


INTAKE_ABANDON, INTAKE_FINISH, FINISH_PULL = Intake._abandon, Intake.finish, TargetHandoff.finish_pull
OPEN_SEQUENCES = worker_core.open_sequences
END_ATTEMPT, ROUTER_UP, WORKERS, DELIVER = Session._end_attempt, Routers._up, Session.workers, Session._deliver
NEXT_ATTEMPT = Session._next_attempt
MOVE_DECODE, APPLY = Bookings.move_decode, PrefixIndex.apply

BUGS: dict[str, Bug] = {
    "blocks are freed while a step in flight names them": bug(Residence, "give_back", give_back_without_pins, Law.BLOCKS, Law.VERIFIED),
    "target blocks are freed while a copy writes them": bug(Intake, "_abandon", forget_quarantine, Law.BLOCKS, Law.VERIFIED),
    "a cancelled attempt keeps its reservation": bug(Intake, "finish", keep_reservation, Law.BLOCKS),
    "a digest that differs is ignored": bug(TargetHandoff, "finish_pull", ignore_digests, Law.VERIFIED),
    "a prefix whose copy failed goes to the cache": bug(Landing, "discard", keep_what_failed, Law.VERIFIED, Law.BLOCKS),
    "the tenant is left out of the hash chain": bug(worker_core, "open_sequences", one_root_for_all, Law.TENANTS),
    "a retry counts its output from its own beginning": bug(worker_core, "open_sequences", count_from_the_retry, Law.STREAM, Law.BLOCKS),
    "leases never end": bug(Offers, "expire", never_expire, Law.BLOCKS),
    "generations are not compared after a copy": bug(SimTransport, "_is_fresh", believe_any_generation, Law.VERIFIED),
    "the epoch of a source is not compared": bug(SimTransport, "_incarnation", believe_any_epoch, Law.VERIFIED),
    "the end of a cancelled attempt is not told": bug(Session, "_end_attempt", lost_done, Law.BLOCKS),
    "an end that was lost on its way is not told again": bug(Routers, "_up", tell_ends_once, Law.BLOCKS),
    "a lost worker is not noticed while KV is awaited": bug(Session, "workers", property(depend_on_nobody_while_waiting), Law.ONE_END),
    "a retry begins one token late": bug(Session, "_next_attempt", one_token_too_many, Law.STREAM, Law.ONE_END),
    "cached tokens are counted with every run": bug(Session, "_deliver", cached_of_the_last_run, Law.USAGE),
    "a booking that moves stays where it was, too": bug(Bookings, "move_decode", booked_here_and_there, Law.BLOCKS),
    "who left the queue is placed all the same": bug(WaitingRoom, "leave", waits_for_ever, Law.BLOCKS, Law.OWN),
    "what a dead worker cached is not forgotten": bug(PrefixIndex, "_clear", keep_bits_of_the_dead, Law.INDEX, Law.OWN),
    "a gap in KV events is overlooked": bug(PrefixIndex, "apply", overlook_gaps, Law.INDEX),
}


def seeds_until_found(planted: Bug) -> tuple[int, Law] | None:
    """How many seeds it took, and the law that broke; None: none of them found it."""
    for seed in range(NUM_SEEDS):
        law = run_seed(seed).law
        if law is not None:
            return seed + 1, law
    return None


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = BUGS[name]
    monkeypatch.setattr(planted.owner, planted.name, planted.replacement)
    found = seeds_until_found(planted)
    assert found is not None, f"{NUM_SEEDS} seeds do not find that {name}"
    assert found[1] in planted.laws, f"found after {found[0]} seeds, by {found[1]}"
    print(f"{name}: seed {found[0] - 1}, {found[1].value}")
