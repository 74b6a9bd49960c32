"""Who is in the cluster: one small service that workers, router and gateways register with and everybody watches.

A registration lives as long as the connection that made it, so a killed process leaves the directory at the end of its
socket. Everybody keeps the last Membership it saw and works on with it while the directory is away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from protocol.messages import Membership, Ping, Pong, Register, RegisterService, ServiceAddress, StatusReply, StatusRequest, Watch
from protocol.wire import Connection, Identity, Listener, encode
from protocol.worker import WorkerAddress

log = logging.getLogger("baton.directory")

MAX_ENTRIES = 4096


class Directory:
    """Registrations by connection, and the watchers that hear of each change.

    `on_change(joined, left)` tells the supervisor's driver in the same process of workers that came and went.
    """

    def __init__(
        self,
        *,
        secret: bytes,
        epoch: int,
        on_change: Callable[[list[WorkerAddress], list[WorkerAddress]], None] = lambda joined, left: None,
    ) -> None:
        self._listener = Listener(Identity(name="directory", kind="directory", epoch=epoch), secret, self._accept)
        self._on_change = on_change
        self._version = 0
        self._workers: dict[str, tuple[Connection, WorkerAddress]] = {}
        self._services: dict[str, tuple[Connection, ServiceAddress]] = {}
        self._watchers: list[Connection] = []

    async def start(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        await self._listener.start(host=host, port=port)

    @property
    def host(self) -> str:
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def membership(self) -> Membership:
        return Membership(
            version=self._version,
            workers=tuple(address for _, address in self._workers.values()),
            services=tuple(service for _, service in self._services.values()),
        )

    def close(self) -> None:
        self._listener.close()

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive
        connection.on_close = lambda c, _: self._forget(c)

    def _receive(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Watch):
            self._watchers.append(connection)
            connection.send(self.membership)
        elif isinstance(message, Register):
            self._register_worker(connection, message.address)
        elif isinstance(message, RegisterService):
            self._register_service(connection, message.service)
        elif isinstance(message, Ping):
            connection.send(Pong(nonce=message.nonce))
        elif isinstance(message, StatusRequest):
            connection.send(StatusReply(reply_id=message.reply_id, json=self._status()))

    def _register_worker(self, connection: Connection, address: WorkerAddress) -> None:
        known = self._workers.get(address.worker_id)
        if known is not None and known[1].epoch > address.epoch:
            log.warning("refused an older incarnation", extra={"worker_id": address.worker_id, "epoch": address.epoch})
            connection.close()
            return
        if known is None and len(self._workers) >= MAX_ENTRIES:
            connection.close()
            return
        self._workers[address.worker_id] = (connection, address)
        log.info("worker joined", extra={"worker_id": address.worker_id, "role": address.role.value, "pid": address.pid})
        self._changed([address], [] if known is None or known[1].epoch == address.epoch else [known[1]])

    def _register_service(self, connection: Connection, service: ServiceAddress) -> None:
        if service.name not in self._services and len(self._services) >= MAX_ENTRIES:
            connection.close()
            return
        self._services[service.name] = (connection, service)
        self._changed([], [])

    def _forget(self, connection: Connection) -> None:
        if connection in self._watchers:
            self._watchers.remove(connection)
        left = [address for c, address in self._workers.values() if c is connection]
        gone = [name for name, (c, _) in self._services.items() if c is connection]
        for address in left:
            del self._workers[address.worker_id]
            log.info("worker left", extra={"worker_id": address.worker_id, "pid": address.pid})
        for name in gone:
            del self._services[name]
        if left or gone:
            self._changed([], left)

    def _changed(self, joined: list[WorkerAddress], left: list[WorkerAddress]) -> None:
        self._version += 1
        frame = encode(self.membership)
        for watcher in list(self._watchers):
            watcher.send_encoded(frame)
        if joined or left:
            self._on_change(joined, left)

    def _status(self) -> str:
        def plain(record: object) -> dict[str, Any]:
            return {k: v for k, v in asdict(record).items() if k not in ("fingerprint", "kv_endpoint")}  # type: ignore[call-overload]

        workers = [plain(address) | {"role": address.role.value} for _, address in self._workers.values()]
        services = [plain(service) for _, service in self._services.values()]
        return json.dumps({"version": self._version, "workers": workers, "services": services})
