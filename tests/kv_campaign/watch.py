"""What the abort campaign adds to a worker: it is slow at every step of a pull, loses acknowledgements, and looks at every byte it took.

The paced executor writes a token's word into every row of its slot, so the tokens of a hand-off say what each byte of it must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import Callable, Iterator
from random import Random
from unittest.mock import patch

import numpy as np

import kvtransfer.endpoint
from cluster.worker_host import WorkerHost
from engine.hash_model import prefix_words
from engine.paced import RegionMemory
from kernels.copy_runs import Runs
from kvtransfer.peers import PeerMessage
from kvtransfer.pieces import Channel
from kvtransfer.pulls import PullState
from kvtransfer.transport import Region
from protocol.kv import KVHandoff, Outcome
from protocol.worker import WorkerSnapshot
from tests.kv_campaign.backends import Hooks, tapped

PAUSE_S_MAX = 0.02  # of a copy between two blocks, of a sender, of a check
SEEN_S = 0.01  # of a check at least: with digests read ahead it would be over before anybody looks
LONG_PAUSE_S = 0.35  # now and then: the lease is renewed meanwhile
LATE_S_MAX = 0.05  # of an acknowledgement, a renewal, a drop
NUM_WRONG, SLOWEST_MS, NUM_GOOD = "campaign_wrong_blocks", "campaign_slowest_pull_ms", "campaign_good_pulls"
NUM_WRONG_READS = "campaign_wrong_reads"  # of the executor
LOST_WORDS = 0.1  # share of the words between workers that never arrive


class Slowness:
    """Everything of this process that moves KV takes its time, drawn anew at each step. `stall_s`: the next piece sent takes so long."""

    def __init__(self, rng: Random) -> None:
        self.stall_s = 0.0
        self._rng = rng
        self._hooks = Hooks()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        check = kvtransfer.endpoint._check

        def slow_check(pull: PullState) -> str:
            time.sleep(SEEN_S)
            self._pause()
            return check(pull)

        def send(channel: Channel, blocks: memoryview, runs: Runs) -> None:
            stall_s, self.stall_s = self.stall_s, 0.0
            time.sleep(stall_s)
            self._pause(before_all=True)
            channel.send(blocks, runs)

        self._hooks.around_copy = lambda call: self._pause(before_all=call == 0)
        self._hooks.on_send = send
        tcp = tapped(kvtransfer.endpoint.TcpTransport, self._hooks)
        with (
            self._hooks.installed(),
            patch.object(kvtransfer.endpoint, "_check", slow_check),
            patch.object(kvtransfer.endpoint, "_CHECK_HERE_BYTES", -1),  # on its thread, where it can be slow and be seen
            patch.object(kvtransfer.endpoint, "TcpTransport", tcp),
        ):
            yield

    def _pause(self, *, before_all: bool = False) -> None:
        """before_all: between the first look at the generations and the first byte, where a writer does most harm."""
        drawn = self._rng.random()
        if drawn > (0.7 if before_all else 0.95):
            time.sleep(LONG_PAUSE_S)
        elif drawn < 0.5:
            time.sleep(self._rng.uniform(0, PAUSE_S_MAX))


def watch(host: WorkerHost, region: Region, rng: Random) -> None:
    """Before `host.start()`. What is seen goes into the worker's counters, by the names above."""
    endpoint, counters = host._endpoint, host._counters
    start_pull, complete_pull, send_to_source = endpoint.start_pull, endpoint.complete_pull, endpoint.send_to_source
    began: dict[str, float] = {}  # by hand-off: the pulls under way
    counters |= dict.fromkeys((NUM_WRONG, SLOWEST_MS, NUM_GOOD), 0)
    groups = RegionMemory(region)._groups
    size = region.layout.block_size_tokens

    def num_wrong_blocks(handoff: KVHandoff, source_indices: array[int], target_block_ids: array[int]) -> int:
        words = np.frombuffer(prefix_words(0, handoff.token_ids), dtype=np.uint64)
        wrong = 0
        for index, block_id in zip(source_indices, target_block_ids, strict=True):
            expected = words[index * size : (index + 1) * size]
            wrong += not all((group[block_id, :, : len(expected)] == expected[None, :, None]).all() for group in groups)
        return wrong

    def watched_pull(
        handoff: KVHandoff,
        source_indices: array[int],
        target_block_ids: array[int],
        deadline_s: float,
        on_done: Callable[[Outcome], None],
        **options: int,
    ) -> None:
        began[handoff.handoff_id] = time.monotonic()

        def done(outcome: Outcome) -> None:
            counters[SLOWEST_MS] = max(counters[SLOWEST_MS], round((time.monotonic() - began.pop(handoff.handoff_id)) * 1000))
            if outcome.error is None:
                counters[NUM_GOOD] += 1
                counters[NUM_WRONG] += num_wrong_blocks(handoff, source_indices, target_block_ids)
            on_done(outcome)

        start_pull(handoff, source_indices, target_block_ids, deadline_s, done, **options)

    def watched_completion(handoff: KVHandoff, deadline_s: float) -> None:
        if handoff.handoff_id in began:  # it has a deadline from here on
            began[handoff.handoff_id] = time.monotonic()
        complete_pull(handoff, deadline_s)

    def late_word(handoff: KVHandoff, message: PeerMessage) -> None:
        drawn = rng.random()
        if drawn < LOST_WORDS:
            return
        if drawn < 0.5:
            send_to_source(handoff, message)
            return
        asyncio.get_running_loop().call_later(rng.uniform(0, LATE_S_MAX), send_to_source, handoff, message)

    snapshot = host.snapshot

    def watched_snapshot() -> WorkerSnapshot:
        counters[NUM_WRONG_READS] = host._executor.num_wrong_reads  # type: ignore[attr-defined]
        return snapshot()

    host.snapshot = watched_snapshot  # type: ignore[method-assign]
    endpoint.start_pull = watched_pull  # type: ignore[method-assign,assignment]
    endpoint.complete_pull = watched_completion  # type: ignore[method-assign]
    endpoint.send_to_source = late_word  # type: ignore[method-assign]
