"""The routers of the cluster, as a gateway reaches them: it keeps a link to each and asks one.

    ready, by rendezvous hash of (gateway, router)      gateways spread over the routers, each keeps to one and the others stand by
    else one that is not ready                          better than none, and counted as a fallback
    else one that has left a Place unanswered

A router that hangs keeps its socket open, so it is asked for a sign of life: one that owes an answer for `silent_s` is dropped
like one that died, and requests waiting in its queue are asked again elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from protocol.links import Link, Links, MakeLinks, Target
from protocol.messages import (
    Assigned,
    Done,
    ExplainRequest,
    Membership,
    Ping,
    Place,
    Pong,
    PrefillDone,
    ServiceAddress,
    StatusReply,
    StatusRequest,
)
from protocol.peering import RouterReadiness
from protocol.wire import Identity

log = logging.getLogger("baton.gateway")

STATUS_TIMEOUT_S = 1.0
MAX_WAITING_STATUS = 64
MAX_TOLD_AGAIN = 8192  # ends of attempts


@dataclass(slots=True, kw_only=True)
class Router:
    """One router of the directory and what we know of it."""

    service: ServiceAddress
    readiness: RouterReadiness | None = None  # None: it is not linked, or has not said
    is_silent: bool = False  # it left a Place unanswered, and has said nothing since
    pinged_s: float | None = None  # when the unanswered Ping went out
    heard_s: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.readiness is not None and self.readiness.is_ready


class Routers:
    """Dials every router of the membership; `tick` watches over them. Callbacks run on the event loop."""

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        silent_s: float,
        on_up: Callable[[], None],
        on_lost: Callable[[list[str]], None],
        on_message: Callable[[Any], None],
        links: MakeLinks = Links,
    ) -> None:
        """on_up: there is a router, after there was none. on_lost(request_ids): who had these asked to place cannot be relied on."""
        self.rows: dict[str, Router] = {}
        self.current: Router | None = None  # whom the next request goes to
        self._gateway = identity.name
        self._silent_s = silent_s
        self._on_up = on_up
        self._on_lost = on_lost
        self._on_message = on_message
        self._links = links(identity, secret, on_up=self._up, on_down=self._down, on_message=self._receive)
        self._asked: dict[str, list[str]] = {}  # request -> routers that were asked to place it, the newest last; until its Done
        self._over: deque[tuple[float, Done]] = deque(
            maxlen=MAX_TOLD_AGAIN
        )  # (when told, what), while a link may still turn out to be dead
        self._now = 0.0  # of the last tick
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._reply_ids = itertools.count(1)

    def follow(self, membership: Membership) -> None:
        found = {s.name: s for s in membership.services if s.kind == "router"}
        for gone in [name for name, row in self.rows.items() if found.get(name) != row.service]:
            del self.rows[gone]
        for name, service in sorted(found.items()):
            self.rows.setdefault(name, Router(service=service))
        self._links.set_targets([Target(name=s.name, epoch=s.epoch, host=s.host, port=s.port) for s in found.values()])
        self._choose()

    @property
    def is_up(self) -> bool:
        return self.current is not None

    def is_linked(self, name: str) -> bool:
        return self._links.get(name) is not None

    # --- requests ---

    def place(self, place: Place) -> Router | None:
        """Ask; returns whom. None: no router is there."""
        while self.current is not None and not self._links.send(self.current.service.name, place):
            self.current.readiness = None  # its connection is closing, and we shall hear so
            self._choose()
        if self.current is not None:
            self._note_asked(place.request_id, self.current.service.name)
        return self.current

    def tell(self, said: PrefillDone | Done) -> None:
        """To the router that placed the request, else to any: they tell each other.

        An end is told again to a router whose link comes up: the one before may have lost it, and a booking would stand until its TTL.
        """
        if isinstance(said, Done):
            self._over.append((self._now, said))
        asked = self._asked.pop(said.request_id, []) if isinstance(said, Done) else self._asked.get(said.request_id, [])
        if not (asked and self._links.send(asked[-1], said)) and self.current is not None:
            self._links.send(self.current.service.name, said)

    def can_ask_another(self, request_id: str) -> bool:
        """The router asked to place this has not answered in time. True: the current one now is another that was not asked yet."""
        asked = self._asked.get(request_id, [])
        if asked and asked[-1] in self.rows:
            self.rows[asked[-1]].is_silent = True
            self._choose()
        return self.current is not None and not self.current.is_silent and self.current.service.name not in asked

    def _note_asked(self, request_id: str, name: str) -> None:
        asked = self._asked.setdefault(request_id, [])
        if name in asked:
            asked.remove(name)
        asked.append(name)

    # --- which one ---

    def _choose(self) -> None:
        before = self.current
        usable = [row for row in self.rows.values() if row.readiness is not None]
        self.current = max(usable, key=self._preference, default=None)
        if self.current is not None and before is None:
            self._on_up()
        elif self.current is not None and before is not None and before.service != self.current.service:
            log.info("another router", extra={"router": self.current.service.name, "before": before.service.name})

    def _preference(self, row: Router) -> tuple[bool, bool, bytes]:
        drawn = blake2b(f"{self._gateway} {row.service.name}".encode(), digest_size=8).digest()
        return not row.is_silent, row.is_ready, drawn

    def _lose(self, name: str) -> None:
        self._on_lost([request_id for request_id, asked in self._asked.items() if asked[-1] == name])

    # --- life ---

    def tick(self, now: float) -> None:
        """Ask for signs of life, and drop who owes one."""
        self._now = now
        for name, row in list(self.rows.items()):
            connection = self._links.get(name)
            if connection is None:
                continue
            if row.pinged_s is None:
                if now - row.heard_s > self._silent_s / 4:
                    row.pinged_s = now
                    connection.send(Ping(nonce=0))
            elif now - row.pinged_s > self._silent_s:
                log.warning("a router does not answer", extra={"router": name, "asked_s": now - row.pinged_s})
                connection.abort()
        if all(self._links.get(name) is not None and row.pinged_s is None for name, row in self.rows.items()):
            while self._over and now - self._over[0][0] > 2 * self._silent_s:
                self._over.popleft()

    async def close(self) -> None:
        await self._links.close()

    def _up(self, name: str, connection: Link) -> None:
        for _, done in self._over:
            connection.send(done)
        row = self.rows.get(name)
        if row is not None:  # it counts once it has said how it is
            row.readiness, row.is_silent, row.pinged_s = None, False, None

    def _down(self, name: str, epoch: int) -> None:
        row = self.rows.get(name)
        if row is not None and row.service.epoch == epoch:
            row.readiness, row.pinged_s = None, None
        self._choose()
        self._lose(name)

    def _receive(self, name: str, message: Any) -> None:
        row = self.rows.get(name)
        if row is None:
            return
        row.pinged_s, row.heard_s = None, self._now  # anything it says is a sign of life
        if row.is_silent:
            row.is_silent = False
            self._choose()
        if isinstance(message, RouterReadiness):
            self._take_readiness(name, row, message)
        elif isinstance(message, StatusReply):
            reply = self._waiting.get(message.reply_id)
            if reply is not None and not reply.done():
                reply.set_result(message.json)
        elif not isinstance(message, Pong):
            if isinstance(message, Assigned) and message.assignment.request_id in self._asked:
                self._note_asked(message.assignment.request_id, name)
            self._on_message(message)

    def _take_readiness(self, name: str, row: Router, said: RouterReadiness) -> None:
        row.readiness = said
        self._choose()
        if not said.is_ready:
            log.warning("a router is not ready", extra={"router": name, "reason": said.reason})
            if self.current is not None and self.current.is_ready:
                self._lose(name)

    # --- what they say of themselves ---

    async def statuses(self) -> dict[str, str | None]:
        """Each router's own status as JSON text; None where it does not answer within a second."""
        names = sorted(self.rows)
        return dict(zip(names, await asyncio.gather(*(self._ask(n, StatusRequest(reply_id=self._reply_id())) for n in names)), strict=True))

    async def explain(self, request_name: str, tenant: str | None) -> list[str]:
        """What the routers remember of a request, as JSON texts; those that do not answer within a second are left out."""
        questions = (self._ask(n, ExplainRequest(reply_id=self._reply_id(), name=request_name, tenant=tenant)) for n in self.rows)
        return [reply for reply in await asyncio.gather(*questions) if reply is not None]

    def _reply_id(self) -> int:
        return next(self._reply_ids)

    async def _ask(self, name: str, question: StatusRequest | ExplainRequest) -> str | None:
        if len(self._waiting) >= MAX_WAITING_STATUS or not self._links.send(name, question):
            return None
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[question.reply_id] = reply
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await reply
        except TimeoutError:
            return None
        finally:
            del self._waiting[question.reply_id]
