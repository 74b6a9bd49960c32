"""From the cells of a tournament to what it says: figures in each replicate, who is better for certain and by how much, and one sentence.

Only replicates that every policy met count, from the first on. Oracles stand beside the ranking: they are compared with those that
could serve, and beat nobody. A figure of 0, as a share of hits where nothing is shared, is compared as FLOOR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median

import numpy as np

from control.compose import pool_sizes
from protocol.worker import Role
from simulator.bounds import bounds_section
from simulator.estimate_error import EXACT, EstimateError
from simulator.fidelity import Fidelity
from simulator.metrics import METRICS, PRIMARY, Metric
from simulator.regret import regret_section
from simulator.tournament import Cell, Entrant, Explain, Explained, Key, Outcome, Task, Tournament, Unexplained
from simulator.verdict import MIN_REPLICATES, Comparison, Standing, compare_all, compare_pair, holm, ranking
from simulator.waterfall import Waterfall, waterfall_section

FLOOR = 1e-6
NUM_QUANTILES = 101  # at 0, 0.01, ... 1

Outcomes = Mapping[Task, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """Of one metric, over the replicates that count."""

    metric: Metric
    values: dict[str, list[float | None]]  # of each policy; None: it has no such figure there
    standings: list[Standing]
    comparisons: list[Comparison]

    def record(self) -> dict[str, object]:
        metric = self.metric
        return {
            "name": metric.name,
            "unit": metric.unit,
            "better": metric.better.value,
            "values": self.values,
            "standings": [asdict(standing) for standing in self.standings],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }

    def ratio(self, label: str, reference: str) -> Comparison | None:
        """`label` over `reference`, whichever way round they were compared; None: they were not."""
        for pair in self.comparisons:
            if (pair.first, pair.second) == (label, reference):
                return pair
            if (pair.second, pair.first) == (label, reference):
                return pair.inverse
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a tournament says."""

    tournament: Tournament
    num_replicates: int  # that count
    metrics: dict[str, MetricResult]
    curves: dict[str, list[float]]  # quantiles of TTFT in seconds, of the requests of all replicates
    available_shares: list[float]  # of prompt tokens, what a cache without end would find, in each replicate
    num_unserved: dict[str, int]  # of each policy: requests that count and were refused, failed or never ended
    waterfalls: dict[str, list[Waterfall]]  # of each policy that could serve, in each replicate; of those not explained none
    explained: dict[str, list[Explained]]  # of each policy that could serve, in each replicate; empty: not all were
    unexplained: str  # why not; empty: nobody asked, or there was no time
    under_errors: dict[EstimateError, list[Standing]]  # of the primary metric, where all replicates were run with reports so wrong

    @property
    def is_exploratory(self) -> bool:
        return self.num_replicates < MIN_REPLICATES

    @property
    def shares_of_ceiling(self) -> dict[str, list[float]]:
        """Of each policy in each replicate: hits over those of a cache without end; 1 where that one has none either."""
        hits = self.metrics["hit_share"].values
        return {
            label: [(hit or 0.0) / most if most else 1.0 for hit, most in zip(shares, self.available_shares, strict=True)]
            for label, shares in hits.items()
        }

    @property
    def verdict(self) -> str:
        """One sentence that may be quoted."""
        oracles = {entrant.label for entrant in self.tournament.entrants if entrant.is_oracle}
        return verdict_of(sentence(self.metrics[PRIMARY], trace=self.trace_name, oracles=oracles), self.num_replicates)

    @property
    def trace_name(self) -> str:
        replicates = self.tournament.replicates
        return replicates.trace.name if replicates.trace is not None else replicates.source.generator

    def sections(self) -> dict[str, object]:
        """The members of the document `baton.compare.v1` beside those that every document has."""
        asked = self.tournament
        pools = pool_sizes(asked.config)
        return {
            "setting": {
                "trace": self.trace_name,
                "trace_sha256": asked.replicates.sha256,
                "rate_per_s": asked.replicates.rate_per_s,
                "requests": asked.replicates.num_requests,
                "replicates": self.num_replicates,
                "workers": {"prefill": pools[Role.PREFILL], "decode": pools[Role.DECODE], "mixed": pools[Role.BOTH]},
                "fidelity": asked.fidelity.value,
                "warm_up_s": asked.warm_up_s,
                "objective": {"ttft_s": asked.objective.ttft_s, "tpot_s": asked.objective.tpot_s},
                "resampling": asked.replicates.told,
                "notes": self.notes(),
            },
            "is_exploratory": self.is_exploratory,
            "verdict": self.verdict,
            "policies": [{"label": e.label, "policy": e.policy, "is_oracle": e.is_oracle} for e in asked.entrants],
            "metrics": [metric.record() for metric in self.metrics.values()],
            "ranking": [asdict(standing) for standing in self.metrics[PRIMARY].standings],
            "curves": {label: {"ttft_s": curve} for label, curve in self.curves.items()},
            "bounds": self._bounds(),
            "waterfall": waterfall_section(self.waterfalls),
            "regret": regret_section({label: of[0].regret for label, of in self.explained.items()}),
            "estimate_error": [
                {"factor": error.factor, "sigma": error.sigma, "standings": [asdict(standing) for standing in standings]}
                for error, standings in self.under_errors.items()
            ],
        }

    def notes(self) -> list[str]:
        """What a reader must know to believe the figures."""
        asked = self.tournament
        notes = [
            "every policy met the same requests with the same seeds; the unit of a test is the replicate",
            f"requests that arrive in the first {asked.warm_up_s:.4g} s are run and not counted",
            f"one that is not served misses the objective and counts as {asked.config.router.max_wait_s:g} s to the first token, or as the "
            "slowest of its run if that is longer; time between tokens and hits are of those served",
            f"a cache without end would find {fmean(self.available_shares):.1%} of the prompt tokens, mean over replicates",
            *asked.replicates.notes,
        ]
        for label, count in self.num_unserved.items():
            if count:
                notes.append(f"{label}: {count:,} requests were not served")
        if self.explained:
            modelled = "bounds and" if asked.fidelity is Fidelity.TOKEN_ACCURATE else "bounds, where reuse is lost and"
            notes.append(f"{modelled} regret are of policy-only runs at the pace as configured; regret of the first replicate")
        if self.unexplained:
            notes.append(f"not explained: {self.unexplained}")
        if self.under_errors:
            notes.append(self._told_errors())
        if self.num_replicates < asked.num_replicates:
            notes.append(f"ended early: {self.num_replicates} of {asked.num_replicates} replicates are whole")
        return notes

    def _bounds(self) -> dict[str, dict[str, object]]:
        """Hits here are of the requests that count, and so is the most there could be of them."""
        bounds = [each.bounds for each in next(iter(self.explained.values()), [])]
        known = [replace(b, infinite_cache=share) for b, share in zip(bounds, self.available_shares, strict=False) if b is not None]
        return bounds_section(known) if known else {}

    def _told_errors(self) -> str:
        """Where the first of the ranking still is."""
        first = self.metrics[PRIMARY].standings[0].policy
        lost = [e for e, standings in self.under_errors.items() if not any(s.policy == first and s.best_or_tied for s in standings)]
        if lost:
            where = ", ".join(f"x{error.factor:g} with sigma {error.sigma:g}" for error in lost)
            return f"{first} is not best or tied where workers report their times wrong by {where}"
        factors, sigmas = [e.factor for e in self.under_errors], [e.sigma for e in self.under_errors]
        return (
            f"{first} is best or tied wherever workers report their times wrong by x{min(factors):g} to x{max(factors):g} with a lognormal "
            f"sigma up to {max(sigmas):g}"
        )


