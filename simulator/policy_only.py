"""A policy over a trace at some ten thousand requests a second: the live policy and placement over the router's view, on analytic workers.

    arrival ──► Placement.choose over AnalyticFleet and SegmentIndex ──► booked ──► PrefillServer ──► DecodeServer ──► over
                   │ no room                                                │              │               │
                   └──► FairQueue, tried again whenever room may have come ◄┴── reports and KV events, late ┘

What decides is the router's own: `Placement`, the policies it asks and what supervises them, the fair queue, the cost model and its fit.
What serves is arithmetic (analytic_worker.py). docs/simulation.md says what is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from random import Random

from control.compose import pool_sizes, prefill_policy
from control.config import ClusterConfig
from engine.models.shapes import find_shape
from prefill_workers.policy import PromptOrder
from protocol.errors import ConfigError
from protocol.kv import Endpoint
from protocol.messages import Place
from protocol.request import AttemptKey
from protocol.worker import BlocksRemoved, BlocksStored, KvEvent, Role, WorkerAddress, WorkerId
from router import policies
from router.choice import Choice
from router.config import Disaggregate
from router.guarded_policy import GuardedPolicy, PoolPolicies
from router.placement import Placement
from router.policies.api import (
    Booked,
    Finished,
    FirstToken,
    KvChanged,
    PlacementPolicy,
    Stateless,
    Tick,
    WorkerJoined,
)
from router.policies.prefix_cost import PrefixCost
from router.policies.round_robin import RoundRobin
from router.queue import FairQueue, Waiting
from simulator.analytic_fleet import AnalyticFleet, AnalyticWorker, ReportedPace, tie_hash
from simulator.analytic_pace import Pace
from simulator.analytic_worker import Driver, Flight
from simulator.decode_server import DecodeServer
from simulator.estimate_error import EXACT, EstimateError
from simulator.forced_choice import ForcingGuard
from simulator.noise import Lognormal
from simulator.prefill_server import PrefillServer
from simulator.prompt_tree import Prompt, PromptTree, prompt_tree
from simulator.routed_cluster import DEFAULT_MAX_MODEL_LEN, DEFAULT_MODEL, FINGERPRINT, LINK_S, MODEL_ID, TICK_S, num_kv_blocks
from simulator.routed_gateway import Served
from simulator.segment_cache import Piece
from simulator.segment_index import SegmentIndex, SegmentRegret
from simulator.sim_processes import SNAPSHOT_S
from simulator.token_accurate import MAX_TOKENS
from simulator.traces.trace import Trace
from simulator.true_steps import TrueSteps, plain_steps

_GATEWAY = "gateway-0"
_LOOK_UP_GIVEN_NAMES = (PrefixCost, RoundRobin)  # policies that find nothing new in a KV event about blocks nobody named to them


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateness:
    """How old what the router hears is, in seconds. The defaults are those of workers that report every 50 ms over loopback."""

    reports_s: float = LINK_S  # on their way
    report_interval_s: float = SNAPSHOT_S  # between two of one worker
    kv_events_s: float = LINK_S


class Watcher:
    """Looks on; changes nothing. Made to be derived from."""

    def placing(self, cluster: PolicyOnlyCluster, prompt: Prompt, choice: Choice, now: float) -> None:
        """The prompt is about to be booked; nothing of it is in the cluster's belief yet."""

    def prefilled(self, flight: Flight) -> None:
        """Its prompt is computed, of which flight.cached_tokens were found."""


def run_policy_only(
    trace: Trace,
    config: ClusterConfig,
    *,
    policy: str,
    seed: int,
    max_tokens: int | None = MAX_TOKENS,
    prompts: PromptTree | None = None,
    lateness: Lateness | None = None,
    steps: TrueSteps | None = None,
    estimate_error: EstimateError = EXACT,
    watcher: Watcher | None = None,
    forced: Mapping[int, WorkerId] | None = None,
) -> list[Served]:
    """Every request of the trace, in its order, and what came of it. The same arguments are the same run.

    policy, seed, max_tokens: as of `run_token_accurate`. steps, estimate_error: as of `RoutedCluster`.
    prompts: `prompts_of(trace, config, max_tokens)`, for who runs several policies over one trace; None: made here.
    lateness: None: as live.
    forced: by number of the request, the prefill worker it goes to, whatever the policy says, as long as that one has room.

    Raises:
        ConfigError: no such policy, or workers that cannot be simulated so.
    """
    if prompts is None:
        prompts = prompts_of(trace, config, max_tokens)
    cluster = PolicyOnlyCluster(
        config,
        policies.load(policy),
        name=policy,
        seed=seed,
        lateness=lateness,
        steps=steps,
        estimate_error=estimate_error,
        watcher=watcher,
    )
    cluster.guard.forced = forced or {}
    return cluster.run(prompts)


