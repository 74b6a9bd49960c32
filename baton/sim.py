"""`baton sim`: a trace, or one drawn from a seed, through the cluster's own code on a virtual clock. An hour of traffic takes minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.progress import say
from baton.trace import read_trace
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from control.config import ClusterConfig
    from simulator.routed_gateway import Served
    from simulator.summary import Latency, Summary
    from simulator.traces.trace import Trace

SCHEMA = "baton.sim.v1"
SESSIONS_PER_S = 0.2  # that begin, of a trace that gives times within sessions only; --rate stretches the whole
MAX_TOKENS = 2048  # what clients are taken to allow; how long an answer will be nobody is told
DEFAULT_CLUSTER: dict[str, dict[str, object]] = {
    "model": {"path": "demo"},
    "workers": {
        "executor": "paced",
        "prefill_workers": 8,
        "decode_workers": 8,
        "num_kv_blocks": 16_384,
        "max_num_batched_tokens": 2048,
        "max_waiting": 4096,
    },
}


def sim(
    trace: Annotated[str, typer.Option(help="A file, or a name in the folder of traces (`baton trace list`).")] = "",
    generate: Annotated[
        str, typer.Option(help="In place of a trace: toolbench, embodied, programming, video_qa, loogle, fan_out, unshared.")
    ] = "",
    policy: Annotated[str, typer.Option(help="NAME[:k=v,...] or module:Class[:k=v,...].")] = "prefix_cost",
    config: Annotated[Path | None, typer.Option(help="A cluster.yaml of paced workers; else 8 + 8 of them.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Requests a second; else the trace's own, or 10.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="The first so many; of a generator 1,000.")] = None,
    cv: Annotated[float, typer.Option(min=0.0, help="Of a generator's gaps: 1 is a Poisson process.")] = 1.0,
    burst: Annotated[int, typer.Option(min=1, help="Of a generator: so many arrive at once.")] = 1,
    spread: Annotated[float, typer.Option(min=0.0, help="Spread arrivals that the trace rounds down to steps of so many seconds.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn. The same seed is the same run.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(min=0.0, help="Seconds to the first token that count as served in time.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0, help="Seconds a token that count as served in time.")] = None,
    traces: Annotated[Path | None, typer.Option("--dir", help="Where traces lie.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write a line of JSON for each request into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Run a placement policy over a trace, on the cluster's own code and a virtual clock."""
    from baton.bench.report import make_document
    from control.config import load_config
    from simulator.summary import Objective, summarise
    from simulator.traces.trace import facts_of

    asked = make_trace(trace, generate, rate=rate, requests=requests, cv=cv, burst=burst, spread_s=spread, seed=seed, folder=traces)
    cluster = load_config(file=config) if config is not None else load_config(DEFAULT_CLUSTER)
    began_s = time.monotonic()
    served = run_trace(asked, cluster, policy=policy, seed=seed, on_progress=say)
    took_s = time.monotonic() - began_s
    say("")
    summary = summarise(served, Objective(ttft_s=slo_ttft, tpot_s=slo_tpot))
    if table is not None:
        table.write_text("".join(json.dumps(asdict(one)) + "\n" for one in served), encoding="utf-8")
    if as_json:
        sections = {"policy": policy, "trace": asdict(facts_of(asked)), "summary": asdict(summary), "took_s": round(took_s, 3)}
        print(json.dumps(make_document(SCHEMA, seed=seed, rows=[], sections=sections)))
    else:
        _print(asked, summary, policy, took_s)


def make_trace(
    trace: str,
    generate: str,
    *,
    rate: float | None,
    requests: int | None,
    cv: float,
    burst: int,
    spread_s: float,
    seed: int,
    folder: Path | None,
) -> Trace:
    """What the options ask for.

    Raises:
        ConfigError: neither a trace nor a generator, or both; or one that does not go with the rest.
    """
    from simulator.traces.generators import Arrivals
    from simulator.traces.generators import generate as draw
    from simulator.traces.timing import at_rate, begin_sessions, first, spread

    if bool(trace) == bool(generate):
        raise ConfigError("give --trace or --generate, one of them; `baton trace list` names traces, --help generators")
    if generate:
        arrivals = Arrivals(rate_per_s=rate if rate is not None else 10.0, cv=cv, burst_size=burst)
        return draw(generate, arrivals, num_requests=requests or 1000, seed=seed)
    asked = read_trace(trace, folder)
    if all(request.session for request in asked.requests) and any(request.think_s is not None for request in asked.requests):
        asked = begin_sessions(asked, SESSIONS_PER_S, seed=seed)
    if spread_s:
        asked = spread(asked, spread_s, seed=seed)
    if requests is not None:
        asked = first(asked, requests)
    try:
        return at_rate(asked, rate) if rate is not None else asked
    except ValueError as error:
        raise ConfigError(str(error)) from None


def run_trace(
    asked: Trace, config: ClusterConfig, *, policy: str, seed: int, on_progress: Callable[[str], None] = lambda text: None
) -> list[Served]:
    """Every request of the trace and what came of it."""
    from simulator.routed_cluster import MODEL_ID, VOCAB_SIZE, RoutedCluster
    from simulator.workload import requests_of

    cluster = RoutedCluster(config, policy=policy, seed=seed, max_tokens=MAX_TOKENS)
    count, began_s = len(asked.requests), time.monotonic()

    def on_over(num_over: int) -> None:
        took_s = time.monotonic() - began_s
        left_s = took_s / num_over * (count - num_over) if num_over else float("inf")
        left = f"{left_s:.0f} s left" if num_over else "starting"
        on_progress(f"{num_over:,} of {count:,} requests, {cluster.loop.now:,.0f} s of virtual time in {took_s:.1f} s, {left}")

    served = cluster.run(requests_of(asked, model_id=MODEL_ID, vocab_size=VOCAB_SIZE, seed=seed), on_over=on_over)
    cluster.router.check()
    return served


def _print(asked: Trace, summary: Summary, policy: str, took_s: float) -> None:
    def told(latency: Latency | None, unit: float) -> str:
        if latency is None:
            return "-"
        return "  ".join(f"{name} {getattr(latency, name) * unit:,.1f}" for name in ("mean", "p50", "p90", "p99"))

    print(f"{policy} under {asked.name}")
    counts = f"{summary.num_finished:,} of {summary.num_requests:,} served"
    print(f"  requests       {counts}; {summary.num_refused:,} refused, {summary.num_failed:,} failed")
    print(f"  TTFT ms        {told(summary.ttft, 1e3)}")
    print(f"  TPOT ms        {told(summary.tpot, 1e3)}")
    print(f"  in time        {summary.attainment:.1%}, {summary.goodput_per_s:.3g} requests/s")
    print(f"  found cached   {summary.hit_share:.1%} of prompt tokens")
    print(f"  time           {summary.duration_s:,.0f} s of traffic in {took_s:.1f} s, {summary.num_requests / took_s:,.0f} requests/s")
