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
from simulator.estimate_error import EXACT, EstimateError
from simulator.fidelity import Fidelity
from simulator.metrics import Figures, counted, figures_of
from simulator.prompt_tree import PromptTree, prompt_tree
from simulator.replicates import Replicates
from simulator.routed_gateway import Served
from simulator.summary import Objective
from simulator.token_accurate import MAX_TOKENS, run_token_accurate
from simulator.traces.trace import Trace, reuse_share
from simulator.true_steps import true_steps

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
    error: EstimateError = EXACT  # of the times that workers report

    def __str__(self) -> str:
        off = "" if self.error.is_none else f", reports x{self.error.factor:g} and sigma {self.error.sigma:g}"
        return f"{self.entrant.label} under replicate {self.replicate}{off}"


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
    errors: tuple[EstimateError, ...] = ()  # of reported times, under which all is run once more; token-accurate only

    def __post_init__(self) -> None:
        labels = [entrant.label for entrant in self.entrants]
        if self.errors and self.fidelity is not Fidelity.TOKEN_ACCURATE:
            raise ConfigError(
                f"reports can be wrong where workers report, which is {Fidelity.TOKEN_ACCURATE.value}; leave --estimate-error out"
            )
        if self.fidelity is Fidelity.POLICY_ONLY and any(entrant.is_oracle for entrant in self.entrants):
            raise ConfigError(
                f"nobody is told lengths in {self.fidelity.value} runs; take {Fidelity.TOKEN_ACCURATE.value} ones for oracles"
            )
        if not labels:
            raise ConfigError("no policies to compare; name one or more")
        if len(set(labels)) < len(labels):
            raise ConfigError(f"two policies have one name in {', '.join(labels)}; rename a file, or tell them apart by {OTHER_DRAWS}2")

    @property
    def keys(self) -> list[Key]:
        """In the order they are run."""
        return [
            Key(replicate=index, entrant=entrant, error=error)
            for error in (EXACT, *self.errors)
            for index in range(self.num_replicates)
            for entrant in self.entrants
        ]


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
        self._kept: Replicate | None = None

    def run(self, key: Key) -> Cell:
        """
        Raises:
            ConfigError: a trace and a cluster that do not go together, or a warm-up that leaves nothing.
        """
        asked, replicate = self.tournament, self._replicate(key.replicate)
        served = self._serve(key, replicate)
        after = counted(served, asked.warm_up_s)
        if not after:
            duration_s = replicate.trace.duration_s
            raise ConfigError(f"nothing of {duration_s:.4g} s of requests comes after a warm-up of {asked.warm_up_s:g} s; shorten it")
        name, is_counted = key.entrant.label, {one.request_id for one in after}
        is_told = key.error.is_none  # else its figures are all that is kept
        return Cell(
            key=key,
            figures=figures_of(after, asked.objective, unserved_ttft_s=asked.config.router.max_wait_s),
            reuse_share=replicate.reuse_share,
            outcomes=pack(outcome_rows(name, key.replicate, served, is_counted)) if is_told else b"",
            decisions=pack(decision_rows(name, key.replicate, served)) if is_told else b"",
        )

    def _replicate(self, index: int) -> Replicate:
        if self._kept is None or self._kept.index != index:
            trace = self.tournament.replicates.make(index)
            is_modelled, size = self.tournament.fidelity is Fidelity.POLICY_ONLY, self.tournament.config.workers.block_size
            prompts = prompt_tree(trace, block_tokens=size, max_tokens=MAX_TOKENS) if is_modelled else None
            self._kept = Replicate(index=index, trace=trace, reuse_share=reuse_share(trace.requests), prompts=prompts)
        return self._kept

    def _serve(self, key: Key, replicate: Replicate) -> list[Served]:
        asked, entrant = self.tournament, key.entrant
        seed = asked.replicates.seed_of(key.replicate) + (entrant.draws - 1) * DRAWS
        max_tokens, steps = None if entrant.is_oracle else MAX_TOKENS, true_steps(asked.config, seed=seed)
        if asked.fidelity is Fidelity.POLICY_ONLY:
            from simulator.policy_only import run_policy_only

            return run_policy_only(
                replicate.trace,
                asked.config,
                policy=entrant.policy,
                seed=seed,
                max_tokens=max_tokens,
                prompts=None if entrant.is_oracle else replicate.prompts,
                steps=steps,
                estimate_error=key.error,
            )
        return run_token_accurate(
            replicate.trace,
            asked.config,
            policy=entrant.policy,
            seed=seed,
            max_tokens=max_tokens,
            steps=steps,
            estimate_error=key.error,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """One that is being run, and what is worked out of it once for all policies."""

    index: int
    trace: Trace
    reuse_share: float
    prompts: PromptTree | None  # for policy-only runs


__all__ = ["Cell", "CellRunner", "Entrant", "Key", "Tournament"]
