"""Wrong reports: what workers say of their times, off by a factor and by noise. So it can be told how far a verdict rests on estimates.

The router learns cost from nothing but counters of microseconds in snapshots (router/cost_model.py, link_cost.py). What they grow by
between two reports is multiplied before the router hears of it; steps, tokens and queues stay as they are, and so does the time everything
really takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.errors import ConfigError
from protocol.worker import WorkerSnapshot
from simulator.noise import Lognormal

FACTORS = (0.5, 1.0, 2.0)
SIGMAS = (0.0, 0.3, 0.6)
_OF_TIME = "_us"  # counters that end so count microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateError:
    """Reported times are true times * `factor` * a lognormal draw with mean 1 and deviation `sigma`, one a report.

    Raises:
        ConfigError: a factor that is not positive, or a negative sigma.
    """

    factor: float = 1.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < float("inf"):
            raise ConfigError(f"factor is {self.factor}, it must be positive; 1 reports times as they are")
        if not 0.0 <= self.sigma < float("inf"):
            raise ConfigError(f"sigma is {self.sigma}, the least is 0")

    @property
    def is_none(self) -> bool:
        return self.factor == 1.0 and self.sigma == 0.0


EXACT = EstimateError()
ERROR_GRID = tuple(EstimateError(factor=factor, sigma=sigma) for factor in FACTORS for sigma in SIGMAS)
"""The axis of estimate error of a comparison."""


class ReportedTimes:
    """What one incarnation of a worker reports in place of its true times."""

    def __init__(self, error: EstimateError, *, seed: int, worker_id: str) -> None:
        self._error = error
        self._noise = Lognormal(seed, "report", worker_id, sigma=error.sigma)
        self._num_reports = 0
        self._seen: dict[str, int] = {}
        self._told: dict[str, int] = {}

    def told(self, snapshot: WorkerSnapshot) -> WorkerSnapshot:
        """`snapshot` as the router is to see it; called once for each that is sent, in order."""
        if self._error.is_none:
            return snapshot
        factor = self._error.factor * self._noise.factor(self._num_reports)
        self._num_reports += 1
        for name in snapshot.counters:
            if name.endswith(_OF_TIME):
                grown = snapshot.counters[name] - self._seen.get(name, 0)
                self._seen[name] = snapshot.counters[name]
                self._told[name] = self._told.get(name, 0) + round(grown * factor)
        return replace(snapshot, counters=snapshot.counters | self._told, step_time_ewma_s=snapshot.step_time_ewma_s * factor)
