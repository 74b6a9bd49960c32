"""When a trace's requests come: faster, slower, spread out, or the first of them only. What they are stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from simulator.traces.trace import Trace, TraceRequest


def at_rate(trace: Trace, rate_per_s: float) -> Trace:
    """The same order and the same bursts, stretched to this mean rate. Think times are people's and stay.

    Raises:
        ValueError: no rate, or a trace whose requests all come at once.
    """
    if not rate_per_s > 0.0 or rate_per_s == float("inf"):
        raise ValueError(f"a rate of {rate_per_s} requests/s is none; give one above 0")
    if not trace.duration_s:
        raise ValueError(f"trace {trace.name!r} has no duration to stretch")
    factor = trace.rate_per_s / rate_per_s
    first_s = trace.requests[0].at_s
    return _retimed(trace, lambda request: (request.at_s - first_s) * factor)


def spread(trace: Trace, step_s: float, *, seed: int) -> Trace:
    """Arrivals that a trace rounds down to steps of `step_s`, spread evenly over their steps; bursts that never were go away.

    Requests of one step keep their order.
    """
    rng = Random(f"spread {seed}")
    by_step: dict[float, list[TraceRequest]] = {}
    for request in trace.requests:
        by_step.setdefault(request.at_s, []).append(request)
    requests: list[TraceRequest] = []
    for at_s, together in by_step.items():
        offsets = sorted(rng.uniform(0.0, step_s) for _ in together)
        requests += [replace(request, at_s=at_s + offset) for request, offset in zip(together, offsets, strict=True)]
    return replace(trace, requests=tuple(sorted(requests, key=lambda r: r.at_s)))


def first(trace: Trace, count: int) -> Trace:
    return replace(trace, requests=trace.requests[:count])


def begin_sessions(trace: Trace, rate_per_s: float, *, seed: int) -> Trace:
    """Sessions that begin as a Poisson process, for a trace that gives times within each session only. Every request needs its session."""
    rng, begin_s, at_s = Random(f"sessions {seed}"), dict[str, float](), 0.0
    for session in dict.fromkeys(r.session for r in trace.requests):
        begin_s[session] = at_s
        at_s += rng.expovariate(rate_per_s)
    return _retimed(trace, lambda request: begin_s[request.session] + request.at_s)


def _retimed(trace: Trace, at_s: Callable[[TraceRequest], float]) -> Trace:
    requests = [replace(request, at_s=at_s(request)) for request in trace.requests]
    return replace(trace, requests=tuple(sorted(requests, key=lambda r: r.at_s)))
