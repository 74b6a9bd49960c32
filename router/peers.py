"""What the other routers have given out: their bookings stand on the workers like our own, and ours are told to them.

    a peer's link opens ──► AskBookings ──► BookingSet ──► BookingNews 1, 2, 3, ...     applied in order, each once
                                 ▲                             │ a number is missing, or nothing comes
                                 └─────────────────────────────┘ asked again, each `resync_interval_s`

Each router tells what it booked itself, and passes on what gateways say of bookings that are not its own. Of two bookings of one
attempt the later one counts: the gateway asked a second router because it did not hear the first. A router that is lost
leaves its bookings for `gateway_grace_s`, since its requests go on; after that the workers' own reports must do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from protocol.messages import Done, Membership, PrefillDone
from protocol.peering import AskBookings, AttemptOver, BookingMade, BookingNews, BookingSet
from protocol.request import AttemptKey
from router.bookings import Booking, Bookings, Held
from router.config import RouterConfig
from router.events import BatchBegun, BatchDue, Command, FromPeer, PeerDown, PeerHungUp, PeerUp, ToPeers
from router.fleet import Fleet, Worker
from router.holds import Hold, Phase
from router.prefix_index import PrefixIndex

MAX_ENDED_TOLD = 2048
Change = BookingMade | PrefillDone | Done


@dataclass(slots=True, kw_only=True)
class PeerBooking(Held):
    """One attempt that another router placed."""

    router: str
    epoch: int


@dataclass(slots=True, kw_only=True)
class _Peer:
    """One other router of the directory."""

    heard_s: float  # its last message that was taken; at first, when we learned of it
    epoch: int | None = None  # of the open link; None: it is down
    next_number: int | None = None  # None: its set has not come
    asked_s: float | None = None  # when the set was asked for that has not come


class Peers:
    """Keeps the bookings of all routers in step. Without other routers every call returns at once."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        name: str,
        fleet: Fleet,
        index: PrefixIndex,
        own: Bookings[Booking],
        say: Callable[[Command], None],
        on_prefill_done: Callable[[PrefillDone, float], bool],
        on_done: Callable[[Done, float], bool],
    ) -> None:
        """on_prefill_done, on_done: a peer heard this; False: nothing here was meant."""
        self._config = config
        self._name = name
        self._fleet = fleet
        self._index = index
        self._own = own
        self._say = say
        self._on_prefill_done = on_prefill_done
        self._on_done = on_done
        self.bookings: Bookings[PeerBooking] = Bookings(fleet, ttl_s=config.booking_ttl_s)
        self._peers: dict[str, _Peer] = {}
        self._lost: dict[tuple[str, int], float] = {}  # (router, epoch) -> when its bookings end
        self._listeners: dict[str, None] = {}  # who is told, in the order they asked
        self._next_number = 0
        self._news: list[Change] = []
        self._yielding = False
        self._was_told = True  # since the last tick
        self.num_silent = 0  # routers not heard for `lag_s`, at the last tick
        self.num_gaps = 0
        self.num_lost = 0

    @property
    def performers(self) -> dict[type, Callable[[Any, float], None]]:
        """What answers each of our events."""
        return {
            PeerUp: self.up,
            PeerDown: self.down,
            PeerHungUp: lambda event, now: self.hung_up(event),
            FromPeer: self.receive,
            BatchDue: lambda event, now: self.batch_due(),
        }

    # --- who is there ---

    @property
    def num_routers(self) -> int:
        """With this one."""
        return 1 + len(self._peers)

    def take_membership(self, membership: Membership, now: float) -> None:
        named = [s.name for s in membership.services if s.kind == "router" and s.name != self._name]
        for gone in [name for name, peer in self._peers.items() if name not in named and peer.epoch is None]:
            del self._peers[gone]
        for name in named:
            self._peers.setdefault(name, _Peer(heard_s=now))

    def up(self, event: PeerUp, now: float) -> None:
        peer = self._peers.setdefault(event.peer, _Peer(heard_s=now))
        peer.epoch, peer.next_number, peer.asked_s = event.epoch, None, None
        self._ask(event.peer, peer, now)

    def down(self, event: PeerDown, now: float) -> None:
        peer = self._peers.get(event.peer)
        if peer is None or peer.epoch != event.epoch:
            return
        peer.epoch = peer.next_number = peer.asked_s = None
        self._lost[event.peer, event.epoch] = now + self._config.gateway_grace_s
        self.num_lost += 1

    def hung_up(self, event: PeerHungUp) -> None:
        self._listeners.pop(event.peer, None)

    # --- what a peer says ---

    def receive(self, event: FromPeer, now: float) -> None:
        message = event.message
        if isinstance(message, AskBookings):
            self._flush(self._listeners)
            self._listeners[event.peer] = None
            self._say(ToPeers(peers=(event.peer,), message=self._set(now)))
            return
        peer = self._peers.get(event.peer)
        if peer is None or peer.epoch != event.epoch:
            return
        if isinstance(message, BookingSet):
            self._take_set(event, peer, message, now)
        elif peer.next_number is not None and message.number == peer.next_number:
            peer.next_number += 1
            peer.heard_s = now
            for change in message.changes:
                self._apply(event, change, now)
        elif peer.next_number is None or message.number > peer.next_number:
            self.num_gaps += peer.asked_s is None
            self._ask(event.peer, peer, now)

    def _take_set(self, event: FromPeer, peer: _Peer, said: BookingSet, now: float) -> None:
        if peer.next_number is not None and said.next_number < peer.next_number:
            return
        peer.next_number, peer.asked_s, peer.heard_s = said.next_number, None, now
        self._lost.pop((event.peer, event.epoch), None)
        kept = {AttemptKey(request_id=made.request_id, attempt=made.attempt) for made in said.bookings}
        for booking in list(self._of(event.peer, event.epoch)):
            if booking.key not in kept:
                self.bookings.drop(booking.key)
        for made in said.bookings:
            self._apply(event, made, now)
        for over in said.ended:
            self._apply(event, Done(request_id=over.request_id, attempt=over.attempt, num_output_tokens=0), now)

    def _apply(self, event: FromPeer, change: Change, now: float) -> None:
        if isinstance(change, BookingMade):
            self._book(event, change, now)
        elif isinstance(change, Done):
            self._end(change, now)
        else:
            self._end_prefill(change, now)

    def _book(self, event: FromPeer, made: BookingMade, now: float) -> None:
        key = AttemptKey(request_id=made.request_id, attempt=made.attempt)
        if self._own.has_ended(key):
            return
        booked_s = now - made.age_s
        own = self._own.live_attempt(key.request_id)
        if own is not None:
            if (key.attempt, booked_s) <= (own.key.attempt, own.booked_s):
                return
            if own.key == key:
                self._yield(key)
            else:
                self._own.end(own.key)
        other = self.bookings.live_attempt(key.request_id)
        if other is not None:
            is_rival = other.key == key and other.router != event.peer
            if other.key.attempt > key.attempt or (is_rival and other.booked_s > booked_s):
                return
            self.bookings.drop(other.key)
        holds = _holds(key, made, now)
        self.bookings.add(
            PeerBooking(
                key=key,
                gateway=made.gateway,
                prefill_worker=made.prefill_worker,
                booked_s=booked_s,
                holds=holds,
                router=event.peer,
                epoch=event.epoch,
            )
        )
        self._fleet.note_chosen(*[w for hold in holds.values() if (w := self._fleet.get(hold.worker_id)) is not None])
        if made.block_hashes:
            self._index.speculate(made.prefill_worker, made.block_hashes, now)

    def _yield(self, key: AttemptKey) -> None:
        """Our booking of an attempt that goes on through another router."""
        self._yielding = True
        self._own.drop(key)
        self._yielding = False

    def _end_prefill(self, said: PrefillDone, now: float) -> None:
        if not self._on_prefill_done(said, now):
            self.bookings.end_prefill(AttemptKey(request_id=said.request_id, attempt=said.attempt), said.decode_worker, now)

    def _end(self, said: Done, now: float) -> None:
        self._on_done(said, now)
        self.bookings.drop(AttemptKey(request_id=said.request_id, attempt=said.attempt))

    # --- what happens here ---

    def made(self, booking: Booking, now: float) -> None:
        """We booked this, or booked it anew."""
        if self._listeners:
            is_new = booking.num_moves == 0
            self._tell(_told(booking, now, booking.place.block_hashes[: self._config.peer_max_blocks] if is_new else ()))

    def forget(self, request_id: str) -> None:
        """A gateway asks here for a request that another router has placed before."""
        booked = self.bookings.live_attempt(request_id)
        if booked is not None:
            self.bookings.drop(booked.key)

    def prefilled(self, booking: Booking) -> None:
        """Prefill of our own booking is over."""
        key, decode_worker = booking.key, booking.assignment.decode_worker
        self._tell(PrefillDone(request_id=key.request_id, attempt=key.attempt, decode_worker=decode_worker))

    def over(self, booking: Booking) -> None:
        """Our own booking is over."""
        if not self._yielding:
            self._tell(Done(request_id=booking.key.request_id, attempt=booking.key.attempt, num_output_tokens=0))

    def pass_on(self, said: PrefillDone | Done, now: float) -> None:
        """A gateway said this of a booking that is not ours."""
        key = AttemptKey(request_id=said.request_id, attempt=said.attempt)
        if isinstance(said, Done):
            self.bookings.drop(key)
        else:
            self.bookings.end_prefill(key, said.decode_worker, now)
        self._tell(said)

    def worker_joined(self, worker: Worker) -> None:
        self.bookings.stand_on(worker)
        worker.scale_bookings(self.booking_scale)

    # --- telling ---

    def batch_due(self) -> None:
        if self._news:
            self._flush(self._listeners)

    def _tell(self, change: Change) -> None:
        if not self._listeners:
            return
        self._news.append(change)
        if len(self._news) >= self._config.peer_batch_size:
            self._flush(self._listeners)
        elif len(self._news) == 1:
            self._say(BatchBegun(within_s=self._config.peer_batch_s))

    def _flush(self, listeners: dict[str, None]) -> None:
        """Also where there is no news: a sign of life."""
        if not listeners:
            self._news = []
            return
        news = BookingNews(number=self._next_number, changes=tuple(self._news))
        self._next_number += 1
        self._news = []
        self._was_told = True
        self._say(ToPeers(peers=tuple(listeners), message=news))

    def _set(self, now: float) -> BookingSet:
        return BookingSet(
            next_number=self._next_number,
            bookings=tuple(_told(booking, now, ()) for booking in self._own),
            ended=tuple(AttemptOver(request_id=k.request_id, attempt=k.attempt) for k in islice(self._own.ended, MAX_ENDED_TOLD)),
        )

    def _ask(self, name: str, peer: _Peer, now: float) -> None:
        if peer.asked_s is not None and now - peer.asked_s < self._config.resync_interval_s:
            return
        peer.asked_s = now
        self._say(ToPeers(peers=(name,), message=AskBookings()))

    # --- time ---

    def tick(self, now: float) -> int:
        """Ask again, give signs of life, end what lost routers left; returns how many bookings were too old."""
        if not self._was_told:
            self._flush(self._listeners)
        self._was_told = False
        for name, peer in self._peers.items():
            if peer.epoch is None:
                continue
            if peer.asked_s is not None:
                self._ask(name, peer, now)
            elif now - peer.heard_s > self._config.gateway_grace_s:  # it hangs: as good as lost
                self._lost[name, peer.epoch] = now
                peer.next_number = None
                self._ask(name, peer, now)
        for lost in [lost for lost, until_s in self._lost.items() if until_s <= now]:
            del self._lost[lost]
            for booking in list(self._of(*lost)):
                self.bookings.drop(booking.key)
        overdue = self.bookings.overdue(now)
        for key in overdue:
            self.bookings.drop(key)
        self.num_silent = sum(now - peer.heard_s > self._config.lag_s for peer in self._peers.values())
        for worker in self._fleet:
            worker.scale_bookings(self.booking_scale)
        return len(overdue)

    # --- how well we know ---

    @property
    def booking_scale(self) -> float:
        """All routers for each one that is heard: how much more was given out than is known here (router replicas out of step)."""
        return self.num_routers / (self.num_routers - self.num_silent)

    def missing(self) -> list[str]:
        """Routers of the directory whose full set has not come."""
        return [name for name, peer in self._peers.items() if peer.next_number is None]

    def behind(self, now: float) -> list[str]:
        """Routers that are there and whose news we could not follow for `lag_s`."""
        lag_s = self._config.lag_s
        return [
            name
            for name, peer in self._peers.items()
            if peer.epoch is not None and peer.asked_s is not None and peer.next_number is not None and now - peer.heard_s > lag_s
        ]

    def status(self, now: float) -> list[dict[str, object]]:
        """One row for each other router."""
        return [
            {
                "router": name,
                "linked": peer.epoch is not None,
                "in_step": peer.next_number is not None and peer.asked_s is None,
                "heard_s": round(now - peer.heard_s, 4),
                "bookings": sum(b.router == name for b in self.bookings),
            }
            for name, peer in self._peers.items()
        ]

    def _of(self, router: str, epoch: int) -> Iterator[PeerBooking]:
        return (b for b in self.bookings if b.router == router and b.epoch == epoch)


