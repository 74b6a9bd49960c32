"""What a placement policy promises, and what the router does when one does not keep it."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random

import pytest

from protocol.errors import ConfigError
from protocol.messages import Place
from protocol.worker import BlocksRemoved, BlocksStored, WorkerId
from router import policies
from router.config import Disaggregate
from router.policies import Cost, PlacementView, Stateless
from router.policies.api import (
    Booked,
    Parts,
    PolicyCommand,
    PolicyEvent,
    PolicyOverran,
    Pool,
    PoolPolicy,
    PoolPrices,
    Pull,
    Replicate,
    Tick,
)
from router.policies.prefix_cost import PrefixCost
from tests.unit.router.router_world import World, chain, place, pools

pytestmark = pytest.mark.pure


# --- loading ----------------------------------------------------------------------------------------------------------


def test_policy_takes_its_parameters_from_the_text() -> None:
    policy = policies.load("prefix_cost:beta=0.5,eviction=off")
    assert isinstance(policy, PrefixCost) and policy.config == PrefixCost.Config(beta=0.5, eviction=False)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("prefix_cots", "did you mean 'prefix_cost'"),
        ("nothing_like_it", "known are round_robin, least_work, prefix_cost"),
        ("prefix_cost:betta=1", "did you mean 'beta'"),
        ("prefix_cost:beta=much", "beta='much' is no float"),
        ("prefix_cost:beta", "is not a parameter"),
        ("round_robin:beta=1", "it has none"),
        ("no_such_module_anywhere:Policy", "cannot import"),
        ("tests.unit.router.test_router_policies:Constnat", "did you mean 'Constant'"),
        ("tests.unit.router.test_router_policies:NoPolicy", "lacks score"),
        ("tests.unit.router.test_router_policies:Tomorrow", "speaks POLICY_API 2"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(spec: str, text: str) -> None:
    with pytest.raises(ConfigError, match="(?s).*" + text.replace("(", "\\(")):
        policies.load(spec)


def test_a_users_policy_is_loaded_by_module_and_class() -> None:
    name = "tests.unit.router.test_router_policies:Constant:seconds=2.5"
    world = World(pools(1, 1), policy=policies.load(name))
    assert world.assign(place(1)).prefill_scores[0].seconds == 2.5


def test_the_page_on_policies_names_each_with_its_parameters() -> None:
    """Seen to fail with a parameter of e2 left out of the page."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "policies.md").read_text()
    for name, cls in policies.BUILT_IN.items():
        assert f"`{name}`" in page
        config = inspect.getattr_static(cls, "Config")
        assert not [f.name for f in fields(config) if f"`{f.name}`" not in page], name


# --- round robin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fleet", [pools(3, 4), pools(0, 0, 5)])
def test_round_robin_gives_every_worker_its_turn(fleet: dict[str, object]) -> None:
    """After any number of requests two workers of a pool differ by one at most. Seen to fail with the latest turn first."""
    world = World(fleet, policy=policies.load("round_robin"))  # type: ignore[arg-type]
    prefills: Counter[str] = Counter()
    decodes: Counter[str] = Counter()
    for number in range(47):
        request = place(number)
        found = world.assign(request)
        prefills[found.prefill_worker] += 1
        decodes[found.decode_worker] += 1
        world.done(request)
        for counts in (prefills, decodes):
            assert max(counts.values()) - min(counts.values()) <= 1
    assert len(prefills) + len(decodes) == (7 if "decode-0" in fleet else 10)


def test_round_robin_goes_on_where_it_was_after_a_restart() -> None:
    first = World(pools(3, 1), policy=policies.load("round_robin"))
    for number in range(4):
        first.assign(place(number))
    successor = policies.load("round_robin")
    successor.restore(first.core.policy._policy.snapshot())
    second = World(pools(3, 1), policy=successor)
    assert second.assign(place(9)).prefill_worker == first.assign(place(9)).prefill_worker


# --- least work -------------------------------------------------------------------------------------------------------


def test_least_work_counts_seconds_not_requests() -> None:
    """One prompt of 4096 weighs more than three of 256."""
    world = World(pools(2, 2), policy=policies.load("least_work"))
    long = world.assign(place(0, num_tokens=4096))
    short = [world.assign(place(n, num_tokens=256)) for n in range(1, 4)]
    assert {s.prefill_worker for s in short} == {"prefill-0", "prefill-1"} - {long.prefill_worker}


