"""Page faults of a pool taken before its blocks are needed, on a thread of low priority.

Memory comes from the system a page at a time, when it is first written. A hand-off of 38 MB into blocks never used before cost
50 ms that way and 5 ms otherwise (2 cores, virtual machine), in the pause between a stream's first and second token; a prompt of
1,024 tokens cost its prefill worker 30 ms. The block pool gives out fresh blocks in ascending order, so it is enough to stay ahead:

    | written or handed to a sequence | resident, `ahead_bytes` | not yet memory |
                                      ^ reached(block_id)
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading

import numpy as np

from kvtransfer.transport import Region

log = logging.getLogger("baton.kvtransfer")

NICENESS = 10
PIECE_BYTES = 4 << 20  # between two pieces the thread may be told to end; a piece takes 1 to 5 ms
_MADV_POPULATE_WRITE = 23  # linux/mman.h, from 5.14 on; faults pages in and leaves their content alone
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold the interpreter lock
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class FaultAhead:
    """Keeps `ahead_bytes` beyond the highest block reached in memory. `reached` and `close` are the owner's; `region` outlives it."""

    def __init__(self, region: Region, ahead_bytes: int) -> None:
        self._block_bytes = region.layout.block_bytes
        self._size_bytes = region.size_bytes
        self._ahead_bytes = ahead_bytes
        self._address: int = np.frombuffer(region.blocks, dtype=np.uint8).ctypes.data  # of a page: kvtransfer.region pads for it
        self._resident_bytes = 0
        self._wanted_bytes = min(ahead_bytes, self._size_bytes)
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-fault-ahead", daemon=True)
        self._thread.start()

    def reached(self, block_id: int) -> None:
        """`block_id` is about to be written."""
        wanted = min((block_id + 1) * self._block_bytes + self._ahead_bytes, self._size_bytes)
        if wanted > self._wanted_bytes:
            with self._changed:
                self._wanted_bytes = wanted
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while self._resident_bytes < self._size_bytes:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._wanted_bytes > self._resident_bytes)
                if self._closing:
                    return
            size = min(PIECE_BYTES, self._size_bytes - self._resident_bytes)
            if _madvise(self._address + self._resident_bytes, size, _MADV_POPULATE_WRITE) != 0:
                # An older kernel, or no memory to be had now: pages come when they are written, as they would have without us.
                log.info("kv pool is not faulted in ahead", extra={"reason": os.strerror(ctypes.get_errno())})
                return
            self._resident_bytes += size


__all__ = ["FaultAhead"]
