"""What a run came to: latencies of those that were served, and the share of all that were served in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Outcome(Protocol):
    """One request and what came of it: `Served` by a simulated cluster, or answered by a live one. Seconds on one clock."""

    @property
    def arrived_s(self) -> float: ...

    @property
    def end_s(self) -> float | None:
        """None: it never ended."""

    @property
    def terminal(self) -> str:
        """ "finished" | "failed" | "refused"."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found where it was computed."""

    @property
    def num_attempts(self) -> int: ...

    @property
    def ttft_s(self) -> float | None: ...

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None where there is one at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a user asks for, in seconds; None: nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met_by(self, served: Outcome) -> bool:
        """One that was refused, failed or never ended meets nothing. One token alone has no time between tokens to miss."""
        if served.terminal != "finished" or served.ttft_s is None:
            return False
        in_time = self.ttft_s is None or served.ttft_s <= self.ttft_s
        return in_time and (self.tpot_s is None or served.tpot_s is None or served.tpot_s <= self.tpot_s)


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency | None:
        if not values:
            return None
        p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99)).tolist()
        return cls(float(np.mean(values)), p50, p90, p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    num_requests: int
    num_finished: int
    num_refused: int
    num_failed: int
    num_retried: int  # that needed more than one attempt
    duration_s: float  # from the first arrival to the last end
    ttft: Latency | None  # None: nobody was served
    tpot: Latency | None
    e2e: Latency | None  # from arrival to the last token
    attainment: float  # share of all requests that met the objective
    goodput_per_s: float  # such requests a second
    hit_share: float  # of prompt tokens of those that were served, found in a cache


def summarise(served: Sequence[Outcome], objective: Objective) -> Summary:
    """
    Raises:
        ValueError: nothing was asked for.
    """
    if not served:
        raise ValueError("no requests, so there is nothing to sum up")
    finished = [one for one in served if one.terminal == "finished"]
    num_met = sum(objective.is_met_by(one) for one in served)
    ends = [one.end_s for one in served if one.end_s is not None]
    duration_s = max(ends, default=served[-1].arrived_s) - served[0].arrived_s
    num_prompt_tokens = sum(one.num_prompt_tokens for one in finished)
    return Summary(
        num_requests=len(served),
        num_finished=len(finished),
        num_refused=sum(one.terminal == "refused" for one in served),
        num_failed=sum(one.terminal == "failed" for one in served),
        num_retried=sum(one.num_attempts > 1 for one in served),
        duration_s=duration_s,
        ttft=Latency.of([one.ttft_s for one in finished if one.ttft_s is not None]),
        tpot=Latency.of([one.tpot_s for one in finished if one.tpot_s is not None]),
        e2e=Latency.of([one.end_s - one.arrived_s for one in finished if one.end_s is not None]),
        attainment=num_met / len(served),
        goodput_per_s=num_met / duration_s if duration_s else float("inf"),
        hit_share=sum(one.num_cached_tokens for one in finished) / num_prompt_tokens if num_prompt_tokens else 0.0,
    )
