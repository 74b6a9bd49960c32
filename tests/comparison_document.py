"""A plausible document of `baton compare`, from a seed: drawings are tested without hours of simulation; verdicts are the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import exp, log
from random import Random
from statistics import median
from typing import Any

from simulator.verdict import MIN_REPLICATES, Better, Standing, compare_all, ranking

# Mean TTFT over that of the first, and its scatter between replicates (standard deviation of the logarithm).
POLICIES = {
    "prefix_cost": (1.0, 0.03),
    "dynamo_like:overlap_weight=2": (1.02, 0.05),
    "sglang_like": (1.17, 0.05),
    "e2:window_s=60,rebalance=off": (1.31, 0.07),
    "least_work": (1.9, 0.12),
    "round_robin": (2.6, 0.15),
    "random": (3.1, 0.2),
    "power_of_two": (2.2, 0.12),
    "session_affinity": (1.45, 0.1),
    "mooncake_ttft": (1.12, 0.04),
    "distserve": (1.85, 0.1),
    "my.module:Sticky:beta=4": (1.25, 0.06),
}
SHAPES = {"mean": 1.0, "p50": 0.55, "p90": 2.4, "p99": 6.5}  # over the mean
WAIT_SIGMA = 1.1  # of waits within a run
ORACLE = "oracle_lengths"


def make_comparison(
    num_policies: int = 6,
    *,
    num_replicates: int = MIN_REPLICATES,
    seed: int = 0,
    has_oracle: bool = False,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Every part of `baton.compare.v1`.

    Args:
        labels: other names for the policies, in order.
    """
    rng = Random(seed)
    factors = dict(list(POLICIES.items())[:num_policies])
    if has_oracle:
        factors[ORACLE] = (0.86, 0.03)
    names = dict(zip(factors, [*(labels or factors), *([ORACLE] if has_oracle and labels else [])], strict=True))
    level = [exp(rng.gauss(log(0.42), 0.25)) for _ in range(num_replicates)]  # replicates differ more than policies do
    means = {names[p]: [x * f * exp(rng.gauss(0, s)) for x in level] for p, (f, s) in factors.items()}
    metrics = [metric(f"ttft_{name}", "s", Better.LOWER, scaled(means, shape, rng)) for name, shape in SHAPES.items()]
    tpot = {label: [0.021 * (0.9 + 0.1 * v / x) for v, x in zip(values, level, strict=True)] for label, values in means.items()}
    metrics += [
        metric(f"tpot_{name}", "s", Better.LOWER, scaled(tpot, shape, rng)) for name, shape in (("p50", 1.0), ("p90", 1.2), ("p99", 1.7))
    ]
    ends = {label: [v + 200 * t for v, t in zip(values, tpot[label], strict=True)] for label, values in means.items()}
    metrics += [metric(f"e2e_{name}", "s", Better.LOWER, scaled(ends, shape, rng)) for name, shape in (("mean", 1.0), ("p99", 2.5))]
    met = {
        label: [max(0.05, 1 - 0.08 * v / x - rng.uniform(0, 0.02)) for v, x in zip(values, level, strict=True)]
        for label, values in means.items()
    }
    hits = {label: [min(0.6, 0.55 / (v / x) ** 0.6) for v, x in zip(values, level, strict=True)] for label, values in means.items()}
    metrics.append(metric("goodput", "requests/s", Better.HIGHER, {label: [9.8 * v for v in values] for label, values in met.items()}))
    metrics += [metric("attainment", "share", Better.HIGHER, met), metric("hit_share", "share", Better.HIGHER, hits)]
    standings = metrics[0]["standings"]
    best, others = standings[0]["policy"], len(standings) - 1
    ceiling = [0.61 + rng.uniform(0, 0.04) for _ in range(num_replicates)]
    quantiles = sorted(rng.gauss(0, WAIT_SIGMA) for _ in range(101))
    is_exploratory = num_replicates < MIN_REPLICATES
    return {
        "schema": "baton.compare.v1",
        "machine": {
            "cpu": "A CPU",
            "num_cores": 2,
            "instructions": ["avx2"],
            "memory_gib": 7.5,
            "packages": {"numpy": "2.4.0", "torch": None},
        },
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "command": "baton compare --policies " + ",".join(names.values()) + " --trace mooncake_conversation --rate 10 --seed 0",
        "seed": seed,
        "rows": [],
        "setting": {
            "trace": "mooncake_conversation",
            "trace_sha256": "9f" * 32,
            "rate_per_s": 10.0,
            "requests": 2000,
            "replicates": num_replicates,
            "workers": {"prefill": 8, "decode": 8},
            "fidelity": "token-accurate",
            "warm_up_s": 30.0,
            "objective": {"ttft_s": 2.0, "tpot_s": 0.05},
            "resampling": "Moving blocks of 60 s of the trace, drawn anew for each replicate.",
            "notes": ["Arrivals are spread over the 3 s that the trace rounds to."],
        },
        "is_exploratory": is_exploratory,
        "verdict": f"{best} has the lowest mean TTFT of {others + 1} policies on mooncake_conversation at 10 requests/s.",
        "policies": [{"label": label, "policy": policy, "is_oracle": policy == ORACLE} for policy, label in names.items()],
        "metrics": metrics,
        "ranking": standings,
        "curves": {
            label: {"ttft_s": [values[0] * 0.6 * exp(q * (0.8 + 0.1 * i)) for q in quantiles]}
            for i, (label, values) in enumerate(means.items())
        },
        "bounds": {
            "infinite_cache": {"what": "Prompt tokens that one cache without end would find.", "values": ceiling, "unit": "share"},
            "pooled_cache": {"what": "One cache as large as all.", "values": [0.97 * share for share in ceiling], "unit": "share"},
            "ttft_bound": {"what": "No order of work has a smaller mean TTFT.", "values": [0.72 * v for v in means[best]], "unit": "s"},
        },
        "waterfall": {label: lost(0.62, values[0], rng) for label, values in hits.items()},
        "regret": {
            label: {
                "num_forks": 400,
                "mean_s": 0.03 * v[0] / level[0],
                "p90_s": 0.11 * v[0] / level[0],
                "mean_of_all_s": 0.004 * v[0] / level[0],
                "best_share": 0.8 - 0.1 * v[0] / level[0],
            }
            for label, v in means.items()
        },
        "estimate_error": [
            {"factor": f, "sigma": s, "standings": metric("x", "s", Better.LOWER, bent(means, best, f, s))["standings"]}
            for s in (0.0, 0.3, 0.6)
            for f in (0.5, 1.0, 2.0)
        ],
    }


