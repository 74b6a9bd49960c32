"""Many seeds of simulated faults on several processes: which laws broke where, and how often each fault met each state."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from protocol.errors import ConfigError
from simulator.fault_run import NUM_REQUESTS, Outcome, run_seed
from simulator.faults import REACHABLE, UNREACHABLE, Kind

SEEDS_AT_ONCE = 4  # a process is given
MAX_FAILURES_TOLD = 100


def kinds_of(text: str) -> tuple[Kind, ...]:
    """`kill,hang`; empty: all of them.

    Raises:
        ConfigError: one that does not exist.
    """
    names = {kind.value: kind for kind in Kind}
    asked = [name for name in text.split(",") if name]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ConfigError(f"there is no fault {unknown[0]!r}; choose among {', '.join(names)}")
    return tuple(names[name] for name in asked) or tuple(Kind)


def repeat_command(seed: int, kinds: tuple[Kind, ...] = tuple(Kind), num_requests: int = NUM_REQUESTS) -> str:
    """What repeats a seed, to the last turn."""
    chosen = "" if kinds == tuple(Kind) else f" --kinds {','.join(kind.value for kind in kinds)}"
    count = "" if num_requests == NUM_REQUESTS else f" --requests {num_requests}"
    return f"baton sim --faults --seed {seed}{chosen}{count}"


@dataclass(slots=True)
class Campaign:
    """What the seeds so far came to."""

    kinds: tuple[Kind, ...]
    requests_a_seed: int = NUM_REQUESTS
    num_seeds: int = 0
    num_requests: int = 0
    num_retried: int = 0
    least_requests: int | None = None  # of one seed; None: none was run
    least_kinds: int | None = None  # of faults that took effect in one seed
    ends: Counter[str] = field(default_factory=Counter)
    effects: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        self.num_requests += outcome.num_requests
        self.num_retried += outcome.num_retried
        if outcome.law is not None:
            self.failures.append(outcome)
        else:  # a run that broke off says nothing of what it would have met
            self.least_requests = min(outcome.num_requests, self.least_requests or outcome.num_requests)
            self.least_kinds = min(outcome.num_kinds, self.least_kinds if self.least_kinds is not None else outcome.num_kinds)
        self.ends.update(outcome.ends)
        self.effects.update(outcome.effects)
        self.hits.update(outcome.hits)

    @property
    def matrix(self) -> dict[str, dict[str, int]]:
        """Requests hit, by fault and state of their attempt; cells that cannot be reached are left out."""
        table: dict[str, dict[str, int]] = {}
        for kind, state in REACHABLE:
            if kind in self.kinds:
                table.setdefault(kind.value, {})[state.value] = self.hits[f"{kind.value}/{state.value}"]
        return table

    @property
    def least_cell(self) -> tuple[str, int]:
        """The reachable cell that was hit least."""
        cells = {f"{kind}/{state}": count for kind, row in self.matrix.items() for state, count in row.items()}
        return min(cells.items(), key=lambda cell: cell[1])

    def repeat(self, outcome: Outcome) -> str:
        return repeat_command(outcome.seed, self.kinds, self.requests_a_seed)

    def document(self) -> dict[str, object]:
        """JSON values."""
        return {
            "kinds": [kind.value for kind in self.kinds],
            "num_seeds": self.num_seeds,
            "num_requests": self.num_requests,
            "num_retried": self.num_retried,
            "ends": dict(sorted(self.ends.items())),
            "effects": {kind.value: self.effects[kind.value] for kind in self.kinds},
            "matrix": self.matrix,
            "unreachable": {f"{kind.value}/{state.value}": why for (kind, state), why in UNREACHABLE.items() if kind in self.kinds},
            "failures": [
                {
                    "seed": one.seed,
                    "law": one.law.value if one.law else None,
                    "text": one.text,
                    "repeat": repeat_command(one.seed, self.kinds),
                }
                for one in self.failures[:MAX_FAILURES_TOLD]
            ],
        }


def run_campaign(
    seeds: range,
    *,
    kinds: tuple[Kind, ...] = tuple(Kind),
    num_requests: int = NUM_REQUESTS,
    num_jobs: int = 1,
    on_outcome: Callable[[Campaign, Outcome], None] = lambda campaign, outcome: None,
) -> Campaign:
    """Every seed, in order, whatever comes of those before; the result does not depend on `num_jobs`."""
    campaign = Campaign(kinds, num_requests)
    for outcome in _outcomes(seeds, partial(run_seed, kinds=kinds, num_requests=num_requests), num_jobs):
        campaign.add(outcome)
        on_outcome(campaign, outcome)
    return campaign


def _outcomes(seeds: range, run: Callable[[int], Outcome], num_jobs: int) -> Iterator[Outcome]:
    if num_jobs == 1:
        _be_quiet()
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(num_jobs, initializer=_be_quiet) as pool:
        yield from pool.imap(run, seeds, chunksize=SEEDS_AT_ONCE)


def _be_quiet() -> None:
    """Lost workers and routers are what these runs are about: no line for each."""
    logging.getLogger("baton").setLevel(logging.CRITICAL)
