"""`baton bench validation`: constants are found again that were planted, and a simulation that is wrong is told.

How: what is taken for live is a simulated cluster with an overhead that nobody is told; no process is started.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from baton.bench.live_runs import LiveRun
from baton.bench.report import Row
from baton.bench.validation import SCHEMA, joined, validated
from baton.bench.validation_model import Overhead, Pair, fitted, predicted, predicted_alone, rows_of
from baton.bench.validation_run import MAX_MODEL_LEN, ValidationPlan, paced_subject, torch_subject
from protocol.errors import ConfigError, ServiceError
from simulator.metrics import figures_of
from simulator.summary import Summary, summarise

pytestmark = pytest.mark.pure

PLANTED = Overhead(step_s=0.004, first_s=0.012)
PLAN = ValidationPlan(policies=("prefix_cost", "least_work"), calibration_policy="round_robin", seconds=12.0, num_repeats=1, seed=1)


SUBJECT = paced_subject(2, None)


@pytest.fixture(autouse=True)
def one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """These policies draw nothing but ties."""
    monkeypatch.setattr("baton.bench.validation.NUM_DRAWS", 1)


@cache
def taken(policy: str, *, is_calibration: bool = False, overhead: Overhead = PLANTED) -> LiveRun:
    """A run of the cluster that is taken for live."""
    asked = SUBJECT.calibrated_on if is_calibration else SUBJECT.validated_on
    served = predicted(SUBJECT.simulated, PLAN.trace(asked, 0), policy, overhead, seed=9)
    summary, figures = summarise(served, SUBJECT.objective), figures_of(served, SUBJECT.objective, unserved_ttft_s=60.0)
    return LiveRun(policy=policy, repeat=0, summary=summary, figures=figures, tells_cached=True, lag_p99_s=0.0, invalid=())


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_constants_that_were_planted_are_found_again() -> None:
    """Seen to fail with TTFT fitted before the time of a step: what queues make of longer steps is taken for the gateway's."""
    calibration = taken("round_robin", is_calibration=True)
    found = fitted([calibration.summary], SUBJECT.simulated, [PLAN.trace(SUBJECT.calibrated_on, 0)], "round_robin", SUBJECT.objective)
    assert found.step_s == pytest.approx(PLANTED.step_s, rel=0.1) and found.first_s == pytest.approx(PLANTED.first_s, rel=0.25)
    assert found.prefill_factor == pytest.approx(1.0, rel=0.03)


def test_prompts_that_take_longer_beside_others_are_told_from_what_all_wait() -> None:
    """How: one prefill worker, hardly used, on which prompts take 1.2 times as long as single steps did.

    Seen to fail with the factor left at 1: what is left of TTFT is then all put on the gateway, and short prompts come out too late.
    """
    planted = Overhead(step_s=0.001, prefill_factor=1.2, first_s=0.005)
    asked = replace(SUBJECT.calibrated_on, rate_per_s=1.0)
    trace = replace(PLAN, seconds=60.0).trace(asked, 0)
    live = summarise(predicted(SUBJECT.simulated, trace, "round_robin", planted, seed=9), SUBJECT.objective)
    found = fitted([live], SUBJECT.simulated, [trace], "round_robin", SUBJECT.objective)
    assert found.prefill_factor == pytest.approx(1.2, rel=0.03) and found.first_s == pytest.approx(planted.first_s, abs=0.003)


def test_what_was_calibrated_on_one_trace_tells_of_another_and_the_null_model_does_not() -> None:
    """Seen to fail with another trace simulated than was sent, and with constants that are fitted and not used."""
    runs = [taken(policy) for policy in PLAN.policies]
    rows, told = validated(SUBJECT, PLAN, [taken("round_robin", is_calibration=True)], runs)
    found = by_name(rows)
    demanded = [row for row in rows if row.target is not None]
    assert len(demanded) == 1 + 3 * len(PLAN.policies) and all(row.ok for row in demanded), [
        (r.name, r.value) for r in demanded if not r.ok
    ]
    assert found["paced-2+2/order_agrees"].details == {"live": ["prefix_cost", "least_work"], "simulated": ["prefix_cost", "least_work"]}
    worst = max(found[f"paced-2+2/ttft_p50_error/{policy}/alone"].value or 0.0 for policy in PLAN.policies)
    assert worst > 50.0, "it knows no cache and no queue"
    assert json.loads(json.dumps(told))["calibration"]["policy"] == "round_robin"


