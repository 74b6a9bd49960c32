"""A worker's prefix cache for the fast simulation: what lies there of each segment, least recently used blocks out first.

The same as engine/core's pool and cache would hold: whoever lets go of a prompt lets go of its deepest block first, so what is evicted of
a segment is its end, and all segments below it went before (prompt_tree.py). Costs grow with the segments of a prompt, not with its blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from simulator.prompt_tree import Segment

Piece = tuple[Segment, int, int]  # blocks of a segment, from the first to before the last


class SegmentCache:
    """`num_blocks` KV blocks of room, shared with what is computed and has no name yet (`reserve`)."""

    __slots__ = ("_held", "num_blocks", "num_named", "num_reserved")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_named = 0  # blocks that can be found
        self.num_reserved = 0  # of prompts under way and of answers
        self._held: OrderedDict[Segment, int] = OrderedDict()  # the least recently used first; how many of its leading blocks

    @property
    def num_free(self) -> int:
        return max(0, self.num_blocks - self.num_named - self.num_reserved)

    def match(self, segments: Sequence[Segment]) -> int:
        """Leading blocks of the prompt that lie here. Changes nothing."""
        held, num_found = self._held, 0
        for segment in segments:
            here = held.get(segment)
            if here is None:
                break
            num_found += here
            if here < segment.num_blocks:
                break
        return num_found

    def num_held(self, segment: Segment) -> int:
        """Leading blocks of one segment; those above it may be gone only if these are."""
        return self._held.get(segment, 0)

    def touch(self, segments: Sequence[Segment]) -> None:
        """The prompt is let go of: deepest block first, so that children are older than their parents."""
        held = self._held
        for segment in reversed(segments):
            if segment in held:
                held.move_to_end(segment)

    def reserve(self, num_blocks: int) -> list[Piece]:
        """Room for blocks that will be written; returns what was evicted for it. What does not fit overflows: nobody is preempted here."""
        self.num_reserved += num_blocks
        return self._evict(self.num_named + self.num_reserved - self.num_blocks)

    def release(self, num_blocks: int) -> None:
        """Blocks without a name are free again."""
        self.num_reserved -= num_blocks
        assert self.num_reserved >= 0, "more given back than was reserved"

    def store(self, segments: Sequence[Segment], num_blocks: int = 1 << 62) -> tuple[list[Piece], list[Piece]]:
        """Leading blocks of the prompt have names from now on: (stored, evicted). The caller released what it reserved for them."""
        held = self._held
        stored: list[Piece] = []
        for segment in segments:
            here, wanted = held.get(segment, 0), min(segment.num_blocks, num_blocks)
            if here < wanted:
                stored.append((segment, here, wanted))
                self.num_named += wanted - here
                held[segment] = wanted
            num_blocks -= segment.num_blocks
            if num_blocks <= 0:
                break
        self.touch(segments)
        return stored, self._evict(self.num_named + self.num_reserved - self.num_blocks)

    def _evict(self, num_blocks: int) -> list[Piece]:
        evicted: list[Piece] = []
        held = self._held
        while num_blocks > 0 and held:
            segment = next(iter(held))
            here = held[segment]
            gone = min(here, num_blocks)
            if gone == here:
                del held[segment]
            else:
                held[segment] = here - gone
            self.num_named -= gone
            num_blocks -= gone
            evicted.append((segment, here - gone, here))
        return evicted
