"""The one router of the moment, as the gateway reaches it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from protocol.links import Links, Target
from protocol.messages import Membership, ServiceAddress, StatusReply, StatusRequest
from protocol.wire import Identity

STATUS_TIMEOUT_S = 1.0
MAX_WAITING_STATUS = 64


class RouterLink:
    """Dials the newest router of the membership. Callbacks run on the event loop."""

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_message: Callable[[Any], None],
    ) -> None:
        self.service: ServiceAddress | None = None
        self._on_message = on_message
        self._links = Links(
            identity, secret, on_up=lambda _, __: on_up(), on_down=lambda _, __: on_down(), on_message=lambda _, m: self._receive(m)
        )
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
        if len(self._waiting) >= MAX_WAITING_STATUS:
            return None
        reply_id = next(self._reply_ids)
        if not self.send(StatusRequest(reply_id=reply_id)):
            return None
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[reply_id] = reply
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await reply
        except TimeoutError:
            return None
        finally:
            del self._waiting[reply_id]

    async def close(self) -> None:
        await self._links.close()

    def _receive(self, message: Any) -> None:
        if isinstance(message, StatusReply):
            reply = self._waiting.get(message.reply_id)
            if reply is not None and not reply.done():
                reply.set_result(message.json)
        else:
            self._on_message(message)
