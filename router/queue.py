"""Who is next: one queue per model, fair between tenants, first come first served inside each.

Virtual token counter (VTC, OSDI'24): every tenant has a counter of the tokens served to it, input + `output_weight` * output; the
waiting tenant with the smallest counter is next. Output is charged as predicted when the request leaves the queue and corrected
when it ends. A tenant that comes back from idleness is lifted to the smallest counter of those waiting, so that nobody saves up.

The gap. Let a request be worth U at most (input and output), its output w*M, and let R requests be served and not settled at most. While
two tenants wait, what was served to one exceeds what was served to the other by no more than

    U + w*M*R            since both began to wait with equal counters
    2 * (U + 2*w*M*R)    since any moment, the return of one of them included

because the last request that the one ahead was served went to the smaller counter, a counter differs from the service by the wrong part of
what is not settled, w*M*R, and U is that request. With w*M*R what the workers hold at once this is the bound of the paper.

Priorities are strict, as in vLLM: a lower number goes first, whatever the counters say, and one that keeps coming starves the others, until
these are refused after `max_wait_s`. Among requests of one priority nobody starves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.messages import Place
from protocol.request import AttemptKey

_FIRST_GUESS_OUTPUT_TOKENS = 256
_OUTPUT_EWMA = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request in the queue."""

    key: AttemptKey
    gateway: str
    place: Place
    since_s: float


@dataclass(slots=True, kw_only=True)
class _Tenant:
    name: str
    counter: float
    output_tokens_mean: float = _FIRST_GUESS_OUTPUT_TOKENS
    levels: dict[int, OrderedDict[AttemptKey, Waiting]] = field(default_factory=dict)


class FairQueue:
    """Requests of one model that wait for a worker. Its length is bounded by whoever pushes."""

    def __init__(self, *, output_weight: float, max_tenants: int) -> None:
        self._output_weight = output_weight
        self._max_tenants = max_tenants
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # least recently used first
        self._levels: dict[int, dict[str, _Tenant]] = {}  # priority -> tenants with a request waiting at it
        self._waiting: OrderedDict[AttemptKey, Waiting] = OrderedDict()  # in order of arrival
        self._floor = 0.0  # counter of the tenant whose request last left the queue empty
        self.num_tokens = 0  # of all waiting prompts

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        """In order of arrival."""
        return iter(self._waiting.values())

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._waiting

    def push(self, waiting: Waiting, *, first: bool = False) -> None:
        """Join the end of the tenant's line; `first`: its head, for one that had been there before."""
        assert waiting.key not in self._waiting, "queued twice"
        tenant = self._tenant(waiting.place.tenant)
        if not tenant.levels:
            active = [t.counter for level in self._levels.values() for t in level.values()]
            tenant.counter = max(tenant.counter, min(active, default=self._floor))
        priority = waiting.place.priority
        line = tenant.levels.setdefault(priority, OrderedDict())
        line[waiting.key] = waiting
        self._waiting[waiting.key] = waiting
        if first:
            line.move_to_end(waiting.key, last=False)
            self._waiting.move_to_end(waiting.key, last=False)
        self._levels.setdefault(priority, {})[tenant.name] = tenant
        self.num_tokens += waiting.place.num_tokens

    def heads(self) -> Iterator[Waiting]:
        """Who is next, then who would be if that one cannot go: at most one request a tenant and priority."""
        for priority in sorted(self._levels):
            tenants = self._levels[priority].values()
            first = min(tenants, key=_counter)
            yield first.levels[priority][next(iter(first.levels[priority]))]
            for tenant in sorted(tenants, key=_counter):
                if tenant is not first:
                    yield tenant.levels[priority][next(iter(tenant.levels[priority]))]

    def remove(self, key: AttemptKey) -> Waiting | None:
        """Take a request out without charging for it; None when it is not here."""
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return None
        tenant, priority = self._tenants[waiting.place.tenant], waiting.place.priority
        line = tenant.levels[priority]
        del line[key]
        if not line:
            del tenant.levels[priority]
            del self._levels[priority][tenant.name]
            if not self._levels[priority]:
                del self._levels[priority]
        self.num_tokens -= waiting.place.num_tokens
        return waiting

    def serve(self, key: AttemptKey) -> int:
        """Take a request out because it goes to a worker; returns the output tokens per choice charged for it."""
        waiting = self._waiting[key]
        tenant = self._tenant(waiting.place.tenant)
        predicted = self.predicted_output_tokens(waiting.place)
        tenant.counter += waiting.place.num_tokens + self._output_weight * predicted * waiting.place.num_choices
        self.remove(key)
        if not self._waiting:
            self._floor = tenant.counter
        return predicted

    def serve_at_once(self, place: Place) -> int:
        """Charge a request that goes to a worker without waiting, as nobody waits before it; the output tokens, as of `serve`."""
        assert not self._waiting, "somebody waits"
        tenant = self._tenant(place.tenant)
        predicted = self.predicted_output_tokens(place)
        charge = place.num_tokens + self._output_weight * predicted * place.num_choices
        self._floor = tenant.counter = max(tenant.counter, self._floor) + charge
        return predicted

    def settle(self, tenant_name: str, *, predicted_output_tokens: int, num_output_tokens: int, num_choices: int) -> None:
        """A request ended with so many output tokens a choice: correct its charge and the tenant's next predictions."""
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            return
        tenant.counter += self._output_weight * num_choices * (num_output_tokens - predicted_output_tokens)
        tenant.output_tokens_mean += _OUTPUT_EWMA * (num_output_tokens - tenant.output_tokens_mean)

    def predicted_output_tokens(self, place: Place) -> int:
        """Of one choice: the tenant's running mean, at most what the request allows."""
        tenant = self._tenants.get(place.tenant)
        mean = tenant.output_tokens_mean if tenant is not None else _FIRST_GUESS_OUTPUT_TOKENS
        return max(1, min(place.expected_output_tokens, round(mean)))

    def counters(self) -> dict[str, float]:
        """Virtual tokens served, by tenant."""
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name=name, counter=self._floor)
            if len(self._tenants) > self._max_tenants:
                idle = next((t for t in self._tenants.values() if not t.levels and t is not tenant), None)
                if idle is not None:
                    del self._tenants[idle.name]
        self._tenants.move_to_end(name)
        return tenant


def _counter(tenant: _Tenant) -> float:
    return tenant.counter
