"""The turns of `baton replay`: a trace on a live cluster under each policy in each repeat, and what the policies came to beside each other.

A replicate is a repeat: new prompts, new arrivals where they are drawn, the same for every policy. It counts where every policy's run does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import numpy as np

from baton.bench.load import Endpoint, LoadRun, drive
from baton.bench.policy_rows import label
from baton.bench.switched import SwitchedCluster, lag_complaint, policy_complaints, turns
from baton.bench.trace_traffic import TraceWorkload, answered, tells_cached
from simulator.summary import Latency, Objective, Summary, summarise
from simulator.verdict import MIN_REPLICATES, Better, Comparison, Standing, compare_all, ranking

PRIMARY = "ttft_mean"
NUM_WARMUPS = 16  # requests, before the first run
CURVE = tuple(i / 100 for i in range(101))

RunKey = tuple[int, str]  # repeat, policy
OnProgress = Callable[[LoadRun], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """One trace sent once."""

    policy: str  # "": that of whoever was asked
    repeat: int
    summary: Summary
    tells_cached: bool
    ttfts_s: tuple[float, ...]  # of those that were served
    lag_p99_s: float
    invalid: tuple[str, ...]  # why it does not count; none where it does

    def record(self) -> dict[str, object]:
        """As a member of the document."""
        summary = asdict(self.summary) | ({} if self.tells_cached else {"hit_share": None})
        invalid = list(self.invalid)
        return {"policy": self.policy, "repeat": self.repeat, "summary": summary, "lag_p99_s": round(self.lag_p99_s, 6), "invalid": invalid}


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnsPlan:
    """What is sent, and under which policies."""

    policies: tuple[str, ...]
    num_repeats: int
    workload_of: Callable[[int], TraceWorkload]  # by repeat
    objective: Objective
    seed: int
    num_retakes: int  # times that runs that did not count are taken again, at the end

    def keys(self) -> list[RunKey]:
        """In the order they are taken: all policies of a repeat follow each other, in an order drawn anew."""
        return [(repeat, policy) for repeat in range(self.num_repeats) for policy in turns(self.policies, f"{self.seed} {repeat}")]


def send(endpoint: Endpoint, workload: TraceWorkload, objective: Objective, *, on_progress: OnProgress | None = None) -> LiveRun:
    """The trace once, as the endpoint is."""
    return _taken("", 0, drive(endpoint, workload, num_warmups=1, on_progress=on_progress), objective, ())


def take_turns(
    plan: TurnsPlan, cluster: SwitchedCluster, endpoint: Endpoint, *, progress_of: Callable[[str], OnProgress | None]
) -> Iterator[LiveRun]:
    """Run after run, each from empty caches and with nothing learned; one that did not count comes again.

    progress_of(what is being done) is told how it goes.

    Raises:
        ConfigError: the router cannot load a policy; before anything is sent.
    """
    for policy in plan.policies:
        cluster.check(policy)
    warm_up = plan.workload_of(0)
    drive(endpoint, replace(warm_up, num_requests=min(NUM_WARMUPS, warm_up.num_requests), seed=-1 - warm_up.seed))
    missing = plan.keys()
    for take in range(1 + plan.num_retakes):
        invalid: list[RunKey] = []
        for number, (repeat, policy) in enumerate(missing, 1):
            what = f"{'again, ' if take else ''}{number} of {len(missing)}: {label(policy)}, repeat {repeat + 1}"
            workload, before = plan.workload_of(repeat), cluster.prepare(policy)
            sent = drive(endpoint, workload, on_progress=progress_of(what))
            run = _taken(policy, repeat, sent, plan.objective, policy_complaints(policy, before, cluster.wait_quiet()))
            if run.invalid:
                invalid.append((repeat, policy))
            yield run
        missing = invalid


def _taken(policy: str, repeat: int, run: LoadRun, objective: Objective, complaints: Iterable[str]) -> LiveRun:
    outcomes, late = answered(run), lag_complaint(run.lag_p99_s)
    return LiveRun(
        policy=policy,
        repeat=repeat,
        summary=summarise(outcomes, objective),
        tells_cached=tells_cached(run.requests),
        ttfts_s=tuple(o.ttft_s for o in outcomes if o.terminal == "finished" and o.ttft_s is not None),
        lag_p99_s=run.lag_p99_s,
        invalid=(*([late] if late is not None else []), *complaints),
    )


# --- policies beside each other ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of a summary."""

    name: str
    unit: str
    better: Better
    of: Callable[[Summary], float | None]  # None: nobody was served