def result_of(tournament: Tournament, outcomes: Outcomes) -> Result:
    """
    Raises:
        ValueError: no replicate was met by every policy.
    """
    count = num_whole(tournament, outcomes)
    if not count:
        raise ValueError("no replicate was met by every policy")
    labels = [entrant.label for entrant in tournament.entrants]
    oracles = {entrant.label for entrant in tournament.entrants if entrant.is_oracle}
    of = _by_label(tournament, outcomes, EXACT, count)
    values = {metric.name: {label: _figures(of[label], metric) for label in labels} for metric in METRICS}
    primary = next(metric for metric in METRICS if metric.name == PRIMARY)
    under_errors = {}
    for error in tournament.errors:
        if num_whole(tournament, outcomes, error) == count:
            so_wrong = _by_label(tournament, outcomes, error, count)
            under_errors[error] = judge(primary, {label: _figures(so_wrong[label], primary) for label in labels}, oracles).standings
    metrics = {metric.name: judge(metric, values[metric.name], oracles) for metric in METRICS}
    explained = {entrant.label: _explained(outcomes, entrant, count) for entrant in tournament.able}
    waterfalls = {label: _waterfalls(of[label], each) for label, each in explained.items()}
    if under_errors:
        under_errors[EXACT] = metrics[PRIMARY].standings
    return Result(
        tournament=tournament,
        num_replicates=count,
        metrics=metrics,
        curves={label: quantiles([ttft_s for cell in of[label] for ttft_s in cell.figures.ttfts_s]) for label in labels},
        available_shares=[cell.available_share for cell in of[labels[0]]],
        num_unserved={label: sum(cell.figures.num_unserved for cell in of[label]) for label in labels},
        waterfalls={label: falls for label, falls in waterfalls.items() if len(falls) == count},
        explained=explained if all(len(each) == count for each in explained.values()) else {},
        unexplained=next((outcome.reason for outcome in outcomes.values() if isinstance(outcome, Unexplained)), ""),
        under_errors={error: under_errors[error] for error in sorted(under_errors, key=lambda e: (e.sigma, e.factor))},
    )


