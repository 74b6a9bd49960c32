"""One seed: a small crowded cluster, 200 requests of three tenants, faults of several kinds, every law looked at; the seed is the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from control.config import ClusterConfig, load_config
from gateway.events import Event
from gateway.session import Session
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS, block_hashes
from protocol.errors import IllegalMove
from protocol.request import Request, SamplingParams, token_buffer
from simulator.faults import LIVE_STATES, FaultInjector, Kind, draw_plan
from simulator.faulty_cluster import FaultyCluster
from simulator.laws import Law, LawBroken, RequestLaws, WorkerLaws, check_books
from simulator.routed_cluster import MODEL_ID, VOCAB_SIZE
from simulator.sim_processes import SimWorkerProcess

NUM_REQUESTS = 200
BEGIN_S = 1.0  # all have reported then
SERVED_WITHIN_S = 240.0  # of virtual time, after the last request came
AT_REST_WITHIN_S = 60.0
TOP_UP_S = 0.002  # after a request came
BOOKING_TTL_S = 8.0
SPECULATIVE_TTL_S = 0.3
CHECK_ROUTER_EVENTS = 100  # of sessions, between two looks at all bookings
TENANTS = (b"tenant-0 of three", b"tenant-1 of three", b"tenant-2 of three")
POLICIES = ("prefix_cost", "prefix_cost", "least_work", "round_robin", "power_of_two", "e2")
POOLS = ((2, 2, 0), (2, 2, 0), (1, 2, 0), (2, 1, 1), (1, 1, 2), (0, 0, 3))  # prefill, decode, mixed workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a seed. `law` None: all of them hold."""

    seed: int
    law: Law | None
    text: str = ""  # what is broken, and where
    num_requests: int = 0
    num_retried: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    effects: dict[str, int] = field(default_factory=dict)  # fault -> how often it met a request
    hits: dict[str, int] = field(default_factory=dict)  # "fault/state" -> requests
    duration_s: float = 0.0  # on the virtual clock

    @property
    def num_kinds(self) -> int:
        """Kinds of faults that took effect."""
        return sum(count > 0 for count in self.effects.values())


def run_seed(seed: int, *, kinds: tuple[Kind, ...] = tuple(Kind), num_requests: int = NUM_REQUESTS) -> Outcome:
    """Everything follows from the arguments."""
    run = _Run(seed, kinds, num_requests)
    law, text = None, ""
    try:
        run.perform()
    except LawBroken as broken:
        law, text = broken.law, str(broken)
    except (AssertionError, IllegalMove, KeyError, ValueError, IndexError) as error:
        law, text = Law.OWN, f"{Law.OWN.value}: {type(error).__name__}: {error}"
    return run.outcome(law, text)


