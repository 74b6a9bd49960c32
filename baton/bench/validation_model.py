"""What a simulation says of a live cluster: three constants fitted on one trace under one policy, and figures of others. Pure.

    live = simulated on the virtual clock, with every step longer by `step_s` (threads, sockets, two processes on one core),
           those that compute prompts taking `prefill_factor` times as long (caches and memory that others use too),
           and every token later by `first_s` (HTTP, the gateway, the client)

The null model knows the same constants and no queue, no cache and no policy: each prompt is computed whole on an idle worker.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean, median

from baton.bench.report import Row, Target
from control.compose import step_time
from control.config import ClusterConfig
from engine.step_time import StepShape, StepTimeModel
from protocol.errors import ConfigError
from simulator.routed_cluster import LINK_S, MODEL_ID, VOCAB_SIZE, RoutedCluster
from simulator.routed_gateway import Served
from simulator.summary import Latency, Objective, Summary, summarise
from simulator.traces.generators import Arrivals, SharedPrompts, Unshared
from simulator.traces.trace import Trace, TraceRequest
from simulator.true_steps import TrueSteps
from simulator.workload import requests_of

NULL = "alone"
ATTAINMENT = Target(relation="<=", bound=5.0)  # points
MEDIAN = Target(relation="<=", bound=15.0)  # %
ORDER = Target(relation=">=", bound=1.0)
TIED = 0.05  # policies whose figures differ by no more are in no order: a cluster of 1 + 1 leaves them nothing to choose
NUM_HOPS = 4  # of the null model: to the router and back, to the worker and back


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a live cluster takes beyond its model's steps."""

    step_s: float = 0.0  # a step
    prefill_factor: float = 1.0  # times a step that computes prompts
    first_s: float = 0.0  # between a client and the workers, both ways together


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Requests of one kind, drawn from a seed; prompts and answers fit the model that serves them."""

    source: SharedPrompts | Unshared
    rate_per_s: float
    name: str

    def trace(self, seconds: float, *, seed: int, max_tokens: int) -> Trace:
        """As many as arrive in `seconds` on average; what would be longer than `max_tokens` is drawn anew."""
        count = max(1, round(seconds * self.rate_per_s))
        moments = Arrivals(rate_per_s=self.rate_per_s).moments_s(Random(f"arrivals {self.name} {seed}"))
        drawn = self.source.prompts(Random(f"prompts {self.name} {seed}"), count)
        fitting = ((runs, length) for runs, length in drawn if sum(run.num_tokens for run in runs) + length <= max_tokens)
        requests = [
            TraceRequest(at_s=at_s, runs=runs, output_tokens=max(2, length))
            for at_s, (runs, length) in itertools.islice(zip(moments, fitting, strict=False), count)
        ]
        return Trace(name=self.name, requests=tuple(requests), notes=(f"drawn from seed {seed}",))


# --- predicting -------------------------------------------------------------------------------------------------------


def predicted(config: ClusterConfig, trace: Trace, policy: str, overhead: Overhead, *, seed: int) -> list[Served]:
    """The trace under a policy on the virtual clock. Clients say how long answers may be, as those of a replay do.

    config: of paced workers, whose pace is that of the live ones.
    """
    steps = TrueSteps(model=Longer(base=_pace_of(config), overhead=overhead))
    cluster = RoutedCluster(config, policy=policy, seed=seed, steps=steps)
    served = cluster.run(requests_of(trace, model_id=MODEL_ID, vocab_size=VOCAB_SIZE, seed=seed))
    return [_later(one, overhead.first_s) for one in served]


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer:
    """A `StepTimeModel`: `base`, and what a live cluster adds to each step."""

    base: StepTimeModel
    overhead: Overhead

    def step_s(self, shape: StepShape) -> float:
        seconds = self.base.step_s(shape) + self.overhead.step_s
        return seconds * self.overhead.prefill_factor if shape.prefill_tokens else seconds


def _pace_of(config: ClusterConfig) -> StepTimeModel:
    pace = step_time(config)
    if pace is None:
        raise ConfigError("a simulated worker needs a pace; give workers.executor: paced")
    return pace


def predicted_alone(config: ClusterConfig, trace: Trace, overhead: Overhead) -> list[Served]:
    """By the null model."""
    pace = Longer(base=_pace_of(config), overhead=overhead)
    most = config.workers.max_num_batched_tokens
    served = []
    for number, asked in enumerate(trace.requests):
        starts = range(0, asked.num_prompt_tokens, most)
        shapes = [StepShape().with_prefill(start, min(most, asked.num_prompt_tokens - start)) for start in starts]
        first_s = asked.at_s + sum(pace.step_s(shape) for shape in shapes) + overhead.first_s + NUM_HOPS * LINK_S
        token_s = pace.step_s(StepShape().with_decodes(1, asked.num_prompt_tokens))
        served.append(
            Served(
                request_id=f"{number:032x}",
                arrived_s=asked.at_s,
                num_prompt_tokens=asked.num_prompt_tokens,
                first_token_s=first_s,
                end_s=first_s + (asked.output_tokens - 1) * token_s,
                num_output_tokens=asked.output_tokens,
                num_attempts=1,
                terminal="finished",
            )
        )
    return served


def fitted(live: Sequence[Summary], config: ClusterConfig, traces: Sequence[Trace], policy: str, objective: Objective) -> Overhead:
    """From live runs of these traces under one policy: the time of a step by the median TPOT; then the factor, by a line through mean, p50,
    p90 and p99 of the TTFT of each run, as what all wait moves them alike; then what is left of the mean.

    Raises:
        ConfigError: nobody was served, so there is nothing to fit.
    """

    def simulated(overhead: Overhead) -> list[Summary]:
        return [summarise(predicted(config, trace, policy, overhead, seed=number), objective) for number, trace in enumerate(traces)]

    found = Overhead()
    found = replace(found, step_s=max(0.0, _median_of(live, "tpot", "p50") - _median_of(simulated(found), "tpot", "p50")))
    found = replace(found, prefill_factor=max(1.0, _slope(_ttfts_of(simulated(found)), _ttfts_of(live))))
    return replace(found, first_s=max(0.0, _median_of(live, "ttft", "mean") - _median_of(simulated(found), "ttft", "mean")))


def _ttfts_of(summaries: Sequence[Summary]) -> list[float]:
    """Of each run the same figures in the same order; a run in which nobody was served has zeros."""
    latencies = [summary.ttft for summary in summaries]
    return [0.0 if latency is None else getattr(latency, name) for latency in latencies for name in ("mean", "p50", "p90", "p99")]


def _slope(from_s: Sequence[float], to_s: Sequence[float]) -> float:
    """Of the line with the least squares of relative errors; 1 where there is none."""
    pairs = [(x, y) for x, y in zip(from_s, to_s, strict=True) if x > 0.0 and y > 0.0]
    weights = [1.0 / y**2 for _, y in pairs]
    if not pairs:
        return 1.0
    mean_x, mean_y = (sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) / sum(weights) for i in (0, 1))
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, pairs, strict=True))
    return sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, pairs, strict=True)) / spread if spread > 0.0 else 1.0


def _median_of(summaries: Sequence[Summary], name: str, statistic: str) -> float:
    values: list[float] = [getattr(latency, statistic) for summary in summaries if (latency := getattr(summary, name)) is not None]
    if not values:
        raise ConfigError(f"no {name} to fit: no request was served; see the log of the cluster")
    return median(values)


def _later(one: Served, by_s: float) -> Served:
    first_s, end_s = one.first_token_s, one.end_s
    return replace(one, first_token_s=None if first_s is None else first_s + by_s, end_s=None if end_s is None else end_s + by_s)


# --- holding it against what was measured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A policy live and simulated, over the same repeats."""

    policy: str  # its label
    live: tuple[Summary, ...]
    simulated: tuple[Summary, ...]
    alone: tuple[Summary, ...]


