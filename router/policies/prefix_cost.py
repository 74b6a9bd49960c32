"""E2 of Preble as one cost without a mode switch: reuse a prefix until its queue costs more than computing it again.

    J(w) = Q(w) + P(w) + D(w) + M(w) + N(w)            prefill
    J(w) = out * TBT(w) + M(w) + N(w)                  decode
    J(w) = both, each term once                        prefilled where it decodes

    D(w) = max(0, (1 + beta * held_up * (1 + busy) / 2) / (1 + uses) - 1) * (P(w) - min P)

Q outstanding seconds; P prefill of what is missed, or pulling a part of it from a peer and the prefill of the rest, whichever is less,
and loading what lies in host memory; M what would be lost by eviction; N moving KV that the decode worker lacks and no sibling brings.

D is what others pay when a prefix is computed once more. They wait for it, each second for `beta` where all workers are busy, for half of
that where all are idle (`busy`: the share that is not). Where workers decode as well, not only prompts behind it wait but all answers of
the batch it is computed beside (`held_up`: 8 there, else 1). But others will find the copy, so that a prefix asked for again and again
bears its price together with the next `uses` requests (prefix_heat.py), and soon none at all: never less, since a request that would be
served where its prefix lies gains nothing from waiting for a copy. A prefix nobody has asked for again spreads once Q of its holders
exceeds 1 + beta times what it saves (section 2 of Preble, ICLR'25), sooner where workers are idle; a hot one once Q exceeds what it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import (
    Booked,
    Cost,
    KvChanged,
    Parts,
    PlacementView,
    PolicyCommand,
    PolicyEvent,
    Pool,
    PoolPrices,
    WorkerView,
)
from router.policies.loads import token_s
from router.policies.prefix_heat import PrefixHeat

WHOLE_HELD_UP = 8.0  # times a second of prefill beside a batch holds others up; chosen on Preble's five workloads (benchmarks/README.md)
_PREFILL = ("queue", "prefill", "duplicate", "evict", "transfer")
_WHOLE = ("queue", "prefill", "duplicate", "evict", "decode")
_MOVED = ("queue", "prefill", "pull", "load", "duplicate", "evict", "transfer")
_WHOLE_MOVED = ("queue", "prefill", "pull", "load", "duplicate", "evict", "decode")
_DECODE = ("decode", "evict", "transfer")


class PrefixCost:
    """Estimated seconds, with prefixes."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        beta: float = 1.5  # price of a duplicated second of prefill while all are busy; 0: others do not count
        heat_s: float = 1.0  # half-life of requests for a prefix, by which copies are judged; 0: no copy is thought of use
        eviction: bool = True  # charge for what a prompt pushes out of a cache

    def __init__(self, config: Config) -> None:
        self.config = config
        self._heat = PrefixHeat(half_life_s=config.heat_s)

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        prices = self.price_pool(view, request, now, rng)
        return {
            worker.worker_id: Cost(seconds, tuple(zip(*prices.parts(i), strict=True)))
            for i, (worker, seconds) in enumerate(zip(view.workers, prices.seconds, strict=True))
        }

    def price_pool(self, view: PlacementView, request: Place, now: float, rng: Random) -> PoolPrices:
        if view.pool is Pool.DECODE:
            return _DecodePrices(view, request, self.config, soon_on=self._heat.soon_on(request, view.cached_tokens, now))
        return _PrefillPrices(view, request, self.config, self._heat, now)

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, Booked):
            self._heat.booked(event, now)
        elif isinstance(event, KvChanged):
            self._heat.changed(event)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return ()

    def snapshot(self) -> bytes:
        return self._heat.snapshot()

    def restore(self, state: bytes) -> None:
        self._heat.restore(state)


