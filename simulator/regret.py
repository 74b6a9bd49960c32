"""What a decision cost, measured by what came of it: the run is repeated with that one decision made otherwise, once for each other worker.

    the run ──► decisions ──► K of them, drawn by seed ──► for each other worker that had room: the run again, that request sent there

Nothing else differs at the moment of the fork: the same seed, arrivals and lengths, the same state of everybody. From there on the policy
goes on by itself, so that what a decision does to those that follow is counted too. A policy's own scores have no say in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from control.config import ClusterConfig
from protocol.worker import WorkerId
from router.choice import Choice
from simulator.policy_only import PolicyOnlyCluster, Watcher, prompts_of, run_policy_only
from simulator.prompt_tree import Prompt, PromptTree
from simulator.routed_gateway import Served
from simulator.traces.trace import Trace

NUM_FORKS = 16
TIED_S = 1e-6  # a worker that is better by less is not better
NUM_FOLLOWERS = 500  # requests that come after the one that is forked; later ones are not simulated again


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """One request, and what became of it on each worker that could have computed it."""

    number: int  # of the request in the trace
    chosen: WorkerId
    ttft_s: Mapping[WorkerId, float]  # of this request, had it gone there; the chosen one included
    mean_ttft_s: Mapping[WorkerId, float]  # of all that were simulated

    @property
    def regret_s(self) -> float:
        """What the request waited longer than where it would have waited least; 0 where the choice was the best."""
        return self.ttft_s[self.chosen] - min(self.ttft_s.values())

    @property
    def regret_of_all_s(self) -> float:
        """The same for the mean of all: what was best for the request may be worse for those behind it."""
        return self.mean_ttft_s[self.chosen] - min(self.mean_ttft_s.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """Over the forks of one policy, in seconds."""

    num_forks: int
    mean_s: float
    p90_s: float
    best_share: float  # of forks at which no worker would have been better for the request
    mean_of_all_s: float  # of the mean time to first token of all

    @classmethod
    def of(cls, forks: Sequence[Fork]) -> Regret | None:
        """None: nothing was forked."""
        if not forks:
            return None
        regrets_s = sorted(fork.regret_s for fork in forks)
        return cls(
            num_forks=len(forks),
            mean_s=fmean(regrets_s),
            p90_s=regrets_s[min(len(regrets_s) - 1, int(0.9 * len(regrets_s)))],
            best_share=sum(regret_s < TIED_S for regret_s in regrets_s) / len(regrets_s),
            mean_of_all_s=fmean([fork.regret_of_all_s for fork in forks]),
        )


def forks_of(
    trace: Trace,
    config: ClusterConfig,
    *,
    policy: str,
    seed: int,
    num_forks: int = NUM_FORKS,
    num_followers: int = NUM_FOLLOWERS,
    prompts: PromptTree | None = None,
) -> list[Fork]:
    """Forks of a policy-only run, at decisions that had a choice, in order. As many runs as other workers had room at each.

    Raises:
        ConfigError: as of `run_policy_only`.
    """
    tree = prompts if prompts is not None else prompts_of(trace, config)
    choices = _Choices()
    run_policy_only(trace, config, policy=policy, seed=seed, prompts=tree, watcher=choices)
    open_to_choice = [number for number, (_, others) in choices.made.items() if others]
    drawn = sorted(Random(f"forks {seed}").sample(sorted(open_to_choice), min(num_forks, len(open_to_choice))))
    forks = []
    for number in drawn:
        chosen, others = choices.made[number]
        short = tree.first(number + 1 + num_followers)
        runs = {
            worker_id: run_policy_only(trace, config, policy=policy, seed=seed, prompts=short, forced=forced)
            for worker_id, forced in [(chosen, {}), *((other, {number: other}) for other in others)]
        }
        ttft_s = {worker_id: run[number].ttft_s for worker_id, run in runs.items()}
        met = {worker_id: s for worker_id, s in ttft_s.items() if s is not None}
        if chosen in met:
            means = {worker_id: _mean_ttft_s(runs[worker_id]) for worker_id in met}
            forks.append(Fork(number=number, chosen=chosen, ttft_s=met, mean_ttft_s=means))
    return forks


def regret_section(regrets: Mapping[str, Regret | None]) -> dict[str, dict[str, float]]:
    """`regret` of a comparison's document, by label; policies of which nothing was forked are left out."""
    return {
        label: {
            "num_forks": regret.num_forks,
            "mean_s": regret.mean_s,
            "p90_s": regret.p90_s,
            "best_share": regret.best_share,
            "mean_of_all_s": regret.mean_of_all_s,
        }
        for label, regret in regrets.items()
        if regret is not None
    }


class _Choices(Watcher):
    """Of each request: where its prompt went, and which other workers had room for it; none where there was no choice."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[WorkerId, tuple[WorkerId, ...]]] = {}

    def placing(self, cluster: PolicyOnlyCluster, prompt: Prompt, choice: Choice, now: float) -> None:
        ranking, chosen = choice.prefill_ranking, choice.prefill.worker_id
        others = tuple(w.worker_id for w in ranking.workers if w.worker_id != chosen) if ranking is not None else ()
        self.made[prompt.number] = (chosen, others)


def _mean_ttft_s(served: Sequence[Served]) -> float:
    return fmean([one.ttft_s for one in served if one.ttft_s is not None])
