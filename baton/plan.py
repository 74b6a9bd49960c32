"""`baton plan`: how many workers of which size meet an objective, whether to disaggregate at all, and the cluster.yaml that says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from baton.plan_told import MIXED, SPLIT, Asked, Told
from baton.progress import say, say_line
from baton.trace_options import Cv, TraceName, TracesDir, source_of
from protocol.errors import ConfigError
from simulator.pools import Affinity, Criterion

if TYPE_CHECKING:
    from simulator.placement_search import Plan, Search
    from simulator.plan_config import Tree
    from simulator.traces.source import Source
    from simulator.traces.trace import Trace
    from simulator.worker_models import WorkerModels

LINK_LATENCY_S = 1e-3
NETWORK_BYTES_PER_S = 25e9  # between machines: 200 Gbit/s
MAX_GPUS_PER_MACHINE = 8


def plan(
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs to divide among prefill and decode workers.")],
    model: Annotated[str, typer.Option(help="opt-13b and opt-66b as published; other names or a directory by datasheet.")] = "opt-13b",
    gpu: Annotated[str, typer.Option(help="A100, H100, H200 or L40S; what was published is of a100-80g.")] = "a100-80g",
    paced: Annotated[Path | None, typer.Option(help="In place of both: the pace and blocks of this cluster.yaml.")] = None,
    gpus_per_machine: Annotated[int, typer.Option(min=1, help="GPUs with a fast link among them.")] = MAX_GPUS_PER_MACHINE,
    affinity: Annotated[Affinity, typer.Option(help="low: KV moves fast within a machine only; high: between any two.")] = Affinity.LOW,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second to serve; else the best rate a GPU is sought.")] = None,
    slo_ttft: Annotated[float | None, typer.Option(min=0.001, help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0001, help="Seconds a token after it.")] = None,
    attainment: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of requests that must be served in time.")] = 0.9,
    criterion: Annotated[
        Criterion, typer.Option(help="joint: in both parts by one request; marginal: each percentile apart, as DistServe's simulator.")
    ] = Criterion.JOINT,
    workload: Annotated[str, typer.Option(help="Lengths: sharegpt, sharegpt_lognormal, or a generator of `baton sim`.")] = "sharegpt",
    trace: TraceName = "",
    traces: TracesDir = None,
    requests: Annotated[int, typer.Option(min=10, help="Of each simulation.")] = 1000,
    cv: Cv = 1.0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="L_m: prompts are batched up to so many tokens.")] = 512,
    link_bytes_per_s: Annotated[float | None, typer.Option(min=1.0, help="Of a worker's link; else the GPU's, or 200 Gbit/s.")] = None,
    link_latency_s: Annotated[float, typer.Option(min=0.0, help="Of a transfer, before its first byte.")] = LINK_LATENCY_S,
    draws: Annotated[int, typer.Option(min=1, max=100, help="Seeds under which the two best are tried again.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of whatever is drawn. The same seed is the same plan.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the best as a cluster.yaml of paced workers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Find how many workers of which size meet an objective, and whether prefill and decode should be apart."""
    asked = Asked(
        gpus=gpus,
        model=model if paced is None else "",
        gpu=gpu if paced is None else "",
        paced=str(paced or ""),
        gpus_per_machine=gpus_per_machine,
        affinity=affinity.value,
        rate=rate,
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        attainment=attainment,
        criterion=criterion.value,
        workload="" if trace else workload,
        trace=trace,
        requests=requests,
        cv=cv,
        batch_tokens=batch_tokens,
        link_bytes_per_s=link_bytes_per_s,
        link_latency_s=link_latency_s,
        draws=draws,
        seed=seed,
    )
    told = make_plan(asked, traces)
    say("")
    if as_json:
        print(json.dumps(told.document()))
    else:
        told.print()
    if output is not None:
        write_config(output, tree_of(told), told.plan)
        say_line(f"{output}: baton sim --config {output} tries it on the cluster's own code, baton serve --config {output} runs it")


