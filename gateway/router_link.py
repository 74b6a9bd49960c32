"""The one router of the moment, as the gateway reaches it.

A router that hangs keeps its socket open, so it is asked for a sign of life: one that owes an answer for `silent_s` is dropped
like one that died, and requests waiting in its queue go on without it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

from protocol.links import Links, Target
from protocol.messages import ExplainRequest, Membership, Ping, Pong, ServiceAddress, StatusReply, StatusRequest
from protocol.wire import Identity

log = logging.getLogger("baton.gateway")

STATUS_TIMEOUT_S = 1.0
MAX_WAITING_STATUS = 64


class RouterLink:
    """Dials the newest router of the membership; `tick` watches over it. Callbacks run on the event loop."""

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        silent_s: float,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_message: Callable[[Any], None],
    ) -> None:
        self.service: ServiceAddress | None = None
        self._silent_s = silent_s
        self._on_down = on_down
        self._on_message = on_message
        self._links = Links(
            identity, secret, on_up=lambda _, __: on_up(), on_down=lambda _, __: self._down(), on_message=lambda _, m: self._receive(m)
        )
        self._asked_s: float | None = None  # when the unanswered Ping went out
        self._heard_s = 0.0
        self._now = 0.0  # of the last tick
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._reply_ids = itertools.count(1)

    def follow(self, membership: Membership) -> None:
        """The router that started last is the active one."""
        routers = [s for s in membership.services if s.kind == "router"]
        self.service = max(routers, key=lambda s: s.epoch, default=None)
        found = self.service
        self._links.set_targets([] if found is None else [Target(name=found.name, epoch=found.epoch, host=found.host, port=found.port)])

    @property
    def is_up(self) -> bool:
        return self.service is not None and self._links.get(self.service.name) is not None

    def send(self, message: object) -> bool:
        """False when no router is connected."""
        return self.service is not None and self._links.send(self.service.name, message)

    async def status(self) -> str | None:
        """The router's own status as JSON text; None when it does not answer within a second."""
        return await self._ask(StatusRequest(reply_id=next(self._reply_ids)))

    async def explain(self, name: str, tenant: str | None) -> str | None:
        """What the router remembers of a request, as JSON text; None when it does not answer within a second."""
        return await self._ask(ExplainRequest(reply_id=next(self._reply_ids), name=name, tenant=tenant))

    async def _ask(self, question: StatusRequest | ExplainRequest) -> str | None:
        if len(self._waiting) >= MAX_WAITING_STATUS or not self.send(question):
            return None
        reply_id = question.reply_id
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[reply_id] = reply
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await reply
        except TimeoutError:
            return None
        finally:
            del self._waiting[reply_id]

    def tick(self, now: float) -> None:
        """Ask for a sign of life, or drop a router that owes one."""
        connection = None if self.service is None else self._links.get(self.service.name)
        if connection is None:
            return
        if self._asked_s is None:
            if now - self._heard_s > self._silent_s / 4:
                self._asked_s = now
                connection.send(Ping(nonce=0))
        elif now - self._asked_s > self._silent_s:
            log.warning("the router does not answer", extra={"asked_s": now - self._asked_s})
            connection.abort()
        self._now = now

    async def close(self) -> None:
        await self._links.close()

    def _down(self) -> None:
        self._asked_s = None
        self._on_down()

    def _receive(self, message: Any) -> None:
        self._asked_s, self._heard_s = None, self._now  # anything it says is a sign of life
        if isinstance(message, Pong):
            return
        if isinstance(message, StatusReply):
            reply = self._waiting.get(message.reply_id)
            if reply is not None and not reply.done():
                reply.set_result(message.json)
        else:
            self._on_message(message)
