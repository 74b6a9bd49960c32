"""The turns of `baton replay`: a trace on a live cluster under each policy in each repeat, and what the policies came to beside each other.

A replicate is a repeat: new prompts, new arrivals where they are drawn, the same for every policy. It counts where every policy's run does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from baton.bench.load import Endpoint, LoadRun, drive
from baton.bench.switched import SwitchedCluster, lag_complaint, policy_complaints, turns
from baton.bench.trace_traffic import TraceWorkload, answered, tells_cached
from router.config import RouterConfig
from router.policies import label
from simulator.comparison import judge, quantiles, sentence, verdict_of
from simulator.metrics import METRICS, PRIMARY, Figures, figures_of
from simulator.summary import Objective, Summary, summarise
from simulator.verdict import MIN_REPLICATES

NUM_WARMUPS = 16  # requests, before the first run

RunKey = tuple[int, str]  # repeat, policy
OnProgress = Callable[[LoadRun], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """One trace sent once."""

    policy: str  # "": that of whoever was asked
    repeat: int
    summary: Summary
    figures: Figures
    tells_cached: bool
    lag_p99_s: float
    invalid: tuple[str, ...]  # why it does not count; none where it does

    def figure(self, metric: str) -> float | None:
        """None: nobody told."""
        return self.figures.by_metric[metric] if self.tells_cached or metric != "hit_share" else None

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
        figures=figures_of(outcomes, objective, unserved_ttft_s=RouterConfig().max_wait_s),
        tells_cached=tells_cached(run.requests),
        lag_p99_s=run.lag_p99_s,
        invalid=(*([late] if late is not None else []), *complaints),
    )


# --- policies beside each other ---------------------------------------------------------------------------------------


def whole_repeats(runs: Sequence[LiveRun], policies: Sequence[str]) -> list[int]:
    """Repeats in which every policy has a run that counts."""
    valid = {(run.repeat, run.policy) for run in runs if not run.invalid}
    return [repeat for repeat in sorted({run.repeat for run in runs}) if all((repeat, policy) in valid for policy in policies)]


def comparison_sections(runs: Sequence[LiveRun], policies: Sequence[str], trace: str) -> dict[str, object]:
    """The members of the document `baton.compare.v1` that tell who is better. No repeat counts for all: none but the policies."""
    named = {policy: label(policy) for policy in policies}
    told: dict[str, object] = {
        "policies": [{"label": named[policy], "policy": policy, "is_oracle": False} for policy in policies],
        "bounds": {},
        "waterfall": {},
        "regret": {},
        "estimate_error": [],
    }
    repeats, by_key = whole_repeats(runs, policies), {(run.repeat, run.policy): run for run in runs}
    if not repeats:
        return told | {"is_exploratory": True, "verdict": "No repeat counts for all policies.", "metrics": [], "ranking": [], "curves": {}}
    of = {policy: [by_key[repeat, policy] for repeat in repeats] for policy in policies}
    results = {m.name: judge(m, {named[p]: [run.figure(m.name) for run in of[p]] for p in policies}, set()) for m in METRICS}
    primary = results[PRIMARY]
    return told | {
        "is_exploratory": len(repeats) < MIN_REPLICATES,
        "verdict": verdict_of(sentence(primary, trace=trace, oracles=set()), len(repeats)),
        "metrics": [result.record() for result in results.values()],
        "ranking": [asdict(standing) for standing in primary.standings],
        "curves": {named[p]: {"ttft_s": quantiles([s for run in of[p] for s in run.figures.ttfts_s])} for p in policies},
    }


__all__ = ["LiveRun", "RunKey", "TurnsPlan", "comparison_sections", "send", "take_turns", "whole_repeats"]
