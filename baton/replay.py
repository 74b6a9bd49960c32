"""`baton replay`: a trace on a live endpoint, summed up as a simulated run is; and policies in turns on a running cluster."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.policies import split_list
from baton.bench.policy_rows import label
from baton.bench.report import make_document
from baton.chat import first_model
from baton.connection import find_server
from baton.progress import say, say_line
from baton.sim import make_trace
from baton.summary_lines import summary_lines
from protocol.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from baton.bench.live_runs import LiveRun, RunKey, TurnsPlan
    from baton.bench.load import Endpoint, LoadRun
    from baton.bench.switched import SwitchedCluster
    from baton.bench.trace_traffic import TraceWorkload
    from simulator.summary import Objective
    from simulator.traces.trace import Trace

SCHEMA = "baton.replay.v1"
CONNECT_TIMEOUT_S = 3.0


def replay(
    trace: Annotated[str, typer.Option(help="A file, or a name in the folder of traces (`baton trace list`).")] = "",
    generate: Annotated[
        str, typer.Option(help="In place of a trace: toolbench, embodied, programming, video_qa, loogle, fan_out, unshared.")
    ] = "",
    url: Annotated[str | None, typer.Option("--url", "--base-url", help="Endpoint; the server running here when left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to name; the endpoint's first when left out.")] = None,
    policies: Annotated[
        str, typer.Option(help="Switch a running cluster between these, a comma between: NAME[:k=v,...] or module:Class[:k=v,...].")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Times each policy has its turn, in an order drawn anew each time.")] = 5,
    retakes: Annotated[int, typer.Option(min=0, help="Times that runs that did not count are taken again, at the end.")] = 1,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Requests a second; else the trace's own, or 10.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="The first so many; of a generator 1,000.")] = None,
    cv: Annotated[float, typer.Option(min=0.0, help="Of a generator's gaps: 1 is a Poisson process.")] = 1.0,
    burst: Annotated[int, typer.Option(min=1, help="Of a generator: so many arrive at once.")] = 1,
    spread: Annotated[float, typer.Option(min=0.0, help="Spread arrivals that the trace rounds down to steps of so many seconds.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, turns, and arrivals where they are drawn; each repeat has its own.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(min=0.0, help="Seconds to the first token that count as served in time.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0, help="Seconds a token that count as served in time.")] = None,
    traces: Annotated[Path | None, typer.Option("--dir", help="Where traces lie.")] = None,
    vocab_size: Annotated[int, typer.Option(min=20, help="Prompts are drawn from the token ids below it.")] = 1000,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the endpoint asks for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too.")] = None,
) -> None:
    """Send a trace to a live endpoint at its own times, whether answers come or not, and sum up what its users would have seen."""
    from baton.bench.live_runs import TurnsPlan
    from baton.bench.load import Endpoint
    from baton.bench.trace_traffic import TraceWorkload
    from simulator.summary import Objective

    asked, objective = split_list(policies), Objective(ttft_s=slo_ttft, tpot_s=slo_tpot)

    @cache
    def workload_of(repeat: int) -> TraceWorkload:
        own = seed * 1000 + repeat  # the same for every policy
        drawn = make_trace(trace, generate, rate=rate, requests=requests, cv=cv, burst=burst, spread_s=spread, seed=own, folder=traces)
        return TraceWorkload.of(drawn, vocab_size=vocab_size, seed=own)

    first = workload_of(0)
    if not first.trace.requests:
        raise ConfigError(f"trace {first.trace.name!r} has no requests, so there is nothing to send")
    server, _ = find_server(url, api_key, os.environ, timeout_s=CONNECT_TIMEOUT_S)
    endpoint = Endpoint(url=server.url, model=model or first_model(server), api_key=api_key)
    if asked:
        cluster = _cluster_at(endpoint)
        plan = TurnsPlan(
            policies=tuple(asked), num_repeats=repeats, workload_of=workload_of, objective=objective, seed=seed, num_retakes=retakes
        )
        runs = _take_turns(plan, cluster, endpoint)
        where: dict[str, object] = {"workers": Counter(row["role"] for row in cluster.status()["workers"])}
    else:
        runs, where = [_send_once(endpoint, first, objective)], {}
    where["endpoint"] = {"url": endpoint.url, "model": endpoint.model}
    setting = where | _setting(first, objective, is_drawn=bool(generate))
    document = replay_document(runs, asked, setting, seed=seed)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    elif asked:
        print_turns(runs, asked, first.trace)
    else:
        _print(runs[0], f"{endpoint.url} under {first.trace.name}")
    if not asked and runs[0].invalid:
        raise ServiceError(f"this run does not count: {'; '.join(runs[0].invalid)}; ask for fewer requests a second, or free this machine")


def _send_once(endpoint: Endpoint, workload: TraceWorkload, objective: Objective) -> LiveRun:
    from baton.bench.live_runs import send

    run = send(endpoint, workload, objective, on_progress=_progress_of(""))
    say("")
    return run


def _take_turns(plan: TurnsPlan, cluster: SwitchedCluster, endpoint: Endpoint) -> list[LiveRun]:
    """The newest run of each policy and repeat, in their order. Ctrl-C ends it with what was measured."""
    from baton.bench.live_runs import take_turns

    taken: dict[RunKey, LiveRun] = {}
    try:
        for run in take_turns(plan, cluster, endpoint, progress_of=_progress_of):
            taken[run.repeat, run.policy] = run
            if run.invalid:
                say_line(f"does not count: {label(run.policy)}, repeat {run.repeat + 1}: {'; '.join(run.invalid)}")
    except (KeyboardInterrupt, ServiceError) as end:
        if not taken:
            raise
        say_line(f"ended early ({str(end) or 'interrupted'}): {len(taken)} of {len(plan.keys())} runs were taken")
    say("")
    return [taken[key] for key in sorted(taken, key=lambda key: (key[0], plan.policies.index(key[1])))]


def _progress_of(what: str) -> Callable[[LoadRun], None] | None:
    if not sys.stderr.isatty():
        return None

    def told(run: LoadRun) -> None:
        over = sum(r.is_over for r in run.requests)
        say(f"{what}{'; ' if what else ''}{len(run.requests):,} of {run.workload.num_requests:,} sent, {over:,} over")

    return told


def _cluster_at(endpoint: Endpoint) -> SwitchedCluster:
    """
    Raises:
        ConfigError: none of this user's servers is there.
    """
    from baton.bench.switched import SwitchedCluster
    from baton.operating import Operator
    from control.run_files import read_run_files

    run = next((run for run in read_run_files(os.environ) if run.url == endpoint.url), None)
    if run is None:
        raise ConfigError(f"--policies switches a cluster of yours on this machine, and none answers at {endpoint.url}; see `baton status`")
    return SwitchedCluster(endpoint.url, Operator.of(run), api_key=endpoint.api_key)


# --- telling ----------------------------------------------------------------------------------------------------------


def replay_document(runs: Sequence[LiveRun], policies: Sequence[str], setting: dict[str, object], *, seed: int) -> dict[str, object]:
    """What the runs came to. Of several policies also what they came to beside each other, as in `baton compare`."""
    from baton.bench.live_runs import PRIMARY, beside, curves, verdict_of, whole_repeats
    from simulator.verdict import MIN_REPLICATES

    sections: dict[str, object] = {"setting": setting, "runs": [run.record() for run in runs]}
    if policies:
        found, num_repeats = beside(runs, policies), len(whole_repeats(runs, policies))
        metrics = [b.record() for b in found]
        sections["setting"] = setting | {"replicates": num_repeats}
        sections |= {
            "is_exploratory": num_repeats < MIN_REPLICATES,
            "verdict": verdict_of(found, num_repeats),
            "policies": [{"label": label(policy), "policy": policy, "is_oracle": False} for policy in policies],
            "metrics": metrics,
            "ranking": next((metric["standings"] for metric in metrics if metric["name"] == PRIMARY), []),
            "curves": curves(runs, policies),
            "bounds": {},
            "waterfall": {},
            "regret": {},
            "estimate_error": [],
        }
    return make_document(SCHEMA, seed=seed, rows=[], sections=sections)


def _setting(workload: TraceWorkload, objective: Objective, *, is_drawn: bool) -> dict[str, object]:
    trace = workload.trace
    return {
        "trace": trace.name,
        "trace_sha256": trace.sha256,
        "rate_per_s": trace.rate_per_s,
        "requests": len(trace.requests),
        "replicates": 1,
        "fidelity": "live",
        "warm_up_s": 0.0,
        "objective": asdict(objective),
        "resampling": "requests and prompts drawn anew in each repeat" if is_drawn else "the same requests in each repeat, other prompts",
        "notes": list(trace.notes),
    }


def print_turns(runs: Sequence[LiveRun], policies: Sequence[str], trace: Trace) -> None:
    """A line of medians for each policy, the verdict, and what did not count."""
    from rich.console import Console
    from rich.table import Table

    from baton.bench.live_runs import METRICS, beside, median_of, verdict_of, whole_repeats

    console = Console(highlight=False, soft_wrap=True)
    shown = {"s": (1e3, "ms"), "requests/s": (1.0, "/s"), "share": (100.0, "%")}
    table = Table(title=f"medians under {trace.name}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for metric in METRICS:
        table.add_column(f"{metric.name.replace('_', ' ')} {shown[metric.unit][1]}", justify="right")
    table.add_column("counted", justify="right")
    for policy in policies:
        medians = [(median_of(runs, policy, metric), shown[metric.unit][0]) for metric in METRICS]
        counted = sum(run.policy == policy and not run.invalid for run in runs)
        told = ["-" if value is None else f"{value * scale:,.1f}" for value, scale in medians]
        table.add_row(label(policy), *told, f"{counted}")
    console.print(table)
    console.print(verdict_of(beside(runs, policies), len(whole_repeats(runs, policies))), markup=False)
    for run in runs:
        if run.invalid:
            console.print(f"{label(run.policy)}, repeat {run.repeat + 1} does not count: {'; '.join(run.invalid)}", markup=False)


def _print(run: LiveRun, title: str) -> None:
    print(title)
    for line in summary_lines(run.summary, tells_cached=run.tells_cached):
        print(line)
    print(f"  this client    sent with a p99 of {run.lag_p99_s * 1e3:.1f} ms behind its times")
