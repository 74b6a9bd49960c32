"""What a choice comes to: a ranking of one pool, a pair of workers with what the attempt takes from each, or why there is none."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from random import Random

from protocol.messages import CandidateScore, Place, PrefixSource
from protocol.request import AttemptKey
from router.fleet import Worker
from router.holds import Hold, Phase
from router.policies.api import Pull


class Blocked(Enum):
    """Why a request stays where it is."""

    FULL = "full"  # every candidate's inbox is full
    NOBODY = "nobody"  # there is no candidate at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What the policy said of one pool, best first."""

    policy: str
    best: Worker
    scores: tuple[CandidateScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    prefill: Worker
    decode: Worker
    cached_tokens: int  # on the prefill worker
    num_marked_blocks: int  # leading hash blocks the index already knows there
    kv_tokens: int  # on the decode worker at the expected end
    policy: str
    reason: str
    prefill_scores: tuple[CandidateScore, ...]
    decode_scores: tuple[CandidateScore, ...]
    pull: Pull | None  # from another worker to the prefill worker
    prefill_s: float  # from now to the first token, as the cost model has it
    handoff_s: float  # from there to the decode worker

    @property
    def is_split(self) -> bool:
        return self.prefill is not self.decode

    @property
    def pulled_tokens(self) -> int:
        return self.pull.pulled_tokens if self.pull is not None else 0

    @property
    def prefix_source(self) -> PrefixSource | None:
        """As the assignment tells it."""
        if self.pull is None:
            return None
        pull = self.pull
        return PrefixSource(worker_id=pull.source, num_tokens=pull.num_tokens, pull_s=pull.pull_s, compute_s=pull.compute_s)

    def holds(self, key: AttemptKey, place: Place, now: float, predicted_output_tokens: int) -> dict[Phase, Hold]:
        """What the attempt takes from each of them."""
        missed = place.num_tokens - self.cached_tokens - self.pulled_tokens
        prefill = Hold(
            key=key,
            phase=Phase.PREFILL,
            worker_id=self.prefill.worker_id,
            prefill_tokens=missed,
            prefill_pairs=missed * place.num_tokens,
        )
        decode = Hold(
            key=key,
            phase=Phase.DECODE,
            worker_id=self.decode.worker_id,
            num_sequences=place.num_choices,
            kv_tokens=self.kv_tokens,
            output_tokens=predicted_output_tokens,
            lands_s=now + self.prefill_s,
        )
        return {Phase.PREFILL: prefill, Phase.DECODE: decode}


def near(cost: float, near_best: float) -> float:
    """Costs up to this are as good as `cost`."""
    return cost + near_best * abs(cost)


def draw_first(best: list[tuple[float, int, int, int]], near_best: float, rng: Random) -> None:
    """Put one of those that are as good as the best in front."""
    num_near = bisect_right(best, near(best[0][0], near_best), key=lambda entry: entry[0])
    if num_near > 1:
        best.insert(0, best.pop(rng.randrange(num_near)))
