"""Another decode worker for a request whose prompt is still being computed elsewhere, where the one that was booked will not do.

    decode worker lost                             ──► all its requests that are under way move
    it reports: not ready any more (it drains)     ──► the same
    it reports: booked beyond its KV pool          ──► the oldest move, as long as it is and another has room
    it reports: predicted time per token breaks    ──► they move to one where it does not
                the objective of a request

The hand-off waits for none of this: the gateway is told, follows unless its Submit to the first worker is out, and says in PrefillDone
who really decodes, which is where the hold then stands (`Bookings.end_prefill`). Work is bounded: `MAX_MOVES` of one booking,
`MAX_RECHECKS` requests looked at for one report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from protocol.request import AttemptKey
from protocol.worker import WorkerState
from router.bookings import Booking, Bookings
from router.fleet import Fleet, Worker
from router.holds import Hold, Phase
from router.placement import Placement

MAX_RECHECKS = 32
MAX_MOVES = 3


class Reassignments:
    """Watches the decode holds of bookings whose prefill is under way on another worker."""

    def __init__(
        self, *, fleet: Fleet, bookings: Bookings[Booking], placement: Placement, on_moved: Callable[[Booking, float], None]
    ) -> None:
        """on_moved(booking, now): the booking's hold and its assignment name another decode worker now; its reason says why."""
        self._fleet = fleet
        self._bookings = bookings
        self._placement = placement
        self._on_moved = on_moved
        self._orphans: OrderedDict[AttemptKey, Hold] = OrderedDict()  # what a lost worker held; no other was found yet

    def recheck(self, worker: Worker, now: float) -> None:
        """After a report of `worker`: are the requests that will come to it still in good hands?"""
        for hold in worker.pending_holds(MAX_RECHECKS):
            booking = self._bookings.get(hold.key)
            if booking is None or booking.num_moves >= MAX_MOVES:  # None: another router booked it, which looks at it itself
                continue
            worker.refresh(now)
            trouble = _trouble(worker, booking)
            leaves = worker.state is not WorkerState.READY
            if trouble is not None and not self._move(booking, hold, trouble, now, leaves=leaves) and (leaves or _is_overbooked(worker)):
                return  # nobody has room for the others either; the next report asks again

    def lost(self, orphans: list[Hold], now: float) -> None:
        """A worker left the fleet, and with it these decode holds of bookings that live on."""
        for hold in orphans:
            self._orphans[hold.key] = hold
        self.tick(now)

    def tick(self, now: float) -> None:
        """Try again for those whose decode worker was lost."""
        for key in list(self._orphans)[:MAX_RECHECKS]:
            hold, booking = self._orphans.pop(key), self._bookings.get(key)
            if booking is None or Phase.DECODE in booking.holds or Phase.PREFILL not in booking.holds:
                continue
            if booking.num_moves < MAX_MOVES and not self._move(booking, hold, f"{hold.worker_id} was lost", now, leaves=True):
                self._orphans[key] = hold

    def _move(self, booking: Booking, hold: Hold, trouble: str, now: float, *, leaves: bool) -> bool:
        """`leaves`: nothing can be decoded where it is booked, so any worker with room is better."""
        before = (booking.assignment.prefill_worker, hold.worker_id)

        def suits(worker: Worker) -> bool:
            return worker.worker_id not in before and (leaves or not _breaks_slo(worker, booking, hold, is_there=False))

        ranking = self._placement.another_decoder(
            booking.place, hold, now, predicted_output_tokens=booking.predicted_output_tokens, suits=suits
        )
        if ranking is None:
            return False
        decode = ranking.best.worker_id
        self._bookings.move_decode(booking, replace(hold, worker_id=decode), now)
        booking.num_moves += 1
        booking.assignment = replace(
            booking.assignment,
            decode_worker=decode,
            decode_scores=ranking.scores(),
            reason=f"{booking.assignment.reason}; decodes on {decode} instead of {hold.worker_id} ({trouble})",
        )
        self._on_moved(booking, now)
        return True


def _trouble(worker: Worker, booking: Booking) -> str | None:
    """Why `worker`, whose sheet is fresh, should not decode what it holds for `booking`; None: it may."""
    if worker.state is not WorkerState.READY:
        return f"{worker.worker_id} is {worker.state.value}"
    if _is_overbooked(worker):
        return f"{worker.worker_id} is booked for {worker.held_kv_tokens:,} of {worker.kv_capacity_tokens:,} KV tokens"
    hold = booking.holds[Phase.DECODE]
    if _breaks_slo(worker, booking, hold, is_there=True):
        return f"{worker.worker_id} would take longer a token than the objective, {booking.place.slo_tpot_s:g} s"
    return None


def _is_overbooked(worker: Worker) -> bool:
    return worker.held_kv_tokens > worker.kv_capacity_tokens


def _breaks_slo(worker: Worker, booking: Booking, hold: Hold, *, is_there: bool) -> bool:
    """Is the request's time per token there predicted above its objective? `is_there`: the load of `worker` includes it."""
    slo_tpot_s = booking.place.slo_tpot_s
    if slo_tpot_s is None or not worker.is_predictable:
        return False
    sequences, kv_tokens = (0, 0) if is_there else (hold.num_sequences, hold.kv_tokens)
    return worker.model.fitted.decode_step_s(worker.num_sequences + sequences, worker.kv_tokens + kv_tokens) > slo_tpot_s
