"""What is best is found, marked and said: percentiles, ties, advice; and DistServe's own placement comes out of its own constants."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from simulator.phases import Outcome
from simulator.placement_search import Found, Goal, Plan, Search, Trial, advice
from simulator.planner import units_within
from simulator.pools import Affinity, Criterion, Link, Pool, Pools
from simulator.summary import Objective
from simulator.traces.generators import Arrivals, generate
from simulator.worker_models import known_workers

pytestmark = pytest.mark.pure

GOAL = Goal(objective=Objective(ttft_s=0.2, tpot_s=0.1))
NVLINK = Link(latency_s=1e-3, bytes_per_s=300e9)
TP2_TP1 = Pools(prefill=Pool(1, 2), decode=Pool(1, 1))


def served(ttft_s: float, tpot_s: float, terminal: str = "finished") -> Outcome:
    return Outcome(
        request_id="r",
        arrived_s=1.0,
        num_prompt_tokens=10,
        first_token_s=1.0 + ttft_s,
        end_s=1.0 + ttft_s + 10 * tpot_s,
        num_output_tokens=11,
        terminal=terminal,
    )


def search(*, seed: int = 0, requests: int = 300, workload: str = "sharegpt", goal: Goal = GOAL, link: Link = NVLINK) -> Search:
    models = known_workers("opt-13b", "a100-80g").by_gpus
    return Search(models, lambda at: generate(workload, Arrivals(rate_per_s=at), num_requests=requests, seed=seed), goal, link=link)


def found(pools: Pools, rate_per_gpu: float, *, pause_s: float = 0.05) -> Found:
    rate_per_s = rate_per_gpu * pools.num_gpus
    trial = Trial(rate_per_s=rate_per_s, attainment=0.95, ttft_s=0.1, tpot_s=0.01, pause_s=pause_s, num_decoding=4.0)
    return Found(pools=pools, trial=trial)


def test_joint_counts_requests_and_marginal_each_percentile() -> None:
    """One in ten is late for its first token, another one slow: 80 % meet both, 90 % each. Seen to fail with one criterion for both."""
    runs = [served(0.1, 0.05)] * 8 + [served(0.3, 0.05), served(0.1, 0.2)]
    trial = Trial.of(runs, GOAL, 5.0)
    assert (trial.attainment, trial.ttft_s, trial.tpot_s) == (pytest.approx(0.8), pytest.approx(0.1), pytest.approx(0.05))
    assert not trial.meets(GOAL) and trial.meets(replace(GOAL, criterion=Criterion.MARGINAL))
    late = Trial.of([*runs, served(0.3, 0.05)], GOAL, 5.0)
    assert late.ttft_s == pytest.approx(0.3) and not late.meets(replace(GOAL, criterion=Criterion.MARGINAL))


def test_who_is_refused_is_never_in_time() -> None:
    """Seen to fail with percentiles of those who were served."""
    runs = [served(0.1, 0.05)] * 8 + [served(0.1, 0.05, "refused")] * 2
    trial = Trial.of(runs, GOAL, 5.0)
    assert (trial.attainment, trial.ttft_s, trial.tpot_s) == (pytest.approx(0.8), inf, inf)


def test_sequences_decode_from_their_first_token_to_their_end() -> None:
    assert Trial.of([served(0.5, 0.05), served(0.5, 0.05)], GOAL, 2.0).num_decoding == pytest.approx(2 * 0.5 / 1.0)


def test_gpus_for_a_rate_are_whole_copies() -> None:
    assert [found(TP2_TP1, 2.0).gpus_for(rate) for rate in (1.0, 6.0, 6.1)] == [3, 3, 6]
    assert Found(pools=TP2_TP1, trial=None).gpus_for(1.0) == inf


@pytest.mark.parametrize(
    ("split", "mixed", "said"),
    [
        (2.0, 1.5, "disaggregation pays"),
        (2.0, 2.5, "disaggregation does not pay here"),
        (2.0, 2.1, "no difference this search can see"),
        (2.0, None, "Only prefill and decode apart meet"),
        (None, 2.0, "Only workers that do both phases meet"),
        (None, None, "No placement meets the objective"),
    ],
)
def test_advice_says_whether_to_disaggregate(split: float | None, mixed: float | None, said: str) -> None:
    """Seen to fail with the two compared the other way round."""
    both = Pools(mixed=Pool(3, 1), chunk_tokens=512)
    assert said in advice(None if split is None else found(TP2_TP1, split), None if mixed is None else found(both, mixed))


def test_pauses_are_told_where_workers_that_make_them_win() -> None:
    """Seen to fail with the sentence left out, and with it said whatever they are."""
    both = Pools(mixed=Pool(3, 1))
    told = advice(found(TP2_TP1, 1.0), found(both, 2.0, pause_s=0.25))
    assert told.endswith("does not pay here. Its answers pause for 250 ms instead of 50 ms, though, which TPOT, a mean, hides.")
    assert advice(found(TP2_TP1, 1.0), found(both, 2.0, pause_s=0.04)).endswith("does not pay here.")


@pytest.mark.parametrize("workload", ["sharegpt", "sharegpt_lognormal"])
def test_one_prefill_and_one_decode_worker_are_best_as_distserve_found_them(workload: str) -> None:
    """OPT-13B, 4 A100-80G, TTFT 200 ms, TPOT 100 ms, 90 %, 300 requests: prefill TP2, decode TP1 (simdistserve/README.md). Lengths as
    simulator/traces/lengths.py states them. Seen to fail with prefill's b left out, and with the prefill lines of TP1 and TP2 exchanged."""
    alone = search(workload=workload)
    rates = {pools: alone.find(pools).rate_per_gpu for pools in units_within([1, 2], 4) if _is_one_to_one(pools)}
    assert max(rates, key=rates.__getitem__) == TP2_TP1 and len(rates) == 4
    assert 1.56 <= rates[TP2_TP1] <= 2.5