def num_whole(tournament: Tournament, outcomes: Outcomes, error: EstimateError = EXACT) -> int:
    """How many replicates, from the first on, every policy has met with reports so wrong."""

    def is_whole(index: int) -> bool:
        return all(Key(replicate=index, entrant=entrant, error=error) in outcomes for entrant in tournament.entrants)

    indices = range(tournament.num_replicates)
    return next((index for index in indices if not is_whole(index)), len(indices))


def _by_label(tournament: Tournament, outcomes: Outcomes, error: EstimateError, count: int) -> dict[str, list[Cell]]:
    """The cells of each policy under the first `count` replicates."""
    found: dict[str, list[Cell]] = {}
    for entrant in tournament.entrants:
        each = [outcomes[Key(replicate=index, entrant=entrant, error=error)] for index in range(count)]
        found[entrant.label] = [outcome for outcome in each if isinstance(outcome, Cell)]
    return found


def _explained(outcomes: Outcomes, entrant: Entrant, count: int) -> list[Explained]:
    each = [outcomes.get(Explain(replicate=index, entrant=entrant)) for index in range(count)]
    return [outcome for outcome in each if isinstance(outcome, Explained)]


def _waterfalls(cells: Sequence[Cell], explained: Sequence[Explained]) -> list[Waterfall]:
    """Of the cells where they have them, else of the runs apart."""
    own, apart = [cell.waterfall for cell in cells], [each.waterfall for each in explained]
    return [waterfall for waterfall in (*own, *apart) if waterfall is not None]


def _figures(cells: Sequence[Cell], metric: Metric) -> list[float | None]:
    return [cell.figures.by_metric[metric.name] for cell in cells]


def judge(metric: Metric, values: Mapping[str, Sequence[float | None]], oracles: set[str]) -> MetricResult:
    """Who is better for certain. A policy without the figure in some replicate is not compared."""
    told = {label: [max(v, FLOOR) for v in each if v is not None] for label, each in values.items() if None not in each}
    able = {label: each for label, each in told.items() if label not in oracles}
    comparisons = compare_all(able)
    standings = ranking({label: _known(values[label]) for label in able}, comparisons, metric.better)
    seers = [label for label in told if label in oracles]
    against = [compare_pair(seer, told[seer], label, told[label]) for seer in seers for label in able]
    adjusted = holm([pair.p_value for pair in against])  # apart: nobody who is ranked is judged more mildly for an oracle beside him
    comparisons += [replace(pair, p_adjusted=p) for pair, p in zip(against, adjusted, strict=True)]
    standings += [Standing(policy=seer, figure=median(_known(values[seer])), best_or_tied=False, beaten_by=()) for seer in seers]
    return MetricResult(
        metric=metric, values={label: list(each) for label, each in values.items()}, standings=standings, comparisons=comparisons
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def sentence(primary: MetricResult, *, trace: str, oracles: set[str]) -> str:
    """Who waits least for the first token, without a full stop."""
    standings = [standing for standing in primary.standings if standing.policy not in oracles]
    if len(standings) == 1:
        return f"{standings[0].policy} has a mean TTFT of {standings[0].figure * 1e3:,.0f} ms under {trace}"
    unbeaten = [standing.policy for standing in standings if standing.best_or_tied]
    beaten = [standing.policy for standing in standings if not standing.best_or_tied]
    if not beaten:
        return f"no difference in mean TTFT under {trace} is certain among {_listed(unbeaten)}"
    if len(unbeaten) > 1:
        return f"{_listed(unbeaten)} are tied for the lowest mean TTFT under {trace}, ahead of {_listed(beaten)}"
    best = unbeaten[0]
    second = next(standing.policy for standing in standings if standing.policy != best)
    pair = primary.ratio(second, best)
    size = f": {second}, the next, takes {pair.ratio:.2f} [{pair.low:.2f}, {pair.high:.2f}] times as long" if pair is not None else ""
    return f"{best} has the lowest mean TTFT under {trace}{size}"


def verdict_of(told: str, num_replicates: int) -> str:
    """A sentence that may be quoted, from what is told and over how many replicates."""
    if num_replicates >= MIN_REPLICATES:
        return f"{told} ({num_replicates} replicates, 95 % intervals, Holm's correction)."
    return f"Exploratory, {num_replicates} of the {MIN_REPLICATES} replicates that a verdict needs: {told}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def quantiles(values: Sequence[float]) -> list[float]:
    """NUM_QUANTILES of them, evenly from the least to the largest."""
    found: list[float] = np.quantile(values, np.linspace(0.0, 1.0, NUM_QUANTILES)).tolist()
    return found


__all__ = ["FLOOR", "MetricResult", "Result", "judge", "num_whole", "quantiles", "result_of", "sentence", "verdict_of"]
