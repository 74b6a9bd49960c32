"""Waiting in closed form: what a simulation of prompts of one length must come out at (Sec. 3.1 of DistServe, OSDI'24).

Poisson arrivals at rate R, a service time D that is always the same, first come first served, nothing batched: M/D/1. TTFT is service
and waiting.
"""

from __future__ import annotations


def ttft_single_s(rate_per_s: float, service_s: float) -> float:
    """One worker: D + R D^2 / (2 (1 - R D)).

    Raises:
        ValueError: the worker is never done, R D >= 1. So with the others.
    """
    load = _load(rate_per_s, service_s, limit=1.0)
    return service_s + rate_per_s * service_s**2 / (2 * (1 - load))


def ttft_replicas_s(rate_per_s: float, service_s: float, num_replicas: int) -> float:
    """Requests drawn evenly among workers alike, each a Poisson process of R / N of its own."""
    return ttft_single_s(rate_per_s / num_replicas, service_s)


def ttft_two_stages_s(rate_per_s: float, service_s: float) -> float:
    """A pipeline of two equal stages, whose slower one takes half of D: D + R D^2 / (4 (2 - R D))."""
    load = _load(rate_per_s, service_s, limit=2.0)
    return service_s + rate_per_s * service_s**2 / (4 * (2 - load))


def ttft_two_ranks_s(rate_per_s: float, service_s: float, speed_up: float) -> float:
    """Tensor parallel over two, `speed_up` K times as fast (1 < K < 2): D / K + R D^2 / (2 K (K - R D))."""
    load = _load(rate_per_s, service_s, limit=speed_up)
    return service_s / speed_up + rate_per_s * service_s**2 / (2 * speed_up * (speed_up - load))


def _load(rate_per_s: float, service_s: float, *, limit: float) -> float:
    load = rate_per_s * service_s
    if not 0.0 <= load < limit:
        raise ValueError(
            f"{rate_per_s} requests/s of {service_s} s each are a load of {load:.3g}, the limit is {limit:.3g}; lower the rate"
        )
    return load