def _is_one_to_one(pools: Pools) -> bool:
    return pools.prefill is not None and pools.decode is not None and pools.prefill.count == pools.decode.count == 1


@pytest.fixture(scope="module")
def acceptance() -> Plan:
    return search().plan(4, Affinity.LOW, gpus_per_machine=4)


@pytest.mark.slow
def test_distserve_s_placement_is_best_among_all_ratios(acceptance: Plan) -> None:
    """The n:m search adds seven units and none is better. Seen to fail with more GPUs taken of equals."""
    assert acceptance.best_split is not None and acceptance.best_split.pools == TP2_TP1
    assert acceptance.as_published is not None and (acceptance.as_published.unit, acceptance.as_published.algorithm) == (TP2_TP1, 2)
    assert sum(one.pools.is_split for one in acceptance.found) == 11
    assert abs(acceptance.best_split.rate_per_gpu - 1.56) < 0.5  # theirs; one draw of 300 requests gives 1.4 to 2.5


@pytest.mark.slow
def test_mixed_workers_stand_beside_on_as_many_gpus(acceptance: Plan) -> None:
    """Three GPUs, which the best split takes, and the four that are given; whole prompts, small and large chunks."""
    mixed = [one.pools for one in acceptance.found if one.pools.mixed is not None]
    assert {pools.num_gpus for pools in mixed} == {3, 4} and len(mixed) == 3 * (1 + 3)
    rates = [one.rate_per_gpu for one in acceptance.found]
    assert rates == sorted(rates, reverse=True)
    assert acceptance.best is not None and acceptance.best.rate_per_gpu == rates[0]


@pytest.mark.slow
def test_a_rate_is_served_by_the_fewest_gpus_and_high_affinity_is_algorithm_1() -> None:
    """Seen to fail with the best rate a GPU taken whatever the rate asked for."""
    plan = search().plan(4, Affinity.HIGH, gpus_per_machine=4, rate_per_s=0.25)
    assert plan.best is not None and plan.best.pools.num_gpus < 4 and plan.best.gpus_for(0.25) == plan.best.pools.num_gpus
    assert all(one.gpus_for(0.25) >= plan.best.gpus_for(0.25) for one in plan.found)
    published = plan.as_published
    assert published is not None and published.algorithm == 1 and published.copies == 1 and published.unit.is_split
