"""One choice: which worker decodes, whether the prompt is computed there or elsewhere, and where elsewhere.

    decode worker first ──► few tokens missing there?  ──yes──► prefill there           (local)
                            │ no
                            ▼
    prefill worker      ──► cheaper to prefill where it decodes, and bearable? ──yes──► (local)
                            │ no
                            └──────────────────────────────────────────────────────────► (split)

Workers with both roles are priced as a whole and compete with the split. A missing pool is replaced by the other: a role is state of a
worker, so each can do the other's work in need. The policy prices workers; this file decides the shape (section 4.3 of DistServe calls
it placement of an instance pair) from the cost model alone, so that it is the same under every policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from random import Random
from typing import NamedTuple

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import Role, WorkerId
from router.choice import Blocked, Choice, Ranking, draw_first, near
from router.config import Disaggregate, RouterConfig
from router.eviction_regret import EvictionRegret
from router.fleet import Fleet, Pools, Worker
from router.guarded_policy import PoolPolicies
from router.holds import Hold
from router.policies.api import PlacementView, Pool, Pull, Replicate
from router.prefix_index import PrefixIndex
from router.pull_cost import PullCosts, Source

MAX_REPLICATIONS = 1024
_AGE_MAX_S = 1e9  # said of a worker never heard of


class FirstToken(NamedTuple):
    """When a request that comes now would have its first token, at best: expected, not leaning high."""

    least_s: float
    least_idle_s: float  # with nothing waiting before it on any worker


@dataclass(slots=True, kw_only=True)
class _Ask:
    """One request on its way through the choice."""

    place: Place
    now: float
    cached_tokens: Mapping[WorkerId, int]
    device_tokens: Mapping[WorkerId, int]
    predicted_output_tokens: int
    kv_tokens: int
    source: Source | None  # who holds most of the prompt

    @property
    def has_host_tokens(self) -> bool:
        """True when somebody holds a part of the prompt in host memory only."""
        return self.device_tokens is not self.cached_tokens

    def cached(self, worker: Worker) -> int:
        return self.cached_tokens.get(worker.worker_id, 0)

    def num_marked_blocks(self, worker: Worker) -> int:
        return self.device_tokens.get(worker.worker_id, 0) // HASH_BLOCK_SIZE_TOKENS

    def missed(self, worker: Worker) -> int:
        return self.place.num_tokens - self.cached_tokens.get(worker.worker_id, 0)


class Placement:
    """Chooses workers; changes nothing but the policy's random generator and the list of replications asked for."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        fleet: Fleet,
        index: PrefixIndex,
        policies: PoolPolicies,
        regret: EvictionRegret,
        rng: Random,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._index = index
        self._policies = policies
        self._regret = regret
        self._rng = rng  # of the draw among workers that are nearly the best
        self.is_one_of_several = False  # between two of their messages routers see the same best: each draws among those nearly as good
        self._pulls = PullCosts(fleet, index, min_tokens=config.prefix_pull_min_tokens, bias=config.estimate_bias)
        self._replications: dict[bytes, tuple[WorkerId, float]] = {}

    def choose(self, place: Place, now: float, *, predicted_output_tokens: int) -> Choice | Blocked:
        pools = self._fleet.pools(place.model_id).fit_for(place.num_tokens + 1, place.excluded)
        if not pools.all:
            return Blocked.NOBODY
        self._fleet.refresh(pools, now)
        ask = self._ask(place, now, predicted_output_tokens)
        config = self._config
        if place.local_only:
            return self._whole(ask, _who_may_decode(pools), "choices differ: prefilled where they decode")
        if config.disaggregate is Disaggregate.NEVER:
            return self._whole(ask, _who_may_decode(pools), "disaggregate is never: prefilled where it decodes")
        if not (pools.prefill or pools.both):
            return self._whole(ask, pools.decode, "no prefill worker is ready: prefilled where it decodes")
        if not (pools.decode or pools.both):
            return self._whole(ask, pools.prefill, "no decode worker is ready: decoded where it is prefilled")
        if config.disaggregate is Disaggregate.ALWAYS and len(pools.all) > 1:
            return self._split(ask, pools.prefill or pools.both, pools.decode or pools.both)
        whole = self._whole(ask, pools.both, "the worker has both roles") if pools.both else Blocked.FULL
        if not (pools.prefill or pools.decode):
            return whole
        split = self._split(ask, pools.prefill or pools.both, pools.decode or pools.both)
        if isinstance(whole, Blocked):
            return split
        if isinstance(split, Blocked):
            return whole
        return whole if self._total_s(ask, whole) <= self._total_s(ask, split) else split

    def another_decoder(
        self, place: Place, hold: Hold, now: float, *, predicted_output_tokens: int, suits: Callable[[Worker], bool]
    ) -> Ranking | None:
        """The decode workers that suit and have room for `hold`, as the policy ranks them; None: there is none."""
        pools = self._fleet.pools(place.model_id).fit_for(place.num_tokens + 1, place.excluded)
        self._fleet.refresh(pools, now)
        ask = self._ask(place, now, predicted_output_tokens)
        workers = [w for w in self._with_room(ask, pools.decode + pools.both, hold.num_sequences, hold.kv_tokens) if suits(w)]
        return self._rank(ask, Pool.DECODE, workers) if workers else None

    def first_token(self, place: Place, now: float, *, predicted_output_tokens: int) -> FirstToken | None:
        """Of workers that may be given the prompt now. None: of some nobody can say, or there is none. Their loads must be fresh."""
        pools, config = self._fleet.pools(place.model_id).fit_for(place.num_tokens + 1, place.excluded), self._config
        ask = self._ask(place, now, predicted_output_tokens)
        if place.local_only or config.disaggregate is Disaggregate.NEVER:
            workers = _who_may_decode(pools)
        else:
            workers = pools.prefill + pools.both or pools.decode
            if config.disaggregate is Disaggregate.AUTO and pools.prefill:
                workers += tuple(w for w in pools.decode if w.worker_id in ask.cached_tokens and self._may_stay(ask, w))
        if not workers or not all(w.is_predictable for w in workers):
            return None
        alone_s = [(w.queued_prefill_s, self._alone_s(ask, w)) for w in workers]
        least_s, least_idle_s = min(queue_s + s for queue_s, s in alone_s), min(s for _, s in alone_s)
        return FirstToken(least_s=least_s / config.estimate_bias, least_idle_s=least_idle_s / config.estimate_bias)

    def forget_replications(self) -> None:
        self._replications.clear()

    def replicate(self, wish: Replicate, now: float) -> None:
        """Take a policy's wish; beyond MAX_REPLICATIONS at once the oldest is forgotten."""
        self._replications.pop(wish.block_hash, None)
        self._replications[wish.block_hash] = (wish.worker_id, now + wish.within_s)
        if len(self._replications) > MAX_REPLICATIONS:
            del self._replications[next(iter(self._replications))]

    # --- shapes ---

    def _whole(self, ask: _Ask, workers: tuple[Worker, ...], reason: str) -> Choice | Blocked:
        """Prefill and decode on one worker."""
        ranking = self._rank(ask, Pool.WHOLE, self._prefillers(ask, self._decoders(ask, workers)))
        if ranking is None:
            return Blocked.FULL
        return self._local(ask, ranking.best, ranking, reason, prefill=ranking)

    def _split(self, ask: _Ask, prefillers: tuple[Worker, ...], decoders: tuple[Worker, ...]) -> Choice | Blocked:
        """Prefill on one worker, decode on another; or both on the decode worker where that is better."""
        may_stay = self._config.disaggregate is Disaggregate.AUTO
        with_room = self._decoders(ask, decoders) or self._decoders_by_then(ask, decoders, prefillers)
        decode = self._rank(ask, Pool.DECODE, with_room)
        if decode is None:
            return Blocked.FULL
        if may_stay and ask.missed(decode.best) <= self._config.local_prefill_max_tokens and self._prefillers(ask, [decode.best]):
            limit = self._config.local_prefill_max_tokens
            return self._local(
                ask, decode.best, decode, f"{ask.missed(decode.best)} tokens are missing, up to {limit} are prefilled where they decode"
            )
        others = [w for w in self._prefillers(ask, prefillers) if w is not decode.best]
        prefill = self._rank(ask, Pool.PREFILL, others, decode_worker=decode.best)
        if prefill is None:
            return Blocked.FULL
        if may_stay:
            stay = self._better_local(ask, with_room, decode, prefill.best)
            if stay is not None:
                return stay
        reason = f"prefilled on {prefill.best.worker_id}, handed to {decode.best.worker_id}"
        source = self._replication_target(ask, prefillers)
        if source is not None and source is not decode.best:
            prefill = replace(prefill, best=source)
            reason = f"policy {self._policies.prefill.name} replicates this prefix to {source.worker_id}"
        return Choice(
            prefill=prefill.best,
            decode=decode.best,
            cached_tokens=ask.cached(prefill.best),
            num_marked_blocks=ask.num_marked_blocks(prefill.best),
            kv_tokens=ask.kv_tokens,
            policy=prefill.policy if prefill.policy == decode.policy else f"{prefill.policy}/{decode.policy}",
            reason=reason,
            prefill_ranking=prefill,
            decode_ranking=decode,
            pull=self._pull(ask, prefill.best),
            prefill_s=prefill.best.queued_prefill_s + self._prefill_s(ask, prefill.best),
            handoff_s=self._transfer_s(ask),
        )

    def _better_local(self, ask: _Ask, decoders: list[Worker], decode: Ranking, prefill: Worker) -> Choice | None:
        """A decode worker that holds so much of the prompt that computing the rest there costs it and those that decode there less, in
        all, than the way through the best prefill worker costs it.
        """
        cached_tokens = ask.cached_tokens
        cached = [cached_tokens.get(w.worker_id, 0) for w in decoders] if cached_tokens else [0]
        most = max(cached)
        most_cached = decoders[cached.index(most)] if most else decode.best
        split_s = prefill.queued_prefill_s + self._prefill_s(ask, prefill) + self._transfer_s(ask)
        for worker in (decode.best, most_cached):
            if not self._may_stay(ask, worker) or not self._prefillers(ask, [worker]):
                continue
            local_s = self._beside_s(ask, worker) + self._stall_s(ask, worker)
            if local_s < split_s:
                return self._local(
                    ask,
                    worker,
                    decode,
                    f"{ask.missed(worker)} of {ask.place.num_tokens} tokens are missing on {worker.worker_id}: {local_s:.4f} s there, "
                    f"{split_s:.4f} s through {prefill.worker_id}",
                )
        return None

    def _may_stay(self, ask: _Ask, worker: Worker) -> bool:
        """Is so little missing on a decode worker, and that so free, that it may compute the prompt?"""
        missed, config = ask.missed(worker), self._config
        if missed > config.local_prefill_predicted_max_tokens or missed > config.local_prefill_max_missed_ratio * ask.place.num_tokens:
            return False
        return not self._is_busy(worker)

    def _local(self, ask: _Ask, worker: Worker, ranking: Ranking, reason: str, *, prefill: Ranking | None = None) -> Choice:
        return Choice(
            prefill=worker,
            decode=worker,
            cached_tokens=ask.cached(worker),
            num_marked_blocks=ask.num_marked_blocks(worker),
            kv_tokens=ask.kv_tokens,
            policy=ranking.policy,
            reason=reason,
            prefill_ranking=prefill,
            decode_ranking=ranking,
            pull=self._pull(ask, worker),
            prefill_s=worker.queued_prefill_s + self._prefill_s(ask, worker),
            handoff_s=0.0,
        )

    # --- pricing ---

    def _rank(self, ask: _Ask, pool: Pool, workers: list[Worker], *, decode_worker: Worker | None = None) -> Ranking | None:
        """None when there is nobody to rank."""
        if not workers:
            return None
        view = PlacementView(
            pool=pool,
            workers=workers,
            cached_tokens=ask.cached_tokens,
            device_tokens=ask.device_tokens,
            predicted_output_tokens=ask.predicted_output_tokens,
            kv_tokens=ask.kv_tokens,
            decode_worker=decode_worker.worker_id if decode_worker is not None else None,
            transfer_s=self._transfer_s(ask) if pool is not Pool.WHOLE else 0.0,
            pulls=self._pulls.prices(ask.source, workers, ask.cached_tokens, ask.place.num_tokens)
            if ask.source is not None and pool is not Pool.DECODE
            else {},
            loads_s=self._loads_s(ask, workers) if ask.has_host_tokens and pool is not Pool.DECODE else {},
            regret_share=self._regret.share,
        )
        guarded = self._policies.of(pool)
        policy, prices = guarded.price(view, ask.place, ask.now)
        seconds, count = prices.seconds, self._config.num_candidates
        dearest = sorted(seconds)[count - 1] if len(seconds) > count else inf
        if self.is_one_of_several:
            dearest = max(dearest, near(min(seconds), self._config.near_best))
        contenders = [(s, workers[i].last_chosen, workers[i].tie_hash, i) for i, s in enumerate(seconds) if s <= dearest and s != inf]
        contenders.sort()
        if self.is_one_of_several:
            draw_first(contenders, self._config.near_best, self._rng)
        best = [i for *_, i in contenders[:count]]
        return Ranking(
            policy=policy,
            best=workers[best[0]],
            workers=workers,
            seconds=seconds,
            best_first=best,
            parts=partial(guarded.parts, prices),
            cached_tokens=ask.cached_tokens,
            now=ask.now,
        )

    def _total_s(self, ask: _Ask, choice: Choice) -> float:
        """Predicted seconds until the last token, to compare shapes."""
        prefill, decode = choice.prefill, choice.decode
        num_sequences = decode.num_sequences + ask.place.num_choices
        token_s = decode.cost.decode_step_s(num_sequences, decode.kv_tokens + ask.kv_tokens)
        if choice.is_split:
            seconds = prefill.queued_prefill_s + self._prefill_s(ask, prefill) + self._transfer_s(ask)
        else:
            seconds = self._beside_s(ask, prefill) + self._stall_s(ask, prefill)
        return seconds + ask.predicted_output_tokens * token_s

    def _beside_s(self, ask: _Ask, worker: Worker) -> float:
        """Until the prompt's first token where it decodes: its steps carry the batch that decodes there too."""
        return worker.queued_prefill_s + self._alone_s(ask, worker)

    def _alone_s(self, ask: _Ask, worker: Worker) -> float:
        """The same with nothing waiting before it. A prefill worker has no batch that decodes."""
        prefill_s = self._prefill_s(ask, worker)
        if worker.role is Role.PREFILL:
            return prefill_s
        cost, num_steps = worker.cost, ceil(ask.missed(worker) / worker.address.max_num_batched_tokens)
        return prefill_s + num_steps * (cost.decode_step_s(worker.num_sequences, worker.kv_tokens) - cost.step_s)

    def _stall_s(self, ask: _Ask, worker: Worker) -> float:
        """What those that decode on `worker` lose while it computes the prompt, all together, at its price.

        A step beside a prompt takes longer by the prompt's tokens, and each sequence waits for all of it (interference, Sec. 2.3 of
        DistServe, OSDI'24). Loading and pulling go on beside the steps and stall nobody.
        """
        pull = self._pull(ask, worker)
        computed = ask.missed(worker) - (pull.pulled_tokens if pull is not None else 0)
        prompt_s = worker.cost.prefill_s(computed, ask.place.num_tokens) - worker.cost.step_s
        return self._config.local_prefill_interference * worker.num_sequences * prompt_s

    def _prefill_s(self, ask: _Ask, worker: Worker) -> float:
        """Until the prompt is computed there, alone, with what is pulled."""
        pull = self._pull(ask, worker)
        saved_s = pull.compute_s - pull.pull_s if pull is not None else 0.0
        return worker.cost.prefill_s(ask.missed(worker), ask.place.num_tokens) - saved_s + self._load_s(ask, worker)

    def _load_s(self, ask: _Ask, worker: Worker) -> float:
        """To bring what it has cached in host memory into its pool."""
        num_tokens = ask.cached(worker) - ask.device_tokens.get(worker.worker_id, 0)
        token_bytes = worker.address.kv_token_bytes
        token_s = token_bytes / self._config.host_link_bytes_per_s if token_bytes else self._config.transfer_s_per_token
        return num_tokens * token_s

    def _loads_s(self, ask: _Ask, workers: Sequence[Worker]) -> dict[WorkerId, float]:
        priced = ((worker.worker_id, self._load_s(ask, worker)) for worker in workers)
        return {worker_id: load_s for worker_id, load_s in priced if load_s > 0.0}

    def _pull(self, ask: _Ask, worker: Worker) -> Pull | None:
        """What the worker had better pull than compute."""
        if ask.source is None or ask.source.num_tokens - ask.cached(worker) < self._config.prefix_pull_min_tokens:
            return None
        return self._pulls.prices(ask.source, [worker], ask.cached_tokens, ask.place.num_tokens).get(worker.worker_id)

    def _transfer_s(self, ask: _Ask) -> float:
        return self._config.transfer_s_base + self._config.transfer_s_per_token * ask.place.num_tokens

    # --- room: the bounded inbox ---

    def _prefillers(self, ask: _Ask, workers: Sequence[Worker]) -> list[Worker]:
        """Those with less than `inbox_steps` of prefill waiting, where the prompt's blocks can be had.

        A prompt mostly cached on a worker follows its prefix beyond the bound, up to max_num_seqs prompts: it adds little work there
        and would add much elsewhere.
        """
        num_tokens, cached_tokens, inbox_steps = ask.place.num_tokens, ask.cached_tokens, self._config.inbox_steps
        with_room = []
        for worker in workers:
            cached = cached_tokens.get(worker.worker_id, 0)
            if num_tokens - cached > worker.prompt_room_tokens:
                continue
            if worker.queued_prefill_tokens < inbox_steps * worker.max_num_batched_tokens or (
                2 * cached >= num_tokens and worker.booked.num_prefills < worker.max_num_seqs
            ):
                with_room.append(worker)
        return with_room

    def _decoders(self, ask: _Ask, workers: Sequence[Worker]) -> list[Worker]:
        """Those whose batch has slots and whose pool holds the expected growth of all that was booked; an idle worker takes anything."""
        return self._with_room(ask, workers, ask.place.num_choices, ask.kv_tokens)

    def _decoders_by_then(self, ask: _Ask, workers: Sequence[Worker], prefillers: Sequence[Worker]) -> list[Worker]:
        """Those that are expected to have room soon after the prompt is computed elsewhere: no block is taken there before. Asked when
        nobody has room now. The hand-off waits for blocks on the prefill worker; with an objective for the time per token it should not.
        """
        begin_s = [w.queued_prefill_s + self._prefill_s(ask, w) for w in self._prefillers(ask, prefillers)]
        if not begin_s:
            return []
        at_s = ask.now + min(begin_s) + (self._config.handoff_wait_s if ask.place.slo_tpot_s is None else 0.0)
        num_sequences, kv_tokens, overcommit = ask.place.num_choices, ask.kv_tokens, self._config.decode_overcommit
        with_room = []
        for worker in workers:
            load = worker.decode_load_met(at_s, ask.predicted_output_tokens)
            has_slot = load.num_sequences + num_sequences <= overcommit * worker.max_num_seqs
            if has_slot and load.kv_tokens + kv_tokens <= worker.kv_capacity_tokens:
                with_room.append(worker)
        return with_room

    def _with_room(self, ask: _Ask, workers: Sequence[Worker], num_sequences: int, kv_tokens: int) -> list[Worker]:
        """What of the prompt lies in a worker's pool takes no more of it, but for blocks that could be reclaimed and no longer can."""
        overcommit, device = self._config.decode_overcommit, ask.device_tokens.get
        with_room = []
        for worker in workers:
            needed = kv_tokens + worker.held_kv_tokens
            if needed > worker.kv_capacity_tokens:
                needed -= max(0, device(worker.worker_id, 0) - worker.reclaimable_kv_tokens)
            has_slot = worker.num_sequences + num_sequences <= overcommit * worker.max_num_seqs
            if not worker.num_sequences or (has_slot and needed <= worker.kv_capacity_tokens):
                with_room.append(worker)
        return with_room

    @staticmethod
    def _is_busy(worker: Worker) -> bool:
        """A decode worker that prefills already, or whose batch is nearly full."""
        return worker.queued_prefill_tokens >= worker.max_num_batched_tokens or worker.num_sequences > 0.9 * worker.max_num_seqs

    # --- the request ---

    def _ask(self, place: Place, now: float, predicted_output_tokens: int) -> _Ask:
        match = self._index.match(place.block_hashes)
        most = place.num_tokens - 1
        cached = _at_most(match.total_tokens, most)
        device = cached if match.device_tokens is match.total_tokens else _at_most(match.device_tokens, most)
        leaned = round(predicted_output_tokens * self._config.estimate_bias)
        return _Ask(
            place=place,
            now=now,
            cached_tokens=cached,
            device_tokens=device,
            predicted_output_tokens=predicted_output_tokens,
            kv_tokens=place.num_tokens + place.num_choices * leaned,
            source=self._pulls.source(place, device) if self._config.prefix_pull and device else None,
        )

    def _replication_target(self, ask: _Ask, prefillers: tuple[Worker, ...]) -> Worker | None:
        if not self._replications:
            return None
        for h in ask.place.block_hashes:
            wish = self._replications.get(h)
            if wish is None:
                continue
            worker_id, until_s = wish
            target = next((w for w in prefillers if w.worker_id == worker_id), None)
            if target is None or ask.now > until_s:
                del self._replications[h]
            elif self._prefillers(ask, [target]):
                del self._replications[h]
                return target
        return None


def _who_may_decode(pools: Pools) -> tuple[Worker, ...]:
    return pools.decode + pools.both or pools.prefill


def _at_most(tokens: Mapping[WorkerId, int], most: int) -> Mapping[WorkerId, int]:
    if max(tokens.values(), default=0) <= most:
        return tokens
    return {name: min(n, most) for name, n in tokens.items()}
