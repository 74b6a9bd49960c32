"""Work the router has given out and not yet heard the end of: what makes the next choice see the last one.

A booking is made in the same turn as the choice. It has one hold on each worker it uses:

    booked ──► prefill hold on P      freed by PrefillDone, Done, the TTL, or P leaving
          └──► decode hold on D       freed by Done, the TTL, or D leaving; moved to another worker while P computes (reassignment.py)

Everything is fenced by (request, attempt), and each hold is freed once, whatever arrives twice or out of order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from protocol.messages import Assignment, Place
from protocol.request import AttemptKey
from protocol.worker import WorkerId
from router.fleet import Fleet, HoldKey, Worker
from router.holds import Hold, Phase

MAX_TOMBSTONES = 8192


@dataclass(slots=True, kw_only=True)
class Held:
    """What one attempt holds, whichever router placed it."""

    key: AttemptKey
    gateway: str
    prefill_worker: WorkerId
    booked_s: float
    holds: dict[Phase, Hold]

    @property
    def is_prefilled(self) -> bool:
        return Phase.PREFILL not in self.holds

    def note_decode_worker(self, worker_id: WorkerId) -> None:
        """It decodes there, as its gateway says."""


@dataclass(slots=True, kw_only=True)
class Booking(Held):
    """One attempt that was placed here."""

    place: Place
    assignment: Assignment
    predicted_output_tokens: int  # of one choice, as charged to the tenant
    num_moves: int = 0  # of its decode hold

    def note_decode_worker(self, worker_id: WorkerId) -> None:
        self.assignment = replace(self.assignment, decode_worker=worker_id)

    def check(self) -> None:
        """Assert that it holds where it decodes."""
        hold = self.holds.get(Phase.DECODE)
        assert hold is None or hold.worker_id == self.assignment.decode_worker, f"{self.key} holds where it does not decode"


B = TypeVar("B", bound=Held)


class Bookings(Generic[B]):
    """Live bookings, oldest first. Their holds stand on the workers of `fleet` for as long as they are here.

    on_over: told of each booking that is over, however it ended.
    """

    def __init__(self, fleet: Fleet, *, ttl_s: float, on_over: Callable[[B], None] = lambda booking: None) -> None:
        self._fleet = fleet
        self._ttl_s = ttl_s
        self._on_over = on_over
        self._by_key: OrderedDict[AttemptKey, B] = OrderedDict()
        self._live_attempt: dict[str, int] = {}
        self._ended: OrderedDict[AttemptKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[B]:
        return iter(self._by_key.values())

    def get(self, key: AttemptKey) -> B | None:
        return self._by_key.get(key)

    def add(self, booking: B) -> None:
        """Take its holds from the workers; one on a worker that is not here yet stands on it once it is (`stand_on`)."""
        assert booking.key not in self._by_key, "booked twice"
        self._by_key[booking.key] = booking
        self._live_attempt[booking.key.request_id] = booking.key.attempt
        for hold in booking.holds.values():
            worker = self._fleet.get(hold.worker_id)
            if worker is not None:
                _stand(booking, hold, worker)

    def stand_on(self, worker: Worker) -> None:
        """A worker has joined: it holds what was booked on it before it was known here."""
        for booking in self._by_key.values():
            for hold in booking.holds.values():
                if hold.worker_id == worker.worker_id and not worker.has_hold(hold):
                    _stand(booking, hold, worker)

    def live_attempt(self, request_id: str) -> B | None:
        """The booked attempt of a request, whichever number it has."""
        number = self._live_attempt.get(request_id)
        return None if number is None else self._by_key.get(AttemptKey(request_id=request_id, attempt=number))

    def end_prefill(self, key: AttemptKey, decode_worker: WorkerId | None, now: float) -> B | None:
        """Prefill is over: its hold is freed, and the request is on its way to the decode worker. None: no such booking.

        decode_worker: who that is by its gateway, which may have heard of a move too late; None: whoever is booked.
        """
        booking = self._by_key.get(key)
        if booking is None:
            return None
        hold = booking.holds.get(Phase.DECODE)
        is_split = hold is not None and hold.worker_id != booking.prefill_worker
        if hold is not None and is_split and decode_worker is not None and decode_worker != hold.worker_id:
            self.move_decode(booking, replace(hold, worker_id=decode_worker), now)
            booking.note_decode_worker(decode_worker)
        self._release(booking, Phase.PREFILL)
        hold = booking.holds.get(Phase.DECODE)
        worker = self._fleet.get(hold.worker_id) if hold is not None else None
        if hold is not None and worker is not None:
            worker.start_settling(hold, now)
        return booking

    def move_decode(self, booking: B, hold: Hold, now: float) -> None:
        """The booking's decode hold is `hold` from now on, and stands on no other worker; nowhere when that one is not in the fleet."""
        assert Phase.PREFILL in booking.holds or Phase.DECODE in booking.holds, "the booking is over"
        worker, earlier = self._fleet.get(hold.worker_id), booking.holds.get(Phase.DECODE)
        if worker is None:
            self._release(booking, Phase.DECODE)
            return
        earlier_worker = self._fleet.get(earlier.worker_id) if earlier is not None else None
        if earlier is not None and earlier_worker is not None:
            earlier_worker.remove_hold(earlier)
        booking.holds[Phase.DECODE] = hold
        worker.add_hold(hold, now, pending=True)

    def end(self, key: AttemptKey) -> B | None:
        """The attempt is over: free what it holds, and remember that it ended, so that a Place that comes late is ignored."""
        self._ended[key] = None
        self._ended.move_to_end(key)
        if len(self._ended) > MAX_TOMBSTONES:
            self._ended.popitem(last=False)
        return self.drop(key)

    def drop(self, key: AttemptKey) -> B | None:
        """Free what the attempt holds without knowing how it went on. None: nothing is booked for it."""
        booking = self._by_key.get(key)
        if booking is not None:
            for phase in list(booking.holds):
                self._release(booking, phase)
        return booking

    def drop_worker(self, worker: Worker) -> list[Hold]:
        """The worker has left the fleet: what it held is gone; what else its requests hold ends with their Done.

        Returns the decode holds it had of bookings whose prefill goes on elsewhere, oldest first.
        """
        orphans = []
        for (key, phase), hold in list(worker.holds.items()):
            booking = self._by_key.get(key)
            if booking is not None:
                self._release(booking, phase)
                if phase is Phase.DECODE and Phase.PREFILL in booking.holds and hold.worker_id != booking.prefill_worker:
                    orphans.append(hold)
        return orphans

    def has_ended(self, key: AttemptKey) -> bool:
        """True when a Done came for this attempt, perhaps before its Place."""
        return key in self._ended

    def overdue(self, now: float) -> list[AttemptKey]:
        keys = []
        for booking in self._by_key.values():
            if booking.booked_s + self._ttl_s > now:
                break
            keys.append(booking.key)
        return keys

    def standing(self) -> set[HoldKey]:
        """Holds that must be found on the workers that are here, and no others."""
        return {(b.key, phase) for b in self for phase, hold in b.holds.items() if self._fleet.get(hold.worker_id) is not None}

    @property
    def ended(self) -> Iterator[AttemptKey]:
        """Attempts that are over, the newest first; MAX_TOMBSTONES at most."""
        return reversed(self._ended)

    def _release(self, booking: B, phase: Phase) -> None:
        """Take one hold away; the booking ends with its last one."""
        hold = booking.holds.pop(phase, None)
        worker = self._fleet.get(hold.worker_id) if hold is not None else None
        if hold is not None and worker is not None:
            worker.remove_hold(hold)
        if not booking.holds:
            self._forget(booking)

    def _forget(self, booking: B) -> None:
        if self._by_key.pop(booking.key, None) is None:
            return
        if self._live_attempt.get(booking.key.request_id) == booking.key.attempt:
            del self._live_attempt[booking.key.request_id]
        self._on_over(booking)


def _stand(booking: Held, hold: Hold, worker: Worker) -> None:
    """On a decode worker that waits for prefill elsewhere the request arrives only after PrefillDone."""
    is_split = len({h.worker_id for h in booking.holds.values()}) > 1
    worker.add_hold(hold, booking.booked_s, pending=is_split and hold.phase is Phase.DECODE)
