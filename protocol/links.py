"""Keeping connections to a changing set of peers: dial, redial, and say who is up.

Gateways and routers dial workers, everybody dials the directory. A link that ends is reported at once (a killed process is
noticed by its socket, 5 ms after it died) and dialed again while the peer stays in the set.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.errors import WireError
from protocol.messages import Membership, Watch
from protocol.wire import Connection, Identity, dial

REDIAL_FIRST_S = 0.05
REDIAL_MAX_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a peer listens, and which incarnation of it is meant: another epoch is another peer."""

    name: str
    epoch: int
    host: str
    port: int


class Link(Protocol):
    """An open connection, as who uses it sees it."""

    @property
    def peer(self) -> Identity: ...
    @property
    def is_open(self) -> bool: ...
    def send(self, message: object) -> None: ...
    def abort(self) -> None: ...


class LinkSet(Protocol):
    """`Links` below, or what stands for them where there are no sockets (simulator/sim_network.py)."""

    def set_targets(self, targets: list[Target]) -> None: ...
    def get(self, name: str) -> Link | None: ...
    def send(self, name: str, message: object) -> bool: ...
    async def close(self) -> None: ...


class MakeLinks(Protocol):
    """As `Links` is made."""

    def __call__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        on_up: Callable[[str, Link], None],
        on_down: Callable[[str, int], None],
        on_message: Callable[[str, Any], None],
    ) -> LinkSet: ...


class Links:
    """Connections to every target of the current set, by name. All callbacks run on the event loop.

    on_up(name, connection) comes after the handshake, when the peer's epoch is the one expected;
    on_down(name, epoch) once for each on_up; on_message(name, message) in between.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        on_up: Callable[[str, Connection], None],
        on_down: Callable[[str, int], None],
        on_message: Callable[[str, Any], None],
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._on_up = on_up
        self._on_down = on_down
        self._on_message = on_message
        self._tasks: dict[Target, asyncio.Task[None]] = {}
        self._open: dict[str, Connection] = {}

    def set_targets(self, targets: list[Target]) -> None:
        """Dial what is new, drop what is gone."""
        wanted = set(targets)
        for target in [t for t in self._tasks if t not in wanted]:
            self._tasks.pop(target).cancel()
        for target in targets:
            if target not in self._tasks:
                self._tasks[target] = asyncio.get_running_loop().create_task(self._keep(target))

    def get(self, name: str) -> Connection | None:
        """The open connection to `name`; None while it is down."""
        return self._open.get(name)

    def send(self, name: str, message: object) -> bool:
        """False when `name` is down: the message was not sent."""
        connection = self._open.get(name)
        if connection is None or not connection.is_open:
            return False
        connection.send(message)
        return True

    @property
    def up(self) -> list[str]:
        return list(self._open)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _keep(self, target: Target) -> None:
        pause_s = REDIAL_FIRST_S
        while True:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def on_close(_: Connection, __: Exception | None, ended: asyncio.Future[None] = ended) -> None:
                if not ended.done():
                    ended.set_result(None)

            early: list[Any] = []
            try:
                connection = await dial(
                    self._identity,
                    self._secret,
                    host=target.host,
                    port=target.port,
                    on_message=_append_to(early),
                    on_close=on_close,
                )
            except (OSError, WireError, TimeoutError):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, REDIAL_MAX_S)
                continue
            if connection.peer.epoch != target.epoch:  # the port was taken over by somebody else
                connection.close()
                await asyncio.sleep(REDIAL_MAX_S)
                continue
            pause_s = REDIAL_FIRST_S
            connection.on_message = lambda _, message: self._on_message(target.name, message)
            self._open[target.name] = connection
            try:
                self._on_up(target.name, connection)
                for message in early:
                    self._on_message(target.name, message)
                await ended
            finally:
                if self._open.get(target.name) is connection:
                    del self._open[target.name]
                connection.close()
                self._on_down(target.name, target.epoch)


def _append_to(messages: list[Any]) -> Callable[[Connection, Any], None]:
    return lambda _, message: messages.append(message)


class MembershipWatch:
    """Follows the directory. `latest` keeps its last word while the directory is away."""

    def __init__(self, identity: Identity, secret: bytes, *, host: str, port: int, on_change: Callable[[Membership], None]) -> None:
        self.latest = Membership(version=0, workers=(), services=())
        self._identity = identity
        self._secret = secret
        self._host = host
        self._port = port
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._to_register: list[object] = []

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def register(self, message: object) -> None:
        """Say Register or RegisterService now and after each reconnection."""
        self._to_register.append(message)
        if self._connection is not None:
            self._connection.send(message)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        pause_s = REDIAL_FIRST_S
        while True:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def on_close(_: Connection, __: Exception | None, ended: asyncio.Future[None] = ended) -> None:
                if not ended.done():
                    ended.set_result(None)

            try:
                self._connection = await dial(
                    self._identity, self._secret, host=self._host, port=self._port, on_message=self._receive, on_close=on_close
                )
            except (OSError, WireError, TimeoutError):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, REDIAL_MAX_S)
                continue
            pause_s = REDIAL_FIRST_S
            try:
                for message in self._to_register:
                    self._connection.send(message)
                self._connection.send(Watch(name=self._identity.name))
                await ended
            finally:
                self._connection.close()
                self._connection = None

    def _receive(self, _: Connection, message: Any) -> None:
        if isinstance(message, Membership):
            self.latest = message
            self._on_change(message)
