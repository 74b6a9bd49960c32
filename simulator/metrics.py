"""What one run of a policy is told by: latencies, shares and goodput of the requests that count.

A request that was refused, failed or never ended counts: it missed the objective, and for latency to the first token it waited as long as
a router lets a request wait (`router.max_wait_s`), or as the slowest of its run if that is longer. Left out it would make a policy look
fast that refuses what is slow; without a bound one refusal would be the mean. Time between tokens, time to the last token (e2e) and hits
are of those that were served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.routed_gateway import Served
from simulator.summary import Latency, Objective, Outcome, summarise
from simulator.verdict import Better


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    unit: str
    better: Better


PRIMARY = "ttft_mean"  # what a ranking goes by
METRICS = (
    *(Metric(name=f"ttft_{statistic}", unit="s", better=Better.LOWER) for statistic in ("mean", "p50", "p90", "p99")),
    *(Metric(name=f"tpot_{statistic}", unit="s", better=Better.LOWER) for statistic in ("p50", "p90", "p99")),
    *(Metric(name=f"e2e_{statistic}", unit="s", better=Better.LOWER) for statistic in ("mean", "p99")),
    Metric(name="goodput", unit="requests/s", better=Better.HIGHER),
    Metric(name="attainment", unit="share", better=Better.HIGHER),
    Metric(name="hit_share", unit="share", better=Better.HIGHER),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run."""

    by_metric: dict[str, float | None]  # None: nobody had two tokens, so there is no time between them
    ttfts_s: tuple[float, ...]  # of all requests that count, in their order
    num_counted: int
    num_unserved: int  # of them, refused, failed or never ended


def counted(served: Sequence[Served], warm_up_s: float) -> list[Served]:
    """Those that arrived `warm_up_s` after the first, or later."""
    return [one for one in served if one.arrived_s - served[0].arrived_s >= warm_up_s]


def figures_of(served: Sequence[Outcome], objective: Objective, *, unserved_ttft_s: float) -> Figures:
    """
    Raises:
        ValueError: no requests.
    """
    summary = summarise(served, objective)
    ttfts_s = [one.ttft_s if one.terminal == "finished" else None for one in served]
    longest_s = max([unserved_ttft_s, *(ttft_s for ttft_s in ttfts_s if ttft_s is not None)])
    waited_s = tuple(longest_s if ttft_s is None else ttft_s for ttft_s in ttfts_s)
    ttft, tpot, e2e = Latency.of(waited_s), summary.tpot, summary.e2e
    assert ttft is not None
    return Figures(
        by_metric={
            "ttft_mean": ttft.mean,
            "ttft_p50": ttft.p50,
            "ttft_p90": ttft.p90,
            "ttft_p99": ttft.p99,
            "tpot_p50": tpot.p50 if tpot is not None else None,
            "tpot_p90": tpot.p90 if tpot is not None else None,
            "tpot_p99": tpot.p99 if tpot is not None else None,
            "e2e_mean": e2e.mean if e2e is not None else None,
            "e2e_p99": e2e.p99 if e2e is not None else None,
            "goodput": summary.goodput_per_s,
            "attainment": summary.attainment,
            "hit_share": summary.hit_share,
        },
        ttfts_s=waited_s,
        num_counted=summary.num_requests,
        num_unserved=summary.num_requests - summary.num_finished,
    )


__all__ = ["METRICS", "PRIMARY", "Figures", "Metric", "counted", "figures_of"]
