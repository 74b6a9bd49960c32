"""The router's picture of caches for the fast simulation: what its prefix index would answer, kept by segment instead of by block.

Confirmed by what workers tell, as late as the run says; guessed from a booking on for `speculative_ttl_s`; both as in
router/prefix_index.py, whose answers these are (a test holds them to it). What was evicted and is wanted again is counted likewise.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import cast

from protocol.worker import WorkerId
from router.eviction_regret import HALF_LIFE_BLOCKS, EvictionRegret
from router.prefix_index import Match, PrefixIndex
from simulator.prompt_tree import BlockNames, Segment
from simulator.segment_cache import Piece

_EMPTY = Match(device_tokens={}, total_tokens={})
MAX_EVICTED_SEGMENTS = 1 << 14


class SegmentIndex(PrefixIndex):
    """Asked by Placement and told by the run; nothing of it is kept by block. Whoever asks has set `now`."""

    def __init__(self, *, block_tokens: int, speculative_ttl_s: float) -> None:
        super().__init__(max_bytes=0, speculative_ttl_s=speculative_ttl_s)
        self._block_tokens = block_tokens
        self._guess_s = speculative_ttl_s
        self._confirmed: dict[Segment, dict[WorkerId, int]] = {}  # leading blocks of it that each worker has told of
        self._guessed: dict[Segment, dict[WorkerId, float]] = {}  # until when each is believed to get all of it
        self._guess_ends: deque[tuple[float, WorkerId, tuple[Segment, ...]]] = deque()

    def match(self, hashes: Sequence[bytes]) -> Match:
        segments = cast(BlockNames, hashes).segments
        confirmed, guessed = self._confirmed.get, self._guessed.get
        found: dict[WorkerId, int] = {}
        alive: list[WorkerId] | None = None
        depth, block_tokens = 0, self._block_tokens
        for segment in segments:
            told, hoped = confirmed(segment), guessed(segment)
            if not told and not hoped:
                break
            size = segment.num_blocks
            if alive is None:
                alive = list(told) if told else []
                if hoped:
                    alive += [worker for worker in hoped if not told or worker not in told]
            going_on = []
            for worker in alive:
                here = size if hoped and worker in hoped else told.get(worker, 0) if told else 0
                if here == size:
                    going_on.append(worker)
                if here:
                    found[worker] = (depth + here) * block_tokens
            alive, depth = going_on, depth + size
            if not alive:
                break
        return Match(device_tokens=found, total_tokens=found) if found else _EMPTY

    def confirmed_tokens(self, worker_id: WorkerId, hashes: Sequence[bytes], num_tokens: int) -> int:
        num_blocks = num_tokens // self._block_tokens
        found = 0
        for segment in cast(BlockNames, hashes).segments:
            here = self._confirmed.get(segment, {}).get(worker_id, 0)
            found += here
            if here < segment.num_blocks or found >= num_blocks:
                break
        return min(found, num_blocks) * self._block_tokens

    def speculate(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, *, num_held: int = 0) -> None:
        if self._guess_s <= 0.0:
            return
        segments, end_s = cast(BlockNames, hashes).segments, now + self._guess_s
        for segment in segments:
            self._guessed.setdefault(segment, {})[worker_id] = end_s
        self._guess_ends.append((end_s, worker_id, segments))

    def expire(self, now: float) -> None:
        ends = self._guess_ends
        while ends and ends[0][0] <= now:
            end_s, worker_id, segments = ends.popleft()
            for segment in segments:
                hoped = self._guessed.get(segment)
                if hoped is not None and hoped.get(worker_id) == end_s:
                    del hoped[worker_id]
                    if not hoped:
                        del self._guessed[segment]

    def change(self, worker_id: WorkerId, stored: Sequence[Piece], evicted: Sequence[Piece]) -> None:
        """A worker's own word."""
        for segment, _, last in stored:
            self._confirmed.setdefault(segment, {})[worker_id] = last
        for segment, first, _ in evicted:
            told = self._confirmed[segment]
            if first:
                told[worker_id] = first
            else:
                del told[worker_id]
                if not told:
                    del self._confirmed[segment]


class SegmentRegret(EvictionRegret):
    """Of blocks evicted, those that were asked for again: counted in runs."""

    def forget(self) -> None:
        super().forget()
        self._lost: OrderedDict[Segment, tuple[int, int]] = OrderedDict()  # blocks of it that went last, oldest first

    def evicted_run(self, segment: Segment, first: int, last: int) -> None:
        num_blocks = (last - first) * segment.hashes_per_block
        kept = 0.5 ** (num_blocks / HALF_LIFE_BLOCKS)
        self._num_evicted = self._num_evicted * kept + num_blocks
        self._num_wanted *= kept
        before = self._lost.pop(segment, None)
        if before is not None and before[0] == last:
            last = before[1]  # its end went earlier
        self._lost[segment] = (first, last)
        if len(self._lost) > MAX_EVICTED_SEGMENTS:
            self._lost.popitem(last=False)

    def asked_in_vain_from(self, segments: Sequence[Segment], num_found: int) -> None:
        """A prompt of which only so many leading blocks were found where it went."""
        if not self._lost:
            return
        depth = 0
        for segment in segments:
            depth += segment.num_blocks
            if depth > num_found and segment in self._lost:
                first, last = self._lost.pop(segment)
                self._num_wanted += (last - max(first, num_found - depth + segment.num_blocks)) * segment.hashes_per_block
