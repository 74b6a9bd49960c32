"""The simulator's driver of the gateway's sessions: what gateway/service.py does live, on the virtual clock, without HTTP and text.

Sessions, links to workers and routers, and the stand-in for a router that does not answer are the gateway's own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.config import GatewayConfig
from gateway.events import (
    Abandon,
    AttemptEnded,
    CancelAt,
    ClientGone,
    Command,
    CompleteAt,
    Deliver,
    End,
    Event,
    Fail,
    Finish,
    NoPlace,
    PlaceWithoutRouter,
    RouterAway,
    RouterLost,
    RouterUp,
    SendPlace,
    Start,
    SubmitTo,
    TellRouter,
    Tick,
    WorkerLost,
    WorkerSaid,
)
from gateway.routers import Routers
from gateway.session import Session
from gateway.stand_in import StandIn
from gateway.workers import Workers
from protocol.lifecycle import AttemptState
from protocol.messages import Assigned, Membership, Offered, Place, PlaceAck, Reassigned, Refused
from protocol.request import Request
from protocol.wire import Identity
from simulator.loop import VirtualLoop
from simulator.sim_network import SimNetwork


@dataclass(slots=True, kw_only=True)
class Served:
    """One request and what came of it; times on the virtual clock, in seconds. None: it did not come to that."""

    request_id: str
    arrived_s: float
    num_prompt_tokens: int
    first_token_s: float | None = None
    end_s: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, as the first worker found it: what its user is told
    prefill_worker: str = ""  # of the last attempt that found its place, as is the decode worker
    decode_worker: str = ""
    num_attempts: int = 0
    terminal: str = ""  # "finished" | "failed" | "refused" | "cancelled" by its user
    reason: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None where there is one at most."""
        if self.first_token_s is None or self.end_s is None or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.num_output_tokens - 1)


class LiveRequest:
    """A session, and when it is next told of the time."""

    __slots__ = ("served", "session", "state", "wake_s")

    def __init__(self, session: Session, served: Served) -> None:
        self.session = session
        self.served = served
        self.state: AttemptState | None = None  # the final one of its last attempt
        self.wake_s = float("inf")


