"""The host tier under seeded pressure: pools far smaller than what is asked for, so that blocks are evicted, saved, and come back.

How: workers of tests/sim_cluster.py with a few beginnings in turn; a block about to be written anew is poisoned, so a word that was not
saved in time, or was loaded from a reused slot, changes tokens and shows as a wrong read. The events of both tiers are held against what
the core says it holds. The last test plants one-line bugs and sees the same laws break.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from engine.core.host_loads import HostLoads
from engine.core.host_tier import HostTier
from engine.core.landing import Landing
from protocol.kv import Endpoint, KVPeer
from protocol.messages import PrefixPull
from protocol.request import Request
from protocol.worker import Role, Tier
from simulator.sim_host_tier import SimHostTier
from simulator.sim_transport import NetworkFaults
from tests.sim_cluster import EOS, ROOT, VOCAB, SimCluster, cached_names, layout, make_request

pytestmark = pytest.mark.pure

NUM_SEEDS = 120
SEEDS_A_TEST = 20
NUM_REQUESTS = 24
SPACING_S = 0.08


def make_cluster(seed: int) -> SimCluster:
    rng = Random(seed * 4057 + 5)
    block_size = rng.choice([16, 16, 32])
    core = {
        "host_tier_bytes": rng.choice([1, 4, 12, 60]) * layout(block_size).block_bytes,
        "lease_s": 0.5,
        "max_handoff_wait_s": 3,
        "prefix_pull_deadline_s": 0.3,
    }
    cluster = SimCluster(
        rng.choice(({"b0": Role.BOTH}, {"b0": Role.BOTH, "b1": Role.BOTH}, {"p0": Role.PREFILL, "d0": Role.DECODE})),
        seed=seed,
        eos_period=rng.choice([0, 9]),
        block_size=block_size,
        num_blocks=rng.choice([10, 14, 20]),
        max_inflight_steps=rng.choice([1, 2]),
        max_num_batched_tokens=rng.choice([16, 64]),
        force_preempt_every=rng.choice([0, 0, 3]),
        faults=NetworkFaults(delay_s_max=rng.choice([0, 0.01])),
        load_fails=rng.choice([0.0, 0.0, 0.2]),
        core=core,
    )
    if rng.random() < 0.5:
        workers = list(cluster.workers)
        cluster.gateway.prefix_pull = lambda attempt, prefill: pull_from(cluster, rng.choice(workers), prefill)
    if rng.random() < 0.4:
        for _ in range(5):
            number = rng.randrange(NUM_REQUESTS)
            when_s = number * SPACING_S + 0.001 + 0.02 * rng.random()
            cluster.loop.call_at(when_s, lambda number=number: cluster.gateway.cancel(f"{number:032x}"))  # type: ignore[misc]
    return cluster


def pull_from(cluster: SimCluster, worker_id: str, prefill: str) -> PrefixPull | None:
    if worker_id == prefill:
        return None
    peer = KVPeer(worker_id=worker_id, epoch=cluster.workers[worker_id].epoch, endpoint=Endpoint())
    return PrefixPull(peer=peer, num_tokens=96)


def make_requests(seed: int) -> list[Request]:
    """Four beginnings that do not fit the pool together, in no order."""
    rng = Random(seed)
    beginnings = [[rng.randrange(3, VOCAB) for _ in range(96)] for _ in range(4)]

    def one(number: int) -> Request:
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20))]
        sampling: dict[str, Any] = {
            "n": rng.choice([1, 1, 2]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(99),
            "max_tokens": rng.randint(1, 12),
            "eos_token_ids": (EOS,),
        }
        return make_request(number, rng.choice(beginnings)[: rng.choice([48, 96])] + own, **sampling)

    return [one(number) for number in range(NUM_REQUESTS)]


def run(seed: int) -> Counter[str]:
    """One seed, judged; what happened in it."""
    cluster = make_cluster(seed)
    cluster.run(make_requests(seed), spacing_s=SPACING_S)
    cluster.judge()
    cluster.rest()
    happened: Counter[str] = Counter()
    for worker in cluster.workers.values():
        told = worker.core.kv_snapshot()
        assert cached_names(worker) == set(told.hashes)
        assert cached_names(worker, Tier.HOST) == set(told.host_hashes)
        happened.update(worker.core.snapshot(0.0).counters)
    return happened


HAPPENED: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_a_block_that_comes_back_has_the_bytes_it_had(first: int) -> None:
    for seed in range(first, first + SEEDS_A_TEST):
        HAPPENED.update(run(seed))


def test_blocks_did_come_back() -> None:
    """Else the seeds above would prove little."""
    if not HAPPENED:
        for seed in range(10):
            HAPPENED.update(run(seed))
    print(f"\n{ {name: n for name, n in sorted(HAPPENED.items()) if name.startswith(('host', 'prefix'))} }")
    for name in ("host_blocks_saved", "host_loads", "host_load_tokens", "host_load_failures", "prefix_pulls"):
        assert HAPPENED[name] > 0, name


def test_a_prompt_that_comes_back_is_loaded_not_computed() -> None:
    """Three prompts of which the pool holds two. Seen to fail with `begin` passing everything on."""
    core = {"host_tier_bytes": 40 * layout().block_bytes}
    cluster = SimCluster({"b0": Role.BOTH}, num_blocks=14, core=core, max_num_batched_tokens=64)
    rng = Random(1)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(81)] for _ in range(3)]
    cluster.run([make_request(n, prompt, max_tokens=1) for n, prompt in enumerate(prompts)], spacing_s=1.0)
    computed = cluster.counters("b0")["prompt_tokens_computed"]
    cluster.run([make_request(7, prompts[0], max_tokens=4)], spacing_s=1.0)
    cluster.judge()
    cluster.rest()
    counters = cluster.counters("b0")
    assert (computed, counters["prompt_tokens_computed"] - computed) == (243, 1)
    assert counters["host_loads"] == 1 and counters["host_load_tokens"] >= 16
    ledger = cluster.gateway.ledgers[f"{7:032x}"]
    assert ledger.num_cached_tokens == [80]


def test_another_root_finds_nothing_in_the_tier() -> None:
    """Slots are found under the root they were computed for. Seen to fail with every prompt looked up under one root."""
    cluster = SimCluster({"b0": Role.BOTH}, num_blocks=14, core={"host_tier_bytes": 40 * layout().block_bytes})
    rng = Random(1)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(81)] for _ in range(3)]
    cluster.run([make_request(n, prompt, max_tokens=1) for n, prompt in enumerate(prompts)], spacing_s=1.0)
    cluster.run([make_request(7, prompts[0], max_tokens=1, root=b"R" * 16)], spacing_s=1.0)
    assert cluster.counters("b0")["host_loads"] == 0 and not cluster.gateway.ledgers[f"{7:032x}"].num_cached_tokens
    assert ROOT != b"R" * 16


# --- negative controls ------------------------------------------------------------------------------------------------


def forget_to_save(self: SimHostTier, command: Any) -> None:
    for slot, generation in zip(command.slots, command.generations, strict=True):
        self._slots[slot] = (generation, self._slots.get(slot, (0, self._pool.read_block(0)))[1])


def reuse_what_is_read(self: HostTier) -> bool:
    self._drop(next(iter(self._entries.values())))
    return True


def save_too_late(self: HostLoads) -> list[Any]:
    late, self.__dict__["late"] = self.__dict__.get("late", []), SAVES(self)
    return late


def keep_whatever_came(self: Landing) -> None:
    self.keep()


SAVES = HostLoads.saves

BUGS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a block is not saved": (SimHostTier, "save", forget_to_save),
    "a slot is reused while it is read": (HostTier, "_make_room", reuse_what_is_read),
    "saved a turn too late": (HostLoads, "saves", save_too_late),
    "a failed load goes to the cache": (Landing, "discard", keep_whatever_came),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = BUGS[bug]
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)):
        for seed in range(60):
            run(seed)
