"""`baton sim`: a trace, or one drawn from a seed, through the cluster's own code on a virtual clock. An hour of traffic takes minutes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.event_replay import run_again
from baton.progress import say
from baton.sim_faults import seeds_of, sim_faults
from baton.summary_lines import summary_lines
from baton.trace_options import Burst, Cv, Generator, Prefixes, Rate, Spread, TraceName, TracesDir, source_of

if TYPE_CHECKING:
    from simulator.summary import Summary
    from simulator.traces.trace import Trace

SCHEMA = "baton.sim.v1"


def sim(
    trace: TraceName = "",
    generate: Generator = "",
    policy: Annotated[str, typer.Option(help="NAME[:k=v,...] or module:Class[:k=v,...].")] = "prefix_cost",
    config: Annotated[Path | None, typer.Option(help="A cluster.yaml of paced workers; else 8 + 8 of them.")] = None,
    rate: Rate = None,
    requests: Annotated[int | None, typer.Option(min=1, help="The first so many; of a generator 1,000, of a seed of faults 200.")] = None,
    cv: Cv = 1.0,
    burst: Burst = 1,
    prefixes: Prefixes = None,
    spread: Spread = 0.0,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn. The same seed is the same run.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(min=0.0, help="Seconds to the first token that count as served in time.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0, help="Seconds a token that count as served in time.")] = None,
    traces: TracesDir = None,
    table: Annotated[Path | None, typer.Option(help="Write a line of JSON for each request into this file.")] = None,
    events: Annotated[
        Path | None, typer.Option(help="In place of a trace: run a router's record again (`baton serve --record DIR`) and compare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    faults: Annotated[bool, typer.Option("--faults", help="In place of a trace: a small cluster under faults drawn from --seed.")] = False,
    kinds: Annotated[str, typer.Option(help="Of faults, as kill,hang; else all of them.")] = "",
    seeds: Annotated[str, typer.Option(help="FIRST:LAST: with --faults, all of these in place of --seed.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share --seeds.")] = 1,
) -> None:
    """Run a placement policy over a trace, on the cluster's own code and a virtual clock."""
    if faults:
        sim_faults(seeds_of(seeds, seed), kinds, requests=requests, jobs=jobs, as_json=as_json)
        return
    if events is not None:
        raise typer.Exit(0 if run_again(events, as_json=as_json) else 1)
    from baton.bench.report import make_document
    from control.config import load_config
    from router.policies.user_path import import_last_from
    from simulator.summary import Objective, summarise
    from simulator.token_accurate import DEFAULT_CLUSTER, run_token_accurate
    from simulator.traces.trace import facts_of

    import_last_from(str(Path.cwd()))
    source = source_of(trace, generate, rate=rate, requests=requests, cv=cv, burst=burst, prefixes=prefixes, spread=spread, folder=traces)
    asked = source.draw(seed=seed)
    cluster = load_config(file=config) if config is not None else load_config(DEFAULT_CLUSTER)
    began_s = time.monotonic()

    def on_over(num_over: int, now_s: float) -> None:
        took_s = time.monotonic() - began_s
        left = f"{took_s / num_over * (len(asked.requests) - num_over):.0f} s left" if num_over else "starting"
        say(f"{num_over:,} of {len(asked.requests):,} requests, {now_s:,.0f} s of virtual time in {took_s:.1f} s, {left}")

    served = run_token_accurate(asked, cluster, policy=policy, seed=seed, on_over=on_over)
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


def _print(asked: Trace, summary: Summary, policy: str, took_s: float) -> None:
    print(f"{policy} under {asked.name}")
    for line in summary_lines(summary):
        print(line)
    print(f"  time           {summary.duration_s:,.0f} s of traffic in {took_s:.1f} s, {summary.num_requests / took_s:,.0f} requests/s")