def rows_of(name: str, pairs: Sequence[Pair]) -> list[Row]:
    """`name`: of the cluster, such as "paced-8+8". A policy without a run that counts has rows without a value."""
    rows = [_order(name, pairs)] if len(pairs) > 1 else []
    for pair in pairs:
        rows.append(_attainment(f"{name}/attainment_error/{pair.policy}", pair.live, pair.simulated, ATTAINMENT))
        rows.append(_attainment(f"{name}/attainment_error/{pair.policy}/{NULL}", pair.live, pair.alone, None))
        for latency, statistic, target in (("ttft", "p50", MEDIAN), ("tpot", "p50", MEDIAN), ("ttft", "p99", None), ("tpot", "p99", None)):
            row = f"{name}/{latency}_{statistic}_error/{pair.policy}"
            rows.append(_latency(row, pair.live, pair.simulated, latency, statistic, target))
            rows.append(_latency(f"{row}/{NULL}", pair.live, pair.alone, latency, statistic, None))
    return rows


def _order(name: str, pairs: Sequence[Pair]) -> Row:
    """By mean TTFT, medians over repeats, the best first. What one tells apart the other must not have the other way round."""
    is_whole = all(pair.live for pair in pairs)
    live, simulated = ({pair.policy: _figure(getattr(pair, who), "ttft", "mean") for pair in pairs} for who in ("live", "simulated"))
    told = {"live": sorted(live, key=live.__getitem__), "simulated": sorted(simulated, key=simulated.__getitem__)}
    agrees = not any(_contradicts(live, simulated, a, b) or _contradicts(simulated, live, a, b) for a, b in itertools.permutations(live, 2))
    return Row(
        name=f"{name}/order_agrees",
        value=float(agrees) if is_whole else None,
        unit="yes / no",
        target=ORDER,
        details=told if is_whole else {"reason": "a policy has no run that counts"},
    )


