"""Who will have left a decode worker's batch by a given time, and who will not have come yet, from what was booked there.

    booked ──► lands_s: its prefill elsewhere is expected to be done ──► from_step: it decodes ──► from_step + output tokens: it ends

Every sequence of a batch gains one token a step, so the *order* in which they end does not depend on how long steps take: ends are kept
as step numbers, sorted once, and become times only when asked. One that outlived its prediction is not expected to end at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

from router.holds import Hold


class BatchLoad(NamedTuple):
    """Of a decode batch, or of a part of it."""

    num_sequences: int
    kv_tokens: int  # at the expected end of each

    def less(self, other: BatchLoad) -> BatchLoad:
        return BatchLoad(max(0, self.num_sequences - other.num_sequences), max(0, self.kv_tokens - other.kv_tokens))


class DecodeOutlook:
    """Of one worker; as many entries as it has decode holds, which `decode_overcommit` bounds."""

    def __init__(self, decoding: Iterable[tuple[Hold, int]], under_way: Iterable[Hold]) -> None:
        """decoding: each with the step at which it began. under_way: those whose prefill is not done elsewhere."""
        ends = sorted((from_step + hold.output_tokens, hold.num_sequences, hold.kv_tokens) for hold, from_step in decoding)
        coming = [(hold.lands_s, hold.num_sequences, hold.kv_tokens, hold.output_tokens) for hold in under_way]
        lands = sorted(entry[:3] for entry in coming)
        self._stay_steps = sum(entry[3] for entry in coming) / max(1, len(coming))  # of those under way, on average
        self._end_steps = [end for end, *_ in ends]
        self._ended = _sums(ends)
        self._lands_s = [at_s for at_s, *_ in lands]
        self._landed = _sums(lands)

    def ending(self, after_step: int, by_step: int) -> BatchLoad:
        """What is expected to end after one step and not after another."""
        first, last = bisect_right(self._end_steps, after_step), bisect_right(self._end_steps, by_step)
        return self._ended[max(first, last)].less(self._ended[first])

    def landing_after(self, at_s: float) -> BatchLoad:
        """What will not have come by then. One that is late already is expected any moment."""
        return self._landed[-1].less(self._landed[bisect_right(self._lands_s, at_s)])

    def landing_outside(self, begin_s: float, end_s: float, step_s: float) -> BatchLoad:
        """What is under way and will not decode between two times: it comes later, or has come and, after an average stay, gone."""
        gone = self._landed[bisect_right(self._lands_s, begin_s - self._stay_steps * step_s)]
        later = self.landing_after(end_s)
        return BatchLoad(gone.num_sequences + later.num_sequences, gone.kv_tokens + later.kv_tokens)

    def first_end(self, after_step: int, suffices: Callable[[BatchLoad], bool]) -> int | None:
        """The first step after which enough is expected to have ended; None: not even the last suffices."""
        first = bisect_right(self._end_steps, after_step)
        index = bisect_left(range(first, len(self._end_steps)), True, key=lambda i: suffices(self._ended[i + 1].less(self._ended[first])))
        return self._end_steps[first + index] if first + index < len(self._end_steps) else None


def _sums(entries: list[tuple[int, int, int]] | list[tuple[float, int, int]]) -> list[BatchLoad]:
    """Of the first 0, 1, ... of them."""
    sequences = accumulate((entry[1] for entry in entries), initial=0)
    kv_tokens = accumulate((entry[2] for entry in entries), initial=0)
    return [BatchLoad(s, kv) for s, kv in zip(sequences, kv_tokens, strict=True)]
