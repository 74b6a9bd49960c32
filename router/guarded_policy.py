"""A policy that fails must not take the cluster with it: least_work decides in its place, and everybody can see that it does."""

from __future__ import annotations

from math import inf, isfinite
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import (
    Cost,
    Parts,
    PlacementPolicy,
    PlacementView,
    PolicyCommand,
    PolicyEvent,
    PolicyOverran,
    Pool,
    PoolPolicy,
    PoolPrices,
)
from router.policies.least_work import LeastWork

FALLBACK = "least_work"


class GuardedPolicy:
    """Asks `policy`; answers with least_work where it raises, prices with no finite number, or prices a worker not in view."""

    def __init__(self, policy: PlacementPolicy, *, name: str, rng: Random, penalty_s: float) -> None:
        self.name = name
        self._policy = policy
        self._pool_policy = policy if isinstance(policy, PoolPolicy) else None
        self._fallback = LeastWork(LeastWork.Config())
        self._rng = rng
        self._penalty_s = penalty_s
        self._penalty_until_s = float("-inf")
        self._last_failure = ""
        self.num_decisions = 0
        self.num_fallbacks = 0
        self.num_failures = 0
        self.num_overruns = 0

    def price(self, view: PlacementView, request: Place, now: float) -> tuple[str, PoolPrices]:
        """The name of the policy that answered, and its prices: at least one that is finite; infinite is a worker left out."""
        self.num_decisions += 1
        if now >= self._penalty_until_s:
            try:
                if self._pool_policy is not None:
                    prices = self._pool_policy.price_pool(view, request, now, self._rng)
                    complaint = _complaint_of_pool(prices, view)
                else:
                    costs = self._policy.score(view, request, now, self._rng)
                    complaint, prices = _complaint(costs, view), _ByName(costs, view)
            except Exception as error:  # whatever a user's code raises: the request must go on
                complaint = f"{type(error).__name__}: {error}"
            if complaint is None:
                return self.name, prices
            self._failed(complaint)
        self.num_fallbacks += 1
        return FALLBACK, _ByName(self._fallback.score(view, request, now, self._rng), view)

    def parts(self, prices: PoolPrices, index: int) -> Parts:
        """Of one of those prices; none where the policy fails to name them."""
        try:
            return prices.parts(index)
        except Exception as error:  # as in price
            self._failed(f"{type(error).__name__} in parts: {error}")
            return (), ()

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
        self.names = "/".join(policy.name for policy in self.each)  # as an assignment tells who chose: NAME, or PREFILL/DECODE

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

    def answered(self, chosen_by: str) -> bool:
        """False when least_work chose in place of one of them."""
        return chosen_by == self.names or {policy.name for policy in self.each}.issuperset(chosen_by.split("/"))

    @property
    def each(self) -> tuple[GuardedPolicy, ...]:
        return (self.prefill,) if self.decode is self.prefill else (self.prefill, self.decode)

    @property
    def notes(self) -> list[str]:
        """One line for each that ever failed."""
        notes = [(pool, policy.note) for pool, policy in zip(("", "decode "), self.each, strict=False)]
        return [pool + note for pool, note in notes if note is not None]


class _ByName:
    """What `score` answered, in the order of the view."""

    __slots__ = ("_costs", "_view", "seconds")

    def __init__(self, costs: dict[WorkerId, Cost], view: PlacementView) -> None:
        self._costs = costs
        self._view = view
        self.seconds = [costs[w.worker_id][0] if w.worker_id in costs else inf for w in view.workers]

    def parts(self, index: int) -> Parts:
        terms = self._costs[self._view.workers[index].worker_id].terms
        if not terms:
            return (), ()
        names, seconds = zip(*terms, strict=True)
        return names, seconds


def _complaint_of_pool(prices: PoolPrices, view: PlacementView) -> str | None:
    seconds = prices.seconds
    if len(seconds) != len(view.workers):
        return f"priced {len(seconds)} of {len(view.workers)} workers"
    if isfinite(sum(seconds)):  # of one look at C speed
        return None
    strange = [f"{w.worker_id} at {s}" for w, s in zip(view.workers, seconds, strict=True) if not isfinite(s)]
    return "priced " + ", ".join(strange) if strange else None


def _complaint(costs: dict[WorkerId, Cost], view: PlacementView) -> str | None:
    if not costs:
        return "priced no worker"
    unknown = costs.keys() - {w.worker_id for w in view.workers}
    if unknown:
        return f"priced {min(unknown)!r}, which is not in view"
    if not all(map(isfinite, [cost.seconds for cost in costs.values()])):
        return "priced " + ", ".join(f"{name} at {cost.seconds}" for name, cost in costs.items() if not isfinite(cost.seconds))
    return None