def make_plan(asked: Asked, traces: Path | None) -> Told:
    """
    Raises:
        ConfigError: nothing is asked for, or of something that is not known.
    """
    from simulator.placement_search import Goal, Search
    from simulator.pools import Link
    from simulator.summary import Objective

    if asked.slo_ttft is None and asked.slo_tpot is None:
        raise ConfigError("nothing is asked for; give --slo-ttft, --slo-tpot or both")
    workers, affinity = workers_of(asked), Affinity(asked.affinity)
    objective = Objective(ttft_s=asked.slo_ttft, tpot_s=asked.slo_tpot)
    goal = Goal(objective=objective, attainment=asked.attainment, criterion=Criterion(asked.criterion))
    usual = workers.link_bytes_per_s if affinity is Affinity.LOW else NETWORK_BYTES_PER_S
    link = Link(latency_s=asked.link_latency_s, bytes_per_s=asked.link_bytes_per_s or usual)
    draw = draws_of(source_of(asked.trace, asked.workload, rate=None, requests=asked.requests, cv=asked.cv, folder=traces))

    def search(seed: int) -> Search:
        models, tokens = workers.by_gpus, asked.batch_tokens
        return Search(models, lambda rate: draw(rate, seed), goal, link=link, batch_tokens=tokens, on_progress=say)

    found = search(asked.seed).plan(asked.gpus, affinity, gpus_per_machine=asked.gpus_per_machine, rate_per_s=asked.rate)
    seeds = range(asked.seed, asked.seed + asked.draws) if asked.draws > 1 and not asked.trace else []
    spreads = spreads_of(found, search, seeds)
    return Told(asked=asked, plan=found, workers=workers, goal=goal, link=link, spreads=spreads, sample=draw(1.0, asked.seed))


def workers_of(asked: Asked) -> WorkerModels:
    from control.config import load_config
    from simulator.worker_models import known_workers, paced_workers

    return known_workers(asked.model, asked.gpu) if not asked.paced else paced_workers(load_config(file=Path(asked.paced)))


def draws_of(source: Source) -> Callable[[float, int], Trace]:
    """(requests/s, seed) to what is sent; a trace is stretched, and the same for every seed.

    Raises:
        ConfigError: no such trace, or one that cannot be read.
    """
    if source.generator:
        return lambda rate, seed: replace(source, rate_per_s=rate).draw(seed=seed)
    asked = source.draw(seed=0)
    return lambda rate, seed: replace(source, rate_per_s=rate).timed(asked)


def spreads_of(plan: Plan, search: Callable[[int], Search], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Requests/s a GPU of the best apart and the best mixed under each seed."""
    spreads: dict[str, list[float]] = {}
    for kind, best in ((SPLIT, plan.best_split), (MIXED, plan.best_mixed)):
        if best is not None and seeds:
            say(f"{best.pools} under {len(seeds)} seeds")
            spreads[kind] = [search(one).find(best.pools).rate_per_gpu for one in seeds]
    return spreads


def tree_of(told: Told) -> Tree:
    """The best of the plan, as often as the rate asks for.

    Raises:
        ConfigError: nothing meets the objective, or only on more GPUs than there are.
    """
    from simulator.plan_config import Typical, cluster_tree
    from simulator.planner import copies

    asked, best = told.asked, told.plan.best
    if best is None:
        raise ConfigError("no placement meets the objective, so there is no file to write; allow more time, or more GPUs to a worker")
    count = copies(asked.rate or 0.0, best.rate_per_s)
    needed = count * best.pools.num_gpus
    if needed > asked.gpus:
        raise ConfigError(f"{asked.rate:g} requests/s need {needed} GPUs, {asked.gpus} are given; raise --gpus, or lower --rate")
    pairs = [(request.num_prompt_tokens, request.output_tokens) for request in told.sample.requests]
    typical = Typical(
        prompt_tokens=round(fmean(prompt for prompt, _ in pairs)),
        context_tokens=round(sum(prompt * output + output**2 / 2 for prompt, output in pairs) / sum(output for _, output in pairs)),
        longest_prompt_tokens=max(prompt for prompt, _ in pairs),
    )
    return cluster_tree(best, count, told.workers, typical, link=told.link, batch_tokens=asked.batch_tokens)


def write_config(path: Path, tree: Tree, plan: Plan) -> None:
    import yaml

    assert plan.best is not None
    remarks = (
        f"{plan.best.pools}, found by baton plan. A worker of TP2 stands for two GPUs.",
        "Paced workers: step times and KV room of the plan's, tokens of the demo model; docs/planning.md says what is approximate.",
    )
    text = "".join(f"# {remark}\n" for remark in remarks) + "\n" + yaml.safe_dump(tree, sort_keys=False)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; check --output") from None
