"""Page faults of a pool taken before its blocks are needed, on a thread of low priority.

Memory comes from the system a page at a time, when it is first written. A hand-off of 38 MB into blocks never used before cost
50 ms that way and 5 ms otherwise (2 cores, virtual machine), in the pause between a stream's first and second token; a prompt of
1,024 tokens cost its prefill worker 30 ms. The block pool gives out fresh blocks in ascending order, so it is enough to stay ahead:

    | written or handed to a sequence | resident, `ahead_bytes` | not yet memory |
                                      ^ reached(block_id)
"""

from __future__ import annotations

import logging
import os
import threading

import numpy as np

from kvtransfer.mapping import HUGE_PAGE_BYTES, make_resident
from kvtransfer.transport import Region

log = logging.getLogger("baton.kvtransfer")

NICENESS = 10
DELAY_S = 0.05  # blocks are asked for when a prompt or a copy is about to begin: with enough left, they have the machine first
ENOUGH = 0.25  # of `ahead_bytes`
PIECE_BYTES = HUGE_PAGE_BYTES  # between two pieces the thread may be told to end; a piece takes about 1 ms


class FaultAhead:
    """Keeps `ahead_bytes` beyond the highest block reached in memory. `reached` and `close` are the owner's; `region` outlives it."""

    def __init__(self, region: Region, ahead_bytes: int) -> None:
        self._block_bytes = region.layout.block_bytes
        self._size_bytes = region.size_bytes
        self._ahead_bytes = ahead_bytes
        self._first_block: int = np.frombuffer(region.blocks, dtype=np.uint8).ctypes.data  # of a page: kvtransfer.region pads for it
        # Counted from the first block; negative at first: pieces begin at huge pages, and the generation words lie before the blocks.
        self._resident_bytes = -(self._first_block % HUGE_PAGE_BYTES)
        self._reached_bytes = 0
        self._is_under_way = True  # some pieces more are wanted, no pause before them
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-fault-ahead", daemon=True)
        self._thread.start()

    def reached(self, block_id: int) -> None:
        """`block_id` is about to be written."""
        reached_bytes = (block_id + 1) * self._block_bytes
        if reached_bytes > self._reached_bytes:
            with self._changed:
                self._reached_bytes = reached_bytes
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def _wanted_bytes(self) -> int:
        return min(self._reached_bytes + self._ahead_bytes, self._size_bytes)

    def _is_short(self) -> bool:
        return self._resident_bytes - self._reached_bytes <= ENOUGH * self._ahead_bytes

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while self._resident_bytes < self._size_bytes:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._wanted_bytes > self._resident_bytes)
                if not self._is_under_way:
                    self._changed.wait_for(lambda: self._closing or self._is_short(), DELAY_S)
                if self._closing:
                    return
            self._is_under_way = self._resident_bytes + PIECE_BYTES < self._wanted_bytes
            done = self._resident_bytes
            size = min(PIECE_BYTES, self._size_bytes - done)
            why_not = make_resident(self._first_block + done, size)
            if why_not:
                # An older kernel, or no memory to be had now: pages come when they are written, as they would have without us.
                log.info("kv pool is not faulted in ahead", extra={"reason": why_not})
                return
            self._resident_bytes += size


__all__ = ["FaultAhead"]
