"""Work the router has given out and not yet heard the end of: what makes the next choice see the last one.

A booking is made in the same turn as the choice. It has one hold on each worker it uses:

    booked ──► prefill hold on P      freed by PrefillDone, Done, the TTL, or P leaving
          └──► decode hold on D       freed by Done, the TTL, or D leaving

Everything is fenced by (request, attempt), and each hold is freed once, whatever arrives twice or out of order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from protocol.messages import Assignment, Place
from protocol.request import AttemptKey
from protocol.worker import WorkerId

MAX_TOMBSTONES = 8192


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What one phase of one attempt will take from one worker. All integers, so that sums come back to exactly zero."""

    key: AttemptKey
    phase: Phase
    worker_id: WorkerId
    prefill_tokens: int = 0  # missed, to be computed
    prefill_pairs: int = 0  # missed * context
    num_sequences: int = 0
    kv_tokens: int = 0  # at the expected end of the output, all choices


@dataclass(slots=True)
class Tally:
    """Sum of holds."""

    num_prefills: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    num_sequences: int = 0
    kv_tokens: int = 0

    def add(self, hold: Hold, sign: int = 1) -> None:
        self.num_prefills += sign * (hold.phase is Phase.PREFILL)
        self.prefill_tokens += sign * hold.prefill_tokens
        self.prefill_pairs += sign * hold.prefill_pairs
        self.num_sequences += sign * hold.num_sequences
        self.kv_tokens += sign * hold.kv_tokens

    @property
    def is_zero(self) -> bool:
        return not (self.num_prefills or self.prefill_tokens or self.prefill_pairs or self.num_sequences or self.kv_tokens)


@dataclass(slots=True, kw_only=True)
class Booking:
    """One attempt that was placed."""

    key: AttemptKey
    gateway: str
    place: Place
    assignment: Assignment
    predicted_output_tokens: int  # of one choice, as charged to the tenant
    booked_s: float
    holds: dict[Phase, Hold]


class Bookings:
    """All live bookings, oldest first. Holds on workers are the caller's to add and remove; this knows which exist."""

    def __init__(self, *, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._by_key: OrderedDict[AttemptKey, Booking] = OrderedDict()
        self._live_attempt: dict[str, int] = {}
        self._ended: OrderedDict[AttemptKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Booking]:
        return iter(self._by_key.values())

    def get(self, key: AttemptKey) -> Booking | None:
        return self._by_key.get(key)

    def add(self, booking: Booking) -> None:
        assert booking.key not in self._by_key, "booked twice"
        self._by_key[booking.key] = booking
        self._live_attempt[booking.key.request_id] = booking.key.attempt

    def live_attempt(self, request_id: str) -> Booking | None:
        """The booked attempt of a request, whichever number it has."""
        number = self._live_attempt.get(request_id)
        return None if number is None else self._by_key.get(AttemptKey(request_id=request_id, attempt=number))

    def release(self, key: AttemptKey, phase: Phase) -> Hold | None:
        """Take one hold away; the booking ends with its last one. None: it was gone already."""
        booking = self._by_key.get(key)
        hold = booking.holds.pop(phase, None) if booking is not None else None
        if booking is not None and not booking.holds:
            self._forget(booking)
        return hold

    def end(self, key: AttemptKey) -> Booking | None:
        """Take the whole booking away and remember that it ended; its holds are still in the record returned."""
        self._ended[key] = None
        self._ended.move_to_end(key)
        if len(self._ended) > MAX_TOMBSTONES:
            self._ended.popitem(last=False)
        booking = self._by_key.get(key)
        if booking is not None:
            self._forget(booking)
        return booking

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

    def _forget(self, booking: Booking) -> None:
        del self._by_key[booking.key]
        if self._live_attempt.get(booking.key.request_id) == booking.key.attempt:
            del self._live_attempt[booking.key.request_id]
