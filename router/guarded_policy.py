"""A policy that fails must not take the cluster with it: least_work decides in its place, and everybody can see that it does."""

from __future__ import annotations

from math import isfinite
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementPolicy, PlacementView, PolicyCommand, PolicyEvent, PolicyOverran
from router.policies.least_work import LeastWork

FALLBACK = "least_work"


class GuardedPolicy:
    """Asks `policy`; answers with least_work where it raises, prices with no finite number, or prices a worker not in view."""

    def __init__(self, policy: PlacementPolicy, *, name: str, rng: Random, penalty_s: float) -> None:
        self._fallback = LeastWork(LeastWork.Config())
        self._rng = rng
        self._penalty_s = penalty_s
        self.use(policy, name=name)

    def use(self, policy: PlacementPolicy, *, name: str) -> None:
        """Ask this one from now on; what the one before it did is forgotten."""
        self.name = name
        self._policy = policy
        self._penalty_until_s = float("-inf")
        self._last_failure = ""
        self.num_decisions = 0
        self.num_fallbacks = 0
        self.num_failures = 0
        self.num_overruns = 0

    def score(self, view: PlacementView, request: Place, now: float) -> tuple[str, dict[WorkerId, Cost]]:
        """The name of the policy that answered, and its prices: at least one, all finite, all of workers in view."""
        self.num_decisions += 1
        if now >= self._penalty_until_s:
            try:
                costs = self._policy.score(view, request, now, self._rng)
                complaint = _complaint(costs, view)
            except Exception as error:  # whatever a user's code raises: the request must go on
                complaint = f"{type(error).__name__}: {error}"
            if complaint is None:
                return self.name, costs
            self._failed(complaint)
        self.num_fallbacks += 1
        return FALLBACK, self._fallback.score(view, request, now, self._rng)

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, PolicyOverran):
            self.num_overruns += 1
            self._penalty_until_s = now + self._penalty_s
            self._last_failure = f"took {event.duration_s:.4f} s, the limit is {event.limit_s:.4f} s"
        try:
            self._policy.observe(event, now)
        except Exception as error:  # as in score
            self._failed(f"{type(error).__name__} in observe: {error}")

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        try:
            return self._policy.commands(now)
        except Exception as error:  # as in score
            self._failed(f"{type(error).__name__} in commands: {error}")
            return ()

    @property
    def note(self) -> str | None:
        """One line for `baton status`; None while the policy never failed."""
        if not self._last_failure:
            return None
        return (
            f"policy {self.name} failed {self.num_failures} times and overran {self.num_overruns} times; {FALLBACK} made "
            f"{self.num_fallbacks} of {self.num_decisions} choices in its place; last: {self._last_failure}"
        )

    def _failed(self, complaint: str) -> None:
        self.num_failures += 1
        self._last_failure = complaint[:200]


def _complaint(costs: dict[WorkerId, Cost], view: PlacementView) -> str | None:
    if not costs:
        return "priced no worker"
    unknown = costs.keys() - {w.worker_id for w in view.workers}
    if unknown:
        return f"priced {min(unknown)!r}, which is not in view"
    if not all(map(isfinite, [cost.seconds for cost in costs.values()])):
        return "priced " + ", ".join(f"{name} at {cost.seconds}" for name, cost in costs.items() if not isfinite(cost.seconds))
    return None
