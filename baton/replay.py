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

from baton.bench.report import make_document
from baton.chat import first_model
from baton.connection import find_server
from baton.progress import say, say_line
from baton.summary_lines import summary_lines
from baton.trace_options import Burst, Cv, Generator, Prefixes, Rate, Spread, TraceName, TracesDir, source_of
from protocol.errors import ConfigError, ServiceError
from router.policies import label, split_list

if TYPE_CHECKING:
    from baton.bench.live_runs import LiveRun, RunKey, TurnsPlan
    from baton.bench.load import Endpoint, LoadRun
    from baton.bench.switched import SwitchedCluster
    from simulator.replicates import Replicates
    from simulator.summary import Objective
    from simulator.traces.source import Source

SCHEMA = "baton.replay.v1"  # of one run; several policies make the document of `baton compare`
COMPARE_SCHEMA = "baton.compare.v1"
CONNECT_TIMEOUT_S = 3.0


def replay(
    trace: TraceName = "",
    generate: Generator = "",
    url: Annotated[str | None, typer.Option("--url", "--base-url", help="Endpoint; the server running here when left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to name; the endpoint's first when left out.")] = None,
    policies: Annotated[
        str, typer.Option(help="Switch a running cluster between these, a comma between: NAME[:k=v,...] or module:Class[:k=v,...].")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Replicates that each policy meets, in an order drawn anew each time.")] = 5,
    retakes: Annotated[int, typer.Option(min=0, help="Times that runs that did not count are taken again, at the end.")] = 1,
    rate: Rate = None,
    requests: Annotated[int | None, typer.Option(min=1, help="The first so many; of a generator 1,000.")] = None,
    cv: Cv = 1.0,
    burst: Burst = 1,
    prefixes: Prefixes = None,
    spread: Spread = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, turns and replicates.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(min=0.0, help="Seconds to the first token that count as served in time.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0, help="Seconds a token that count as served in time.")] = None,
    traces: TracesDir = None,
    vocab_size: Annotated[int, typer.Option(min=20, help="Prompts are drawn from the token ids below it.")] = 1000,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the endpoint asks for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too.")] = None,
    report: Annotated[Path | None, typer.Option(help="With --policies: draw the comparison into this HTML file.")] = None,
) -> None:
    """Send a trace to a live endpoint at its own times, whether answers come or not, and sum up what its users would have seen."""
    from baton.bench.load import Endpoint
    from simulator.summary import Objective

    asked, objective = split_list(policies), Objective(ttft_s=slo_ttft, tpot_s=slo_tpot)
    if len({label(policy) for policy in asked}) < len(asked):
        raise ConfigError(f"two policies of {policies} have one name; give them parameters that tell them apart")
    source = source_of(trace, generate, rate=rate, requests=requests, cv=cv, burst=burst, prefixes=prefixes, spread=spread, folder=traces)
    server, _ = find_server(url, api_key, os.environ, timeout_s=CONNECT_TIMEOUT_S)
    endpoint = Endpoint(url=server.url, model=model or first_model(server), api_key=api_key)
    if not asked:
        document, complaints = _once(source, endpoint, objective, seed=seed, vocab_size=vocab_size, is_shown=not as_json)
    else:
        document = _in_turns(source, endpoint, objective, asked, num_repeats=repeats, num_retakes=retakes, seed=seed, vocab_size=vocab_size)
        complaints = ()
        if not as_json:
            _print_turns(document)
        if report is not None:
            from simulator.report import render

            report.write_text(render(document), encoding="utf-8")
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    if complaints:
        raise ServiceError(f"this run does not count: {'; '.join(complaints)}; ask for fewer requests a second, or free this machine")


# --- once -------------------------------------------------------------------------------------------------------------


def _once(
    source: Source, endpoint: Endpoint, objective: Objective, *, seed: int, vocab_size: int, is_shown: bool
) -> tuple[dict[str, object], Sequence[str]]:
    """The document, and why it says nothing of the endpoint, if so."""
    from baton.bench.live_runs import send
    from baton.bench.trace_traffic import TraceWorkload
    from simulator.traces.trace import facts_of

    trace = source.draw(seed=seed)
    if not trace.requests:
        raise ConfigError(f"trace {trace.name!r} has no requests, so there is nothing to send")
    run = send(endpoint, TraceWorkload.of(trace, vocab_size=vocab_size, seed=seed), objective, on_progress=_progress_of(""))
    say("")
    if is_shown:
        print(f"{endpoint.url} under {trace.name}")
        for line in summary_lines(run.summary, tells_cached=run.tells_cached):
            print(line)
        print(f"  this client    sent with a p99 of {run.lag_p99_s * 1e3:.1f} ms behind its times")
    sections = {
        "endpoint": {"url": endpoint.url, "model": endpoint.model},
        "trace": asdict(facts_of(trace)),
        "objective": asdict(objective),
        **run.record(),
    }
    return make_document(SCHEMA, seed=seed, rows=[], sections=sections), run.invalid


# --- policies in turns ------------------------------------------------------------------------------------------------


def _in_turns(
    source: Source,
    endpoint: Endpoint,
    objective: Objective,
    policies: Sequence[str],
    *,
    num_repeats: int,
    num_retakes: int,
    seed: int,
    vocab_size: int,
) -> dict[str, object]:
    from baton.bench.live_runs import TurnsPlan
    from baton.bench.trace_traffic import TraceWorkload
    from simulator.replicates import Replicates

    cluster = _cluster_at(endpoint)
    num_requests = source.num_requests or len(source.draw(seed=seed).requests)
    replicates = Replicates.of(source, num_requests=num_requests, seed=seed)

    @cache
    def workload_of(repeat: int) -> TraceWorkload:
        return TraceWorkload.of(replicates.make(repeat), vocab_size=vocab_size, seed=replicates.seed_of(repeat))

    plan = TurnsPlan(
        policies=tuple(policies),
        num_repeats=num_repeats,
        workload_of=workload_of,
        objective=objective,
        seed=seed,
        num_retakes=num_retakes,
    )
    runs = _taken(plan, cluster, endpoint)
    roles = Counter(str(row["role"]) for row in cluster.status()["workers"])
    return turns_document(runs, policies, replicates, objective, roles)


def _taken(plan: TurnsPlan, cluster: SwitchedCluster, endpoint: Endpoint) -> list[LiveRun]:
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


def turns_document(
    runs: Sequence[LiveRun], policies: Sequence[str], replicates: Replicates, objective: Objective, roles: Counter[str]
) -> dict[str, object]:
    """The document of `baton compare`, of a live cluster, and each run beside it."""
    from baton.bench.live_runs import comparison_sections, whole_repeats

    whole = whole_repeats(runs, policies)
    name = replicates.trace.name if replicates.trace is not None else replicates.source.generator
    invalid = [f"{label(run.policy)}, repeat {run.repeat + 1} does not count: {'; '.join(run.invalid)}" for run in runs if run.invalid]
    setting = {
        "trace": name,
        "trace_sha256": replicates.sha256,
        "rate_per_s": replicates.rate_per_s,
        "requests": replicates.num_requests,
        "replicates": len(whole),
        "workers": {"prefill": roles["prefill"] + roles["both"], "decode": roles["decode"]},
        "fidelity": "live",
        "warm_up_s": 0.0,
        "objective": {"ttft_s": objective.ttft_s, "tpot_s": objective.tpot_s},
        "resampling": replicates.told,
        "notes": [
            "every policy met the same requests, from empty caches and with nothing learned, in an order drawn anew; the unit of a test is "
            "the replicate",
            *replicates.notes,
            *invalid,
        ],
    }
    sections = {"setting": setting, **comparison_sections(runs, policies, name), "runs": [run.record() for run in runs]}
    return make_document(COMPARE_SCHEMA, seed=replicates.seed, rows=[], sections=sections)


def _print_turns(document: dict[str, object]) -> None:
    from baton.compare_table import print_comparison
    from simulator.report.document import read_document

    print_comparison(read_document(document))


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


__all__ = ["replay", "turns_document"]
