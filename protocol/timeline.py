"""Events -> latencies. The only definition of each; server, simulator and benchmarks all call these.

TTFT, TPOT and goodput as in Sec. 2 of DistServe (OSDI'24): TTFT is arrival to first token; TPOT is the mean time of a token
after the first; a request meets its SLO when it meets both; goodput is the rate of requests that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.request import Slo


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Moments of one request on one clock, seconds. `token_times_s` has one entry a delivery, with its number of tokens."""

    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    assigned_s: float | None = None
    prefill_end_s: float | None = None
    handoff_end_s: float | None = None
    end_s: float | None = None

    def add_tokens(self, now_s: float, count: int) -> None:
        assert count > 0 and (not self.token_times_s or now_s >= self.token_times_s[-1])
        self.token_times_s.append(now_s)
        self.token_counts.append(count)

    @property
    def num_tokens(self) -> int:
        return sum(self.token_counts)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None before it."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first delivery; None with fewer than two deliveries."""
        later = self.num_tokens - self.token_counts[0] if self.token_counts else 0
        if later == 0:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / later

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive deliveries."""
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.arrival_s

    @property
    def queue_s(self) -> float | None:
        """Arrival to assignment by the router."""
        return None if self.assigned_s is None else self.assigned_s - self.arrival_s

    def meets(self, slo: Slo) -> bool:
        """True when every objective that is stated is met; a request without a first token meets none."""
        if self.ttft_s is None:
            return False
        if slo.ttft_s is not None and self.ttft_s > slo.ttft_s:
            return False
        return slo.tpot_s is None or self.tpot_s is None or self.tpot_s <= slo.tpot_s


def goodput_requests_per_s(timelines: list[Timeline], slo: Slo, duration_s: float) -> float:
    """Rate of requests that met `slo`, over `duration_s` seconds."""
    return sum(t.meets(slo) for t in timelines) / duration_s