def metric(name: str, unit: str, better: Better, values: dict[str, list[float]]) -> dict[str, Any]:
    """An oracle is compared with the best of the others, stands behind them and beats nobody."""
    able = {label: each for label, each in values.items() if label != ORACLE}
    comparisons = compare_all(able)
    standings = ranking(able, comparisons, better)
    if ORACLE in values:
        best = standings[0].policy
        comparisons += compare_all({ORACLE: values[ORACLE], best: values[best]})
        standings.append(Standing(policy=ORACLE, figure=median(values[ORACLE]), best_or_tied=False, beaten_by=()))
    return {
        "name": name,
        "unit": unit,
        "better": better.value,
        "values": values,
        "standings": [asdict(standing) | {"beaten_by": list(standing.beaten_by)} for standing in standings],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def scaled(values: dict[str, list[float]], by: float, rng: Random) -> dict[str, list[float]]:
    return {label: [value * by * exp(rng.gauss(0, 0.03)) for value in each] for label, each in values.items()}


def bent(values: dict[str, list[float]], best: str, factor: float, sigma: float) -> dict[str, list[float]]:
    """As if the best one, and it alone, suffered from what it is told wrong."""
    worse = 0.9 + 0.05 * sigma + 0.1 * abs(log(factor)) * sigma / 0.3
    return {label: [value * (worse if label == best else 1.0) for value in each] for label, each in values.items()}


def lost(available: float, found: float, rng: Random) -> dict[str, float]:
    """What is not found, to three causes."""
    left = max(0.0, available - found)
    first, second = rng.uniform(0.1, 0.3) * left, rng.uniform(0.2, 0.5) * left
    return {"available": available, "staleness": first, "load_trade": second, "eviction": left - first - second, "found": available - left}
