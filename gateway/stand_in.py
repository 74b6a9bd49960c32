"""What a gateway places in the router's stead while that does not answer, and remembers of it: the router never hears where it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gateway.placement import POLICY_NAME, least_work
from protocol.messages import Assignment, Done, Place, PrefillDone
from protocol.request import AttemptKey
from protocol.worker import WorkerSnapshot
from router.explanations import Explanations


class StandIn:
    """The newest `max_count` placements of its own are in `explanations`."""

    def __init__(self, *, max_count: int) -> None:
        self.explanations = Explanations(max_count=max_count)

    def place(self, place: Place, snapshots: Sequence[WorkerSnapshot], booked_tokens: Mapping[str, int], now: float) -> Assignment | None:
        """By least_work over the last snapshots; None: nobody ready can decode."""
        assignment = least_work(place, snapshots, booked_tokens)
        if assignment is not None:
            self.explanations.placed(place, assignment, now)
        return assignment

    def hear(self, message: PrefillDone | Done, placed: Assignment | None, now: float) -> PrefillDone | Done:
        """What the router is to be told of an attempt: not what was found where it did not send it. `placed`: the newest assignment."""
        if isinstance(message, Done):
            self.explanations.ended(message, now)
        elif placed is not None and placed.policy == POLICY_NAME:
            key = AttemptKey(request_id=message.request_id, attempt=message.attempt)
            self.explanations.first_token(key, now, found_tokens=message.num_cached_tokens)
            return replace(message, num_cached_tokens=None)
        return message
