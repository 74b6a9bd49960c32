"""The live driver of the gateway: sockets and a clock around the sessions, one event loop, one tick.

    HTTP side ──open(), cancel()──►┐                        ┌──SendPlace, TellRouter──► router
    workers   ──StepOutput, ...───►│ inbox ─► Session.on() ─┤──SubmitTo, CancelAt─────► workers
    router    ──Assigned, ...─────►┘                        └──Deliver──► text ──► Feed ──► HTTP side

Performing a command may bring an event at once (a worker that cannot be reached), so events go through one inbox and a session
is never entered twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.config import GatewayConfig
from gateway.dialect.sampling import ModelLimits
from gateway.events import (
    Abandon,
    Abort,
    AttemptEnded,
    CancelAt,
    ChoiceStopped,
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
from gateway.explain import explain_document, log_attempt, request_id_of
from gateway.live import ClientLeft, Feed, LiveRequest
from gateway.metrics import Metrics
from gateway.model import load_served_model
from gateway.routers import Routers
from gateway.salts import TenantSalts
from gateway.session import Session
from gateway.stand_in import StandIn
from gateway.status import status_document, worker_status
from gateway.text import ChoiceText
from gateway.tracing import RequestSpans
from gateway.workers import Workers
from protocol.errors import BatonError, NoWorker, Overloaded, ServiceError
from protocol.lifecycle import AttemptState
from protocol.links import MembershipWatch
from protocol.messages import (
    Assigned,
    Done,
    HandoffDone,
    Membership,
    Offered,
    PlaceAck,
    PrefillDone,
    Reassigned,
    Refused,
    RegisterService,
    ServiceAddress,
    TransferFailed,
)
from protocol.request import Request, SamplingParams, Slo
from protocol.wire import Identity
from router.explanations import answer

log = logging.getLogger("baton.gateway")

DRAIN_POLL_S = 0.02
NO_SLO = Slo()


class GatewayService:
    """Accepts requests, owns them to their end. Everything runs on the event loop that called `start`."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        model_dir: Path,
        directory_host: str,
        directory_port: int,
        secret: bytes,
        salt: bytes,
        epoch: int,
        name: str,
        seed: int | None = None,
        spans: RequestSpans | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secret` is the cluster's, `salt` (32 bytes) keys the prefix hashes and never leaves the gateways.

        seed: of requests that bring none, in order of arrival; None: each is drawn from the system.
        """
        self.config = config
        self.model = load_served_model(model_dir, config.served_model_names)
        self.identity = Identity(name=name, kind="gateway", epoch=epoch)
        self.clock = clock
        self._salts = TenantSalts(salt)
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        self._spans = spans  # None: no traces
        self._started = False
        self._draining = False
        self._busy = False  # the inbox is being worked off
        self._live: dict[str, LiveRequest] = {}
        self._inbox: deque[tuple[LiveRequest, Event]] = deque()
        self._ticker: asyncio.Task[None] | None = None
        self._membership = MembershipWatch(self.identity, secret, host=directory_host, port=directory_port, on_change=self._on_membership)
        self.workers = Workers(self.identity, secret, config, clock=clock, on_fact=self._on_fact, on_lost=self._on_worker_lost)
        self.routers = Routers(
            self.identity,
            secret,
            silent_s=config.router_silent_s,
            on_up=self._on_router_up,
            on_lost=self._on_router_lost,
            on_message=self._on_router_message,
        )
        self.stand_in = StandIn(max_count=config.num_explained)
        self.metrics = Metrics(
            self.model.name,
            snapshots=lambda: [r.snapshot for r in self.workers.rows.values() if r.snapshot is not None],
            gauges=self._gauges,
        )

    # --- life ---

    async def start(self) -> None:
        """Begin to follow the directory; once. Requests are refused with 503 until workers are there."""
        if self._started:
            return
        self._started = True
        address = ServiceAddress(name=self.identity.name, kind="gateway", epoch=self.identity.epoch, host="", port=0, pid=os.getpid())
        self._membership.register(RegisterService(service=address))
        self._membership.start()
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    def draw_seed(self) -> int:
        """64 bits, for a request that brings no seed."""
        return self._seeds.getrandbits(64)

    async def drain(self, deadline_s: float) -> None:
        """Accept nothing new; wait for what is there, then end the rest with 503."""
        self._draining = True
        until = self.clock() + deadline_s
        while self._live and self.clock() < until:
            await asyncio.sleep(DRAIN_POLL_S)
        error = NoWorker("the server is shutting down", retry_after_s=1.0)
        for live in list(self._live.values()):
            self._post(live, Abort(error=error))

    async def close(self) -> None:
        await self.drain(0.0)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.workers.close()
        await self.routers.close()
        await self._membership.close()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)

    # --- what the HTTP side uses ---

    def limits(self) -> ModelLimits:
        """
        Raises:
            NoWorker: no worker has ever been seen, so the model's length is not known.
        """
        return ModelLimits(
            max_model_len=self._max_model_len(),
            vocab_size=self.model.tokenizer.vocab_size,
            eos_token_ids=self.model.eos_token_ids,
            defaults=self.model.defaults,
        )

    async def encode(self, encode: Callable[[], array[int]], num_chars: int) -> array[int]:
        """Run a tokenizer call here, or in a thread when the text is long."""
        if num_chars <= self.config.encode_inline_chars:
            return encode()
        return await asyncio.to_thread(encode)

    def check_open(self) -> None:
        """
        Raises:
            NoWorker: the gateway is draining. Overloaded: max_live_requests are in progress.
        """
        if self._draining:
            raise NoWorker("the server is shutting down", retry_after_s=1.0)
        limit = self.config.max_live_requests
        if len(self._live) >= limit:
            raise Overloaded(f"{len(self._live)} requests are in progress, the limit of this gateway is {limit}", retry_after_s=1.0)

    def open(
        self,
        *,
        request_id: str,
        prompt_token_ids: array[int],
        sampling: SamplingParams,
        texts: Sequence[ChoiceText],
        feed: Feed,
        first_index: int,
        tenant: str,
        priority: int,
        cache_salt: str,
        session: str = "",
        slo: Slo = NO_SLO,
        known_as: tuple[str, ...] = (),
        traceparent: str = "",
    ) -> LiveRequest:
        """Accept a request: from here on it has exactly one end, told to `feed`.

        session: as the client names the conversation. known_as: other names to explain it by. traceparent: of the client's trace.
        """
        request = Request(
            request_id=request_id,
            model_id=self._model_id(),
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            cache_root=self._salts.cache_root(
                tenant,
                fingerprint=self._fingerprint(),
                tokenizer_revision=self.model.tokenizer.revision,
                cache_salt=cache_salt,
            ),
            arrival_s=self.clock(),
            tenant=tenant,
            priority=priority,
            session=self._salts.session(tenant, session),
            slo=slo,
        )
        live = LiveRequest(Session(request, self.config, known_as=known_as), texts, feed, first_index=first_index)
        self._live[request_id] = live
        if self._spans is not None:
            self._spans.begin(live.session, traceparent)
        self._post(live, Start())
        return live

    def cancel(self, live: LiveRequest) -> None:
        """The client is gone; nothing happens when the request is already over."""
        self._post(live, ClientGone())

    @property
    def num_live(self) -> int:
        """Requests accepted and not over."""
        return len(self._live)

    @property
    def reasons_not_ready(self) -> list[str]:
        """Empty when a request sent now can be expected to be answered."""
        if self._draining:
            return ["the gateway is draining"]
        return self.workers.why_not_ready(self.clock())

    @property
    def system_fingerprint(self) -> str:
        fingerprint = self._fingerprint()
        return f"fp_{fingerprint.hex()[:12]}" if fingerprint else "fp_none"

    async def status(self, tenant: str | None) -> dict[str, object]:
        """The document of `GET /status`. `tenant`: for its eyes; None: for everybody's."""
        replies, now, membership = await self.routers.statuses(), self.clock(), self._membership.latest
        return status_document(
            identity=self.identity,
            pid=os.getpid(),
            model_names=self.model.names,
            max_model_len=self.config.max_model_len or self._least_max_model_len(),
            reasons_not_ready=self.reasons_not_ready,
            workers=[
                worker_status(row, now, linked=self.workers.is_up(worker_id), trouble=row.trouble(now, self.config))
                for worker_id, row in sorted(self.workers.rows.items())
            ],
            routers=self.routers,
            router_replies=replies,
            gateways=[s for s in membership.services if s.kind == "gateway"],
            requests=self._gauges(),
            fallbacks=self.metrics.fallback_counts(),
            membership_version=membership.version,
            tenant=tenant,
        )

    async def explain(self, name: str, tenant: str | None) -> dict[str, object]:
        """The document of `GET /explain/NAME`. `tenant`: only its requests; None: everybody's.

        Raises:
            NotExplained: nothing is kept under that name. NoRouter: it may be, but the router does not answer.
        """
        request_id = request_id_of(name)
        replies = await self.routers.explain(request_id, tenant)
        own = answer(self.stand_in.explanations, request_id, tenant, self.clock(), by=self.identity.name)
        return explain_document(name, own=own, replies=replies)

    # --- the loop ---

    def _post(self, live: LiveRequest, event: Event) -> None:
        self._inbox.append((live, event))
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                live, event = self._inbox.popleft()
                try:
                    self._turn(live, event)
                except Exception:  # a bug of ours in one request must not take the others down
                    log.exception("a request broke its session", extra={"request_id": live.request_id})
                    self._end(live, Fail(error=ServiceError("internal error; the server's log has the request id")))
        finally:
            self._busy = False

    def _turn(self, live: LiveRequest, event: Event) -> None:
        now = self.clock()
        commands = deque(live.session.on(event, now))
        while commands:
            command = commands.popleft()
            if isinstance(command, Deliver):
                stopped = self._deliver(live, command)
                if stopped is not None:
                    commands += live.session.on(stopped, now)
            else:
                self._perform(live, command)

    def _perform(self, live: LiveRequest, command: Command) -> None:
        match command:
            case SubmitTo(worker_id=worker_id, submit=submit, prefix_source=source):
                pull = self.workers.prefix_pull(source) if source is not None else None
                self.workers.send(worker_id, submit if pull is None else replace(submit, prefix_pull=pull))
            case TellRouter(message=message):
                self._tell_router(live, message)
            case SendPlace(place=place):
                if (asked := self.routers.place(place)) is None:
                    self._post(live, RouterAway())
                elif not asked.is_ready:
                    self.metrics.fallbacks.labels("unready_router").inc()
            case PlaceWithoutRouter(place=place) if self.routers.can_ask_another(place.request_id):
                self._post(live, RouterUp())
            case PlaceWithoutRouter(place=place):
                now = self.clock()
                assignment = self.stand_in.place(place, self.workers.reachable(now), self._booked_tokens(), now)
                self.metrics.fallbacks.labels("least_work").inc()
                log.warning("placed without the router", extra={"request_id": live.request_id, "attempt": place.attempt})
                self._post(live, NoPlace() if assignment is None else Assigned(assignment=assignment))
            case CompleteAt(worker_id=worker_id, completed=completed):
                self.workers.send(worker_id, completed)
            case CancelAt(worker_id=worker_id, cancel=cancel):
                self.workers.send(worker_id, cancel)
            case AttemptEnded():
                self._attempt_ended(live, command)
            case Finish() | Fail() | Abandon():
                self._end(live, command)

    def _tell_router(self, live: LiveRequest, message: PrefillDone | Done) -> None:
        session, now = live.session, self.clock()
        placed = session.assignments[-1] if session.assignments else None
        if isinstance(message, PrefillDone) and placed is not None:
            since_s = session.timelines[0].assigned_s if message.attempt == 0 else None
            self.metrics.prefilled(placed, session.request.num_prompt_tokens, message.num_cached_tokens, now, since_s)
        self.routers.tell(self.stand_in.hear(message, placed, now))

    def _deliver(self, live: LiveRequest, deliver: Deliver) -> ChoiceStopped | None:
        if deliver.token_ids:
            self.metrics.delivered(live.session.timelines[deliver.choice], len(deliver.token_ids))
        stopped = live.deliver(deliver)
        limit = self.config.max_undelivered_tokens
        if live.feed.undelivered_tokens > limit:
            self.metrics.slow_clients.inc()
            self._post(live, Abort(error=ServiceError(f"the client left more than {limit} tokens unread")))
        return stopped

    def _attempt_ended(self, live: LiveRequest, ended: AttemptEnded) -> None:
        self.metrics.attempt_ended(ended, goes_on=live.session.end is None)
        log_attempt(live.session, ended)
        if self._spans is not None:
            self._spans.attempt_ended(live.session, ended)

    def _end(self, live: LiveRequest, end: End) -> None:
        self._live.pop(live.request_id, None)
        error: BatonError | None = None
        outcome = "finished"
        if isinstance(end, Fail):
            error, outcome = end.error, "failed"
        elif isinstance(end, Abandon):
            error, outcome = ClientLeft("the client went away"), "cancelled"
        self.metrics.request_ended(live.session, outcome)
        if self._spans is not None:
            self._spans.end(live.session, outcome)
        live.feed.end(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.tick_s)
            now = self.clock()
            self.workers.tick(now)
            self.routers.tick(now)
            for live in [x for x in self._live.values() if x.session.wake_s <= now]:
                self._post(live, Tick())

    # --- what others say ---

    def _on_membership(self, membership: Membership) -> None:
        self.workers.follow(membership)
        self.routers.follow(membership)

    def _on_fact(self, said: WorkerSaid) -> None:
        fact = said.fact
        if isinstance(fact, HandoffDone):
            self.metrics.handed_off(fact)
        elif isinstance(fact, TransferFailed):
            self.metrics.handoff_failed(fact)
        live = self._live.get(fact.handoff.request_id if isinstance(fact, Offered) else fact.request_id)
        if live is not None:
            self._post(live, said)

    def _on_worker_lost(self, worker_id: str) -> None:
        for live in [x for x in self._live.values() if worker_id in x.session.workers]:
            self._post(live, WorkerLost(worker_id=worker_id))

    def _on_router_up(self) -> None:
        for live in [x for x in self._live.values() if x.session.state is AttemptState.QUEUED]:
            self._post(live, RouterUp())

    def _on_router_lost(self, request_ids: list[str]) -> None:
        for live in [self._live[x] for x in request_ids if x in self._live]:
            self._post(live, RouterUp() if self.routers.is_up else RouterLost())

    def _on_router_message(self, message: Any) -> None:
        if isinstance(message, (PlaceAck, Refused, Reassigned)):
            live = self._live.get(message.request_id)
            if live is not None:
                self._post(live, message)
        elif isinstance(message, Assigned):
            assignment = message.assignment
            live = self._live.get(assignment.request_id)
            if live is not None:
                self._post(live, message)
                if live.session.assignment is assignment:
                    self.metrics.placed(assignment.policy, apart=assignment.prefill_worker != assignment.decode_worker)

    # --- small things ---

    def _booked_tokens(self) -> dict[str, int]:
        booked: dict[str, int] = {}
        for live in self._live.values():
            session = live.session
            for worker_id in session.workers:
                booked[worker_id] = booked.get(worker_id, 0) + session.request.num_prompt_tokens + session.num_output_tokens
        return booked

    def _gauges(self) -> dict[str, float]:
        states = [live.session.state for live in self._live.values()]
        return {
            "requests_live": len(states),
            "requests_queued": states.count(AttemptState.QUEUED),
            "requests_prefilling": states.count(AttemptState.PREFILLING),
            "requests_waiting_kv": states.count(AttemptState.WAITING_KV),
            "requests_decoding": states.count(AttemptState.DECODING),
            "workers_linked": sum(self.workers.is_up(w) for w in self.workers.rows),
            "router_linked": float(self.routers.is_up),
        }

    def _max_model_len(self) -> int:
        found = self.config.max_model_len or self._least_max_model_len()
        if found is None:
            raise NoWorker("no worker is ready to take requests; see GET /ready", retry_after_s=1.0)
        return found

    def _least_max_model_len(self) -> int | None:
        return min((row.address.max_model_len for row in self.workers.rows.values()), default=None)

    def _model_id(self) -> str:
        """The workers' name for the model, which the router matches; clients may know it by others."""
        return next((row.address.model_id for _, row in sorted(self.workers.rows.items())), self.model.name)

    def _fingerprint(self) -> bytes:
        return next((row.address.fingerprint for _, row in sorted(self.workers.rows.items())), b"")