def _contradicts(one: Mapping[str, float], other: Mapping[str, float], a: str, b: str) -> bool:
    """`one` has `a` ahead of `b` by more than a tie, `other` has it behind."""
    return one[a] < (1.0 - TIED) * one[b] and other[a] > other[b]


def _attainment(name: str, live: Sequence[Summary], other: Sequence[Summary], target: Target | None) -> Row:
    if not live:
        return Row(name=name, value=None, unit="points", target=target, details={"reason": "no run counts"})
    measured, told = (fmean(s.attainment for s in summaries) for summaries in (live, other))
    details: dict[str, object] = {"live": round(measured, 4), "predicted": round(told, 4)}
    return Row(name=name, value=round(abs(told - measured) * 100, 2), unit="points", target=target, details=details)


def _latency(name: str, live: Sequence[Summary], other: Sequence[Summary], latency: str, statistic: str, target: Target | None) -> Row:
    measured, told = _figure(live, latency, statistic), _figure(other, latency, statistic)
    if measured == float("inf") or told == float("inf"):
        return Row(name=name, value=None, unit="%", target=target, details={"reason": "no run counts, or nobody was served"})
    details: dict[str, object] = {"live_ms": round(measured * 1e3, 3), "predicted_ms": round(told * 1e3, 3)}
    return Row(name=name, value=round(abs(told / measured - 1.0) * 100, 2), unit="%", target=target, details=details)


def _figure(summaries: Sequence[Summary], latency: str, statistic: str) -> float:
    """Seconds, the median over repeats; infinite where nobody was served."""
    found: list[Latency] = [of for summary in summaries if (of := getattr(summary, latency)) is not None]
    return median(getattr(of, statistic) for of in found) if found else float("inf")


__all__ = ["NULL", "Asked", "Overhead", "Pair", "fitted", "predicted", "predicted_alone", "rows_of"]
