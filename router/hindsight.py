"""What came out otherwise than the router believed: time to first token, and how much of a prompt its worker found cached.

A cost model that drifts makes placement worse without anybody noticing, and so does an index that no longer speaks of the workers'
caches (another salt, tokenizer or template, KV events that do not arrive). Both are counted here, and the second is said aloud.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum

from protocol.messages import Assignment
from protocol.worker import WorkerId

NUM_TTFTS = 512  # newest first tokens that errors are told of
MIN_EXPECTED_TOKENS = 64  # fewer expected tokens prove nothing
MIN_EXPECTED_SHARE = 0.1  # of the prompt
NUM_OVERLAPS = 256  # newest prompts that overlap is told of
GOES_ON_S = 60.0  # a note in the status is of the newest prompts of so long
GOES_ON_SHARE = 0.2
GOES_ON_COUNT = 3
WARNING_INTERVAL_S = 10.0


class Overlap(Enum):
    """What a worker found cached, beside what was expected."""

    FOUND = "found"  # at least half of it
    SHORT = "short"  # less than half
    NONE = "none"  # nothing


def overlap(expected_tokens: int, found_tokens: int, num_tokens: int) -> Overlap | None:
    """None: too few of the prompt's `num_tokens` were expected to say anything."""
    if expected_tokens < max(MIN_EXPECTED_TOKENS, MIN_EXPECTED_SHARE * num_tokens):
        return None
    if found_tokens == 0:
        return Overlap.NONE
    return Overlap.FOUND if 2 * found_tokens >= expected_tokens else Overlap.SHORT


class PredictionErrors:
    """Actual over predicted seconds from the placement to the first token, over the newest NUM_TTFTS. What a request waited before
    is known and not predicted, so it is left out. Predictions lean high by `router.estimate_bias`: below 1 is as meant."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=NUM_TTFTS)

    def observe(self, assignment: Assignment, first_token_s: float) -> None:
        """`first_token_s`: from the booking on. Nothing is learned of an assignment without a prediction."""
        if assignment.predicted_ttft_s is not None:
            self._ratios.append(first_token_s / max(assignment.predicted_ttft_s - assignment.waited_s, 1e-6))

    def document(self) -> dict[str, object]:
        """`actual_over_predicted`: median and 90th percentile; None before the first."""
        ratios = sorted(self._ratios)
        at = {f"p{q}": round(ratios[len(ratios) * q // 100], 4) if ratios else None for q in (50, 90)}
        return {"count": len(ratios), "actual_over_predicted": at}


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedOverlap:
    """A prompt of which its worker found less than half of what was expected."""

    request_id: str
    worker_id: WorkerId
    expected_tokens: int
    confirmed_tokens: int  # of them: told of by the worker itself
    found_tokens: int
    num_missed: int  # such prompts since the last one that was told of, this one included


class OverlapWatch:
    """Counts prompts by what was found of what was expected; a warning every WARNING_INTERVAL_S at most."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Overlap]] = Counter()
        self._newest: deque[tuple[float, WorkerId, bool]] = deque(maxlen=NUM_OVERLAPS)  # (when, who, missed)
        self._missed: MissedOverlap | None = None  # the newest that was not told of
        self._num_untold = 0
        self._warned_s = float("-inf")

    def observe(self, assignment: Assignment, found_tokens: int, num_tokens: int, now: float) -> None:
        """What the prefill worker found of a prompt of `num_tokens`."""
        of_confirmed = overlap(assignment.confirmed_tokens, found_tokens, num_tokens)
        if of_confirmed is not None:
            self.counts["confirmed", of_confirmed] += 1
        of_all = overlap(assignment.cached_tokens, found_tokens, num_tokens)
        if of_all is None:
            return
        self.counts["expected", of_all] += 1
        is_missed = of_all is not Overlap.FOUND
        self._newest.append((now, assignment.prefill_worker, is_missed))
        if is_missed:
            self._num_untold += 1
            self._missed = MissedOverlap(
                request_id=assignment.request_id,
                worker_id=assignment.prefill_worker,
                expected_tokens=assignment.cached_tokens,
                confirmed_tokens=assignment.confirmed_tokens,
                found_tokens=found_tokens,
                num_missed=self._num_untold,
            )

    def take_warning(self, now: float) -> MissedOverlap | None:
        """The newest miss nobody was told of; None when there is none, or one was told of less than WARNING_INTERVAL_S ago."""
        if self._missed is None or now - self._warned_s < WARNING_INTERVAL_S:
            return None
        missed, self._missed = self._missed, None
        self._num_untold, self._warned_s = 0, now
        return missed

    def note(self, now: float) -> str | None:
        """One line for `baton status` while it goes on."""
        recent = [(who, missed) for when, who, missed in self._newest if now - when <= GOES_ON_S]
        missing = Counter(who for who, missed in recent if missed)
        num_missed = missing.total()
        if num_missed < GOES_ON_COUNT or num_missed < GOES_ON_SHARE * len(recent):
            return None
        worst, of_worst = missing.most_common(1)[0]
        return (
            f"overlap is missing: {num_missed} of the last {len(recent)} prompts with an expected prefix found less than half of it "
            f"({num_missed / len(recent):.0%}), {of_worst} of them on {worst}; see 'Why was this worker chosen?' in docs/operating.md"
        )

    def document(self) -> dict[str, object]:
        """Prompts by what was found: of all that was expected, and of what workers had told of themselves."""
        return {kind: {o.value: self.counts[kind, o] for o in Overlap} for kind in ("expected", "confirmed")}
