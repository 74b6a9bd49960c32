"""A trace: who asks for what, when; and what can be said of it before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev


@dataclass(frozen=True, slots=True)
class Run:
    """`num_tokens` tokens of a prompt, the first of the content called `name`. Equal names are equal tokens, others share none."""

    name: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request. Its prompt is its runs, one behind the other."""

    at_s: float  # from the beginning of the trace
    runs: tuple[Run, ...]
    output_tokens: int
    session: str = ""  # "": the trace names none
    think_s: float | None = None  # between the end of the session's request before it and this one; None: not told

    @property
    def num_prompt_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()  # what was left out or made up in reading it

    @property
    def duration_s(self) -> float:
        return self.requests[-1].at_s - self.requests[0].at_s if self.requests else 0.0

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second; infinite where all come at once, 0 where nobody comes."""
        if not self.requests:
            return 0.0
        return len(self.requests) / self.duration_s if self.duration_s else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFacts:
    """What `baton trace describe` tells."""

    name: str
    num_requests: int
    num_sessions: int
    duration_s: float
    rate_per_s: float
    interarrival_cv: float  # standard deviation over mean of the gaps; 1 for a Poisson process
    same_moment_share: float  # of requests that arrive with another one
    input_tokens: tuple[int, int, int]  # p50, p90, p99
    output_tokens: tuple[int, int, int]
    reuse_share: float  # of prompt tokens found by a cache that forgets nothing, as a prefix of an earlier prompt
    notes: tuple[str, ...]


def facts_of(trace: Trace) -> TraceFacts:
    """
    Raises:
        ValueError: the trace is empty.
    """
    requests = trace.requests
    if not requests:
        raise ValueError(f"trace {trace.name!r} has no requests")
    gaps = [after.at_s - before.at_s for before, after in pairwise(requests)]
    mean_gap = fmean(gaps) if gaps else 0.0
    moments = [r.at_s for r in requests]
    num_shared_moments = sum(
        a in (before, after) for before, a, after in zip([None, *moments], moments, [*moments[1:], None], strict=False)
    )
    return TraceFacts(
        name=trace.name,
        num_requests=len(requests),
        num_sessions=len({r.session for r in requests if r.session}),
        duration_s=trace.duration_s,
        rate_per_s=trace.rate_per_s,
        interarrival_cv=pstdev(gaps) / mean_gap if mean_gap else 0.0,
        same_moment_share=num_shared_moments / len(requests),
        input_tokens=_percentiles(r.num_prompt_tokens for r in requests),
        output_tokens=_percentiles(r.output_tokens for r in requests),
        reuse_share=reuse_share(requests),
        notes=trace.notes,
    )


def reuse_share(requests: Iterable[TraceRequest]) -> float:
    """Of all prompt tokens those that begin an earlier prompt too, run by run: what a cache without end or blocks would save."""
    longest: dict[tuple[int, str], int] = {}  # by what came before and the run's name
    num_tokens = num_reused = 0
    for request in requests:
        before = 0
        for run in request.runs:
            key = (before, run.name)
            num_tokens += run.num_tokens
            known = longest.get(key, 0)
            num_reused += min(known, run.num_tokens)
            longest[key] = max(known, run.num_tokens)
            before = hash((before, run.name, run.num_tokens))
    return num_reused / num_tokens if num_tokens else 0.0


def _percentiles(values: Iterable[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99))
    return p50, p90, p99
