"""What a choice comes to: a ranking of one pool, a pair of workers with what the attempt takes from each, or why there is none."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from protocol.messages import CandidateScore, Place, PrefixSource
from protocol.request import AttemptKey
from protocol.worker import WorkerId
from router.fleet import Worker
from router.holds import Hold, Phase
from router.policies.api import Parts, Pull

_AGE_MAX_S = 1e9  # said of a worker never heard of


class Blocked(Enum):
    """Why a request stays where it is."""

    FULL = "full"  # every candidate's inbox is full
    NOBODY = "nobody"  # there is no candidate at all


@dataclass(slots=True, kw_only=True)
class Ranking:
    """What the policy said of one pool."""

    policy: str
    best: Worker
    workers: list[Worker]
    seconds: Sequence[float]  # of each of them
    best_first: list[int]  # indices of the few that are kept
    parts: Callable[[int], Parts]  # of the price of the worker at an index
    cached_tokens: Mapping[WorkerId, int]
    now: float

    def scores(self) -> tuple[CandidateScore, ...]:
        """Best first. True as long as no worker was read anew."""
        return tuple([self._score(i) for i in self.best_first])

    def _score(self, index: int) -> CandidateScore:
        worker = self.workers[index]
        names, seconds = self.parts(index)
        return CandidateScore(
            worker_id=worker.worker_id,
            seconds=float(self.seconds[index]),  # a policy may compute in other numbers
            cached_tokens=self.cached_tokens.get(worker.worker_id, 0),
            signal_age_s=min(self.now - worker.read_at_s, _AGE_MAX_S),
            term_names=names,
            term_seconds=seconds,
        )


@dataclass(slots=True, kw_only=True)
class Choice:
    """Where an attempt goes. Of whoever is about to book it; nobody keeps it."""

    prefill: Worker
    decode: Worker
    cached_tokens: int  # on the prefill worker
    num_marked_blocks: int  # leading hash blocks the index already knows there
    kv_tokens: int  # on the decode worker at the expected end
    policy: str
    reason: str
    prefill_ranking: Ranking | None  # None: nobody was asked where to prefill, it goes where it decodes
    decode_ranking: Ranking
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
