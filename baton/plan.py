"""`baton plan`: how many workers of which size meet an objective, whether to disaggregate at all, and the cluster.yaml that says so."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from baton.progress import say, say_line
from baton.trace_options import Cv, TraceName, TracesDir, source_of
from protocol.errors import ConfigError
from simulator.pools import Affinity, Criterion

if TYPE_CHECKING:
    from baton.bench.report import Row
    from simulator.placement_search import Found, Goal, Plan, Search
    from simulator.plan_config import Tree
    from simulator.pools import Link
    from simulator.traces.source import Source
    from simulator.traces.trace import Trace
    from simulator.worker_models import WorkerModels

SCHEMA = "baton.plan.v1"
SPLIT, MIXED = "apart", "mixed"
LINK_LATENCY_S = 1e-3
NETWORK_BYTES_PER_S = 25e9  # between machines: 200 Gbit/s
MAX_GPUS_PER_MACHINE = 8
NOT_MODELLED = (
    "no pipeline parallelism: a worker is one tensor-parallel group",
    "no prefix is found cached, and no worker fails",
    "a step that computes prompts beside decodes reads the weights once; no published profile shows it",
)


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
    from baton.bench.report import make_document
    from simulator.placement_search import Goal, Search
    from simulator.pools import Link
    from simulator.summary import Objective

    if slo_ttft is None and slo_tpot is None:
        raise ConfigError("nothing is asked for; give --slo-ttft, --slo-tpot or both")
    workers = workers_of(model, gpu, paced)
    goal = Goal(objective=Objective(ttft_s=slo_ttft, tpot_s=slo_tpot), attainment=attainment, criterion=criterion)
    usual = workers.link_bytes_per_s if affinity is Affinity.LOW else NETWORK_BYTES_PER_S
    link = Link(latency_s=link_latency_s, bytes_per_s=link_bytes_per_s or usual)
    generator = "" if trace else workload
    draw = draws_of(source_of(trace, generator, rate=None, requests=requests, cv=cv, burst=1, spread=0.0, folder=traces))

    def search(of_seed: int) -> Search:
        return Search(workers.by_gpus, lambda at: draw(at, of_seed), goal, link=link, batch_tokens=batch_tokens, on_progress=say)

    began_s = time.monotonic()
    found = search(seed).plan(gpus, affinity, gpus_per_machine=gpus_per_machine, rate_per_s=rate)
    spreads = spreads_of(found, search, range(seed, seed + draws) if draws > 1 and not trace else [])
    took_s = time.monotonic() - began_s
    say("")
    told = Told(workers=workers, goal=goal, rate_per_s=rate, gpus=gpus, spreads=spreads)
    if as_json:
        asked = {
            "model": model if paced is None else str(paced),
            "gpu": gpu if paced is None else None,
            "gpus": gpus,
            "gpus_per_machine": gpus_per_machine,
            "affinity": affinity.value,
            "rate_per_s": rate,
            "ttft_s": slo_ttft,
            "tpot_s": slo_tpot,
            "attainment": attainment,
            "criterion": criterion.value,
            "step_times": workers.origin,
            "workload": trace or workload,
            "requests": requests,
            "cv": cv,
            "batch_tokens": batch_tokens,
            "link": asdict(link),
        }
        sections = {"asked": asked, "lengths": lengths_of(draw(1.0, seed)), **told.sections(found), "took_s": round(took_s, 1)}
        print(json.dumps(make_document(SCHEMA, seed=seed, rows=told.rows(found), sections=sections)))
    else:
        told.print(found, f"{model} on {gpus} x {gpu}" if paced is None else f"{paced} on {gpus} GPUs", draw(1.0, seed), took_s)
    if output is not None:
        write_config(output, tree_of(found, told, draw(1.0, seed), link=link, batch_tokens=batch_tokens), found)
        say_line(f"{output}: baton sim --config {output} tries it on the cluster's own code, baton serve --config {output} runs it")


def workers_of(model: str, gpu: str, paced: Path | None) -> WorkerModels:
    from control.config import load_config
    from simulator.worker_models import known_workers, paced_workers

    return known_workers(model, gpu) if paced is None else paced_workers(load_config(file=paced))


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


def lengths_of(trace: Trace) -> dict[str, object]:
    """The distribution a plan was made for."""
    from simulator.traces.trace import facts_of

    facts = facts_of(trace)
    mean = {
        "input_mean": sum(r.num_prompt_tokens for r in trace.requests) / len(trace.requests),
        "output_mean": sum(r.output_tokens for r in trace.requests) / len(trace.requests),
    }
    return {"name": facts.name, "input_tokens": facts.input_tokens, "output_tokens": facts.output_tokens, **mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A plan in words and figures."""

    workers: WorkerModels
    goal: Goal
    rate_per_s: float | None
    gpus: int
    spreads: Mapping[str, Sequence[float]]

    def rows(self, plan: Plan) -> list[Row]:
        from baton.bench.report import Row

        return [
            Row(name=str(one.pools), value=one.rate_per_gpu, unit="requests/s/GPU", details=self._details(one, plan)) for one in plan.found
        ]

    def sections(self, plan: Plan) -> dict[str, object]:
        published = plan.as_published
        answer = published and {
            "algorithm": published.algorithm,
            "unit": str(published.unit),
            "copies": published.copies,
            "gpus": published.num_gpus,
        }
        best = {"best": plan.best, SPLIT: plan.best_split, MIXED: plan.best_mixed}
        named = {kind: str(one.pools) if one is not None else None for kind, one in best.items()}
        return {"best": named, "as_published": answer, "draws": self.spreads, "advice": plan.advice, "not_modelled": NOT_MODELLED}

    def print(self, plan: Plan, what: str, sample: Trace, took_s: float) -> None:
        lengths, share = lengths_of(sample), f"p{self.goal.attainment * 100:g}"
        wanted = self.goal.objective
        asked = [f"{name} {limit * 1e3:g} ms" for name, limit in (("TTFT", wanted.ttft_s), ("TPOT", wanted.tpot_s)) if limit is not None]
        print(f"{what}: {' and '.join(asked)} for {self.goal.attainment:.0%} of {lengths['name']}", end="")
        print(f" (prompts of {lengths['input_mean']:,.0f} tokens, answers of {lengths['output_mean']:,.0f}, on average)\n")
        head = ["", "placement", "GPUs", "req/s/GPU", "req/s", "in time", f"TTFT {share} ms", f"TPOT {share} ms", f"pause {share} ms"]
        asks = self.rate_per_s is not None
        lines = [head + ([f"GPUs for {self.rate_per_s:g}/s"] if asks else [])]
        for one in plan.found:
            trial = one.trial
            cells = ["*" if one is plan.best else "", str(one.pools), str(one.pools.num_gpus)]
            if trial is None:
                cells += ["-"] * 6
            else:
                cells += [f"{one.rate_per_gpu:.2f}", f"{one.rate_per_s:.2f}", f"{trial.attainment:.1%}"]
                cells += [f"{trial.ttft_s * 1e3:.0f}", f"{trial.tpot_s * 1e3:.1f}", f"{trial.pause_s * 1e3:.0f}"]
            if self.rate_per_s is not None:
                cells.append(f"{one.gpus_for(self.rate_per_s):.0f}" if trial is not None else "-")
            lines.append(cells)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            cells = [
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
        print(f"\n{plan.advice}")
        if plan.as_published is not None:
            answer = plan.as_published
            times = f"{answer.copies} x ({answer.unit})" if answer.copies > 1 else str(answer.unit)
            print(f"DistServe's algorithm {answer.algorithm} says: {times}, {answer.num_gpus} GPUs.")
        for kind, rates in self.spreads.items():
            print(
                f"Best {kind} under {len(rates)} seeds: {min(rates):.2f} to {max(rates):.2f} requests/s a GPU, median {median(rates):.2f}."
            )
        print(f"Note: step times are {self.workers.origin}.")
        for note in NOT_MODELLED:
            print(f"Note: {note}.")
        print(f"{len(plan.found)} placements in {took_s:.0f} s.")

    def _details(self, one: Found, plan: Plan) -> dict[str, object]:
        trial = one.trial
        details: dict[str, object] = {
            "gpus": one.pools.num_gpus,
            "kind": MIXED if one.pools.mixed is not None else SPLIT,
            "is_best": one is plan.best,
            "rate_per_s": one.rate_per_s,
            "attainment": None if trial is None else trial.attainment,
            "ttft_s": None if trial is None else trial.ttft_s,
            "tpot_s": None if trial is None else trial.tpot_s,
            "pause_s": None if trial is None else trial.pause_s,
        }
        if self.rate_per_s is not None:
            details["gpus_for_rate"] = one.gpus_for(self.rate_per_s) if trial is not None else None
        return details


def tree_of(plan: Plan, told: Told, sample: Trace, *, link: Link, batch_tokens: int) -> Tree:
    """The best of the plan, as often as the rate asks for.

    Raises:
        ConfigError: nothing meets the objective, or only on more GPUs than there are.
    """
    from simulator.plan_config import Typical, cluster_tree
    from simulator.planner import copies

    if plan.best is None:
        raise ConfigError(
            "no placement meets the objective, so there is no configuration to write; allow more time, or more GPUs to a worker"
        )
    count = copies(told.rate_per_s or 0.0, plan.best.rate_per_s)
    if count * plan.best.pools.num_gpus > told.gpus:
        needed = count * plan.best.pools.num_gpus
        raise ConfigError(f"{told.rate_per_s:g} requests/s need {needed} GPUs, {told.gpus} are given; raise --gpus, or lower --rate")
    prompts = [request.num_prompt_tokens for request in sample.requests]
    outputs = [request.output_tokens for request in sample.requests]
    typical = Typical(
        prompt_tokens=round(sum(prompts) / len(prompts)),
        context_tokens=round(sum(p * o + o * o / 2 for p, o in zip(prompts, outputs, strict=True)) / sum(outputs)),
        longest_prompt_tokens=max(prompts),
    )
    return cluster_tree(plan.best, count, told.workers, typical, link=link, batch_tokens=batch_tokens)


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
