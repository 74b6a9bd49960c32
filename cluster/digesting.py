"""Reading an offer's blocks for their digests: on the loop where that is quick, on another thread where it would hold others up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvtransfer.endpoint import KVEndpoint
from protocol.kv import KVHandoff

T = TypeVar("T")

INLINE_BYTES = 8 << 20  # read in 1 ms


def when_read(endpoint: KVEndpoint, handoff: KVHandoff, read: Callable[[KVHandoff], T], tell: Callable[[T], None]) -> None:
    """`tell(read(handoff))`, on the loop's thread, now or later. The blocks are leased meanwhile and stay as they are."""
    if endpoint.offer_read_bytes(handoff) <= INLINE_BYTES:
        tell(read(handoff))
        return
    reading = asyncio.get_running_loop().run_in_executor(None, read, handoff)
    reading.add_done_callback(lambda done: tell(done.result()))