def prompts_of(trace: Trace, config: ClusterConfig, max_tokens: int | None = MAX_TOKENS) -> PromptTree:
    """The trace taken apart for the workers of `config`, once for all policies."""
    return prompt_tree(trace, block_tokens=config.workers.block_size, max_tokens=max_tokens)


class PolicyOnlyCluster:
    """Pools as `config` has them, all ready at 0 s. One run each. `seed`: of the router's draws, as in RoutedCluster."""

    def __init__(
        self,
        config: ClusterConfig,
        policy: PlacementPolicy,
        *,
        name: str,
        seed: int,
        lateness: Lateness | None = None,
        steps: TrueSteps | None = None,
        estimate_error: EstimateError = EXACT,
        watcher: Watcher | None = None,
    ) -> None:
        """
        Raises:
            ConfigError: workers without a pace or a number of KV blocks, or that do what only the token-accurate simulation knows.
        """
        if prefill_policy(config).order_by is not PromptOrder.FIRST_COME:
            raise ConfigError(
                f"prefill.order_by is {config.prefill.order_by.value}; policy-only runs serve first_come, token-accurate ones any"
            )
        self._steps = steps or plain_steps(config)
        self._config = told = config.router
        self._watcher = watcher
        self._lateness = lateness or Lateness()
        self._rng = rng = Random(seed)
        tie_seed = rng.getrandbits(64)
        self.pulls_prefixes = told.prefix_pull
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._layout = layout = find_shape(config.paced.model or DEFAULT_MODEL).kv_layout(config.workers.block_size)
        self.block_tokens = config.workers.block_size
        self._block_s, self._copy_s = layout.block_bytes / config.simulation.link_bytes_per_s, config.simulation.link_latency_s
        self.fleet = AnalyticFleet(told)
        self.index = SegmentIndex(block_tokens=config.workers.block_size, speculative_ttl_s=told.speculative_ttl_s)
        self._regret = SegmentRegret()
        self._late_changes: deque[tuple[float, AnalyticWorker, list[Piece], list[Piece]]] = deque()
        self.guard = ForcingGuard(policy, name=policies.split(name)[0], rng=rng, penalty_s=told.policy_penalty_s)
        asked, of_decode = [policy], None
        if told.decode_policy:
            asked.append(policies.load(told.decode_policy))
            of_decode = GuardedPolicy(asked[1], name=policies.split(told.decode_policy)[0], rng=rng, penalty_s=told.policy_penalty_s)
        self._is_listening = any(_listens(each) for each in asked)
        self._names_all = any(_listens(each) and not isinstance(each, _LOOK_UP_GIVEN_NAMES) for each in asked)
        self._policies = PoolPolicies(self.guard, of_decode)
        self._placement = Placement(told, fleet=self.fleet, index=self.index, policies=self._policies, regret=self._regret, rng=rng)
        self.queue: FairQueue = FairQueue(output_weight=told.output_weight, max_tenants=told.max_tenants)
        self._flights: dict[str, Flight] = {}  # that wait at the router
        self._num_waiting = 0
        self._tick_s = 0.0
        self._num_kv_events = 0
        driver = Driver()
        driver.call_at = self._call_at
        driver.prefilled, driver.decoded = self._prefilled, self._decoded
        driver.cache_changed = self._cache_changed
        driver.room_at = self._room_at
        self.pace = Pace(self._steps.model)
        self.chunk_tokens = min(config.workers.max_num_batched_tokens, config.prefill.chunk_tokens_alone)
        self._start(config, driver, tie_seed, estimate_error, seed)

    def _start(self, config: ClusterConfig, driver: Driver, tie_seed: int, error: EstimateError, seed: int) -> None:
        workers, num_blocks = config.workers, num_kv_blocks(config)
        roles = {f"{role.value}-{number}": role for role, count in pool_sizes(config).items() for number in range(count)}
        for worker_id, role in roles.items():
            address = WorkerAddress(
                worker_id=worker_id,
                role=role,
                epoch=1,
                host="127.0.0.1",
                port=1,
                pid=1,
                hostname="host",
                kv_endpoint=Endpoint(),
                model_id=MODEL_ID,
                fingerprint=FINGERPRINT,
                block_size_tokens=workers.block_size,
                num_kv_blocks=num_blocks,
                max_model_len=config.model.max_model_len or DEFAULT_MAX_MODEL_LEN,
                max_num_seqs=workers.max_num_seqs,
                max_num_batched_tokens=workers.max_num_batched_tokens,
                kv_token_bytes=self._layout.token_bytes,
            )
            server: PrefillServer | DecodeServer
            if role is Role.PREFILL:
                server = PrefillServer(
                    worker_id,
                    driver=driver,
                    pace=self.pace,
                    num_blocks=num_blocks,
                    block_tokens=workers.block_size,
                    chunk_tokens=self.chunk_tokens,
                    max_num_seqs=workers.max_num_seqs,
                    room_tokens=int(config.router.inbox_steps * workers.max_num_batched_tokens),
                    late_s=self._lateness.reports_s,
                    interval_s=self._lateness.report_interval_s,
                    noise=self._steps.noise_of(worker_id) if self._steps.sigma else None,
                )
            else:
                server = DecodeServer(
                    worker_id,
                    driver=driver,
                    pace=self.pace,
                    num_blocks=num_blocks,
                    block_tokens=workers.block_size,
                    chunk_tokens=self.chunk_tokens,
                    chunk_tokens_beside=config.prefill.chunk_tokens_beside_decodes,
                    max_num_seqs=workers.max_num_seqs,
                    room_tokens=int(config.router.inbox_steps * workers.max_num_batched_tokens),
                    late_s=self._lateness.reports_s,
                )
            noise = Lognormal(seed, "report", worker_id, sigma=error.sigma)
            reported = ReportedPace(factor=error.factor, noise=noise)
            self.fleet.join(
                AnalyticWorker(address, server, config=config.router, tie_hash=tie_hash(worker_id, tie_seed), reported=reported)
            )
            self._policies.observe(WorkerJoined(worker_id=worker_id, role=role, model_id=MODEL_ID), 0.0)
        self._by_id: Mapping[WorkerId, AnalyticWorker] = {worker.worker_id: worker for worker in self.fleet.workers}
        may_split = config.router.disaggregate is not Disaggregate.NEVER and any(role.prefills for role in roles.values())
        self._prefillers = [worker for worker in self.fleet.workers if worker.role.prefills or not may_split]
        self._room_tokens = config.router.inbox_steps * workers.max_num_batched_tokens

    def server(self, worker_id: WorkerId) -> PrefillServer | DecodeServer:
        return self._by_id[worker_id].server

    # --- time ---

    def run(self, tree: PromptTree) -> list[Served]:
        assert tree.block_tokens == self.block_tokens, "prompts taken apart for blocks of another size"
        events, prompts = self._events, tree.prompts
        served = [
            Served(request_id=prompt.place.request_id, arrived_s=prompt.at_s, num_prompt_tokens=prompt.num_tokens) for prompt in prompts
        ]
        arrivals = zip(prompts, served, strict=True)
        prompt, record = next(arrivals, (None, None))
        due_s = prompt.at_s + LINK_S if prompt is not None else inf
        while True:
            if events and events[0][0] < due_s:
                now, _, call = heappop(events)
                self._now = now
                call(now)
            elif prompt is not None and record is not None:
                self._now = due_s
                self._arrive(prompt, record, due_s)
                prompt, record = next(arrivals, (None, None))
                due_s = prompt.at_s + LINK_S if prompt is not None else inf
            else:
                return served

    def _call_at(self, at_s: float, call: Callable[[float], None]) -> None:
        self._num_events += 1
        heappush(self._events, (at_s, self._num_events, call))

    # --- placing ---

    def _arrive(self, prompt: Prompt, served: Served, now: float) -> None:
        flight = Flight(prompt, served)
        served.num_attempts = 1
        if prompt.num_tokens + 1 > self.fleet.pools(MODEL_ID).most_tokens:
            self._refuse(flight, "no worker can hold the prompt", now)
        elif self._num_waiting >= self._config.max_queue:
            self._refuse(flight, "the queue is full", now)
        elif self._num_waiting:
            self._wait(flight, now)
        else:
            self._catch_up(now)
            place = prompt.place
            choice = self._placement.choose(place, now, predicted_output_tokens=self.queue.predicted_output_tokens(place))
            if isinstance(choice, Choice):
                self._book(flight, choice, self.queue.serve_at_once(place), now)
            else:
                self._wait(flight, now)

    def _wait(self, flight: Flight, now: float) -> None:
        place = flight.prompt.place
        key = AttemptKey(request_id=place.request_id, attempt=place.attempt)
        if not self._num_waiting:  # what was on its way to us when nobody waited
            self._call_at(now + self._lateness.reports_s + self._lateness.report_interval_s / 2, self._pump)
        self._num_waiting += 1
        self.queue.push(Waiting(key=key, gateway=_GATEWAY, place=place, since_s=now))
        self._flights[place.request_id] = flight
        self._call_at(now + self._config.max_wait_s, lambda now: self._turn_away(key, now))

    def _turn_away(self, key: AttemptKey, now: float) -> None:
        """Who waited too long; whoever is next then may find room where that one did not."""
        flight = self._flights.pop(key.request_id, None)
        if flight is not None:
            self.queue.remove(key)
            self._num_waiting -= 1
            self._refuse(flight, "no worker had room", now)
            self._pump(now)

    def _room_at(self, at_s: float) -> None:
        if self._num_waiting:
            self._call_at(at_s, self._pump)

    def _pump(self, now: float) -> None:
        """Place who is next until nobody can be placed."""
        queue = self.queue
        while self._num_waiting:
            waiting = next(queue.heads())
            place = waiting.place
            self._catch_up(now)
            choice = self._placement.choose(place, now, predicted_output_tokens=queue.predicted_output_tokens(place))
            if not isinstance(choice, Choice):
                return
            self._num_waiting -= 1
            self._book(self._flights.pop(place.request_id), choice, queue.serve(waiting.key), now)
            if self._num_waiting and not self._may_have_room(next(queue.heads()).place, now):
                return

    def _may_have_room(self, place: Place, now: float) -> bool:
        """False: a choice would surely find every inbox full, so it need not be made. The rule is Placement's: below the bound, or for
        prompts mostly cached.
        """
        for worker in self._prefillers:
            worker.refresh(now)
            if worker.queued_prefill_tokens < self._room_tokens:
                return True
        return 2 * max(self.index.match(place.block_hashes).total_tokens.values(), default=0) >= place.num_tokens

    def _pump_if_changed(self, now: float) -> None:
        """A prompt or an answer is over. That is no room where every inbox was full of tokens: reports will tell of those by themselves."""
        if self._num_waiting:
            room_tokens = self._room_tokens
            if any([worker.queued_prefill_tokens < room_tokens for worker in self._prefillers]):
                self._pump(now)

    def _refuse(self, flight: Flight, reason: str, now: float) -> None:
        served = flight.served
        served.terminal, served.reason, served.end_s = "refused", reason, now + LINK_S

    def _book(self, flight: Flight, choice: Choice, predicted_output_tokens: int, now: float) -> None:
        prompt, served = flight.prompt, flight.served
        prefill, decode = self._by_id[choice.prefill.worker_id], self._by_id[choice.decode.worker_id]
        decodes = decode.server
        assert isinstance(decodes, DecodeServer), "there is always somebody who decodes (control/sections.py)"
        if self._watcher is not None:
            self._watcher.placing(self, prompt, choice, now)
        missed = prompt.num_tokens - choice.cached_tokens - choice.pulled_tokens
        flight.booked_s, flight.booked_tokens, flight.booked_pairs = now, missed, missed * prompt.num_tokens
        flight.booked_kv_tokens, flight.predicted_output_tokens = choice.kv_tokens, predicted_output_tokens
        flight.lands_s = now + choice.prefill_s
        flight.prefill, flight.decode = prefill.server, decodes
        flight.ready_s = now + 2 * LINK_S
        served.prefill_worker, served.decode_worker = prefill.worker_id, decode.worker_id
        confirmed_tokens = 0
        if self._is_listening:
            confirmed_tokens = self.index.confirmed_tokens(prefill.worker_id, prompt.place.block_hashes, choice.cached_tokens)
        if choice.pull is not None:
            self._pull(flight, choice)
        prefill.book_prefill(flight)
        decode.book_decode(flight)
        self.fleet.note_chosen(prefill, decode)
        self.index.speculate(prefill.worker_id, prompt.place.block_hashes, now)
        prefill.note_booked(prompt.num_tokens, choice.cached_tokens)
        self._regret.asked_in_vain_from(prompt.segments, (choice.cached_tokens + choice.pulled_tokens) // self.block_tokens)
        if self._is_listening:
            booked = Booked(
                request=prompt.place,
                prefill_worker=prefill.worker_id,
                decode_worker=decode.worker_id,
                cached_tokens=choice.cached_tokens,
                confirmed_tokens=confirmed_tokens,
                pulled_tokens=choice.pulled_tokens,
                prefill_cost=prefill.cost,
                decode_cost=decode.cost,
            )
            self._policies.observe(booked, now)
        prefill.server.submit(flight)

    def _pull(self, flight: Flight, choice: Choice) -> None:
        """What the source really has beyond the worker comes before the prompt is begun, as long as it takes to copy."""
        assert choice.pull is not None
        segments = flight.prompt.segments
        there = min(self._by_id[choice.pull.source].server.cache.match(segments), choice.pull.num_tokens // self.block_tokens)
        here = flight.prefill.cache.match(segments)
        flight.ready_s += 2 * LINK_S
        if there > here:
            flight.pulled_blocks = there
            flight.ready_s += self._copy_s + (there - here) * self._block_s

    def _catch_up(self, now: float) -> None:
        """What has come to the router by now."""
        late, index = self._late_changes, self.index
        while late and late[0][0] <= now:
            _, worker, stored, evicted = late.popleft()
            index.change(worker.worker_id, stored, evicted)
            if evicted and worker.role.prefills:
                self._regret.evicted_runs(evicted)
            if self._is_listening:
                self._policies.observe(KvChanged(worker_id=worker.worker_id, events=self._kv_events(stored, evicted)), now)
        index.expire(now)
        if self._is_listening and now >= self._tick_s:
            self._tick_s = now + TICK_S
            self._policies.observe(Tick(), now)
            for wish in self._policies.commands(now):
                self._placement.replicate(wish, now)

    def _kv_events(self, stored: list[Piece], evicted: list[Piece]) -> tuple[KvEvent, ...]:
        events: list[KvEvent] = []
        for segment, first, last in stored:
            names = segment.all_names(first, last) if self._names_all else segment.asked_names(first, last)
            if names:
                self._num_kv_events += 1
                events.append(BlocksStored(number=self._num_kv_events, parent=b"", hashes=names))
        for segment, first, last in evicted:
            names = segment.all_names(first, last) if self._names_all else segment.asked_names(first, last)
            if names:
                self._num_kv_events += 1
                events.append(BlocksRemoved(number=self._num_kv_events, hashes=names))
        return tuple(events)

    # --- what workers do ---

    def _cache_changed(self, worker_id: WorkerId, stored: list[Piece], evicted: list[Piece], now: float) -> None:
        worker = self._by_id[worker_id]
        worker.has_changed = True
        if stored or evicted:
            self._late_changes.append((now + self._lateness.kv_events_s, worker, stored, evicted))

    def _prefilled(self, flight: Flight, now: float) -> None:
        served, prompt = flight.served, flight.prompt
        served.first_token_s, served.num_cached_tokens, served.num_output_tokens = now + LINK_S, flight.cached_tokens, 1
        prefill, decode = self._by_id[served.prefill_worker], self._by_id[served.decode_worker]
        prefill.end_prefill(flight)
        decode.begin_decode(flight)
        if self._watcher is not None:
            self._watcher.prefilled(flight)
        if self._is_listening:
            key = AttemptKey(request_id=served.request_id, attempt=0)
            self._policies.observe(FirstToken(key=key, since_booked_s=now - flight.booked_s), now)
        if prompt.output_tokens < 2:
            self._over(flight, now)
        elif decode is prefill:
            flight.decode.join(flight, now)
            self._pump_if_changed(now)
        else:
            missing = prompt.num_tokens // self.block_tokens - decode.server.cache.match(prompt.segments)
            late_s = 2 * LINK_S + self._copy_s + missing * self._block_s
            self._call_at(now + late_s, lambda now: flight.decode.join(flight, now))
            self._pump_if_changed(now)

    def _decoded(self, flight: Flight, now: float) -> None:
        flight.served.num_output_tokens = flight.prompt.output_tokens
        self._over(flight, now)

    def _over(self, flight: Flight, now: float) -> None:
        served = flight.served
        served.end_s, served.terminal = now + LINK_S, "finished"
        self._by_id[served.decode_worker].end_decode(flight)
        self.queue.settle(
            "", predicted_output_tokens=flight.predicted_output_tokens, num_output_tokens=served.num_output_tokens, num_choices=1
        )
        if self._is_listening:
            key = AttemptKey(request_id=served.request_id, attempt=0)
            self._policies.observe(Finished(key=key, num_output_tokens=served.num_output_tokens), now)
        self._pump_if_changed(now)


def _listens(policy: PlacementPolicy) -> bool:
    """It makes something of what it is told."""
    observe: object = type(policy).observe
    return observe is not Stateless.observe