class _Run:
    def __init__(self, seed: int, kinds: tuple[Kind, ...], num_requests: int) -> None:
        self._seed = seed
        rng = Random(f"cluster {seed}")
        self._config = draw_config(rng)
        gap_s = rng.choice((0.004, 0.008, 0.012))
        self._requests = list(draw_requests(Random(f"requests {seed}"), num_requests))
        arrivals = Random(f"arrivals {seed}")
        self._arrivals_s = sorted(BEGIN_S + arrivals.random() * gap_s * num_requests for _ in self._requests)
        self._by_id = {request.request_id: request for request in self._requests}
        self._laws = RequestLaws(self._requests, vocab_size=VOCAB_SIZE)
        self._injector: FaultInjector | None = None
        self._cluster = FaultyCluster(self._config, seed=seed, max_kept_kv_events=rng.choice((2, 16, 8192)), on_start=self._watch)
        plan = draw_plan(Random(f"plan {seed}"), kinds, begin_s=BEGIN_S, end_s=self._arrivals_s[-1])
        top_up_s = [self._arrivals_s[int(share * (num_requests - 1))] + TOP_UP_S for share in (0.6, 0.8, 1.0)]
        self._injector = FaultInjector(self._cluster, plan, Random(f"faults {seed}"), kinds=kinds, top_up_s=top_up_s)
        gateway = self._cluster.gateway
        gateway.on_deliver = self._laws.delivered
        gateway.on_end = self._laws.ended
        gateway.on_event = self._hear
        self._num_heard = 0

    def perform(self) -> None:
        cluster, gateway, num_sent = self._cluster, self._cluster.gateway, len(self._requests)
        for at_s, request in zip(self._arrivals_s, self._requests, strict=True):
            cluster.loop.call_at(at_s, lambda request=request: gateway.submit(request))  # type: ignore[misc]
        deadline_s = self._arrivals_s[-1] + SERVED_WITHIN_S
        if not cluster.loop.run(lambda: gateway.num_over == num_sent, deadline_s=deadline_s):
            raise LawBroken(Law.ONE_END, f"{sorted(gateway.live)[:3]} and {len(gateway.live)} in all do not end")
        self._rest()

    def _rest(self) -> None:
        """Until nobody holds anything."""
        loop, cluster = self._cluster.loop, self._cluster
        if not loop.run(lambda: not self._unrest(), deadline_s=loop.now + AT_REST_WITHIN_S):
            law, text = self._unrest() or (Law.BLOCKS, "")
            raise LawBroken(law, text)
        loop.run(lambda: False, deadline_s=loop.now + 2 * SPECULATIVE_TTL_S)  # guesses are over then
        router = cluster.router
        check_books(router.check)
        self._compare_caches()
        for worker in cluster.workers.values():
            check_books(worker.core.check)
        if router.counters["bookings_expired"]:
            raise LawBroken(Law.BLOCKS, f"{router.counters['bookings_expired']} bookings were never ended")

    def _compare_caches(self) -> None:
        """What the router would find for each prompt, beside what lies there."""
        cluster = self._cluster
        held = {worker_id: set(worker.core.kv_snapshot().hashes) for worker_id, worker in cluster.workers.items()}
        for request in self._requests:
            hashes = block_hashes(request.cache_root, request.prompt_token_ids)
            depths = {name: next((i for i, h in enumerate(hashes) if h not in names), len(hashes)) for name, names in held.items()}
            found = cluster.router.index.match(hashes).device_tokens
            right = {name: depth * HASH_BLOCK_SIZE_TOKENS for name, depth in depths.items() if depth}
            if found != right:
                raise LawBroken(Law.INDEX, f"the router finds {found} of {request.request_id}, cached are {right}")

    def _unrest(self) -> tuple[Law, str] | None:
        """What is not at rest yet."""
        cluster = self._cluster
        router = cluster.router
        if not cluster.router_process.is_alive or not all(worker.is_running for worker in cluster.workers.values()):
            return Law.BLOCKS, "a process is away"
        for worker_id, worker in cluster.workers.items():
            snapshot = worker.core.snapshot(cluster.loop.now) if worker.core.is_at_rest else None
            if snapshot is None or snapshot.num_blocks_free + snapshot.num_blocks_cached != snapshot.num_blocks_total:
                return Law.BLOCKS, f"{worker_id} holds blocks or work at rest"
        if len(router.bookings) or len(router.waiting_room):
            return Law.BLOCKS, f"{len(router.bookings)} bookings and {len(router.waiting_room)} waiting attempts are left at the router"
        for worker_id, worker in cluster.workers.items():
            told, right = router.index.told_by(worker_id), worker.core.kv_snapshot()
            if told is None or set(told.hashes) != set(right.hashes) or set(told.host_hashes) != set(right.host_hashes):
                return Law.INDEX, f"the router does not know what {worker_id} caches"
        return None

    def _watch(self, process: SimWorkerProcess) -> None:
        if self._injector is not None:
            self._injector.started(process)
        process.after_turn = WorkerLaws(process.worker, self._requests, self._by_id, num_blocks=process.address.num_kv_blocks)

    def _hear(self, session: Session, event: Event) -> None:
        assert self._injector is not None
        self._injector.hear(session, event)
        self._laws.hear(session, event)
        self._num_heard += 1
        if self._num_heard % CHECK_ROUTER_EVENTS == 0:
            check_books(self._cluster.router.check)

    def outcome(self, law: Law | None, text: str) -> Outcome:
        served = self._cluster.gateway.served.values()
        injector = self._injector
        assert injector is not None
        return Outcome(
            seed=self._seed,
            law=law,
            text=text,
            num_requests=len(served),
            num_retried=sum(one.num_attempts > 1 for one in served),
            ends=dict(sorted(Counter(one.terminal or "open" for one in served).items())),
            effects={kind.value: injector.effects[kind] for kind in Kind if injector.effects[kind]},
            hits={f"{k.value}/{s.value}": injector.hits[k, s] for k in Kind for s in LIVE_STATES if injector.hits[k, s]},
            duration_s=round(self._cluster.loop.now, 6),
        )


