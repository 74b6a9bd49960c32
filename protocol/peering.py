"""What routers tell each other of the work they have given out, and gateways of themselves.

    router -> router       AskBookings                     (who dials asks; from then on it is told)
    router -> router       BookingSet, then BookingNews    (one way, numbered; a gap is another AskBookings)
    router -> gateway      RouterReadiness                 (when it connects, and on every change)

Everything is idempotent by (request_id, attempt), so what comes twice or late changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Done, PrefillDone


@dataclass(frozen=True, slots=True, kw_only=True)
class BookingMade:
    """An attempt was placed, or placed anew: what it takes from which workers, from its start to its end."""

    request_id: str
    attempt: int
    gateway: str
    prefill_worker: str
    decode_worker: str
    prefill_tokens: int  # missed there, to be computed
    prefill_pairs: int  # missed * context
    num_sequences: int
    kv_tokens: int  # at the expected end of the output, all choices
    output_tokens: int  # of one choice, as predicted
    lands_in_s: float  # until its prompt is expected to be computed
    is_prefilled: bool
    age_s: float  # since it was booked
    block_hashes: tuple[bytes, ...] = ()  # of the prompt, from its start; not all of a long one, none in a BookingSet


@dataclass(frozen=True, slots=True, kw_only=True)
class BookingNews:
    """What happened since the message before; empty as a sign of life."""

    number: int
    changes: tuple[BookingMade | PrefillDone | Done, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOver:
    """Whoever placed it: a Place or a booking that comes late is of no account."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BookingSet:
    """All live bookings the router made itself, and attempts of anybody that it knows to be over; news go on with `next_number`."""

    next_number: int
    bookings: tuple[BookingMade, ...]
    ended: tuple[AttemptOver, ...]  # the newest ones


@dataclass(frozen=True, slots=True, kw_only=True)
class AskBookings:
    """Send me your set, and your news from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReadiness:
    """Whether this router knows enough to place well; `reason` is empty when it does."""

    is_ready: bool
    reason: str


PEERING_MESSAGES: tuple[type, ...] = (AskBookings, BookingSet, BookingNews, RouterReadiness)
