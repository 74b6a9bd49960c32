"""What the fast simulation's router believes is what the router's own code would believe of the same reports, bookings and events."""

from __future__ import annotations

from random import Random

import pytest

from control.config import load_config
from engine.step_time import LinearStepTime, RooflineStepTime, StepShape
from protocol.messages import KvEvents
from protocol.request import AttemptKey
from protocol.worker import BlocksRemoved, BlocksStored, KvEvent, WorkerSnapshot, WorkerState
from router import policies
from router.choice import Choice
from router.fleet import Worker
from router.holds import Hold, Phase
from router.prefix_index import PrefixIndex
from simulator.analytic_fleet import AnalyticWorker
from simulator.analytic_pace import Pace
from simulator.decode_server import DecodeServer
from simulator.policy_only import PolicyOnlyCluster, Watcher, prompts_of
from simulator.prefill_server import PrefillServer
from simulator.prompt_tree import Prompt
from simulator.segment_cache import Piece
from simulator.segment_index import SegmentIndex
from simulator.traces.generators import Arrivals, generate

pytestmark = pytest.mark.pure

CONFIG = load_config(
    {
        "workers": {
            "executor": "paced",
            "prefill_workers": 2,
            "decode_workers": 2,
            "block_size": 64,
            "num_kv_blocks": 256,
            "max_num_batched_tokens": 4096,  # steps of 0.4 s: reports are at times too old to be believed
        }
    }
)
SHEET = ("queued_prefill_tokens", "queued_prefill_s", "free_kv_tokens", "reclaimable_kv_tokens", "prompt_room_tokens")
OF_DECODE = ("num_sequences", "kv_tokens")


class Doubles(Watcher):
    """Before each choice becomes a booking: a router's worker is told what this one was, and asked for its sheet."""

    def __init__(self) -> None:
        self.num_compared = self.num_busy = self.num_stale = 0

    def placing(self, cluster: PolicyOnlyCluster, prompt: Prompt, choice: Choice, now: float) -> None:
        for worker in cluster.fleet.workers:
            double = self.double_of(worker, now)
            double.refresh(now)
            for name in SHEET + (OF_DECODE if isinstance(worker.server, DecodeServer) else ()):
                assert getattr(worker, name) == pytest.approx(getattr(double, name), rel=1e-9), (worker.worker_id, name, now)
            self.num_compared += 1
            self.num_busy += worker.queued_prefill_tokens > 0
            self.num_stale += now > worker.read_at_s + CONFIG.router.snapshot_stale_s

    @staticmethod
    def double_of(worker: AnalyticWorker, now: float) -> Worker:
        router, server = CONFIG.router, worker.server
        double = Worker(
            worker.address,
            model=worker.model,
            link=worker.link,
            tie_hash=0,
            stale_s=router.snapshot_stale_s,
            settle_s=router.booking_settle_s,
        )
        double.take_common_cost(worker.cost)
        double.context_mean = worker.context_mean
        waiting, read_at_s = 0, now
        if isinstance(server, PrefillServer):
            waiting, read_at_s, _ = server.waiting(now)
            waiting += worker.late_tokens
        elif server.is_mixing:
            waiting = server.waiting_tokens
        booked, fresh = worker.booked, worker.fresh
        seen = (
            booked.num_prefills - fresh.num_prefills,
            booked.prefill_tokens - fresh.prefill_tokens,
            booked.prefill_pairs - fresh.prefill_pairs,
        )
        of_fresh = (fresh.num_prefills, fresh.prefill_tokens, fresh.prefill_pairs)
        for flight in worker.decoding:
            double.add_hold(hold(flight.served.request_id, Phase.DECODE, kv_tokens=flight.booked_kv_tokens), read_at_s - 1.0, pending=False)
        for kind, (count, tokens, pairs), since_s in (("seen", seen, read_at_s - 1.0), ("fresh", of_fresh, read_at_s + 1.0)):
            for number in range(count):  # the first has it all: nobody but the sums tells them apart
                part = (tokens, pairs) if number == 0 else (0, 0)
                double.add_hold(hold(f"{kind} {number}", Phase.PREFILL, tokens=part[0], pairs=part[1]), since_s, pending=False)
        for flight in worker.pending:
            double.add_hold(hold(flight.served.request_id, Phase.DECODE, kv_tokens=flight.booked_kv_tokens), now, pending=True)
        double.take_snapshot(snapshot(worker, waiting, now - read_at_s), now, refit_interval_s=1e9)
        return double


def hold(name: str, phase: Phase, *, tokens: int = 0, pairs: int = 0, kv_tokens: int = 0) -> Hold:
    return Hold(
        key=AttemptKey(request_id=name, attempt=0),
        phase=phase,
        worker_id="w",
        prefill_tokens=tokens,
        prefill_pairs=pairs,
        num_sequences=int(phase is Phase.DECODE),
        kv_tokens=kv_tokens,
    )


def snapshot(worker: AnalyticWorker, waiting_tokens: int, age_s: float) -> WorkerSnapshot:
    server, cache = worker.server, worker.server.cache
    decodes = isinstance(server, DecodeServer)
    return WorkerSnapshot(
        worker_id=worker.worker_id,
        epoch=1,
        role=worker.role,
        state=WorkerState.READY,
        age_s=age_s,
        step_count=1,
        last_event_number=0,
        num_waiting=0,
        num_running=len(worker.decoding) if decodes else 0,
        waiting_tokens=waiting_tokens,
        running_kv_tokens=round(server.kv_tokens) if isinstance(server, DecodeServer) else 0,
        num_blocks_total=cache.num_blocks,
        num_blocks_free=cache.num_free,
        num_blocks_owned=cache.num_reserved + cache.num_pinned,
        num_blocks_leased=0,
        num_blocks_cached=cache.num_named - cache.num_pinned,
        num_preemptions=0,
        step_time_ewma_s=0.0,
        counters={},
    )


