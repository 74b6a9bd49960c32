"""What a worker's driver does for its host tier: saves at once, loads on another thread, each end told as an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from engine.core.events import LoadBlocks, LoadDone, SaveBlocks
from kvtransfer.host_tier import HostTierMemory


class TierCopies:
    """Performs SaveBlocks and LoadBlocks on one worker's tier. `on_done` is called on the loop's thread."""

    def __init__(self, memory: HostTierMemory, on_done: Callable[[LoadDone], None]) -> None:
        self.performers: dict[type, Callable[[Any], None]] = {
            SaveBlocks: lambda c: memory.save(c.block_ids, c.slots, c.generations),
            LoadBlocks: self._load,
        }
        self._memory = memory
        self._on_done = on_done
        self._loading: set[asyncio.Future[str]] = set()

    async def close(self) -> None:
        """After the copies under way."""
        if self._loading:
            await asyncio.wait(self._loading)
        self._memory.close()

    def _load(self, command: LoadBlocks) -> None:
        loading = asyncio.get_running_loop().run_in_executor(None, self._memory.load, command.slots, command.generations, command.block_ids)
        self._loading.add(loading)
        loading.add_done_callback(lambda done: self._loaded(command.load_id, done))

    def _loaded(self, load_id: int, done: asyncio.Future[str]) -> None:
        self._loading.discard(done)
        broken = done.exception()
        self._on_done(LoadDone(load_id=load_id, error=repr(broken) if broken is not None else done.result()))