class _PrefillPrices:
    """Of workers that compute the prompt; in Pool.WHOLE they decode as well."""

    __slots__ = ("_duplicate", "_evict", "_least_s", "_own_s", "_request", "_view", "seconds")

    def __init__(self, view: PlacementView, request: Place, config: PrefixCost.Config, heat: PrefixHeat, now: float) -> None:
        self._view = view
        self._request = request
        self._evict = evict = config.eviction
        workers, num_tokens, cached = view.workers, request.num_tokens, view.cached_tokens.get
        held = [cached(worker.worker_id, 0) for worker in workers]
        own_s: list[float] = []
        self._own_s = own_s
        whole = view.pool is Pool.WHOLE
        held_up = WHOLE_HELD_UP if whole else 1.0
        num_busy = 0
        for worker, cached_tokens in zip(workers, held, strict=True):
            if worker.queued_prefill_s > 0.0 or (whole and worker.num_sequences):
                num_busy += 1
            missed, cost = num_tokens - cached_tokens, worker.cost
            own_s.append(cost.step_s + missed * cost.prefill_token_s + missed * num_tokens * cost.prefill_pair_s)
        if view.pulls or view.loads_s:
            self._move(view)
        self._least_s = least_s = min(own_s)
        uses = heat.uses(request, held, now)
        price = 1.0 + config.beta * held_up * (1.0 + num_busy / len(workers)) / 2.0
        self._duplicate = duplicate = max(0.0, price / (1.0 + uses) - 1.0)
        self.seconds: list[float] = []
        prices = self.seconds
        last_s = view.transfer_s
        for worker, own, cached_tokens in zip(workers, own_s, held, strict=True):
            evict_s = 0.0
            if evict and num_tokens > worker.free_kv_tokens:  # the cheap half of the question first
                evict_s = _eviction_s(worker, view, num_tokens - cached_tokens)
            if whole:
                last_s = _decode_s(worker, view, request)
            prices.append(worker.queued_prefill_s + own + duplicate * (own - least_s) + evict_s + last_s)

    def _move(self, view: PlacementView) -> None:
        """What is pulled from a peer or loaded from host memory, in place of what computing it takes."""
        pulls, loads_s, own_s = view.pulls, view.loads_s, self._own_s
        for i, worker in enumerate(view.workers):
            pull = pulls.get(worker.worker_id)
            if pull is not None and pull.pull_s < pull.compute_s:
                own_s[i] = own_s[i] - pull.compute_s + pull.pull_s
            if loads_s:
                own_s[i] += loads_s.get(worker.worker_id, 0.0)

    def parts(self, index: int) -> Parts:
        view, request, worker, own_s = self._view, self._request, self._view.workers[index], self._own_s[index]
        duplicate_s = self._duplicate * (own_s - self._least_s)
        missed = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0)
        evict_s = _eviction_s(worker, view, missed) if self._evict else 0.0
        whole = view.pool is Pool.WHOLE
        last_s = _decode_s(worker, view, request) if whole else view.transfer_s
        pull, load_s = view.pulls.get(worker.worker_id), view.loads_s.get(worker.worker_id, 0.0)
        pull_s = pull.pull_s if pull is not None and pull.pull_s < pull.compute_s else 0.0
        if pull_s or load_s:
            prefill_s = own_s - pull_s - load_s
            return _WHOLE_MOVED if whole else _MOVED, (worker.queued_prefill_s, prefill_s, pull_s, load_s, duplicate_s, evict_s, last_s)
        return _WHOLE if whole else _PREFILL, (worker.queued_prefill_s, own_s, duplicate_s, evict_s, last_s)


class _DecodePrices:
    """Of workers that take the hand-off. soon_on: who will have how many tokens of the prompt by then, whatever he has now."""

    __slots__ = ("_evict", "_request", "_soon_on", "_transfer_token_s", "_view", "seconds")

    def __init__(self, view: PlacementView, request: Place, config: PrefixCost.Config, *, soon_on: tuple[WorkerId, int]) -> None:
        self._view = view
        self._soon_on = soon_on
        self._request = request
        self._evict = evict = config.eviction
        num_tokens, cached = request.num_tokens, view.cached_tokens.get
        self._transfer_token_s = moved_s = view.transfer_s / max(num_tokens, 1)
        output, kv_tokens, num_choices = view.predicted_output_tokens, view.kv_tokens, request.num_choices
        self.seconds: list[float] = []
        prices = self.seconds
        for worker in view.workers:
            missed, cost = num_tokens - cached(worker.worker_id, 0), worker.cost
            batch, kv = worker.num_sequences + num_choices, worker.kv_tokens + kv_tokens
            decode_s = output * (cost.step_s + batch * cost.decode_sequence_s + kv * cost.decode_kv_token_s)
            evict_s = _eviction_s(worker, view, missed) if evict and missed > worker.free_kv_tokens else 0.0
            if worker.worker_id == soon_on[0]:
                missed = min(missed, num_tokens - soon_on[1])
            prices.append(decode_s + evict_s + moved_s * missed)

    def parts(self, index: int) -> Parts:
        view, request, worker = self._view, self._request, self._view.workers[index]
        missed = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0)
        evict_s = _eviction_s(worker, view, missed) if self._evict else 0.0
        if worker.worker_id == self._soon_on[0]:
            missed = min(missed, request.num_tokens - self._soon_on[1])
        return _DECODE, (_decode_s(worker, view, request), evict_s, self._transfer_token_s * missed)


def _decode_s(worker: WorkerView, view: PlacementView, request: Place) -> float:
    """Of the output, in the batch as it would be."""
    return view.predicted_output_tokens * token_s(view, request, worker)


def _eviction_s(worker: WorkerView, view: PlacementView, missed: int) -> float:
    """Seconds of prefill that the cached blocks pushed out by this prompt would have saved; a decode worker computes no prompts."""
    if missed <= worker.free_kv_tokens or not worker.role.prefills:
        return 0.0
    displaced = min(missed - worker.free_kv_tokens, worker.reclaimable_kv_tokens)
    return view.regret_share * displaced * worker.cost.prefill_token_s