@pytest.mark.parametrize("policy", ["round_robin", "prefix_cost"])
def test_a_sheet_is_what_the_routers_own_worker_would_write(policy: str) -> None:
    """How: at each of some 250 bookings, each worker beside a double of router.fleet that is told the same. Seen to fail with reports
    that are believed however old, and with room that forgets what is on its way.
    """
    trace = generate("video_qa", Arrivals(rate_per_s=6.0), num_requests=250, seed=1)
    watcher = Doubles()
    cluster = PolicyOnlyCluster(CONFIG, policies.load(policy), name=policy, seed=0, watcher=watcher)
    cluster.run(prompts_of(trace, CONFIG))
    assert watcher.num_compared > 800 and watcher.num_busy > 300 and watcher.num_stale > 20


@pytest.mark.parametrize("seed", range(5))
def test_the_index_answers_as_the_routers_own(seed: int) -> None:
    """How: random stores, evictions and guesses to both, the same prompts asked of both. Seen to fail with guesses that never end."""
    rng, now = Random(seed), 0.0
    tree = prompts_of(generate("toolbench", Arrivals(rate_per_s=1.0), num_requests=60, seed=seed), CONFIG)
    ours = SegmentIndex(block_tokens=tree.block_tokens, speculative_ttl_s=2.0)
    theirs = PrefixIndex(max_bytes=1 << 30, speculative_ttl_s=2.0)
    workers = ["a", "b", "c"]
    held: dict[str, dict[object, int]] = {worker: {} for worker in workers}
    numbers = dict.fromkeys(workers, 0)
    for worker in workers:
        theirs.join(worker, 1)
    for _ in range(400):
        now += rng.expovariate(2.0)
        worker, prompt = rng.choice(workers), rng.choice(tree.prompts)
        stored: list[Piece] = []
        evicted: list[Piece] = []
        act = rng.random()
        if act < 0.35:
            stored = [(s, held[worker].get(s, 0), s.num_blocks) for s in prompt.segments if held[worker].get(s, 0) < s.num_blocks]
        elif act < 0.6:
            present = [s for s in prompt.segments if held[worker].get(s, 0)]
            if present and not any(
                held[worker].get(s) for p in tree.prompts for s in p.segments[len(present) :] if present[-1] in p.segments
            ):
                have = held[worker][present[-1]]
                evicted = [(present[-1], rng.randrange(have), have)]
        else:
            ours.speculate(worker, prompt.place.block_hashes, now)
            theirs.speculate(worker, tuple(prompt.names), now)
        for segment, _, last in stored:
            held[worker][segment] = last
        for segment, first, _ in evicted:
            held[worker][segment] = first
        ours.change(worker, stored, evicted)
        events: list[KvEvent] = []
        for segment, first, last in stored:
            numbers[worker] += 1
            events.append(BlocksStored(number=numbers[worker], parent=b"", hashes=segment.all_names(first, last)))
        for segment, first, last in evicted:
            numbers[worker] += 1
            events.append(BlocksRemoved(number=numbers[worker], hashes=segment.all_names(first, last)))
        theirs.apply(KvEvents(worker_id=worker, epoch=1, events=tuple(events)))
        for index in (ours, theirs):
            index.expire(now)
        for asked in rng.sample(tree.prompts, 6):
            names = tuple(asked.names)
            assert ours.match(asked.place.block_hashes).total_tokens == theirs.match(names).total_tokens
            for each in workers:
                assert ours.confirmed_tokens(each, asked.place.block_hashes, asked.num_tokens) == theirs.confirmed_tokens(
                    each, names, len(names) * 16
                )


@pytest.mark.parametrize(
    "model",
    [
        LinearStepTime(
            prefill_base_s=5e-3, prefill_token_s=1e-4, prefill_read_s=1e-9, decode_base_s=0.015, decode_sequence_s=5e-5, decode_read_s=1e-8
        ),
        RooflineStepTime(
            num_parameters=8e9,
            weight_bytes=16e9,
            kv_token_bytes=131_072,
            attention_flops_per_read=524_288,
            flops_per_s=4e14,
            bytes_per_s=2e12,
            overhead_s=3e-3,
        ),
    ],
)
def test_runs_of_steps_take_what_their_steps_take(model: LinearStepTime | RooflineStepTime) -> None:
    """How: against step_s of the shapes, one by one. Seen to fail with reads counted from the start of the prompt."""
    pace = Pace(model)
    one_by_one = [model.step_s(StepShape().with_prefill(start, 512)) for start in range(1000, 1000 + 4 * 512, 512)]
    assert pace.chunks_s(1000, 4, 512) == pytest.approx(sum(one_by_one))
    last_s = model.step_s(StepShape().with_prefill(1000 + 4 * 512, 100))
    assert pace.prompt_s(1000, 4 * 512 + 100, 512) == pytest.approx(sum(one_by_one) + last_s)
    both = StepShape().with_prefill(0, 300).with_prefill(640, 200)
    assert pace.step_s([(0, 300), (640, 200)]) == pytest.approx(model.step_s(both))
    assert pace.decode_step_s(12, 40_000) == pytest.approx(model.step_s(StepShape().with_decodes(12, 40_000)))