# --- prefix cost ------------------------------------------------------------------------------------------------------


def test_prefix_cost_follows_a_prefix_until_its_queue_costs_more_than_two_and_a_half_times_what_it_saves() -> None:
    """beta 2, one of two workers busy: (1 + 2 * 3/4) times. The saved prefill is 2048 tokens, the queue grows by reports of waiting tokens.

    Where the prefix can be pulled it saves what computing costs above pulling, so it spreads much earlier.
    """
    prefix = chain("system prompt", 128)

    def chosen(waiting_tokens: int, beta: float, prefix_pull: bool = False) -> str:
        policy = policies.load(f"prefix_cost:beta={beta}")
        world = World(pools(2, 1), policy=policy, inbox_steps=100.0, prefix_pull=prefix_pull)
        world.hold("prefill-1", prefix)
        world.report("prefill-1", waiting_tokens=waiting_tokens)
        return world.assign(place(1, num_tokens=2100, block_hashes=prefix)).prefill_worker

    assert [chosen(w, beta=2.0) for w in (0, 2048, 4500, 6000)] == ["prefill-1"] * 3 + ["prefill-0"]
    assert [chosen(w, beta=0.0) for w in (0, 1500, 2500)] == ["prefill-1"] * 2 + ["prefill-0"]
    assert [chosen(w, beta=2.0, prefix_pull=True) for w in (0, 100, 1000)] == ["prefill-1"] * 2 + ["prefill-0"]


def test_a_copy_costs_more_where_it_holds_up_answers_as_well() -> None:
    """beta 0.5, workers that do both, one of two busy with prompts: (1 + 0.5 * 8 * 3/4) times what it saves, 2048 tokens; (1 + 0.5 * 8)
    times where the other has answers under way. Seen to fail with answers not counted as business, and with `held_up` 1 everywhere.
    """
    prefix = chain("system prompt", 128)

    def chosen(waiting_tokens: int, num_running: int) -> str:
        world = World(pools(0, 0, 2), policy=policies.load("prefix_cost:beta=0.5"), inbox_steps=100.0, prefix_pull=False)
        world.hold("both-1", prefix)
        world.report("both-0", num_running=num_running)
        world.report("both-1", num_running=num_running, waiting_tokens=waiting_tokens)
        return world.assign(place(1, num_tokens=2100, block_hashes=prefix)).prefill_worker

    assert [chosen(w, num_running=0) for w in (7500, 9000)] == ["both-1", "both-0"]
    assert [chosen(w, num_running=3) for w in (9000, 11000)] == ["both-1", "both-0"]


def test_siblings_that_arrive_together_land_together() -> None:
    """Eight siblings over one fresh prefix of 4096 tokens, no event from any worker in between.

    Seen to fail with speculation off (index.speculate not called): they scatter over all four workers.
    """
    world = World(pools(4, 2))
    prefix = chain("fresh", 256)
    for number in range(8):
        tail = chain(("tail", number), 6, parent=prefix[-1])
        world.now += 0.005
        found = world.assign(place(number, num_tokens=4096 + 100, block_hashes=prefix + tail))
        assert found.cached_tokens == (0 if number == 0 else 4096)
    assert len({record.assignment.prefill_worker for record in world.core.explanations}) == 1


def test_different_prompts_spread() -> None:
    world = World(pools(4, 2))
    chosen = Counter(world.assign(place(n, num_tokens=1024)).prefill_worker for n in range(8))
    assert set(chosen.values()) == {2}


