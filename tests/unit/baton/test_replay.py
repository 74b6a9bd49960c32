"""`baton replay`: what is sent is the trace, what is told is what its users saw, and a repeat counts for all policies or for none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from baton.bench.live_runs import LiveRun, TurnsPlan, beside, verdict_of, whole_repeats
from baton.bench.load import Endpoint, ErrorKind, LoadRun, SentRequest, drive
from baton.bench.switched import lag_complaint
from baton.bench.trace_traffic import TraceWorkload, answered
from baton.replay import replay_document
from baton.sim import make_trace
from protocol.timeline import Timeline
from simulator.summary import Latency, Objective, Summary, summarise
from simulator.traces.trace import Run, Trace, TraceRequest
from tests.stub_endpoint import StubServer, event, running

pytestmark = pytest.mark.pure

TRACE = Trace(
    name="small",
    requests=(
        TraceRequest(at_s=5.0, runs=(Run("shared", 20), Run("a", 4)), output_tokens=3),
        TraceRequest(at_s=5.03, runs=(Run("shared", 20), Run("b", 9)), output_tokens=1),
        TraceRequest(at_s=5.03, runs=(Run("c", 7),), output_tokens=5),
    ),
)
WORKLOAD = TraceWorkload.of(TRACE, vocab_size=500, seed=1)


def as_many_as_asked(body: dict[str, Any]) -> list[bytes]:
    tokens = [event({"text": "a", "token_ids": [11]}) for _ in range(body["max_tokens"])]
    details = {"cached_tokens": 5}
    return [*tokens, event(None, usage={"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": details}) + b"data: [DONE]\n\n"]


def planted(policy: str, repeat: int, mean_s: float, *, invalid: tuple[str, ...] = ()) -> LiveRun:
    latency = Latency(mean_s, mean_s, 2 * mean_s, 3 * mean_s)
    summary = Summary(
        num_requests=10,
        num_finished=10,
        num_refused=0,
        num_failed=0,
        num_retried=0,
        duration_s=1.0,
        ttft=latency,
        tpot=latency,
        attainment=1.0,
        goodput_per_s=10.0,
        hit_share=0.5,
    )
    return LiveRun(policy=policy, repeat=repeat, summary=summary, tells_cached=True, ttfts_s=(mean_s,), lag_p99_s=0.001, invalid=invalid)


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_trace_is_sent_with_its_own_lengths_sharing_and_times() -> None:
    """How: three requests to an endpoint that remembers bodies. Seen to fail with every request asked for the longest answer."""
    stub = StubServer(pieces=as_many_as_asked)
    with running(stub) as url:
        run = drive(Endpoint(url=url, model="stub"), WORKLOAD)
    assert [(len(prompt), tokens) for prompt, tokens in zip(WORKLOAD.prompts(), WORKLOAD.output_lens(), strict=True)] == [
        (24, 3), (29, 1), (7, 5),
    ]  # fmt: skip
    by_length = {len(body["prompt"]): body for body in stub.bodies}
    assert {length: body["max_tokens"] for length, body in by_length.items()} == {24: 3, 29: 1, 7: 5}
    assert by_length[24]["prompt"][:20] == by_length[29]["prompt"][:20] != by_length[24]["prompt"][4:24]
    assert [r.error for r in run.requests] == [None] * 3, [r.error_text for r in run.requests]
    assert [r.timeline.arrival_s - run.started_s for r in run.requests] == pytest.approx([0.0, 0.03, 0.03])
    assert [o.num_cached_tokens for o in answered(run)] == [5, 5, 5] and [o.num_output_tokens for o in answered(run)] == [3, 1, 5]


def test_another_seed_is_other_prompts_and_a_warm_up_is_not_of_the_run() -> None:
    """Seen to fail with prompts that do not look at the seed."""
    other = replace(WORKLOAD, seed=2)
    assert WORKLOAD.prompts() == TraceWorkload.of(TRACE, vocab_size=500, seed=1).prompts() != other.prompts()
    assert other.arrivals_s() == WORKLOAD.arrivals_s() and len(replace(WORKLOAD, num_requests=2).prompts()) == 2


# --- what is told -----------------------------------------------------------------------------------------------------


def test_what_was_not_answered_is_missed_and_latencies_are_those_of_the_timeline() -> None:
    """Seen to fail with refusals left out, and with TPOT over the time until the stream closed."""
    run = LoadRun(workload=WORKLOAD, started_s=10.0)
    well = Timeline(arrival_s=10.0, token_times_s=[10.1, 10.2, 10.4], token_counts=[1, 1, 1], end_s=15.0)
    run.requests = [
        SentRequest(index=0, timeline=well, sent_s=10.0, num_prompt_tokens=20, num_cached_tokens=10),
        SentRequest(index=1, timeline=Timeline(arrival_s=11.0, end_s=11.1), sent_s=11.0, error=ErrorKind.REFUSED),
        SentRequest(index=2, timeline=Timeline(arrival_s=12.0, end_s=12.5), sent_s=12.0, error=ErrorKind.BROKEN),
    ]
    first, *_ = answered(run)
    assert (first.ttft_s, first.tpot_s) == (well.ttft_s, well.tpot_s) == pytest.approx((0.1, 0.15))
    summary = summarise(answered(run), Objective(ttft_s=0.2, tpot_s=0.2))
    assert (summary.num_requests, summary.num_finished, summary.num_refused, summary.num_failed) == (3, 1, 1, 1)
    assert summary.attainment == pytest.approx(1 / 3) and summary.hit_share == pytest.approx(0.5)
    assert summary.duration_s == pytest.approx(5.0)


def test_a_client_that_lags_makes_a_run_invalid_and_siblings_of_a_burst_do_not() -> None:
    """How: planted times of sending. Seen to fail with the limit at 50 ms, and with every sibling counted."""

    def lag_of(late_s: list[float], arrivals_s: list[float]) -> float:
        run = LoadRun(workload=WORKLOAD, started_s=0.0)
        run.requests = [
            SentRequest(index=i, timeline=Timeline(arrival_s=at_s), sent_s=at_s + late)
            for i, (at_s, late) in enumerate(zip(arrivals_s, late_s, strict=True))
        ]
        return run.lag_p99_s

    assert lag_of([0.001, 0.02, 0.03, 0.002], [1.0, 1.0, 1.0, 2.0]) == pytest.approx(0.002, abs=1e-4)
    late = lag_of([0.001] * 50 + [0.0061] * 2, [float(i) for i in range(52)])
    complaint = lag_complaint(late)
    assert complaint is not None and "p99 6.1 ms" in complaint and "5 ms" in complaint
    assert lag_complaint(0.0049) is None


def test_the_command_prints_one_document_and_fails_when_the_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with an exit of 0 whatever the client did."""
    stub = StubServer(pieces=as_many_as_asked)
    flags = ["replay", "--generate", "fan_out", "--requests", "4", "--rate", "40", "--slo-ttft", "60", "--json"]
    monkeypatch.setattr("baton.bench.switched.LAG_S_MAX", 60.0)  # a busy machine is not what is looked at
    with running(stub) as url:
        outcome = CliRunner().invoke(app, [*flags, "--url", url])
        monkeypatch.setattr("baton.bench.switched.LAG_S_MAX", -1.0)
        late = CliRunner().invoke(app, [*flags, "--url", url])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout.splitlines()[-1])
    assert document["schema"] == "baton.replay.v1" and document["setting"]["fidelity"] == "live"
    asked = make_trace("", "fan_out", rate=40.0, requests=4, cv=1.0, burst=1, spread_s=0.0, seed=0, folder=None)
    assert document["setting"]["trace_sha256"] == asked.sha256
    (run,) = document["runs"]
    assert run["summary"]["num_finished"] == 4 and run["summary"]["attainment"] == 1.0 and run["invalid"] == []
    assert len(stub.bodies) == 2 * 5, "a warm-up goes before each"
    assert late.exit_code != 0 and "does not count" in str(late.exception)


