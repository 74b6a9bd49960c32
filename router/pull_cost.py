"""Which prefixes are worth pulling from another worker: who surely holds one, and whether bringing it over beats computing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocol.messages import Place
from protocol.worker import WorkerId, WorkerState
from router.fleet import Fleet, Worker
from router.policies.api import Pull
from router.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The live worker that surely holds most of a prompt in its pool."""

    worker: Worker
    num_tokens: int


class PullCosts:
    """Prices pulls between the workers of one fleet."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, *, min_tokens: int, bias: float) -> None:
        """min_tokens: fewer are computed. bias: estimates lean high, those of computing too."""
        self._fleet = fleet
        self._index = index
        self._min_tokens = min_tokens
        self._bias = bias

    def source(self, place: Place, device_tokens: Mapping[WorkerId, int]) -> Source | None:
        """Who holds most, by its own events; a booking alone is no KV yet. None: nobody holds enough.

        Only workers that are ready, serve the model, and did not fail this request.
        """
        best: Source | None = None
        beaten = self._min_tokens - 1
        for worker_id, believed in device_tokens.items():
            if believed <= beaten or worker_id in place.excluded:
                continue
            worker = self._fleet.get(worker_id)
            if worker is None or worker.state is not WorkerState.READY or worker.address.model_id != place.model_id:
                continue
            num_tokens = self._index.confirmed_tokens(worker_id, place.block_hashes, believed)
            if num_tokens and (best is None or num_tokens > best.num_tokens):
                best = Source(worker=worker, num_tokens=num_tokens)
                beaten = max(beaten, num_tokens)
        return best

    def prices(
        self, source: Source, workers: Sequence[Worker], cached_tokens: Mapping[WorkerId, int], num_tokens: int
    ) -> dict[WorkerId, Pull]:
        """Of bringing to each worker what the source has beyond it of a prompt; left out where computing is cheaper."""
        giver, held, min_tokens, bias = source.worker.worker_id, source.num_tokens, self._min_tokens, self._bias
        fingerprint, cached = source.worker.address.fingerprint, cached_tokens.get
        pulls = {}
        for worker in workers:
            pulled = held - cached(worker.worker_id, 0)
            if pulled < min_tokens or worker.address.fingerprint != fingerprint:
                continue
            assert worker is not source.worker, "a worker lacks nothing that it holds"
            cost = worker.cost
            compute_s = pulled * (cost.prefill_token_s + num_tokens * cost.prefill_pair_s)
            link = worker.link
            pull_s = bias * (link.scale * (link.base_s + pulled * link.token_s))  # link.seconds(pulled), of a whole pool
            if pull_s < compute_s:
                pulls[worker.worker_id] = Pull(giver, held, pulled, pull_s, compute_s)
        return pulls
