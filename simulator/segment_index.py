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
        self._whole: dict[Segment, dict[WorkerId, None]] = {}  # who has told of all of it
        self._parts: dict[Segment, dict[WorkerId, int]] = {}  # who of some leading blocks of it
        self._guessed: dict[Segment, dict[WorkerId, float]] = {}  # until when each is believed to get all of it
        self._guess_ends: deque[tuple[float, WorkerId, tuple[Segment, ...]]] = deque()

    def match(self, hashes: Sequence[bytes]) -> Match:
        whole_of, part_of, guess_of = self._whole.get, self._parts.get, self._guessed.get
        found: dict[WorkerId, int] = {}
        alive: dict[WorkerId, None] | None = None  # who has all so far; None: everybody has nothing
        depth, block_tokens = 0, self._block_tokens
        for segment in cast(BlockNames, hashes).segments:
            whole, parts, hoped = whole_of(segment), part_of(segment), guess_of(segment)
            going_on: dict[WorkerId, None] = {}
            if whole:
                going_on = whole if alive is None and not hoped else {w: None for w in whole if alive is None or w in alive}
            if hoped:
                for worker in hoped:
                    if alive is None or worker in alive:
                        going_on[worker] = None
            if parts:
                for worker, here in parts.items():
                    if (alive is None or worker in alive) and worker not in going_on:
                        found[worker] = (depth + here) * block_tokens
            if not going_on:
                break
            depth += segment.num_blocks
            found.update(dict.fromkeys(going_on, depth * block_tokens))
            alive = going_on
        return Match(device_tokens=found, total_tokens=found) if found else _EMPTY

    def confirmed_tokens(self, worker_id: WorkerId, hashes: Sequence[bytes], num_tokens: int) -> int:
        num_blocks = -(-num_tokens // self._block_tokens)
        found = 0
        for segment in cast(BlockNames, hashes).segments:
            whole = self._whole.get(segment)
            if whole is None or worker_id not in whole:
                parts = self._parts.get(segment)
                found += parts.get(worker_id, 0) if parts is not None else 0
                break
            found += segment.num_blocks
            if found >= num_blocks:
                break
        return min(num_tokens, found * self._block_tokens)

    def speculate(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, *, num_held: int = 0) -> None:
        if self._guess_s <= 0.0:
            return
        segments, end_s, guessed = cast(BlockNames, hashes).segments, now + self._guess_s, self._guessed
        for segment in segments:
            hoped = guessed.get(segment)
            if hoped is None:
                guessed[segment] = {worker_id: end_s}
            else:
                hoped[worker_id] = end_s
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
        whole_of = self._whole
        for segment, first, last in stored:
            if first:
                self._forget_part(worker_id, segment)
            if last == segment.num_blocks:
                whole = whole_of.get(segment)
                if whole is None:
                    whole_of[segment] = {worker_id: None}
                else:
                    whole[worker_id] = None
            else:
                self._parts.setdefault(segment, {})[worker_id] = last
        for segment, first, last in evicted:
            if last < segment.num_blocks:
                self._forget_part(worker_id, segment)
            else:
                whole = whole_of[segment]
                del whole[worker_id]
                if not whole:
                    del whole_of[segment]
            if first:
                self._parts.setdefault(segment, {})[worker_id] = first

    def _forget_part(self, worker_id: WorkerId, segment: Segment) -> None:
        parts = self._parts[segment]
        del parts[worker_id]
        if not parts:
            del self._parts[segment]


class SegmentRegret(EvictionRegret):
    """Of blocks evicted, those that were asked for again: counted in runs."""

    def forget(self) -> None:
        super().forget()
        self._lost: OrderedDict[Segment, tuple[int, int]] = OrderedDict()  # blocks of it that went last, oldest first

    def evicted_runs(self, pieces: Sequence[Piece]) -> None:
        lost = self._lost
        num_blocks = 0
        for segment, first, last in pieces:
            num_blocks += (last - first) * segment.hashes_per_block
            before = lost.pop(segment, None)
            if before is not None and before[0] == last:
                last = before[1]  # its end went earlier
            lost[segment] = (first, last)
        kept = 0.5 ** (num_blocks / HALF_LIFE_BLOCKS)
        self._num_evicted = self._num_evicted * kept + num_blocks
        self._num_wanted *= kept
        while len(lost) > MAX_EVICTED_SEGMENTS:
            lost.popitem(last=False)

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