def test_eviction_is_charged_where_memory_is_full_and_what_was_evicted_is_asked_for_again() -> None:
    """How: prefill-0 evicts 512 blocks of which half are asked for again (and 256 count before any did): 256 / 768 of what is displaced.

    Seen to fail with `asked_in_vain` not called, with the first blocks of a prompt passed over, and with eviction charged while blocks
    are free.
    """
    world = World(pools(2, 1))
    chains = [chain(("cold", number), 64) for number in range(8)]
    world.kv_events("prefill-0", *[BlocksStored(number=n, parent=b"", hashes=c) for n, c in enumerate(chains, 1)])
    full, free = {"num_blocks_free": 0, "num_blocks_cached": 4096}, {"num_blocks_free": 4096, "num_blocks_cached": 0}
    world.report("prefill-0", **full)
    world.report("prefill-1", **free)
    assert evict_s(world, place(50, num_tokens=1024)) == {"prefill-0": 0.0, "prefill-1": 0.0}, "nothing was evicted yet"
    world.kv_events("prefill-0", *[BlocksRemoved(number=n, hashes=c) for n, c in enumerate(chains, 9)])
    for number, names in enumerate(chains[:4]):
        world.assign(place(number, num_tokens=1100, block_hashes=names))
        world.done(place(number))
    world.report("prefill-0", **full)
    world.report("prefill-1", **free)
    priced = evict_s(world, place(99, num_tokens=1024))
    kept = 0.5 ** (64 / 8192)
    share = 256 / (sum(64 * kept**n for n in range(8)) + 256 * kept**8)
    token_s = world.core.fleet.get("prefill-0").cost.prefill_token_s  # type: ignore[union-attr]
    assert priced["prefill-1"] == 0.0 and priced["prefill-0"] == pytest.approx(share * 1024 * token_s)


def evict_s(world: World, request: Place) -> dict[str, float]:
    """What prefix_cost charges each prefill worker for what the prompt would push out."""
    found = world.assign(request)
    world.done(request)
    return {s.worker_id: dict(zip(s.term_names, s.term_seconds, strict=True))["evict"] for s in found.prefill_scores}


def test_exact_ties_go_to_the_worker_chosen_least_recently() -> None:
    world = World(pools(0, 3))
    chosen = []
    for number in range(9):
        request = place(number)
        chosen.append(world.assign(request).decode_worker)
        world.done(request)
    assert chosen[:3] == chosen[3:6] == chosen[6:] and len(set(chosen[:3])) == 3


def test_the_same_seed_chooses_alike_and_another_seed_breaks_ties_otherwise() -> None:
    def run(seed: int) -> list[tuple[str, str]]:
        world = World(pools(5, 5), seed=seed)
        return [(a.prefill_worker, a.decode_worker) for a in (world.assign(place(n)) for n in range(20))]

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(6)}) > 1


# --- policies that misbehave ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantConfig:
    seconds: float = 1.0
    trouble: str = ""


class Constant(Stateless):
    """Prices every worker alike; `trouble` names what it does instead."""

    Config = ConstantConfig

    def __init__(self, config: ConstantConfig) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        match self.config.trouble:
            case "raises":
                raise KeyError("prefill-7")
            case "nan":
                return {w.worker_id: Cost(float("nan"), ()) for w in view.workers}
            case "unknown":
                return {"prefill-7": Cost(1.0, ())}
            case "nobody":
                return {}
        return {w.worker_id: Cost(self.config.seconds, ()) for w in view.workers}

    def observe(self, event: PolicyEvent, now: float) -> None:
        if self.config.trouble == "deaf" and isinstance(event, Booked):
            raise RuntimeError("not listening")


class ConstantPool(Constant):
    """The same in a column; "raises" only where a worker's parts are asked for."""

    def price_pool(self, view: PlacementView, request: Place, now: float, rng: Random) -> PoolPrices:
        if self.config.trouble == "few":
            return Column([1.0])
        return Column([float("nan") if self.config.trouble == "nan" else self.config.seconds] * len(view.workers), self.config.trouble)


@dataclass
class Column:
    seconds: list[float]
    trouble: str = ""

    def parts(self, index: int) -> Parts:
        if self.trouble == "raises":
            raise KeyError(index)
        return ("all",), (self.seconds[index],)


class Tomorrow(Constant):
    policy_api = 2


class NoPolicy:
    Config = ConstantConfig


@pytest.mark.parametrize("trouble", ["raises", "nan", "unknown", "nobody"])
def test_a_policy_that_fails_is_replaced_by_least_work_loudly(trouble: str) -> None:
    world = _with(trouble)
    world.report("prefill-0", waiting_tokens=1000)
    found = world.assign(place(1))
    assert (found.policy, found.prefill_worker) == ("least_work", "prefill-1")
    assert world.core.policy.num_fallbacks == 2, "one a pool"
    (note,) = world.core.notes(world.now)
    assert "failed 2 times" in note and "least_work" in note


