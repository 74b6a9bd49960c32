"""Small words between workers beside the blocks: a target acknowledges, renews or drops an offer at its source, or asks for a prefix.

At most once and in order. A word that is lost costs a lease's length of kept blocks, never correctness, so nothing is resent: what
waits for a peer that stays away longer than `_GIVE_UP_S`, or came back as another incarnation, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from kvtransfer.config import TransportConfig
from protocol.errors import MalformedFrame, WireError
from protocol.kv import Endpoint, HandoffShard, KVPeer
from protocol.kv_messages import AckHandoff, DropHandoff, PrefixOffered, PrefixRefused, RenewLease, RequestPrefix
from protocol.wire import Connection, Identity, Listener, dial

PeerMessage = AckHandoff | DropHandoff | RenewLease | RequestPrefix | PrefixOffered | PrefixRefused
OnPeerMessage = Callable[[str, PeerMessage], None]  # (worker id of the sender, message)

_GIVE_UP_S = 5.0
_REDIAL_FIRST_S = 0.05
_REDIAL_MAX_S = 1.0


class PeerPost:
    """Both directions for one worker. Lives on the event loop that called `start`.

    `counters` gains messages_sent, messages_received and messages_dropped.
    """

    def __init__(
        self, identity: Identity, secret: bytes, config: TransportConfig, on_message: OnPeerMessage, counters: Counter[str]
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._config = config
        self._on_message = on_message
        self._counters = counters
        self._listeners: list[Listener] = []
        self._routes: dict[tuple[str, int], _Route] = {}

    async def start(self, *, unix_path: str, tcp: bool) -> Endpoint:
        """Listen; returns an Endpoint with the control fields filled."""
        listener = Listener(self._identity, self._secret, self._welcome)
        await listener.start(unix_path=unix_path)
        self._listeners.append(listener)
        port = 0
        if tcp:
            listener = Listener(self._identity, self._secret, self._welcome)
            await listener.start(host=self._config.host, port=self._config.control_port)
            self._listeners.append(listener)
            port = listener.port
        return Endpoint(control_path=unix_path, control_port=port)

    def send(self, to: HandoffShard | KVPeer, message: PeerMessage, *, same_host: bool) -> None:
        """Queue a word for that process: the one that made the offer, or a peer."""
        key = (to.worker_id, to.epoch)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = _Route(to.worker_id, to.epoch, to.endpoint, use_unix=same_host)
            route.task = asyncio.get_running_loop().create_task(self._keep(key, route))
        if len(route.queue) >= self._config.max_queued_messages:
            self._counters["messages_dropped"] += 1
            return
        route.queue.append(message)
        route.wake.set()

    async def close(self) -> None:
        """Send what can be sent at once, then hang up."""
        routes = list(self._routes.values())
        for route in routes:
            if route.task is not None:
                route.task.cancel()
        for route in routes:
            if route.task is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await route.task
        for listener in self._listeners:
            listener.close()
        await asyncio.sleep(0)  # the transports tell of their end on the next turn of the loop

    async def _keep(self, key: tuple[str, int], route: _Route) -> None:
        """Send to one peer until it is idle, gone or replaced."""
        connection: Connection | None = None
        try:
            while True:
                try:
                    await asyncio.wait_for(route.wake.wait(), self._config.idle_close_s)
                except TimeoutError:
                    return
                route.wake.clear()
                if route.queue and (connection is None or not connection.is_open):
                    connection = await self._dial(route)
                    if connection is None:
                        return
                while route.queue and connection is not None and connection.is_open:
                    connection.send(route.queue.popleft())
                    self._counters["messages_sent"] += 1
                if route.queue:  # it ended meanwhile; dial again
                    route.wake.set()
        finally:
            self._counters["messages_dropped"] += len(route.queue)
            del self._routes[key]
            if connection is not None:
                connection.close()

    async def _dial(self, route: _Route) -> Connection | None:
        """A connection to that very process; None when it does not come back in time, or as another incarnation."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _GIVE_UP_S
        pause_s = _REDIAL_FIRST_S
        where = route.endpoint
        while loop.time() < give_up:
            address: dict[str, Any] = (
                {"unix_path": where.control_path} if route.use_unix else {"host": where.host, "port": where.control_port}
            )
            try:
                connection = await dial(
                    self._identity, self._secret, on_message=_refuse, on_close=lambda *_: None, timeout_s=_GIVE_UP_S, **address
                )
            except (OSError, WireError, TimeoutError):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _REDIAL_MAX_S)
                continue
            if (connection.peer.name, connection.peer.epoch) == (route.worker_id, route.epoch):
                return connection
            connection.close()
            return None
        return None

    def _welcome(self, connection: Connection) -> None:
        connection.on_message = self._receive

    def _receive(self, connection: Connection, message: Any) -> None:
        if not isinstance(message, PeerMessage):
            raise MalformedFrame(f"{connection.peer.name} sent {type(message).__name__} on a control connection of kvtransfer")
        self._counters["messages_received"] += 1
        self._on_message(connection.peer.name, message)


class _Route:
    """What waits for one incarnation of one peer."""

    def __init__(self, worker_id: str, epoch: int, endpoint: Endpoint, *, use_unix: bool) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.endpoint = endpoint
        self.use_unix = use_unix
        self.queue: deque[PeerMessage] = deque()
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


def _refuse(connection: Connection, message: Any) -> None:
    raise MalformedFrame(f"{connection.peer.name} answered a word that has no answer: {type(message).__name__}")
