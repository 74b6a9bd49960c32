"""A tournament of placement policies: every policy under every replicate, with the same trace and the same seed for all policies of one.

    replicate 0: policy a, policy b, ...     replicate 1: policy a, policy b, ...

Replicates are run one after the other, so that a tournament which is ended early has whole ones to tell of.
"""

from __future__ import annotations

from dataclasses import dataclass

from control.config import ClusterConfig
from protocol.errors import ConfigError
from router import policies
from simulator.bounds import Bounds, bounds_of
from simulator.cell_rows import decision_rows, outcome_rows, pack
from simulator.estimate_error import EXACT, EstimateError
from simulator.fidelity import Fidelity
from simulator.metrics import Figures, counted, figures_of
from simulator.policy_only import prompts_of, run_policy_only
from simulator.prompt_tree import PromptTree
from simulator.regret import Regret, forks_of
from simulator.replicates import Replicates
from simulator.routed_gateway import Served
from simulator.routed_waterfall import routed_waterfall_of
from simulator.summary import Objective
from simulator.token_accurate import MAX_TOKENS, run_token_accurate
from simulator.traces.trace import Trace
from simulator.true_steps import true_steps
from simulator.waterfall import Waterfall, waterfall_of

ORACLE = "oracle_"  # before a policy's name
OTHER_DRAWS = "#"  # behind it, with a number
NUM_FORKS = 8  # of each policy
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
class Explain:
    """A policy under a replicate once more, by policy-only runs, for what frames its figures and what its decisions cost."""

    replicate: int
    entrant: Entrant

    def __str__(self) -> str:
        return f"why {self.entrant.label} under replicate {self.replicate}"


