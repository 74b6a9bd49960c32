"""A tournament of placement policies: every policy under every replicate, with the same trace and the same seed for all policies of one.

    replicate 0: policy a, policy b, ...     replicate 1: policy a, policy b, ...

Replicates are run one after the other, so that a tournament which is ended early has whole ones to tell of.
"""

from __future__ import annotations

from dataclasses import dataclass

from control.config import ClusterConfig
from protocol.errors import ConfigError
from router import policies
from simulator.cell_rows import decision_rows, outcome_rows, pack
from simulator.fidelity import Fidelity
from simulator.metrics import Figures, counted, figures_of
from simulator.replicates import Replicates
from simulator.routed_gateway import Served
from simulator.summary import Objective
from simulator.token_accurate import MAX_TOKENS, run_token_accurate
from simulator.traces.trace import Trace, reuse_share

ORACLE = "oracle_"  # before a policy's name
OTHER_DRAWS = "#"  # behind it, with a number
DRAWS = 10**12  # between the seeds of one replicate for NAME#1, NAME#2, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A policy under the name it has here.

    oracle_NAME is the policy NAME that is told how long answers will be, as none that serves is. NAME#2 is NAME once more with other draws
    of its own: one policy under two names, for whoever wants to see how often chance is taken for a difference.
    """

    label: str  # short
    policy: str  # as `router.policies.load` takes it
    is_oracle: bool = False
    draws: int = 1

    @classmethod
    def of(cls, spec: str) -> Entrant:
        """
        Raises:
            ConfigError: no such policy.
        """
        named, mark, number = spec.partition(OTHER_DRAWS)
        if mark and not (number.isdecimal() and int(number)):
            raise ConfigError(f"policy {spec!r}: behind {OTHER_DRAWS} a number from 1 on is expected, as in prefix_cost{OTHER_DRAWS}2")
        is_oracle = named.startswith(ORACLE)
        policy = named.removeprefix(ORACLE)
        policies.load(policy)
        label = f"{ORACLE if is_oracle else ''}{policies.label(policy)}{mark}{number}"
        return cls(label=label, policy=policy, is_oracle=is_oracle, draws=int(number) if mark else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Which cell."""

    replicate: int
    entrant: Entrant

    def __str__(self) -> str:
        return f"{self.entrant.label} under replicate {self.replicate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tournament:
    """What is run.

    Raises:
        ConfigError: no policies, or two of one name.
    """

    entrants: tuple[Entrant, ...]
    replicates: Replicates
    num_replicates: int
    config: ClusterConfig
    fidelity: Fidelity
    objective: Objective
    warm_up_s: float  # what arrives within it is run and not counted

    def __post_init__(self) -> None:
        labels = [entrant.label for entrant in self.entrants]
        if not labels:
            raise ConfigError("no policies to compare; name one or more")
        if len(set(labels)) < len(labels):
            raise ConfigError(f"two policies have one name in {', '.join(labels)}; rename a file, or tell them apart by {OTHER_DRAWS}2")

    @property
    def keys(self) -> list[Key]:
        """In the order they are run."""
        return [Key(replicate=index, entrant=entrant) for index in range(self.num_replicates) for entrant in self.entrants]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy under one replicate, and what came of it."""

    key: Key
    figures: Figures
    reuse_share: float  # of the replicate: what a cache without end would find
    outcomes: bytes  # a row for each request, packed (cell_rows.py)
    decisions: bytes


class CellRunner:
    """Runs cells; keeps the replicate of the last one, which the next likely has too."""

    def __init__(self, tournament: Tournament) -> None:
        self.tournament = tournament
        self._kept: tuple[int, Trace, float] | None = None

    def run(self, key: Key) -> Cell:
        """
        Raises:
            ConfigError: a trace and a cluster that do not go together, or a warm-up that leaves nothing.
        """
        asked = self.tournament
        trace, reused = self._replicate(key.replicate)
        served = self._serve(key, trace)
        after = counted(served, asked.warm_up_s)
        if not after:
            raise ConfigError(f"nothing of {trace.duration_s:.4g} s of requests comes after a warm-up of {asked.warm_up_s:g} s; shorten it")
        name, is_counted = key.entrant.label, {one.request_id for one in after}
        return Cell(
            key=key,
            figures=figures_of(after, asked.objective, unserved_ttft_s=asked.config.router.max_wait_s),
            reuse_share=reused,
            outcomes=pack(outcome_rows(name, key.replicate, served, is_counted)),
            decisions=pack(decision_rows(name, key.replicate, served)),
        )

    def _replicate(self, index: int) -> tuple[Trace, float]:
        if self._kept is None or self._kept[0] != index:
            trace = self.tournament.replicates.make(index)
            self._kept = index, trace, reuse_share(trace.requests)
        return self._kept[1:]

    def _serve(self, key: Key, trace: Trace) -> list[Served]:
        asked, entrant = self.tournament, key.entrant
        seed = asked.replicates.seed_of(key.replicate) + (entrant.draws - 1) * DRAWS
        max_tokens = None if entrant.is_oracle else MAX_TOKENS
        return run_token_accurate(trace, asked.config, policy=entrant.policy, seed=seed, max_tokens=max_tokens)


__all__ = ["Cell", "CellRunner", "Entrant", "Key", "Tournament"]