class RoutedGateway:
    """One gateway. Call `tick` every GatewayConfig.tick_s, as the live one is.

    max_tokens: what clients are taken to allow, so that nobody who places sees how long an answer will be; None: they know, and say it.
    """

    def __init__(self, loop: VirtualLoop, network: SimNetwork, config: GatewayConfig, *, name: str, max_tokens: int | None = None) -> None:
        self.identity = Identity(name=name, kind="gateway", epoch=1)
        self.served: dict[str, Served] = {}
        self.live: dict[str, LiveRequest] = {}  # those that are not over
        self.num_over = 0
        self.num_placed_alone = 0  # attempts that no router answered for
        # Checkers look here.
        self.on_event: Callable[[Session, Event], None] | None = None  # what happened, before the session is told
        self.on_deliver: Callable[[Session, Deliver], None] | None = None
        self.on_attempt_ended: Callable[[Session, AttemptEnded], None] | None = None
        self.on_end: Callable[[Session], None] | None = None
        self._loop = loop
        self._config = config
        self._max_tokens = max_tokens
        self._inbox: deque[tuple[LiveRequest, Event]] = deque()
        self._is_busy = False
        self._wakes: list[tuple[float, int, LiveRequest]] = []  # a heap
        self._num_wakes = 0
        self.workers = Workers(
            self.identity, b"", config, clock=lambda: loop.now, on_fact=self._on_fact, on_lost=self._on_worker_lost, links=network.links
        )
        self.routers = Routers(
            self.identity,
            b"",
            silent_s=config.router_silent_s,
            on_up=self._on_router_up,
            on_lost=self._on_router_lost,
            on_message=self._on_router_message,
            links=network.links,
        )
        self._stand_in = StandIn(max_count=config.num_explained)

    def follow(self, membership: Membership) -> None:
        self.workers.follow(membership)
        self.routers.follow(membership)

    def submit(self, request: Request) -> None:
        """Accept it now, whatever its arrival_s says: from here on it has exactly one end."""
        now, request_id = self._loop.now, request.request_id
        served = self.served[request_id] = Served(request_id=request_id, arrived_s=now, num_prompt_tokens=request.num_prompt_tokens)
        live = self.live[request_id] = LiveRequest(Session(replace(request, arrival_s=now), self._config), served)
        self._post(live, Start())

    def cancel(self, request_id: str) -> None:
        """Its client is gone; nothing happens when it is over."""
        live = self.live.get(request_id)
        if live is not None:
            self._post(live, ClientGone())

    def tick(self) -> None:
        now, wakes = self._loop.now, self._wakes
        self.workers.tick(now)
        self.routers.tick(now)
        due: list[LiveRequest] = []
        while wakes and wakes[0][0] <= now:
            live = heapq.heappop(wakes)[2]
            live.wake_s = float("inf")
            if live.session.end is None:
                due.append(live)
        for live in due:
            if live.session.wake_s <= now:
                self._post(live, Tick())
            else:
                self._set_wake(live)

    # --- the loop, as the live one's ---

    def _post(self, live: LiveRequest, event: Event) -> None:
        self._inbox.append((live, event))
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._inbox:
                self._turn(*self._inbox.popleft())
        finally:
            self._is_busy = False

    def _turn(self, live: LiveRequest, event: Event) -> None:
        session = live.session
        if self.on_event is not None:
            self.on_event(session, event)
        commands = session.on(event, self._loop.now)
        is_tokens_only = bool(commands)
        for command in commands:
            if isinstance(command, Deliver):
                self._deliver(live, command)
            else:
                is_tokens_only = False
                self._perform(live, command)
        if not is_tokens_only:  # tokens move no deadline
            self._set_wake(live)

    def _set_wake(self, live: LiveRequest) -> None:
        wake_s = live.session.wake_s
        if wake_s < live.wake_s:
            live.wake_s = wake_s
            self._num_wakes += 1
            heapq.heappush(self._wakes, (wake_s, self._num_wakes, live))

    def _deliver(self, live: LiveRequest, deliver: Deliver) -> None:
        if live.served.first_token_s is None and deliver.token_ids:
            live.served.first_token_s = self._loop.now
        if self.on_deliver is not None:
            self.on_deliver(live.session, deliver)

    def _perform(self, live: LiveRequest, command: Command) -> None:
        match command:
            case SubmitTo(worker_id=worker_id, submit=submit, prefix_source=source):
                pull = self.workers.prefix_pull(source) if source is not None else None
                self.workers.send(worker_id, submit if pull is None else replace(submit, prefix_pull=pull))
            case TellRouter(message=message):
                session = live.session
                placed = session.assignments[-1] if session.assignments else None
                self.routers.tell(self._stand_in.hear(message, placed, self._loop.now))
            case SendPlace(place=place):
                if self.routers.place(self._as_told(live, place)) is None:
                    self._post(live, RouterAway())
            case PlaceWithoutRouter(place=place) if self.routers.can_ask_another(place.request_id):
                self._post(live, RouterUp())
            case PlaceWithoutRouter(place=place):
                now = self._loop.now
                assignment = self._stand_in.place(self._as_told(live, place), self.workers.reachable(now), self._booked_tokens(), now)
                self.num_placed_alone += assignment is not None
                self._post(live, NoPlace() if assignment is None else Assigned(assignment=assignment))
            case CompleteAt(worker_id=worker_id, completed=completed):
                self.workers.send(worker_id, completed)
            case CancelAt(worker_id=worker_id, cancel=cancel):
                self.workers.send(worker_id, cancel)
            case AttemptEnded():
                live.state = command.state
                if self.on_attempt_ended is not None:
                    self.on_attempt_ended(live.session, command)
            case Finish() | Fail() | Abandon():
                self._end(live, command)

    def _as_told(self, live: LiveRequest, place: Place) -> Place:
        if self._max_tokens is None:
            return place
        delivered = live.session.request.sampling.max_tokens - place.expected_output_tokens
        return replace(place, expected_output_tokens=max(1, self._max_tokens - delivered))

    def _end(self, live: LiveRequest, end: End) -> None:
        session, served = live.session, live.served
        assert self.live.pop(served.request_id, None) is live, f"{served.request_id} ends twice"
        self.num_over += 1
        served.end_s = self._loop.now
        served.num_output_tokens = session.num_output_tokens
        served.num_cached_tokens = session.num_cached_tokens
        served.num_attempts = session.attempt.number + 1
        if session.assignments:
            served.prefill_worker, served.decode_worker = session.assignments[-1].prefill_worker, session.assignments[-1].decode_worker
        if isinstance(end, Fail):
            served.terminal = "refused" if live.state is AttemptState.REJECTED else "failed"
            served.reason = str(end.error)
        else:
            served.terminal = "finished" if isinstance(end, Finish) else "cancelled"
        if self.on_end is not None:
            self.on_end(session)

    # --- what others say ---

    def _on_fact(self, said: WorkerSaid) -> None:
        fact = said.fact
        live = self.live.get(fact.handoff.request_id if isinstance(fact, Offered) else fact.request_id)
        if live is not None:
            self._post(live, said)

    def _on_worker_lost(self, worker_id: str) -> None:
        for live in [x for x in self.live.values() if worker_id in x.session.workers]:
            self._post(live, WorkerLost(worker_id=worker_id))

    def _on_router_up(self) -> None:
        for live in [x for x in self.live.values() if x.session.state is AttemptState.QUEUED]:
            self._post(live, RouterUp())

    def _on_router_lost(self, request_ids: list[str]) -> None:
        for live in [self.live[x] for x in request_ids if x in self.live]:
            self._post(live, RouterUp() if self.routers.is_up else RouterLost())

    def _on_router_message(self, message: object) -> None:
        if isinstance(message, (PlaceAck, Refused, Reassigned)):
            live = self.live.get(message.request_id)
        elif isinstance(message, Assigned):
            live = self.live.get(message.assignment.request_id)
        else:
            return
        if live is not None:
            self._post(live, message)

    def _booked_tokens(self) -> dict[str, int]:
        booked: dict[str, int] = {}
        for live in self.live.values():
            session = live.session
            for worker_id in session.workers:
                booked[worker_id] = booked.get(worker_id, 0) + session.request.num_prompt_tokens + session.num_output_tokens
        return booked
