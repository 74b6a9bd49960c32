"""Telling a running cluster what an operator may tell it: which policy places, and that its caches be empty.

Over the sockets its own processes use, with the cluster secret of control/access.py; each question is one connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from control.access import Access, read_access
from control.run_files import RunFile
from protocol.control import CacheReset, PolicyInUse, ResetCache, UsePolicy
from protocol.errors import ConfigError, ServiceError, WireError
from protocol.messages import Membership, Watch
from protocol.wire import Connection, Identity, dial
from protocol.worker import WorkerId

ANSWER_TIMEOUT_S = 5.0


class Operator:
    """One cluster, asked from a thread without an event loop."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._identity = Identity(name=f"operator-{os.getpid()}", kind="client", epoch=time.time_ns())

    @classmethod
    def of(cls, run: RunFile) -> Operator:
        """Of a server of this user on this machine.

        Raises:
            ConfigError: it does not let us in.
        """
        return cls(read_access(Path(run.access)))

    def use_policy(self, policy: str, *, decode_policy: str = "", forget: bool = False) -> None:
        """Place by `policy` from now on.

        decode_policy: of the decode pool, where it is another. forget: fitted cost models, hit rates and guesses at caches too.

        Raises:
            ConfigError: the router cannot load it; the one before stays.
            ServiceError: no router answers.
        """
        asyncio.run(self._use_policy(UsePolicy(reply_id=1, policy=policy, decode_policy=decode_policy, forget=forget)))

    def reset_caches(self) -> dict[WorkerId, int]:
        """Every worker drops the cached blocks nobody uses; how many blocks each kept for somebody.

        Raises:
            ServiceError: a worker does not answer.
        """
        return asyncio.run(self._reset_caches())

    async def _use_policy(self, wish: UsePolicy) -> None:
        routers = [s for s in (await self._membership()).services if s.kind == "router"]
        if not routers:
            raise ServiceError("the cluster has no router at this moment; ask again in a second")
        for answer in await asyncio.gather(*(self._ask(r.name, r.host, r.port, wish, PolicyInUse) for r in routers)):
            if answer.error:
                raise ConfigError(f"the router still uses {answer.policy}: {answer.error}")

    async def _reset_caches(self) -> dict[WorkerId, int]:
        workers = (await self._membership()).workers
        asked = (self._ask(w.worker_id, w.host, w.port, ResetCache(reply_id=1), CacheReset) for w in workers)
        answers = await asyncio.gather(*asked)
        return {worker.worker_id: answer.num_blocks_kept for worker, answer in zip(workers, answers, strict=True)}

    async def _membership(self) -> Membership:
        access = self._access
        found = await self._ask("the directory", access.directory_host, access.directory_port, Watch(name=self._identity.name), Membership)
        assert isinstance(found, Membership)
        return found

    async def _ask(self, name: str, host: str, port: int, question: object, kind: type) -> Any:
        """The first message of `kind` that comes back."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def receive(_: Connection, message: Any) -> None:
            if isinstance(message, kind) and not answered.done():
                answered.set_result(message)

        def closed(_: Connection, error: Exception | None) -> None:
            if not answered.done():
                answered.set_exception(ServiceError(f"{name} closed the connection without an answer ({error})"))

        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                connection = await dial(self._identity, self._access.secret, host=host, port=port, on_message=receive, on_close=closed)
                try:
                    connection.send(question)
                    return await answered
                finally:
                    answered.cancel()
                    connection.close()
        except (OSError, WireError, TimeoutError) as error:
            raise ServiceError(
                f"{name} does not answer at {host}:{port} ({error or type(error).__name__}); is the server running?"
            ) from None


__all__ = ["Operator"]