def test_a_simulation_that_is_wrong_is_told() -> None:
    """How: a live cluster twice as slow as it was when it was calibrated, and one in which policies come in another order.

    Seen to fail with errors taken of the simulation's own figures.
    """
    slow = replace(PLANTED, step_s=0.02)
    rows, _ = validated(
        SUBJECT,
        PLAN,
        [taken("round_robin", is_calibration=True)],
        [taken(policy, overhead=slow) for policy in PLAN.policies],
    )
    found = by_name(rows)
    assert all(found[f"paced-2+2/tpot_p50_error/{policy}"].ok is False for policy in PLAN.policies)
    good, bad = (taken(policy).summary for policy in PLAN.policies)
    order, *_ = rows_of("c", [pair("a", [good], [bad]), pair("b", [bad], [good])])
    assert order.ok is False and order.details == {"live": ["a", "b"], "simulated": ["b", "a"]}
    alike, *_ = rows_of("c", [pair("a", [good], [good]), pair("b", [bad], [good])])
    tied, *_ = rows_of("c", [pair("a", [good], [good]), pair("b", [good], [good])])
    assert alike.ok is True and tied.ok is True, "nobody says the opposite"


def pair(policy: str, live: list[Summary], simulated: list[Summary]) -> Pair:
    return Pair(policy=policy, live=tuple(live), simulated=tuple(simulated), alone=tuple(simulated))


def test_a_policy_without_a_run_that_counts_is_missed_and_not_left_out() -> None:
    """Seen to fail with policies taken from the runs."""
    runs = [taken("prefix_cost"), replace(taken("least_work"), invalid=("requests left late",))]
    calibration = taken("round_robin", is_calibration=True)
    rows, _ = validated(SUBJECT, PLAN, [calibration], runs)
    found = by_name(rows)
    assert found["paced-2+2/attainment_error/least_work"].value is None and found["paced-2+2/attainment_error/least_work"].ok is False
    assert found["paced-2+2/order_agrees"].ok is False and "reason" in found["paced-2+2/order_agrees"].details
    with pytest.raises(ServiceError, match="no run of the calibration counts: requests left late"):
        validated(SUBJECT, PLAN, [replace(calibration, invalid=("requests left late",))], runs)


def test_the_null_model_computes_each_prompt_whole_and_alone() -> None:
    """How: by hand, of the first request. Seen to fail with one step for a prompt of two chunks."""
    trace, config = PLAN.trace(SUBJECT.validated_on, 0), SUBJECT.simulated
    (first, *_), asked = predicted_alone(config, trace, Overhead(step_s=0.001, first_s=0.01)), trace.requests[0]
    num_steps = -(-asked.num_prompt_tokens // config.workers.max_num_batched_tokens)
    by_hand = num_steps * (config.paced.prefill_base_s + 0.001) + asked.num_prompt_tokens * config.paced.prefill_token_s
    assert num_steps > 1 and first.ttft_s == pytest.approx(by_hand + 0.01 + 4 * 0.0003)


def test_requests_fit_the_model_and_a_seed_is_a_trace() -> None:
    """Seen to fail with lengths that are not looked at."""
    long = replace(PLAN, seconds=300.0)
    for asked in (SUBJECT.calibrated_on, SUBJECT.validated_on):
        trace = long.trace(asked, 0)
        assert trace == long.trace(asked, 0) != long.trace(asked, 1)
        assert all(r.output_tokens >= 2 and r.num_prompt_tokens + r.output_tokens <= MAX_MODEL_LEN for r in trace.requests)
        assert trace.rate_per_s == pytest.approx(asked.rate_per_s, rel=0.1)


def test_clusters_measured_apart_stand_in_one_document(tmp_path: Path) -> None:
    """Seen to fail with rows of the same cluster kept from before."""

    def document(cluster: str, value: float) -> dict[str, Any]:
        return {"schema": SCHEMA, "rows": [Row(name=f"{cluster}/x", value=value, unit="%").record()], "clusters": {cluster: {"v": value}}}

    file = tmp_path / "validation.json"
    for cluster, value in (("paced", 1.0), ("torch", 2.0), ("paced", 3.0)):
        file.write_text(json.dumps(joined(file, document(cluster, value))))
    found = json.loads(file.read_text())
    assert [(row["name"], row["value"]) for row in found["rows"]] == [("torch/x", 2.0), ("paced/x", 3.0)]
    assert set(found["clusters"]) == {"paced", "torch"}
    file.write_text('{"schema": "other"}')
    with pytest.raises(ConfigError, match="has schema 'other'"):
        joined(file, document("paced", 1.0))


def test_a_cluster_that_computes_needs_its_step_times(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="baton calibrate"):
        torch_subject("demo", tmp_path, None, None)
    file = tmp_path / "steps.yaml"
    file.write_text("paced: {prefill_base_s: 0.01, prefill_token_s: 0.001, decode_base_s: 0.02}\n")
    subject = torch_subject("demo", tmp_path, None, file)
    assert subject.simulated.paced.prefill_token_s == 0.001 and subject.simulated.workers.executor == "paced"
    assert subject.served["workers"] == {"prefill_workers": 1, "decode_workers": 1, "num_kv_blocks": 512, "seed": 0}
