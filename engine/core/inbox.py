"""What waits in a worker, in order: by priority, then as the prefill policy has it, then first come, first served.

Prompts whose KV will be offered to another worker stand in a line of their own, so that one that may not be begun yet holds up those
behind it in that line only, and finding who is next costs the same however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import merge

from engine.core.hit_groups import HitGroups
from engine.core.sequence import Order, Sequence


class Inbox:
    """Waiting sequences; a leader stands for its choices. Bounded by WorkerCoreConfig.max_waiting."""

    def __init__(self, groups: HitGroups | None = None) -> None:
        """groups: order by what is cached of a prompt when it enters; None: by the order it brings."""
        self._groups = groups
        self.num_tokens = 0  # to be computed for them
        self._staying: list[Sequence] = []  # decode here; KV on offer to us included
        self._leaving: list[Sequence] = []  # prefill only

    def __len__(self) -> int:
        return len(self._staying) + len(self._leaving)

    def __iter__(self) -> Iterator[Sequence]:
        """In order. Not to be changed meanwhile."""
        return merge(self._staying, self._leaving, key=by_order)

    def next(self, *, may_leave: bool) -> Sequence | None:
        """The first in order; without `may_leave`, of those that stay."""
        staying = self._staying[0] if self._staying else None
        leaving = self._leaving[0] if may_leave and self._leaving else None
        if staying is None or leaving is None:
            return staying or leaving
        return min(staying, leaving, key=by_order)

    @property
    def next_leaving(self) -> Sequence | None:
        return self._leaving[0] if self._leaving else None

    def staying(self) -> Iterator[Sequence]:
        return iter(self._staying)

    def enter(self, sequence: Sequence, num_cached_tokens: Callable[[Sequence], int]) -> None:
        """Begin to wait. One that brings its KV is wholly cached."""
        if self._groups is not None:
            has_kv = sequence.attempt.handoff is not None
            self._groups.place(sequence, len(sequence.tokens) if has_kv else num_cached_tokens(sequence))
        self.add(sequence)

    def begin(self, sequence: Sequence) -> None:
        """It is its turn."""
        if self._groups is not None:
            self._groups.begun(sequence.order[1])
        self.remove(sequence)

    def add(self, sequence: Sequence) -> None:
        """Wait, or wait again, in the place it has."""
        insort(self._line(sequence), sequence, key=by_order)
        self.num_tokens += sequence.compute_end

    def remove(self, sequence: Sequence) -> bool:
        """False: it was not here."""
        line = self._line(sequence)
        index = bisect_left(line, sequence.order, key=by_order)
        if index == len(line) or line[index] is not sequence:
            return False
        del line[index]
        self.num_tokens -= sequence.compute_end
        return True

    def _line(self, sequence: Sequence) -> list[Sequence]:
        return self._leaving if sequence.attempt.prefill_only else self._staying


def by_order(sequence: Sequence) -> Order:
    return sequence.order