# --- policies beside each other ---------------------------------------------------------------------------------------


def test_every_policy_has_its_turn_in_each_repeat_in_an_order_drawn_anew() -> None:
    """Seen to fail with one order for all repeats."""
    plan = TurnsPlan(
        policies=("a", "b", "c"), num_repeats=12, workload_of=lambda repeat: WORKLOAD, objective=Objective(), seed=3, num_retakes=1
    )
    keys = plan.keys()
    orders = [tuple(policy for repeat, policy in keys if repeat == r) for r in range(12)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(orders)) > 2
    assert [repeat for repeat, _ in keys] == sorted(repeat for repeat, _ in keys) and keys == plan.keys()


def test_a_repeat_counts_for_all_policies_or_for_none() -> None:
    """How: 21 planted repeats, one of them invalid for one policy. Seen to fail with a repeat that counts where any of its runs does."""
    policies = ["prefix_cost", "round_robin", "least_work"]
    runs = [planted(p, r, (0.1 + 0.001 * r) * (1.5 if p == "round_robin" else 1.0)) for r in range(21) for p in policies]
    runs[4] = planted("round_robin", 1, 9.0, invalid=("requests left late",))
    assert whole_repeats(runs, policies) == [0, *range(2, 21)]
    found = {b.metric.name: b for b in beside(runs, policies)}
    assert all(len(row) == 20 for b in found.values() for row in b.values.values())
    ttft = {s.policy: s for s in found["ttft_mean"].standings}
    assert not ttft["round_robin"].best_or_tied and ttft["prefix_cost"].best_or_tied and ttft["least_work"].best_or_tied
    assert {s.policy: s.best_or_tied for s in found["goodput"].standings} == dict.fromkeys(policies, True)
    told = verdict_of(list(found.values()), 20)
    assert "certain below round_robin" in told and "exploratory" not in told and "exploratory" in verdict_of(list(found.values()), 19)
    document = replay_document(runs, policies, {"fidelity": "live"}, seed=0)
    assert document["ranking"] == document["metrics"][0]["standings"] and document["is_exploratory"] is False  # type: ignore[index]
    assert replay_document(runs[:3], policies, {}, seed=0)["is_exploratory"] is True


def test_figures_of_zero_are_told_and_not_compared() -> None:
    """Seen to fail with the logarithm of a ratio over 0."""
    runs = [planted(p, r, 0.1) for r in range(3) for p in ("a", "b")]
    runs = [replace(run, summary=replace(run.summary, hit_share=0.0 if run.policy == "a" else 0.5)) for run in runs]
    hits = next(b for b in beside(runs, ["a", "b"]) if b.metric.name == "hit_share")
    assert hits.values == {"a": [0.0] * 3, "b": [0.5] * 3} and hits.comparisons == [] and hits.standings == []
    assert beside(runs[:1], ["a", "b"]) == [] and "nothing can be said" in verdict_of([], 0)
