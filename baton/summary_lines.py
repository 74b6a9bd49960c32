"""A run summed up, as a reader sees it on a terminal: the same lines for a simulated run and a live one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.summary import Latency, Summary


def summary_lines(summary: Summary, *, tells_cached: bool = True) -> Iterator[str]:
    """tells_cached: False where nobody said how much of the prompts was found in caches."""
    counts = f"{summary.num_finished:,} of {summary.num_requests:,} served"
    yield f"  requests       {counts}; {summary.num_refused:,} refused, {summary.num_failed:,} failed"
    yield f"  TTFT ms        {_milliseconds(summary.ttft)}"
    yield f"  TPOT ms        {_milliseconds(summary.tpot)}"
    yield f"  in time        {summary.attainment:.1%}, {summary.goodput_per_s:.3g} requests/s"
    yield f"  found cached   {f'{summary.hit_share:.1%} of prompt tokens' if tells_cached else '-'}"


def _milliseconds(latency: Latency | None) -> str:
    if latency is None:
        return "-"
    return "  ".join(f"{name} {getattr(latency, name) * 1e3:,.1f}" for name in ("mean", "p50", "p90", "p99"))