@pytest.mark.parametrize("trouble", ["nan", "few"])
def test_a_policy_whose_column_is_wrong_is_replaced_by_least_work_loudly(trouble: str) -> None:
    """Seen to fail with `_complaint_of_pool` left out."""
    world = World(pools(2, 2), policy=ConstantPool(ConstantConfig(trouble=trouble)))
    world.report("prefill-0", waiting_tokens=1000)
    found = world.assign(place(1))
    assert (found.policy, found.prefill_worker) == ("least_work", "prefill-1")
    assert "failed 2 times" in world.core.notes(world.now)[0]


def test_a_policy_that_cannot_name_its_parts_still_places() -> None:
    """Seen to fail with `parts` asked of the policy without the guard."""
    world = World(pools(2, 2), policy=ConstantPool(ConstantConfig(trouble="raises")))
    found = world.assign(place(1))
    assert found.policy == "prefix_cost" and found.prefill_scores[0].term_names == ()
    assert "KeyError in parts" in world.core.notes(world.now)[0]


@pytest.mark.parametrize("pool", list(Pool))
def test_prefix_cost_prices_alike_by_name_and_by_column_and_its_terms_add_up(pool: Pool) -> None:
    """With pulls, loads, evictions and full caches among the workers. Seen to fail with the pull left out of the terms."""
    world = World(pools(0, 0, 6))
    shared = chain("shared", 32)
    for number, worker in enumerate(world.addresses):
        world.hold(worker, shared[: 6 * number])
        world.report(worker, waiting_tokens=200 * number, num_running=number, num_blocks_free=40 - 8 * number, num_blocks_cached=500)
    for number in range(3):
        world.assign(place(number))
    request = place(9, num_tokens=600, block_hashes=shared)
    workers = list(world.core.fleet)
    view = PlacementView(
        pool=pool,
        workers=workers,
        cached_tokens=world.core.index.match(shared).total_tokens,
        device_tokens=world.core.index.match(shared).device_tokens,
        predicted_output_tokens=64,
        kv_tokens=664,
        decode_worker=None,
        transfer_s=0.01,
        pulls={"both-1": Pull("both-5", 480, 384, 0.001, 0.02)},
        loads_s={"both-2": 0.003},
    )
    policy = policies.load("prefix_cost")
    assert isinstance(policy, PoolPolicy)
    prices, costs = policy.price_pool(view, request, world.now, Random(0)), policy.score(view, request, world.now, Random(0))
    assert [cost.seconds for cost in costs.values()] == list(prices.seconds) and len(set(prices.seconds)) > 3
    for index, cost in enumerate(costs.values()):
        assert cost.terms == tuple(zip(*prices.parts(index), strict=True))
        assert sum(seconds for _, seconds in cost.terms) == pytest.approx(cost.seconds)


def test_a_policy_that_cannot_listen_still_places() -> None:
    world = _with("deaf")
    assert world.assign(place(1)).policy != "least_work"
    assert "RuntimeError in observe: not listening" in world.core.notes(world.now)[0]


def test_a_policy_that_overran_is_replaced_for_a_while() -> None:
    world = _with("", policy_penalty_s=1.0)
    world.on(PolicyOverran(duration_s=0.5, limit_s=0.01))
    assert world.assign(place(1)).policy == "least_work"
    world.now += 1.1
    world.report_all()
    assert world.assign(place(2)).policy == "prefix_cost", "the name of the configured policy"
    assert world.core.policy.num_overruns == 1


# --- a policy for each pool -------------------------------------------------------------------------------------------

FAILING = "tests.unit.router.test_router_policies:Constant:trouble=raises"


