"""A policy that fails must not take the cluster with it: least_work decides in its place, and everybody can see that it does."""

from __future__ import annotations

from math import isfinite
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementPolicy, PlacementView, PolicyCommand, PolicyEvent, PolicyOverran, Pool
from router.policies.least_work import LeastWork

FALLBACK = "least_work"


class GuardedPolicy:
    """Asks `policy`; answers with least_work where it raises, prices with no finite number, or prices a worker not in view."""

    def __init__(self, policy: PlacementPolicy, *, name: str, rng: Random, penalty_s: float) -> None:
        self.name = name
        self._policy = policy
        self._fallback = LeastWork(LeastWork.Config())
        self._rng = rng
        self._penalty_s = penalty_s
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


class PoolPolicies:
    """The policy of each pool. One object serves both unless the user named two."""

    def __init__(self, prefill: GuardedPolicy, decode: GuardedPolicy | None = None) -> None:
        self.use(prefill, decode)

    def use(self, prefill: GuardedPolicy, decode: GuardedPolicy | None = None) -> None:
        """Ask these from now on."""
        self.prefill = prefill  # also of workers that compute the prompt and decode
        self.decode = decode if decode is not None else prefill

    def of(self, pool: Pool) -> GuardedPolicy:
        return self.decode if pool is Pool.DECODE else self.prefill

    def observe(self, event: PolicyEvent, now: float) -> None:
        """Each hears of everything, but only the one that overran of that."""
        if isinstance(event, PolicyOverran):
            self.of(event.pool).observe(event, now)
            return
        for policy in self.each:
            policy.observe(event, now)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        """Of the policy that chooses prefill workers: commands are about prefixes."""
        return self.prefill.commands(now)

    @property
    def names(self) -> str:
        """As an assignment tells who chose: NAME, or PREFILL/DECODE where they are two."""
        return "/".join(policy.name for policy in self.each)

    def answered(self, chosen_by: str) -> bool:
        """False when least_work chose in place of one of them."""
        return {policy.name for policy in self.each}.issuperset(chosen_by.split("/"))

    @property
    def each(self) -> tuple[GuardedPolicy, ...]:
        return (self.prefill,) if self.decode is self.prefill else (self.prefill, self.decode)

    @property
    def notes(self) -> list[str]:
        """One line for each that ever failed."""
        notes = [(pool, policy.note) for pool, policy in zip(("", "decode "), self.each, strict=False)]
        return [pool + note for pool, note in notes if note is not None]


def _complaint(costs: dict[WorkerId, Cost], view: PlacementView) -> str | None:
    if not costs:
        return "priced no worker"
    unknown = costs.keys() - {w.worker_id for w in view.workers}
    if unknown:
        return f"priced {min(unknown)!r}, which is not in view"
    if not all(map(isfinite, [cost.seconds for cost in costs.values()])):
        return "priced " + ", ".join(f"{name} at {cost.seconds}" for name, cost in costs.items() if not isfinite(cost.seconds))
    return None
