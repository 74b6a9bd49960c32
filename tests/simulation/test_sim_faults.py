"""Worker cores under seeded faults: messages lost and repeated, copies that fail, hang or come late, steps that fail, workers killed.

How: SimCluster drives real cores on a virtual clock with words for KV; a checker looks at every turn, and at the end
    I1  every request has exactly one terminal state        (the gateway asserts it)
    I2  its tokens are those of the undisturbed run         (computed one after the other, by other code)
    I3  at rest no block is owned or leased, and free + cached = total
    I5  no step read a word that its tokens do not call for (stale, unverified or reused blocks are poisoned)
The last tests plant one-line bugs and see the same laws break.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from engine.core.block_pool import BlockPool
from engine.core.events import CancelPull
from engine.core.intake import Intake
from engine.core.offers import Offers
from engine.core.residence import Residence
from engine.core.worker_core import WorkerCore
from kvtransfer.handoff import TargetHandoff
from protocol.kv import FailurePolicy, Outcome
from protocol.lifecycle import HandoffState, advance
from protocol.request import Request
from protocol.worker import Role
from simulator.sim_transport import NetworkFaults, SimTransport
from tests.sim_cluster import EOS, VOCAB, SimCluster, cached_names, make_request

pytestmark = pytest.mark.pure

NUM_SEEDS = 200
SEEDS_A_TEST = 20
NUM_REQUESTS = 12

ROLES = (
    {"b0": Role.BOTH},
    {"p0": Role.PREFILL, "d0": Role.DECODE},
    {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE},
    {"b0": Role.BOTH, "b1": Role.BOTH},
)


def make_cluster(seed: int) -> SimCluster:
    """A small, crowded cluster: every bound is met now and then."""
    rng, apart = Random(seed * 7919 + 3), Random(f"{seed} apart")
    faults = NetworkFaults(
        lose_message=rng.choice([0, 0.2]),
        repeat_message=rng.choice([0, 0.2]),
        fail_pull=rng.choice([0, 0.2]),
        hang_pull=rng.choice([0, 0.1]),
        delay_s_max=rng.choice([0, 0.05, 0.5]),
        deaf_pull=apart.choice([0, 0.05]),
    )
    core = {
        "lease_s": rng.choice([0.3, 2]),
        "pull_deadline_s": 1,
        "max_handoff_wait_s": rng.choice([0.2, 3]),
        "max_waiting": rng.choice([3, 100]),
        "max_offered_bytes": rng.choice([3000, 1 << 30]),
        "offer_early": bool(seed % 2),
        "kv_load_failure_policy": apart.choice([FailurePolicy.RECOMPUTE, FailurePolicy.RETRY]),
    }
    cluster = SimCluster(
        rng.choice(ROLES),
        seed=seed,
        eos_period=rng.choice([0, 9]),
        block_size=rng.choice([16, 16, 32]),
        num_blocks=rng.choice([10, 14, 30, 60]),
        max_inflight_steps=rng.choice([1, 2]),
        max_num_batched_tokens=rng.choice([7, 16, 64]),
        max_num_seqs=rng.choice([4, 6]),
        enable_prefix_caching=rng.random() < 0.7,
        force_preempt_every=rng.choice([0, 0, 3]),
        step_time_budget_s=rng.choice([None, 0.015]),
        faults=faults,
        core=core,
    )
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 3)):
            cluster.loop.call_at(rng.random(), lambda: kill(cluster, rng))
    if rng.random() < 0.6:
        for _ in range(3):
            request_id = f"{rng.randrange(NUM_REQUESTS):032x}"
            cluster.loop.call_at(0.05 + rng.random(), lambda request_id=request_id: cluster.gateway.cancel(request_id))  # type: ignore[misc]
    if rng.random() < 0.4:
        draw = Random(seed)
        for worker in cluster.workers.values():
            worker.executor.error = lambda _: "out of memory" if draw.random() < 0.004 else None
    return cluster


def kill(cluster: SimCluster, rng: Random) -> None:
    """kill -9 and a fresh incarnation of the same name."""
    worker_id = rng.choice(list(cluster.workers))
    cluster.workers[worker_id].kill()
    cluster.gateway.lost(worker_id)
    cluster.start(worker_id)


def make_requests(seed: int) -> list[Request]:
    rng = Random(seed)
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]

    def one(number: int) -> Request:
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 50))]
        sampling: dict[str, Any] = {
            "n": rng.choice([1, 1, 2, 4]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(99),
            "max_tokens": rng.randint(1, 40),
            "eos_token_ids": (EOS,),
            "stop_token_ids": rng.choice([(), (7, 8, 9)]),
            "min_tokens": rng.choice([0, 5]),
        }
        return make_request(number, (shared if rng.random() < 0.5 else []) + own, priority=rng.choice([0, 0, 1]), **sampling)

    return [one(number) for number in range(NUM_REQUESTS)]


def run(seed: int) -> Counter[str]:
    """One seed, judged; what happened in it."""
    cluster = make_cluster(seed)
    cluster.run(make_requests(seed))
    cluster.judge()
    cluster.rest()
    happened: Counter[str] = Counter(retries=sum(ledger.attempt for ledger in cluster.gateway.ledgers.values()))
    happened["stale copies refused"] = cluster.transport.num_stale
    for worker in cluster.workers.values():
        assert cached_names(worker) == set(worker.core.kv_snapshot().hashes), "events and snapshot tell of the same blocks"
        happened.update(worker.core.snapshot(0.0).counters)
    return happened


def run_cancel_storm(seed: int) -> int:
    """Most requests are cancelled while their KV is on its way to a target with hardly a block to spare; how many were."""
    rng = Random(seed)
    faults = NetworkFaults(delay_s_max=0.3)
    cluster = SimCluster({"p0": Role.PREFILL, "d0": Role.DECODE}, seed=seed, num_blocks=12, enable_prefix_caching=False, faults=faults)
    storm = 0

    def watch() -> None:
        nonlocal storm
        for live in list(cluster.workers["d0"].core._attempts.values()):
            if live.handoff is not None and live.handoff.is_pulling and rng.random() < 0.3:
                storm += 1
                cluster.gateway.cancel(live.key.request_id)
        cluster.loop.call_later(0.02, watch)

    watch()
    cluster.run(make_requests(seed))
    cluster.judge()
    cluster.rest()
    return storm


def test_laws_hold_when_attempts_are_cancelled_while_their_kv_moves() -> None:
    assert sum(run_cancel_storm(seed) for seed in range(10)) >= 10


HAPPENED: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_laws_hold_under_faults(first: int) -> None:
    for seed in range(first, first + SEEDS_A_TEST):
        HAPPENED.update(run(seed))


def test_the_faults_did_happen() -> None:
    """Else the seeds above would prove little."""
    if not HAPPENED:
        HAPPENED.update(run(4) + run(7) + run(14))
    print(f"\n{dict(HAPPENED)}")
    for name in ("retries", "handoffs_taken", "transfer_failures", "preemptions", "cached_tokens", "late_messages", "pulls_again"):
        assert HAPPENED[name] > 0, name


def test_a_seed_is_a_run() -> None:
    assert run(11) == run(11)


# --- negative controls: each planted bug breaks a law within some seeds -------------------------------------------------


def give_back_without_pins(self: Residence, block_ids: Any, _: int) -> None:
    for block_id in reversed(block_ids):
        self._pool.disown(block_id)


def cancel_without_quarantine(self: Intake, live: Any) -> Any:
    commands = INTAKE_CANCEL(self, live)
    for handoff_id in list(self._quarantine):
        self._scheduler.residence.give_back(self._quarantine.pop(handoff_id), -1)
    return commands


def abandon_without_quarantine(self: Intake, live: Any, target: TargetHandoff) -> Any:
    return CancelPull(handoff_id=target.handoff_id)  # the attempt gives its blocks back at once


def offer_without_lease(self: Offers, live: Any, token_ids: Any, now: float, **early: int) -> Any:
    handoff = OFFERS_MAKE(self, live, token_ids, now, **early)
    self._pool.end_lease(handoff.shards[0].block_ids)
    return handoff


def lose_surplus_check(self: WorkerCore, live: Any) -> None:
    self._attempts.pop(live.part, None)  # ended, but its sequences go on


def believe_everything(self: Any, _: Any) -> bool:
    return True


def believe_failed_copies(self: TargetHandoff, _: Outcome) -> None:
    self.state = advance(self.state, HandoffState.VERIFIED)


def never_shared(self: BlockPool, _: int) -> bool:
    return False


INTAKE_CANCEL, OFFERS_MAKE = Intake.cancel, Offers.make

BUGS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "blocks freed while a step in flight names them": (Residence, "give_back", give_back_without_pins),
    "target blocks freed while a copy writes them": (Intake, "cancel", cancel_without_quarantine),
    "target blocks freed while a copy that nobody waits for writes them": (Intake, "_abandon", abandon_without_quarantine),
    "offered blocks not leased": (Offers, "make", offer_without_lease),
    "an attempt ends, its sequences do not": (WorkerCore, "_end", lose_surplus_check),
    "generations not compared after the copy": (SimTransport, "_is_fresh", believe_everything),
    "a shared block written without a copy": (BlockPool, "is_shared", never_shared),
    "decoding from a copy that failed": (TargetHandoff, "finish_pull", believe_failed_copies),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = BUGS[bug]
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)):
        for seed in range(60):
            run_cancel_storm(seed)
            run(seed)