def test_each_pool_is_placed_by_its_own_policy() -> None:
    """Prefill follows a prefix, decode takes turns. Seen to fail with the decode pool asking the prefill policy."""
    world = World(pools(3, 3), policy=policies.load("prefix_cost"), decode_policy="round_robin", disaggregate=Disaggregate.ALWAYS)
    prefix = chain("shared", 64)
    made = []
    for number in range(6):
        request = place(number, num_tokens=1100, block_hashes=prefix)
        made.append(world.assign(request))
        world.done(request)
    assert len({a.prefill_worker for a in made}) == 1
    assert Counter(a.decode_worker for a in made) == {"decode-0": 2, "decode-1": 2, "decode-2": 2}
    assert {a.policy for a in made} == {"prefix_cost/round_robin"}
    assert not any("failed" in a.reason for a in made)
    assert [world.core.status(world.now)[key]["name"] for key in ("policy", "decode_policy")] == ["prefix_cost", "round_robin"]  # type: ignore[index]


@pytest.mark.parametrize("failing", ["policy", "decode_policy"])
def test_one_pools_failing_policy_leaves_the_others_alone(failing: str) -> None:
    """Seen to fail with one GuardedPolicy for both pools."""
    prefill, decode = (FAILING, "round_robin") if failing == "policy" else ("round_robin", FAILING)
    world = World(pools(2, 2), policy=policies.load(prefill), decode_policy=decode, disaggregate=Disaggregate.ALWAYS)
    world.assign(place(1))
    counts = {
        name: guarded.num_fallbacks for name, guarded in (("policy", world.core.policy), ("decode_policy", world.core.policies.decode))
    }
    assert counts == {"policy": 0, "decode_policy": 0} | {failing: 1}
    (note,) = world.core.notes(world.now)
    assert "KeyError" in note and note.startswith("policy " if failing == "policy" else "decode policy ")


def test_an_overrun_sets_aside_the_policy_that_overran() -> None:
    """Seen to fail with the pool of the event left out of PoolPolicies.observe, and with PoolPolicies.answered that is always true."""
    world = World(pools(2, 2), decode_policy="round_robin", disaggregate=Disaggregate.ALWAYS)
    world.on(PolicyOverran(duration_s=0.5, limit_s=0.01, pool=Pool.DECODE))
    assert (world.core.policy.num_overruns, world.core.policies.decode.num_overruns) == (0, 1)
    assignment = world.assign(place(1))
    assert assignment.policy == "prefix_cost/least_work"
    assert assignment.reason.endswith("prefix_cost/round_robin failed or was too slow")


def _with(trouble: str, **config: object) -> World:
    return World(pools(2, 1), policy=Constant(ConstantConfig(trouble=trouble)), **config)


# --- commands ---------------------------------------------------------------------------------------------------------


class Replicating(Constant):
    """Asks once for a copy of one prefix on one worker."""

    def __init__(self, wish: Replicate) -> None:
        super().__init__(ConstantConfig())
        self.wish: tuple[PolicyCommand, ...] = (wish,)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        wish, self.wish = self.wish, ()
        return wish


def test_a_replication_sends_the_next_request_with_the_prefix_to_the_worker_named() -> None:
    prefix = chain("hot", 10)
    wish = Replicate(block_hash=prefix[-1], worker_id="prefill-2", within_s=5.0)
    world = World(pools(3, 1), policy=Replicating(wish))
    world.tick()
    request = place(1, block_hashes=prefix + chain("tail", 22, parent=prefix[-1]))
    assert all("replicates" not in world.assign(place(n)).reason for n in (2, 3)), "other prompts are not moved"
    found = world.assign(request)
    assert found.prefill_worker == "prefill-2" and "replicates" in found.reason
    assert "replicates" not in world.assign(replace(request, request_id="e" * 32)).reason


def test_ticks_reach_the_policy() -> None:
    seen: list[PolicyEvent] = []

    class Listening(Constant):
        def observe(self, event: PolicyEvent, now: float) -> None:
            seen.append(event)

    world = World(pools(1, 1), policy=Listening(ConstantConfig()))
    request = place(1)
    world.assign(request)
    world.prefill_done(request)
    world.done(request)
    world.tick()
    world.kill("decode-0")
    names = [type(e).__name__ for e in seen if type(e).__name__ != "KvChanged"]
    assert names == ["WorkerJoined", "WorkerJoined", "Booked", "FirstToken", "Finished", "Tick", "WorkerLeft"]
    assert isinstance(seen[-2], Tick)
