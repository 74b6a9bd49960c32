"""Whether this router knows enough to place well: gateways go to routers that do, and to others only where there is none.

    starting ──► membership ──► every worker of it heard, every router's bookings known ──► ready ◄──► lagging
                                └─ or `ready_wait_s` is over: who does not answer then does not hold us up ─┘

A router whose belief is old still answers; it would send work where it was wanted a second ago.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.peering import RouterReadiness
from protocol.worker import WorkerId
from router.config import RouterConfig
from router.events import Command, ToGateway
from router.fleet import Fleet
from router.peers import Peers
from router.prefix_index import PrefixIndex
from router.worker_reports import WorkerReports

NUM_NAMED = 3  # of those a reason lists
NO_DIRECTORY = "has not heard from the directory"


class Readiness:
    """Judged with each tick, and with each event while not ready; gateways are told when they connect and of each change."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        fleet: Fleet,
        index: PrefixIndex,
        reports: WorkerReports,
        peers: Peers,
        say: Callable[[Command], None],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._index = index
        self._reports = reports
        self._peers = peers
        self._say = say
        self._gateways: dict[str, None] = {}
        self._began_s: float | None = None  # the first membership came
        self._has_begun = False  # what was there at the start is known, or was waited for
        self._turned_s: float | None = None  # the last tick, or the first membership
        self._stood_still_s = 0.0  # before the last tick
        self._unlinked_s: dict[WorkerId, float] = {}  # worker of the directory -> without a link since
        self.reason = NO_DIRECTORY
        self.num_lags = 0

    @property
    def is_ready(self) -> bool:
        return not self.reason

    def tell(self, gateway: str) -> None:
        """It is connected: say how we are, now and on every change."""
        self._gateways[gateway] = None
        self._say(self._word(gateway))

    def forget(self, gateway: str) -> None:
        self._gateways.pop(gateway, None)

    def take_membership(self, now: float) -> None:
        if self._began_s is None:
            self._began_s = self._turned_s = now

    def tick(self, now: float) -> None:
        self._stood_still_s = now - self._turned_s if self._turned_s is not None else 0.0
        self._turned_s = now
        known = self._fleet.known
        unlinked = [w for w in known if self._fleet.get(w) is None]
        self._unlinked_s = {w: self._unlinked_s.get(w, now) for w in unlinked}

    def judge(self, now: float) -> None:
        """Find the reason not to be ready, if any, and say so where it begins or ends."""
        was_ready = self.is_ready
        self.reason = self._reason(now)
        if self.is_ready == was_ready:
            return
        self.num_lags += was_ready
        for gateway in self._gateways:
            self._say(self._word(gateway))

    def _word(self, gateway: str) -> ToGateway:
        return ToGateway(gateway=gateway, message=RouterReadiness(is_ready=self.is_ready, reason=self.reason))

    def _reason(self, now: float) -> str:
        if self._began_s is None:
            return NO_DIRECTORY
        if not self._has_begun:
            waited_s = now - self._began_s
            reason = self._unheard()
            if reason and waited_s < self._config.ready_wait_s:
                return reason
            self._has_begun = True
        return self._lag(now)

    def _unheard(self) -> str:
        workers = [w for w in self._fleet.known if not self._has_heard(w)]
        if workers:
            return f"starting: has not heard from {_names(workers)}"
        routers = self._peers.missing()
        return f"starting: does not know the bookings of {_names(routers)}" if routers else ""

    def _has_heard(self, worker_id: WorkerId) -> bool:
        worker = self._fleet.get(worker_id)
        return worker is not None and worker.snapshot is not None and self._index.has_heard(worker_id)

    def _lag(self, now: float) -> str:
        lag_s = self._config.lag_s
        if self._stood_still_s > lag_s:
            return f"its event loop stood still for {self._stood_still_s:.1f} s, the limit is {lag_s:g} s"
        old = [w.worker_id for w in self._fleet if w.snapshot is not None and now - w.read_at_s > lag_s]
        cut_off = [w for w, since_s in self._unlinked_s.items() if now - since_s > lag_s]
        if 2 * len(old + cut_off) > max(len(self._fleet.known), 1):
            return f"knows nothing newer than {lag_s:g} s of most workers: {_names(old + cut_off)}"
        num_missed, limit = self._reports.num_missed_events, self._config.max_missed_events
        if num_missed > limit:
            return f"waits for {num_missed} KV events of workers, the limit is {limit}"
        behind = self._peers.behind(now)
        if behind:
            return f"could not follow the bookings of {_names(behind)} for {lag_s:g} s"
        num_others = self._peers.num_routers - 1
        if num_others > 1 and 2 * self._peers.num_silent > num_others:  # of one other, the silence is its own
            return f"has heard nothing from {self._peers.num_silent} of {num_others} other routers for {lag_s:g} s"
        return ""


def _names(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
