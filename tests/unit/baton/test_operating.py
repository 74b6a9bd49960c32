"""An operator finds router and workers through the directory, with the secret of the run's access file and not without it."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest

from baton.operating import Operator
from cluster.directory import Directory
from control.access import Access, read_access, write_access
from protocol.control import CacheReset, ResetCache
from protocol.errors import ConfigError, ServiceError
from protocol.links import MembershipWatch
from protocol.messages import Register
from protocol.wire import Connection, Identity, Listener
from protocol.worker import Role
from router.config import RouterConfig
from router.service import RouterService
from tests.unit.router.router_world import address

pytestmark = pytest.mark.pure

SECRET = b"s" * 32


class ResettingWorker:
    """Registers and answers ResetCache."""

    def __init__(self, name: str, kept: int) -> None:
        self.name, self.kept = name, kept

    async def start(self, directory: Directory) -> None:
        identity = Identity(name=self.name, kind="worker", epoch=1)
        self.listener = Listener(identity, SECRET, self._accept)
        await self.listener.start()
        self.watch = MembershipWatch(identity, SECRET, host=directory.host, port=directory.port, on_change=lambda _: None)
        self.watch.register(Register(address=address(self.name, Role.BOTH, port=self.listener.port)))
        self.watch.start()

    async def close(self) -> None:
        await self.watch.close()
        self.listener.close()

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive

    def _receive(self, connection: Connection, message: Any) -> None:
        if isinstance(message, ResetCache):
            connection.send(CacheReset(reply_id=message.reply_id, num_blocks_kept=self.kept))


async def test_router_and_workers_are_found_and_asked(tmp_path: Path) -> None:
    """How: a real directory and router, two small workers; the operator runs on a thread, as in a command.

    Seen to fail with an operator that asks the first worker only, and with an answer's error that is not raised.
    """
    directory = Directory(secret=SECRET, epoch=1)
    await directory.start()
    router = RouterService(RouterConfig(), directory_host=directory.host, directory_port=directory.port, secret=SECRET, epoch=1)
    workers = [ResettingWorker("w0", 3), ResettingWorker("w1", 0)]
    try:
        for worker in workers:
            await worker.start(directory)
        await router.start()
        while len(directory.membership.workers) < 2 or not directory.membership.services:
            await asyncio.sleep(0.01)
        file = tmp_path / "access"
        write_access(Access(directory_host=directory.host, directory_port=directory.port, secret=SECRET), file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        operator = Operator(read_access(file))
        await asyncio.to_thread(operator.use_policy, "round_robin")
        assert router.status()["policy"]["spec"] == "round_robin"  # type: ignore[index]
        with pytest.raises(ConfigError, match="the router still uses round_robin: unknown policy 'robin'"):
            await asyncio.to_thread(operator.use_policy, "robin")
        assert await asyncio.to_thread(operator.reset_caches) == {"w0": 3, "w1": 0}
        stranger = Operator(Access(directory_host=directory.host, directory_port=directory.port, secret=b"x" * 32))
        with pytest.raises(ServiceError, match="the directory"):
            await asyncio.to_thread(stranger.reset_caches)
    finally:
        await router.close()
        for worker in workers:
            await worker.close()
        directory.close()


def test_a_missing_or_strange_access_file_is_told(tmp_path: Path) -> None:
    """Seen to fail with the schema not looked at."""
    with pytest.raises(ConfigError, match="does not let us in"):
        read_access(tmp_path / "none")
    strange = tmp_path / "strange"
    strange.write_text('{"schema": "another", "host": "h", "port": 1, "secret": "00"}')
    with pytest.raises(ConfigError, match="schema another"):
        read_access(strange)


def test_the_secret_is_in_no_repr() -> None:
    """It must not reach a log. Seen to fail with `repr=True`."""
    assert "ssss" not in repr(Access(directory_host="h", directory_port=1, secret=b"s" * 32))