def _told(booking: Booking, now: float, block_hashes: tuple[bytes, ...]) -> BookingMade:
    prefill, decode = booking.holds.get(Phase.PREFILL), booking.holds.get(Phase.DECODE)
    return BookingMade(
        request_id=booking.key.request_id,
        attempt=booking.key.attempt,
        gateway=booking.gateway,
        prefill_worker=booking.assignment.prefill_worker,
        decode_worker=booking.assignment.decode_worker if decode is None else decode.worker_id,
        prefill_tokens=0 if prefill is None else prefill.prefill_tokens,
        prefill_pairs=0 if prefill is None else prefill.prefill_pairs,
        num_sequences=0 if decode is None else decode.num_sequences,
        kv_tokens=0 if decode is None else decode.kv_tokens,
        output_tokens=0 if decode is None else decode.output_tokens,
        lands_in_s=0.0 if decode is None else decode.lands_s - now,
        is_prefilled=booking.is_prefilled,
        age_s=now - booking.booked_s,
        block_hashes=block_hashes,
    )


def _holds(key: AttemptKey, made: BookingMade, now: float) -> dict[Phase, Hold]:
    decode = Hold(
        key=key,
        phase=Phase.DECODE,
        worker_id=made.decode_worker,
        num_sequences=made.num_sequences,
        kv_tokens=made.kv_tokens,
        output_tokens=made.output_tokens,
        lands_s=now + made.lands_in_s,
    )
    if made.is_prefilled:
        return {Phase.DECODE: decode}
    prefill = Hold(
        key=key,
        phase=Phase.PREFILL,
        worker_id=made.prefill_worker,
        prefill_tokens=made.prefill_tokens,
        prefill_pairs=made.prefill_pairs,
    )
    return {Phase.PREFILL: prefill, Phase.DECODE: decode}
