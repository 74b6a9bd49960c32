"""Requests that have no worker yet: in the fair queue of their model while every worker is full, stranded while there is none at all.

admit ──► placed at once                       nobody waits before it, and a worker has room
     ├──► queue (fair)      ──► placed         tried again when something ends, reports, or time passes
     └──► stranded          ──► queue, first   when a worker it fits is ready
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from protocol.messages import Refused
from protocol.request import AttemptKey
from router import admission
from router.choice import Blocked, Choice
from router.config import RouterConfig
from router.fleet import Fleet
from router.placement import Placement
from router.queue import FairQueue, Waiting


class WaitingRoom:
    """Whoever waited and is placed goes to `on_choice(waiting, choice, predicted_output_tokens, now)`, which books it in that turn."""

    def __init__(
        self, config: RouterConfig, *, fleet: Fleet, placement: Placement, on_choice: Callable[[Waiting, Choice, int, float], None]
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._placement = placement
        self._on_choice = on_choice
        self._by_request: dict[str, Waiting] = {}  # one attempt of a request waits at most
        self.queues: dict[str, FairQueue] = {}
        self.stranded: OrderedDict[AttemptKey, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_request)

    def get(self, request_id: str) -> Waiting | None:
        return self._by_request.get(request_id)

    def of_gateway(self, gateway: str) -> list[Waiting]:
        return [w for w in self._by_request.values() if w.gateway == gateway]

    def admit(self, waiting: Waiting, now: float) -> tuple[Choice, int] | None:
        """Let it wait its turn, or say where it goes at once, with its predicted output: for the caller to book."""
        place = waiting.place
        if not self._fleet.pools(place.model_id).all:
            self._strand(waiting)
            return None
        queue = self._queue(place.model_id)
        if len(queue):
            self._push(queue, waiting)
            self.pump(place.model_id, now)
            return None
        choice = self._placement.choose(place, now, predicted_output_tokens=queue.predicted_output_tokens(place))
        if isinstance(choice, Choice):
            return choice, queue.serve_at_once(place)
        if choice is Blocked.NOBODY:
            self._strand(waiting)
        else:
            self._push(queue, waiting)
        return None

    def leave(self, key: AttemptKey) -> bool:
        """Whoever waits under this key waits no longer; False when nobody does."""
        waiting = self._by_request.get(key.request_id)
        if waiting is None or waiting.key != key:
            return False
        del self._by_request[key.request_id]
        if self.stranded.pop(key, None) is None:
            self.queues[waiting.place.model_id].remove(key)
        return True

    def worker_is_ready(self, model_id: str, now: float) -> None:
        """Those it fits that had no worker at all come first, in their old order."""
        for waiting in [w for w in reversed(self.stranded.values()) if w.place.model_id == model_id]:
            if self._fleet.pools(model_id).fit_for(waiting.place.num_tokens + 1, waiting.place.excluded).all:
                del self.stranded[waiting.key]
                self._queue(model_id).push(waiting, first=True)
        self.pump(model_id, now)

    def pump(self, model_id: str, now: float) -> None:
        """Place who is next until nobody can be placed."""
        queue = self.queues.get(model_id)
        while queue is not None and len(queue):
            if not self._place_one(queue, now):
                return

    def pump_all(self, now: float) -> None:
        for model_id in list(self.queues):
            self.pump(model_id, now)

    def refuse_overdue(self, now: float) -> Iterator[tuple[Waiting, Refused]]:
        """Those who waited too long leave, each with what it is told."""
        for model_id, queue in self.queues.items():
            for waiting in [w for w in queue if now - w.since_s >= self._config.max_wait_s]:
                self.leave(waiting.key)
                drain_s = admission.drain_s(queue.num_tokens, self._fleet.pools(model_id))
                yield waiting, admission.refusal_after_wait(waiting.place, now - waiting.since_s, drain_s)
        for waiting in [w for w in self.stranded.values() if now - w.since_s >= self._config.no_worker_wait_s]:
            self.leave(waiting.key)
            yield waiting, admission.refusal_without_worker(waiting.place, now - waiting.since_s)

    def check(self) -> None:
        """Assert that everybody who waits is found under its request, and nobody else."""
        waiting = {w.key for queue in self.queues.values() for w in queue} | self.stranded.keys()
        assert waiting == {w.key for w in self._by_request.values()}, "queue and its index by request differ"

    def _place_one(self, queue: FairQueue, now: float) -> bool:
        """Place or strand the next request. One that avoids some workers does not hold up those that need not."""
        for waiting in queue.heads():
            place = waiting.place
            choice = self._placement.choose(place, now, predicted_output_tokens=queue.predicted_output_tokens(place))
            if choice is Blocked.NOBODY:
                queue.remove(waiting.key)
                self.stranded[waiting.key] = waiting
                return True
            if isinstance(choice, Choice):
                predicted = queue.serve(waiting.key)
                del self._by_request[place.request_id]
                self._on_choice(waiting, choice, predicted, now)
                return True
            if not (place.excluded or place.local_only):
                return False
        return False

    def _strand(self, waiting: Waiting) -> None:
        self._by_request[waiting.key.request_id] = self.stranded[waiting.key] = waiting

    def _push(self, queue: FairQueue, waiting: Waiting) -> None:
        self._by_request[waiting.key.request_id] = waiting
        queue.push(waiting)

    def _queue(self, model_id: str) -> FairQueue:
        if model_id not in self.queues:
            self.queues[model_id] = FairQueue(output_weight=self._config.output_weight, max_tenants=self._config.max_tenants)
        return self.queues[model_id]