def _latency(name: str, statistic: str) -> Metric:
    def of(summary: Summary) -> float | None:
        latency: Latency | None = getattr(summary, name)
        return None if latency is None else float(getattr(latency, statistic))

    return Metric(name=f"{name}_{statistic}", unit="s", better=Better.LOWER, of=of)


METRICS = (
    *(_latency("ttft", statistic) for statistic in ("mean", "p50", "p90", "p99")),
    *(_latency("tpot", statistic) for statistic in ("p50", "p90", "p99")),
    Metric(name="goodput", unit="requests/s", better=Better.HIGHER, of=lambda s: s.goodput_per_s),
    Metric(name="attainment", unit="share", better=Better.HIGHER, of=lambda s: s.attainment),
    Metric(name="hit_share", unit="share", better=Better.HIGHER, of=lambda s: s.hit_share),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One metric of all policies, replicate by replicate."""

    metric: Metric
    values: dict[str, list[float]]
    comparisons: list[Comparison]
    standings: list[Standing]

    def record(self) -> dict[str, object]:
        return {
            "name": self.metric.name,
            "unit": self.metric.unit,
            "better": self.metric.better.value,
            "values": self.values,
            "standings": [asdict(standing) for standing in self.standings],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


def whole_repeats(runs: Sequence[LiveRun], policies: Sequence[str]) -> list[int]:
    """Repeats in which every policy has a run that counts."""
    valid = {(run.repeat, run.policy) for run in runs if not run.invalid}
    return [repeat for repeat in sorted({run.repeat for run in runs}) if all((repeat, policy) in valid for policy in policies)]


def beside(runs: Sequence[LiveRun], policies: Sequence[str]) -> list[Beside]:
    """Every metric that every run has; a pair is two policies in one repeat. No repeat counts: nothing."""
    by_key = {(run.repeat, run.policy): run for run in runs}
    repeats = whole_repeats(runs, policies)
    found: list[Beside] = []
    for metric in METRICS if repeats else ():
        if metric.name == "hit_share" and not all(run.tells_cached for run in runs):
            continue
        told = {label(policy): [metric.of(by_key[repeat, policy].summary) for repeat in repeats] for policy in policies}
        values = {name: [value for value in row if value is not None] for name, row in told.items()}
        if any(len(row) < len(repeats) for row in values.values()):
            continue
        # A ratio needs figures above 0: where one is 0 the values are told and nothing is made of them.
        is_comparable = all(value > 0.0 for row in values.values() for value in row)
        comparisons = compare_all(values) if is_comparable else []
        standings = ranking(values, comparisons, metric.better) if is_comparable else []
        found.append(Beside(metric=metric, values=values, comparisons=comparisons, standings=standings))
    return found


def verdict_of(found: Sequence[Beside], num_repeats: int) -> str:
    """One sentence of the primary metric."""
    primary = next((b for b in found if b.metric.name == PRIMARY and b.standings), None)
    if primary is None:
        return "no repeat counts for all policies, so nothing can be said"
    best, *others = primary.standings
    beaten = [s.policy for s in others if not s.best_or_tied]
    tied = [s.policy for s in others if s.best_or_tied]
    words = f"{best.policy} has the lowest mean TTFT, {best.figure * 1e3:.1f} ms"
    words += f"; for certain below {', '.join(beaten)}" if beaten else ""
    words += f"; not told apart from {', '.join(tied)}" if tied else ""
    return words + f" ({num_repeats} repeats{', exploratory' if num_repeats < MIN_REPLICATES else ''})"


def curves(runs: Sequence[LiveRun], policies: Sequence[str]) -> dict[str, object]:
    """Quantiles of TTFT of each policy, pooled over the repeats that count."""
    repeats = set(whole_repeats(runs, policies))
    pooled = {policy: [s for run in runs if run.policy == policy and run.repeat in repeats for s in run.ttfts_s] for policy in policies}
    return {label(policy): {"ttft_s": np.quantile(values, CURVE).tolist()} for policy, values in pooled.items() if values}


def median_of(runs: Sequence[LiveRun], policy: str, metric: Metric) -> float | None:
    """Over the runs that count; None: there is none."""
    values = [value for run in runs if run.policy == policy and not run.invalid and (value := metric.of(run.summary)) is not None]
    return median(values) if values else None


__all__ = [
    "METRICS",
    "PRIMARY",
    "Beside",
    "LiveRun",
    "Metric",
    "RunKey",
    "TurnsPlan",
    "beside",
    "curves",
    "median_of",
    "send",
    "take_turns",
    "verdict_of",
    "whole_repeats",
]
