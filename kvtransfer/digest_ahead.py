"""Digests of an early offer's whole blocks, read on a thread of its own while the last step of their prefill computes.

What is read by the end of the step need not be read then, when somebody waits for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from kvtransfer import digest
from kvtransfer.layer_clock import reached
from kvtransfer.transport import Region
from protocol.kv import DigestMode, HandoffShard, KVHandoff

MAX_AHEAD = 64  # offers; of one that was given up the digests stay until as many others were made


class DigestAhead:
    """Digests of offers of one region, with or without a head start. One thread calls `begin`; `take` may be called from any."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-digest")
        self._reader.submit(int)  # the thread is there from the start: how many a worker has says whether it leaks some
        self._read: dict[str, Future[bytes]] = {}  # by handoff id

    def begin(self, handoff: KVHandoff, mode: DigestMode) -> None:
        """Read the blocks of our one shard that are whole."""
        (shard,) = handoff.shards
        if len(self._read) >= MAX_AHEAD:
            del self._read[next(iter(self._read))]
        self._read[handoff.handoff_id] = self._reader.submit(self._whole, handoff, shard, mode)

    def take(self, handoff: KVHandoff, mode: DigestMode) -> bytes:
        """Of all blocks of our one shard, as they are now; what is not read yet is read here. `mode` is that of `begin`."""
        (shard,) = handoff.shards
        begun = self._read.pop(handoff.handoff_id, None)
        read = begun.result() if begun is not None and begun.done() and not begun.cancelled() else b""
        left = range(len(read) // digest.DIGEST_SIZE_BYTES, len(shard.block_ids))
        return read + self._compute(handoff, shard, mode, left)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _whole(self, handoff: KVHandoff, shard: HandoffShard, mode: DigestMode) -> bytes:
        """Nothing when the step before the last is still at work."""
        is_ready = reached(self._region) >= shard.layer_clock
        return self._compute(handoff, shard, mode, range(shard.num_whole_blocks)) if is_ready else b""

    def _compute(self, handoff: KVHandoff, shard: HandoffShard, mode: DigestMode, places: range) -> bytes:
        return digest.compute(self._region, shard.block_ids, shard.generations, mode, handoff.handoff_id, places)
