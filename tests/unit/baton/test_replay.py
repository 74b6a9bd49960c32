"""`baton replay`: what is sent is the trace, what is told is what its users saw, and a repeat counts for all policies or for none."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from baton.bench.live_runs import LiveRun, TurnsPlan, comparison_sections, whole_repeats
from baton.bench.load import Endpoint, ErrorKind, LoadRun, SentRequest, drive
from baton.bench.switched import lag_complaint
from baton.bench.trace_traffic import Answered, TraceWorkload, answered
from baton.replay import turns_document
from protocol.timeline import Timeline
from simulator.metrics import figures_of
from simulator.replicates import Replicates
from simulator.report import render
from simulator.report.document import read_document
from simulator.summary import Objective, summarise
from simulator.traces.source import Source
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
    outcomes = [
        Answered(
            request_id=str(i),
            arrived_s=i * 0.1,
            end_s=i * 0.1 + mean_s,
            num_prompt_tokens=20,
            num_output_tokens=2,
            num_cached_tokens=0 if policy == "round_robin" else 10,
            ttft_s=mean_s * (0.5 + i / 9),
            tpot_s=0.01,
            terminal="finished",
            reason="",
        )
        for i in range(10)
    ]
    return LiveRun(
        policy=policy,
        repeat=repeat,
        summary=summarise(outcomes, Objective()),
        figures=figures_of(outcomes, Objective(), unserved_ttft_s=60.0),
        tells_cached=True,
        lag_p99_s=0.001,
        invalid=invalid,
    )


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
    assert document["schema"] == "baton.replay.v1" and document["trace"]["num_requests"] == 4
    assert document["summary"]["num_finished"] == 4 and document["summary"]["attainment"] == 1.0 and document["invalid"] == []
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
    replicates = Replicates.of(Source(generator="fan_out"), num_requests=10, seed=0)
    document = turns_document(runs, policies, replicates, Objective(), Counter(prefill=2, decode=2))
    told = read_document(document)
    assert {len(row) for metric in told.metrics.values() for row in metric.values.values()} == {20}
    ttft = {s.policy: s.best_or_tied for s in told.ranking}
    assert ttft == {"prefix_cost": True, "least_work": True, "round_robin": False}
    assert told.setting.fidelity == "live" and told.setting.num_replicates == 20 and not told.is_exploratory
    assert told.verdict is not None and "ahead of round_robin" in told.verdict and len(told.curves["prefix_cost"]) == 101
    assert any("round_robin, repeat 2 does not count: requests left late" in note for note in told.setting.notes)
    assert "round_robin" in render(document), "it can be drawn as any comparison"


def test_few_repeats_explore_and_none_says_nothing() -> None:
    """Seen to fail with a verdict over nothing."""
    runs = [planted(p, r, 0.1) for r in range(3) for p in ("a", "b")]
    assert comparison_sections(runs, ["a", "b"], "t")["is_exploratory"] is True
    nothing = comparison_sections(runs[:1], ["a", "b"], "t")
    assert nothing["metrics"] == [] and nothing["verdict"] == "No repeat counts for all policies."
    hushed = [replace(run, tells_cached=False) for run in runs]
    told = {m["name"]: m for m in comparison_sections(hushed, ["a", "b"], "t")["metrics"]}  # type: ignore[attr-defined]
    assert told["hit_share"]["values"] == {"a": [None] * 3, "b": [None] * 3} and told["hit_share"]["standings"] == []
