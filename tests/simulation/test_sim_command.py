"""`baton sim`: a seed is a run; what is refused is a miss; nobody who places knows how long an answer will be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from control.config import load_config
from protocol.messages import Place
from router.core import RouterCore
from simulator.routed_cluster import RoutedCluster
from simulator.routed_gateway import Served
from simulator.summary import Objective, summarise
from simulator.token_accurate import DEFAULT_CLUSTER, run_token_accurate
from simulator.traces.source import Source
from simulator.traces.trace import Run, Trace, TraceRequest

pytestmark = pytest.mark.pure

SMALL = {"workers": {"executor": "paced", "prefill_workers": 2, "decode_workers": 2, "num_kv_blocks": 512, "max_num_batched_tokens": 512}}


def served(ttft_s: float, *, tpot_s: float = 0.02, terminal: str = "finished", num_tokens: int = 5) -> Served:
    return Served(
        request_id="r",
        arrived_s=10.0,
        num_prompt_tokens=100,
        first_token_s=10.0 + ttft_s,
        end_s=10.0 + ttft_s + tpot_s * (num_tokens - 1),
        num_output_tokens=num_tokens,
        num_cached_tokens=25,
        num_attempts=1,
        terminal=terminal,
    )


def test_a_summary_counts_what_was_not_served_as_missed() -> None:
    """Seen to fail with attainment over those that were served."""
    runs = [served(0.1), served(0.3), served(0.1, tpot_s=0.2), served(0.1, terminal="failed"), served(0.2, num_tokens=1)]
    refused = Served(request_id="r", arrived_s=10.0, num_prompt_tokens=100, end_s=10.1, terminal="refused")
    summary = summarise([*runs, refused], Objective(ttft_s=0.25, tpot_s=0.1))
    assert (summary.num_requests, summary.num_finished, summary.num_refused, summary.num_failed) == (6, 4, 1, 1)
    assert summary.attainment == pytest.approx(2 / 6) and summary.hit_share == 0.25
    assert summary.duration_s == pytest.approx(0.9) and summary.goodput_per_s == pytest.approx(2 / 0.9)
    assert summary.ttft is not None and summary.ttft.p50 == pytest.approx(0.15) and summary.ttft.mean == pytest.approx(0.175)
    assert summarise([refused], Objective()).ttft is None and Objective().is_met_by(runs[1])


def small_trace(num_requests: int = 40) -> Trace:
    return Source(generator="fan_out", rate_per_s=20.0, num_requests=num_requests, burst_size=8).draw(seed=3)


def test_a_seed_is_a_run_and_tokens_are_those_of_the_trace() -> None:
    """Seen to fail with the router's ties drawn from the system."""
    config = load_config(SMALL)
    first, again = (run_token_accurate(small_trace(), config, policy="power_of_two", seed=5) for _ in range(2))
    assert first == again and all(one.terminal == "finished" for one in first)
    assert [(one.num_prompt_tokens, one.num_output_tokens) for one in first] == [(1088, 64)] * 40
    assert run_token_accurate(small_trace(), config, policy="power_of_two", seed=6) != first


def test_the_router_is_not_told_how_long_an_answer_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 tokens each; the router hears of 2,048 allowed. Seen to fail with max_tokens left out of the cluster."""
    asked: list[Place] = []
    on = RouterCore.on

    def listen(self: RouterCore, event: object, now: float) -> object:
        message = getattr(event, "message", None)
        if isinstance(message, Place):
            asked.append(message)
        return on(self, event, now)  # type: ignore[arg-type]

    monkeypatch.setattr(RouterCore, "on", listen)
    run_token_accurate(small_trace(8), load_config(SMALL), policy="least_work", seed=0)
    assert {place.expected_output_tokens for place in asked} == {2048} and len(asked) == 8


def test_prefixes_of_a_trace_are_found_again() -> None:
    trace = Trace(
        name="t",
        requests=tuple(TraceRequest(at_s=float(i), runs=(Run("p", 512), Run(f"own {i}", 32)), output_tokens=4) for i in range(5)),
    )
    runs = run_token_accurate(trace, load_config(SMALL), policy="prefix_cost", seed=0)
    assert [one.num_cached_tokens for one in runs] == [0] + [512] * 4


def test_workers_that_cannot_be_simulated_are_told() -> None:
    for change, why in (({"num_kv_blocks": None}, "workers.num_kv_blocks"), ({"executor": "torch"}, "workers.executor: paced")):
        tree = {"workers": {name: value for name, value in (SMALL["workers"] | change).items() if value is not None}}
        with pytest.raises(Exception, match=why):
            RoutedCluster(load_config(tree))


def test_the_command_prints_a_table_and_a_document(tmp_path: Path) -> None:
    runner, rows = CliRunner(), tmp_path / "rows.jsonl"
    asked = ["sim", "--generate", "toolbench", "--requests", "60", "--rate", "20", "--slo-ttft", "1"]
    told = runner.invoke(app, [*asked, "--table", str(rows)])
    assert told.exit_code == 0, told.output
    assert "60 of 60 served" in told.stdout and "prefix_cost under toolbench" in told.stdout
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 60 and {line["terminal"] for line in lines} == {"finished"}
    document = json.loads(runner.invoke(app, [*asked, "--policy", "round_robin", "--json"]).stdout)
    assert document["schema"] == "baton.sim.v1" and document["summary"]["num_finished"] == 60 and document["policy"] == "round_robin"
    for bad, why in (
        ([], "--trace or --generate"),
        (["--generate", "x"], "there is no generator 'x'"),
        (["--trace", "x"], "there is no trace x"),
    ):
        assert why in str(runner.invoke(app, ["sim", *bad]).exception)


def test_the_default_cluster_is_one() -> None:
    RoutedCluster(load_config(DEFAULT_CLUSTER)).router.check()
