"""The comparison's document (`baton.compare.v1`) as records. A part that is missing is None or empty here, and the page says so.

A figure that is `null` in the document is NaN: somebody was there, and nothing can be said of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, nan
from statistics import median

from protocol.errors import ConfigError
from simulator.verdict import Better, Comparison, Standing

SCHEMA = "baton.compare.v1"
PRIMARY = "ttft_mean"  # what policies are ranked by

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of all policies alike. None: the document does not tell."""

    trace: str | None
    trace_sha256: str | None
    rate_per_s: float | None
    num_requests: int | None  # of each replicate
    num_replicates: int | None
    num_prefill: int | None
    num_decode: int | None
    num_mixed: int | None  # that do both
    fidelity: str | None
    warm_up_s: float | None
    ttft_s: float | None  # the objective
    tpot_s: float | None
    resampling: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    label: str
    spec: str  # as --policies takes it
    is_oracle: bool  # sees what none that serves can see; stands in the ranking, beats nobody
    place: int  # in the order of the document: its colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    unit: str
    better: Better
    values: Mapping[str, tuple[float, ...]]  # of each policy in each replicate
    standings: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]

    def ratio(self, label: str, reference: str) -> Comparison | None:
        """`label` over `reference`, whichever way round the document has the pair; None: it has not."""
        for pair in self.comparisons:
            if (pair.first, pair.second) == (label, reference):
                return pair
            if (pair.first, pair.second) == (reference, label):
                low, high = _inverse(pair.high), _inverse(pair.low)
                return replace(pair, first=label, second=reference, ratio=_inverse(pair.ratio), low=low, high=high)
        return None

    def standing(self, label: str) -> Standing | None:
        return next((standing for standing in self.standings if standing.policy == label), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    name: str
    what: str
    unit: str
    values: tuple[float, ...]  # of each replicate

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").replace("ttft", "TTFT")

    @property
    def middle(self) -> float:
        """Median over replicates; NaN where there is none."""
        return middle_of(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """Shares of prompt tokens: what a cache without end would find, what was lost of it and to what, what was found."""

    available: float
    staleness: float
    load_trade: float
    eviction: float
    found: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """Of decisions taken again with each worker in turn."""

    num_forks: int
    mean_s: float
    p90_s: float
    best_share: float  # where the worker that was chosen was the best one
    mean_of_all_s: float  # of the mean TTFT of all requests: a choice is felt by those behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateError:
    """Who leads where the router's estimates are off by `factor` and by lognormal noise of `sigma`."""

    factor: float
    sigma: float
    standings: tuple[Standing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    commit: str | None
    seed: int | None
    command: str | None
    machine: Mapping[str, str]  # in words
    verdict: str | None
    is_exploratory: bool
    setting: Setting
    policies: tuple[Policy, ...]
    metrics: Mapping[str, Metric]
    ranking: tuple[Standing, ...]  # the best first
    curves: Mapping[str, tuple[float, ...]]  # quantiles of TTFT in seconds, evenly from 0 to 1
    bounds: Mapping[str, Bound]
    waterfall: Mapping[str, Waterfall]
    regret: Mapping[str, Regret]
    estimate_error: tuple[EstimateError, ...]

    def policy(self, label: str) -> Policy:
        return next(policy for policy in self.policies if policy.label == label)

    @property
    def in_order(self) -> tuple[Policy, ...]:
        """As ranked, then those that are not."""
        ranked = [standing.policy for standing in self.ranking]
        return (*(self.policy(label) for label in ranked), *(policy for policy in self.policies if policy.label not in ranked))

    @property
    def reference(self) -> Policy | None:
        """What others are divided by: the first of the ranking that could be switched on. None: nothing is ranked."""
        return next((policy for standing in self.ranking if not (policy := self.policy(standing.policy)).is_oracle), None)


def read_document(document: Fields) -> Report:
    """
    Raises:
        ConfigError: another schema, or a member of another kind than the schema has.
    """
    if document.get("schema") != SCHEMA:
        raise ConfigError(f"schema {document.get('schema')!r} is not {SCHEMA!r}; give the document that `baton compare --json` prints")
    metrics = {metric.name: metric for metric in (_metric(each) for each in _rows(document, "metrics"))}
    primary = metrics.get(PRIMARY)
    ranking = _standings(document, "ranking") or (primary.standings if primary is not None else ())
    policies = [_policy(each, place) for place, each in enumerate(_rows(document, "policies"))]
    for label in dict.fromkeys([standing.policy for standing in ranking]):
        if label not in {policy.label for policy in policies}:
            policies.append(Policy(label=label, spec=label, is_oracle=False, place=len(policies)))
    curves = _table(document, "curves")
    return Report(
        commit=_text(document, "commit"),
        seed=_whole(document, "seed"),
        command=_text(document, "command"),
        machine=_machine(_fields(document, "machine")),
        verdict=_text(document, "verdict"),
        is_exploratory=document.get("is_exploratory") is True,
        setting=_setting(_fields(document, "setting")),
        policies=tuple(policies),
        metrics=metrics,
        ranking=ranking,
        curves={label: _figures(curve, "ttft_s") for label, curve in curves.items() if curve.get("ttft_s") is not None},
        bounds={name: _bound(name, bound) for name, bound in sorted(_table(document, "bounds").items())},
        waterfall={label: _waterfall(each) for label, each in _table(document, "waterfall").items()},
        regret={label: _regret(each) for label, each in _table(document, "regret").items()},
        estimate_error=tuple(
            EstimateError(factor=_figure(each, "factor"), sigma=_figure(each, "sigma"), standings=_standings(each, "standings"))
            for each in _rows(document, "estimate_error")
        ),
    )


def has_one_best(standings: Iterable[Standing]) -> bool:
    """And nobody tied with it."""
    return sum(standing.best_or_tied for standing in standings) == 1


def middle_of(values: Iterable[float]) -> float:
    """Median of what is finite; NaN where nothing is."""
    told = [value for value in values if isfinite(value)]
    return median(told) if told else nan


# --- parts ------------------------------------------------------------------------------------------------------------


def pools_told(setting: Setting) -> str:
    """`8 + 8 workers`, prefill first; `4 workers that do both`."""
    apart = f"{setting.num_prefill} + {setting.num_decode} workers" if setting.num_prefill or setting.num_decode else ""
    both = f"{setting.num_mixed} workers that do both" if setting.num_mixed else ""
    return " and ".join(filter(None, (apart, both))) or "no workers"


def _setting(fields: Fields) -> Setting:
    workers, objective = _fields(fields, "workers"), _fields(fields, "objective")
    return Setting(
        trace=_text(fields, "trace"),
        trace_sha256=_text(fields, "trace_sha256"),
        rate_per_s=_number(fields, "rate_per_s"),
        num_requests=_whole(fields, "requests"),
        num_replicates=_whole(fields, "replicates"),
        num_prefill=_whole(workers, "prefill"),
        num_decode=_whole(workers, "decode"),
        num_mixed=_whole(workers, "mixed"),
        fidelity=_text(fields, "fidelity"),
        warm_up_s=_number(fields, "warm_up_s"),
        ttft_s=_number(objective, "ttft_s"),
        tpot_s=_number(objective, "tpot_s"),
        resampling=_text(fields, "resampling"),
        notes=tuple(str(note) for note in _list(fields, "notes")),
    )


def _machine(fields: Fields) -> dict[str, str]:
    said = {}
    for name, value in sorted(fields.items()):
        if isinstance(value, Mapping):
            said[name] = ", ".join(f"{key} {each}" for key, each in sorted(value.items()) if each is not None)
        elif isinstance(value, list):
            said[name] = ", ".join(str(each) for each in value)
        elif value is not None:
            said[name] = str(value)
    return said


def _policy(fields: Fields, place: int) -> Policy:
    label = _demanded(fields, "label")
    return Policy(label=label, spec=_text(fields, "policy") or label, is_oracle=fields.get("is_oracle") is True, place=place)


def _metric(fields: Fields) -> Metric:
    values = _fields(fields, "values")
    return Metric(
        name=_demanded(fields, "name"),
        unit=_text(fields, "unit") or "",
        better=Better.HIGHER if fields.get("better") == "higher" else Better.LOWER,
        values={label: _figures(values, label) for label in values},
        standings=_standings(fields, "standings"),
        comparisons=tuple(_comparison(each) for each in _rows(fields, "comparisons")),
    )


def _standings(fields: Fields, name: str) -> tuple[Standing, ...]:
    return tuple(
        Standing(
            policy=_demanded(each, "policy"),
            figure=_figure(each, "figure"),
            best_or_tied=each.get("best_or_tied") is True,
            beaten_by=tuple(str(one) for one in _list(each, "beaten_by")),
        )
        for each in _rows(fields, name)
    )


def _comparison(fields: Fields) -> Comparison:
    return Comparison(
        first=_demanded(fields, "first"),
        second=_demanded(fields, "second"),
        ratio=_figure(fields, "ratio"),
        low=_figure(fields, "low"),
        high=_figure(fields, "high"),
        p_value=_figure(fields, "p_value"),
        p_adjusted=_figure(fields, "p_adjusted"),
    )


def _bound(name: str, fields: Fields) -> Bound:
    return Bound(name=name, what=_text(fields, "what") or name, unit=_text(fields, "unit") or "", values=_figures(fields, "values"))


def _waterfall(fields: Fields) -> Waterfall:
    return Waterfall(
        available=_figure(fields, "available"),
        staleness=_figure(fields, "staleness"),
        load_trade=_figure(fields, "load_trade"),
        eviction=_figure(fields, "eviction"),
        found=_figure(fields, "found"),
    )


def _regret(fields: Fields) -> Regret:
    return Regret(
        num_forks=_whole(fields, "num_forks") or 0,
        mean_s=_figure(fields, "mean_s"),
        p90_s=_figure(fields, "p90_s"),
        best_share=_figure(fields, "best_share"),
        mean_of_all_s=_figure(fields, "mean_of_all_s"),
    )


# --- kinds ------------------------------------------------------------------------------------------------------------


def _fields(of: Fields, name: str) -> Fields:
    """Empty where it is missing."""
    value = of.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value


def _table(of: Fields, name: str) -> dict[str, Fields]:
    fields = _fields(of, name)
    return {key: _fields(fields, key) for key in fields}


def _list(of: Fields, name: str) -> list[object]:
    """Empty where it is missing."""
    value = of.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise _wrong(name, value, "a list")
    return list(value)


def _rows(of: Fields, name: str) -> list[Fields]:
    rows: list[Fields] = []
    for value in _list(of, name):
        if not isinstance(value, Mapping):
            raise _wrong(name, value, "a list of objects")
        rows.append(value)
    return rows


def _text(of: Fields, name: str) -> str | None:
    value = of.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _demanded(of: Fields, name: str) -> str:
    value = _text(of, name)
    if value is None:
        raise _wrong(name, value, "text")
    return value


def _number(of: Fields, name: str) -> float | None:
    value = of.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number")
    return float(value)


def _whole(of: Fields, name: str) -> int | None:
    value = _number(of, name)
    if value is not None and not value.is_integer():
        raise _wrong(name, value, "a whole number")
    return None if value is None else int(value)


def _figure(of: Fields, name: str) -> float:
    value = _number(of, name)
    return nan if value is None else value


def _figures(of: Fields, name: str) -> tuple[float, ...]:
    return tuple(_figure({name: value}, name) for value in _list(of, name))


def _wrong(name: str, value: object, kind: str) -> ConfigError:
    return ConfigError(f"{name} of the comparison is {value!r}, not {kind}; `baton compare --json` prints what a report is made of")


def _inverse(value: float) -> float:
    return 1 / value if value else float("inf")


__all__ = [
    "Bound",
    "EstimateError",
    "Metric",
    "Policy",
    "Regret",
    "Report",
    "Setting",
    "Waterfall",
    "has_one_best",
    "middle_of",
    "pools_told",
    "read_document",
]
