"""A worker's prefix cache for the fast simulation: what lies there of each segment, least recently used blocks out first.

The same as engine/core's pool and cache would hold. Blocks that a prompt or a batch uses are pinned and stay; whoever lets go of a prompt
lets go of its deepest block first, so what is evicted of a segment is its end, and all segments below it went before (prompt_tree.py).
Costs grow with the segments of a prompt, not with its blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from simulator.prompt_tree import Segment

Piece = tuple[Segment, int, int]  # blocks of a segment, from the first to before the last


class SegmentCache:
    """`num_blocks` KV blocks of room, shared with what is computed and has no name yet (`reserve`)."""

    __slots__ = ("_held", "_pins", "num_blocks", "num_named", "num_pinned", "num_reserved")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_named = 0  # blocks that can be found
        self.num_pinned = 0  # of them, those in use
        self.num_reserved = 0  # of prompts under way and of answers
        self._held: OrderedDict[Segment, int] = OrderedDict()  # the least recently used first; how many of its leading blocks
        self._pins: dict[Segment, int] = {}  # how many use it

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

    def pin(self, segments: Sequence[Segment]) -> None:
        """In use from now on, with what will be stored of them."""
        pins, held = self._pins, self._held
        for segment in segments:
            num_users = pins.get(segment, 0)
            if not num_users:
                self.num_pinned += held.get(segment, 0)
            pins[segment] = num_users + 1

    def unpin(self, segments: Sequence[Segment]) -> None:
        """One user less. The last lets go, deepest block first, so that children are older than their parents."""
        pins, held = self._pins, self._held
        for segment in reversed(segments):
            num_users = pins[segment] - 1
            if num_users:
                pins[segment] = num_users
                continue
            del pins[segment]
            here = held.get(segment)
            if here:
                self.num_pinned -= here
                held.move_to_end(segment)

    def reserve(self, num_blocks: int) -> list[Piece]:
        """Room for blocks that will be written; returns what was evicted for it. What does not fit overflows: nobody is preempted here."""
        self.num_reserved += num_blocks
        surplus = self.num_named + self.num_reserved - self.num_blocks
        return self._evict(surplus) if surplus > 0 else []

    def release(self, num_blocks: int) -> None:
        """Blocks without a name are free again."""
        self.num_reserved -= num_blocks
        assert self.num_reserved >= 0, "more given back than was reserved"

    def store(self, segments: Sequence[Segment], num_blocks: int = 1 << 62) -> tuple[list[Piece], list[Piece]]:
        """Leading blocks of the prompt have names from now on: (stored, evicted). The caller released what it reserved for them."""
        held, pins = self._held, self._pins
        stored: list[Piece] = []
        for segment in segments:
            here, wanted = held.get(segment, 0), segment.num_blocks
            if wanted > num_blocks:
                wanted = num_blocks
            if here < wanted:
                stored.append((segment, here, wanted))
                self.num_named += wanted - here
                if segment in pins:
                    self.num_pinned += wanted - here
                held[segment] = wanted
            num_blocks -= segment.num_blocks
            if num_blocks <= 0:
                break
        surplus = self.num_named + self.num_reserved - self.num_blocks
        return stored, self._evict(surplus) if surplus > 0 else []

    def _evict(self, num_blocks: int) -> list[Piece]:
        evicted: list[Piece] = []
        held, pins, num_kept = self._held, self._pins, 0
        while num_blocks > 0 and num_kept < len(held):
            segment = next(iter(held))
            if segment in pins:
                held.move_to_end(segment)  # it will be, at the latest, when it is let go of
                num_kept += 1
                continue
            here = held[segment]
            if here <= num_blocks:
                gone = here
                del held[segment]
            else:
                gone = num_blocks
                held[segment] = here - gone
            self.num_named -= gone
            num_blocks -= gone
            evicted.append((segment, here - gone, here))
        return evicted