def draw_config(rng: Random) -> ClusterConfig:
    """A few workers with little room: every bound is met now and then."""
    prefill, decode, mixed = rng.choice(POOLS)
    policy = rng.choice(POLICIES)
    return load_config(
        {
            "workers": {
                "executor": "paced",
                "prefill_workers": prefill,
                "decode_workers": decode,
                "mixed_workers": mixed,
                "num_kv_blocks": rng.choice((40, 64, 96)),
                "max_num_batched_tokens": rng.choice((64, 128, 256)),
                "max_num_seqs": rng.choice((6, 12, 24)),
                "max_inflight_steps": rng.choice((1, 1, 2)),
                "max_waiting": rng.choice((8, 64)),
                "lease_s": rng.choice((0.3, 1.0)),
                "pull_deadline_s": rng.choice((0.1, 0.3)),
                "max_handoff_wait_s": rng.choice((0.3, 2.0)),
                "prefix_pull_deadline_s": rng.choice((0.05, 0.2)),
                "offer_early": rng.random() < 0.5,
                "force_preempt_every": rng.choice((0, 0, 9)),
                "kv_host_tier_bytes": rng.choice((0, 0, 64 << 20)),
            },
            "paced": {"prefill_base_s": 0.001, "prefill_token_s": rng.choice((2e-5, 1e-4)), "decode_base_s": 0.003},
            "simulation": {"link_bytes_per_s": rng.choice((50e9, 3e9, 3e8))},  # 26 MB of a prompt of 200 tokens: half a millisecond to 90
            "transport": {"kv_load_failure_policy": rng.choice(("recompute", "recompute", "retry"))},
            "router": {
                "policy": policy,
                "disaggregate": rng.choice(("auto", "always", "always")),
                "local_prefill_max_tokens": 8,
                "max_wait_s": 30.0,
                "no_worker_wait_s": 5.0,
                "booking_ttl_s": BOOKING_TTL_S,
                "speculative_ttl_s": SPECULATIVE_TTL_S,
                "resync_interval_s": 0.2,
                "ready_wait_s": 0.5,
                "prefix_pull_min_tokens": 16,
                "prefix_pull_s_base": 1e-5,
                "link_bytes_per_s": 100e9,
            },
            "gateway": {
                "router_silent_s": 0.5,
                "link_wait_s": 0.3,
                "placement_wait_s": 60.0,
                "request_timeout_s": 180.0,
                "max_attempts": 12,
            },
        }
    )


def draw_requests(rng: Random, count: int) -> Iterator[Request]:
    """Prompts of 20 to 200 tokens; half of them begin like others, of whichever tenant. Their sampling seed is their number."""
    trunks = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(16, 120))] for _ in range(4)]
    for number in range(count):
        tenant = rng.randrange(len(TENANTS))
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(20, 80))]
        prompt = (rng.choice(trunks) if rng.random() < 0.6 else []) + own
        yield Request(
            request_id=f"{number:032x}",
            model_id=MODEL_ID,
            prompt_token_ids=token_buffer(prompt),
            sampling=SamplingParams(
                n=rng.choice((1, 1, 1, 1, 2, 3)),
                temperature=rng.choice((0.0, 1.0)),
                seed=number,
                max_tokens=min(rng.randint(1, 20), rng.randint(1, 20)),
                min_tokens=rng.choice((0, 4)),
                stop_token_ids=rng.choice(((), tuple(range(40)))),
                num_logprobs=rng.choice((None, None, None, 0, 2)),
            ),
            cache_root=TENANTS[tenant][:16],
            arrival_s=0.0,
            tenant=f"tenant-{tenant}",
            priority=rng.choice((0, 0, 1)),
        )