Task = Key | Explain


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
    is_explained: bool = False
    errors: tuple[EstimateError, ...] = ()  # of reported times, under which all is run once more

    def __post_init__(self) -> None:
        labels = [entrant.label for entrant in self.entrants]
        if labels and not self.able:
            raise ConfigError(f"{', '.join(labels)}: oracles alone have nobody to stand beside; name a policy that could serve")
        if not labels:
            raise ConfigError("no policies to compare; name one or more")
        if len(set(labels)) < len(labels):
            raise ConfigError(f"two policies have one name in {', '.join(labels)}; rename a file, or tell them apart by {OTHER_DRAWS}2")

    @property
    def able(self) -> list[Entrant]:
        """Those that could serve."""
        return [entrant for entrant in self.entrants if not entrant.is_oracle]

    def seed_of(self, replicate: int, entrant: Entrant) -> int:
        """Of whatever is drawn in a cell."""
        return self.replicates.seed_of(replicate) + (entrant.draws - 1) * DRAWS

    @property
    def tasks(self) -> list[Task]:
        """In the order they are run: what is asked first, why it is so, and how far it rests on estimates."""
        each = [(index, entrant) for index in range(self.num_replicates) for entrant in self.entrants]
        explained = [(index, entrant) for index in range(self.num_replicates) for entrant in self.able] if self.is_explained else []
        return [
            *(Key(replicate=index, entrant=entrant) for index, entrant in each),
            *(Explain(replicate=index, entrant=entrant) for index, entrant in explained),
            *(Key(replicate=index, entrant=entrant, error=error) for error in self.errors for index, entrant in each),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy under one replicate, and what came of it."""

    key: Key
    figures: Figures
    available_share: float  # of the prompt tokens that count, what a cache without end would find
    waterfall: Waterfall | None  # of this run; None: it is not explained, or its fidelity has that in a run apart
    outcomes: bytes  # a row for each request, packed (cell_rows.py)
    decisions: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What came of an Explain."""

    waterfall: Waterfall | None  # None: the cell has it
    bounds: Bounds | None  # of the replicate; with its first policy alone
    regret: Regret | None  # under replicate 0 alone; None too where nothing could be placed otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexplained:
    """Policy-only runs do not know this cluster."""

    reason: str


Outcome = Cell | Explained | Unexplained


class Runner:
    """Runs tasks; keeps the replicate of the last one, which the next likely has too."""

    def __init__(self, tournament: Tournament) -> None:
        self.tournament = tournament
        self._kept: Replicate | None = None

    def run(self, task: Task) -> Outcome:
        """
        Raises:
            ConfigError: a trace and a cluster that do not go together, or a warm-up that leaves nothing.
        """
        return self._cell(task) if isinstance(task, Key) else self._explained(task)

    def _cell(self, key: Key) -> Cell:
        asked, replicate = self.tournament, self._replicate(key.replicate)
        served, waterfall = self._serve(key, replicate)
        after = counted(served, asked.warm_up_s)
        if not after:
            duration_s = replicate.trace.duration_s
            raise ConfigError(f"nothing of {duration_s:.4g} s of requests comes after a warm-up of {asked.warm_up_s:g} s; shorten it")
        name, is_counted = key.entrant.label, {one.request_id for one in after}
        is_told = key.error.is_none  # else its figures are all that is kept
        return Cell(
            key=key,
            figures=figures_of(after, asked.objective, unserved_ttft_s=asked.config.router.max_wait_s),
            available_share=replicate.available_share,
            waterfall=waterfall,
            outcomes=pack(outcome_rows(name, key.replicate, served, is_counted)) if is_told else b"",
            decisions=pack(decision_rows(name, key.replicate, served)) if is_told else b"",
        )

    def _replicate(self, index: int) -> Replicate:
        if self._kept is None or self._kept.index != index:
            trace = self.tournament.replicates.make(index)
            prompts = prompts_of(trace, self.tournament.config)
            after = [prompt for prompt in prompts.prompts if prompt.at_s >= self.tournament.warm_up_s]
            available = sum(prompt.reusable_tokens for prompt in after) / max(1, sum(prompt.num_tokens for prompt in after))
            self._kept = Replicate(index=index, trace=trace, prompts=prompts, available_share=available)
        return self._kept

    def _serve(self, key: Key, replicate: Replicate) -> tuple[list[Served], Waterfall | None]:
        asked, entrant = self.tournament, key.entrant
        seed = asked.seed_of(key.replicate, entrant)
        max_tokens, steps = None if entrant.is_oracle else MAX_TOKENS, true_steps(asked.config, seed=seed)
        if asked.fidelity is Fidelity.POLICY_ONLY:
            served = run_policy_only(
                replicate.trace,
                asked.config,
                policy=entrant.policy,
                seed=seed,
                max_tokens=max_tokens,
                prompts=None if entrant.is_oracle else replicate.prompts,
                steps=steps,
                estimate_error=key.error,
            )
            return served, None
        if asked.is_explained and key.error.is_none and not entrant.is_oracle:  # the same run, looked at
            return routed_waterfall_of(replicate.trace, asked.config, policy=entrant.policy, seed=seed, steps=steps)
        served = run_token_accurate(
            replicate.trace,
            asked.config,
            policy=entrant.policy,
            seed=seed,
            max_tokens=max_tokens,
            steps=steps,
            estimate_error=key.error,
        )
        return served, None

    def _explained(self, task: Explain) -> Explained | Unexplained:
        asked, entrant, replicate = self.tournament, task.entrant, self._replicate(task.replicate)
        trace, config, prompts, seed = replicate.trace, asked.config, replicate.prompts, asked.seed_of(task.replicate, entrant)
        try:
            waterfall = None
            if asked.fidelity is Fidelity.POLICY_ONLY:
                _, waterfall = waterfall_of(trace, config, policy=entrant.policy, seed=seed, prompts=prompts)
            bounds = bounds_of(trace, config, seed=seed, prompts=prompts) if entrant == asked.able[0] else None
            forks = (
                [] if task.replicate else forks_of(trace, config, policy=entrant.policy, seed=seed, num_forks=NUM_FORKS, prompts=prompts)
            )
        except ConfigError as error:
            return Unexplained(reason=str(error))
        return Explained(waterfall=waterfall, bounds=bounds, regret=Regret.of(forks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """One that is being run, and what is worked out of it once for all policies."""

    index: int
    trace: Trace
    prompts: PromptTree
    available_share: float


__all__ = ["Cell", "Entrant", "Explain", "Explained", "Key", "Outcome", "Runner", "Task", "Tournament", "Unexplained"]
