"""The search behind `baton plan`: pools are simulated until their best rate is known, and one sentence says what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import fmean

from simulator.phases import Outcome, run_phases
from simulator.planner import algorithm_1, algorithm_2, best_rate, copies, mixed_within, units_within
from simulator.pools import Affinity, Criterion, Link, Pool, Pools, WorkerModel
from simulator.routed_gateway import Served
from simulator.summary import Objective
from simulator.traces.trace import Trace

SATURATING_TOKENS = 512  # L_m: one prompt of so many fills an A100 with a model of 13B (Sec. 3.1 of DistServe, OSDI'24)
MIXED_CHUNKS = (None, 512, 2048)  # whole prompts first; Sarathi-Serve's strict and relaxed budgets (OSDI'24)
MOST_UNITS = 40  # that are simulated whole: those whose phases alone promise most


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    objective: Objective
    attainment: float = 0.9  # share of requests
    criterion: Criterion = Criterion.JOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of some pools at one rate."""

    rate_per_s: float
    attainment: float  # of both parts, by the same request
    ttft_s: float  # that the goal's share of requests does not exceed; so with the others
    tpot_s: float
    pause_s: float  # the longest time between two tokens of a request
    num_decoding: float  # sequences at a time, on average, over all workers

    @classmethod
    def of(cls, served: Sequence[Outcome], goal: Goal, rate_per_s: float) -> Trial:
        ends = [one.end_s for one in served if one.end_s is not None]
        decoding_s = sum(one.end_s - one.first_token_s for one in served if one.end_s is not None and one.first_token_s is not None)
        return cls(
            rate_per_s=rate_per_s,
            attainment=fmean(goal.objective.is_met_by(one) for one in served),
            ttft_s=_not_exceeded([_or_never(one, one.ttft_s) for one in served], goal.attainment),
            tpot_s=_not_exceeded([_or_never(one, one.tpot_s or 0.0) for one in served], goal.attainment),
            pause_s=_not_exceeded([_or_never(one, one.pause_s) for one in served], goal.attainment),
            num_decoding=decoding_s / (max(ends) - served[0].arrived_s or inf),
        )

    def meets(self, goal: Goal) -> bool:
        if goal.criterion is Criterion.JOINT:
            return self.attainment >= goal.attainment
        wanted = goal.objective
        return self.ttft_s <= (wanted.ttft_s or inf) and self.tpot_s <= (wanted.tpot_s or inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Pools and their best rate. `trial`: at it; None: they meet the goal at no rate that was tried."""

    pools: Pools
    trial: Trial | None

    @property
    def rate_per_s(self) -> float:
        return self.trial.rate_per_s if self.trial is not None else 0.0

    @property
    def rate_per_gpu(self) -> float:
        return self.rate_per_s / self.pools.num_gpus

    def gpus_for(self, rate_per_s: float) -> float:
        """Of as many copies as serve `rate_per_s`."""
        return copies(rate_per_s, self.rate_per_s) * self.pools.num_gpus if self.rate_per_s else inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the paper's algorithm says for the rate asked for."""

    algorithm: int  # 1 or 2
    unit: Pools
    copies: int

    @property
    def num_gpus(self) -> int:
        return self.copies * self.unit.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found, best rate a GPU first; None: nothing of that kind meets the goal."""

    found: tuple[Found, ...]
    best: Found | None
    best_split: Found | None
    best_mixed: Found | None
    as_published: Answer | None
    advice: str


class Search:
    """Simulates pools under `workload(requests/s)`, the same requests whatever the rate."""

    def __init__(
        self,
        models: Mapping[int, WorkerModel],
        workload: Callable[[float], Trace],
        goal: Goal,
        *,
        link: Link,
        batch_tokens: int = SATURATING_TOKENS,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.models = models
        self.goal = goal
        self._workload = workload
        self._link = link
        self._batch_tokens = batch_tokens
        self._on_progress = on_progress

    def trial(self, pools: Pools, rate_per_s: float) -> Trial:
        requests = self._workload(rate_per_s).requests
        served = run_phases(requests, pools, self.models, link=self._link, batch_tokens=self._batch_tokens)
        return Trial.of(served, self.goal, rate_per_s)

    def find(self, pools: Pools) -> Found:
        met: dict[float, Trial] = {}

        def is_met(rate_per_s: float) -> bool:
            trial = self.trial(pools, rate_per_s)
            if trial.meets(self.goal):
                met[rate_per_s] = trial
                return True
            return False

        return Found(pools=pools, trial=met.get(best_rate(is_met, pools.num_gpus)))

    def plan(self, num_gpus: int, affinity: Affinity, *, gpus_per_machine: int, rate_per_s: float | None = None) -> Plan:
        """The best pools for `rate_per_s`: those that need the fewest GPUs; without one, those of the best rate a GPU.

        num_gpus: that prefill and decode workers, or workers that do both, may take together; a rate may ask for several times as many.
        """
        sizes = [size for size in self.models if size <= min(num_gpus, gpus_per_machine)]
        known: dict[Pools, Found] = {}

        def goodput(pools: Pools) -> float:
            if pools not in known:
                known[pools] = self.find(pools)
            return known[pools].rate_per_s

        self._on_progress("one phase alone")
        phases = algorithm_1(sizes, goodput, rate_per_s or 0.0)
        together = num_gpus if affinity is Affinity.HIGH else min(num_gpus, gpus_per_machine)
        units = list(units_within(sizes, together)) if phases is not None else []

        def promised_per_gpu(pools: Pools) -> float:
            assert pools.prefill is not None and pools.decode is not None
            prompts = goodput(Pools(prefill=Pool(1, pools.prefill.gpus_each))) * pools.prefill.count
            decodes = goodput(Pools(decode=Pool(1, pools.decode.gpus_each))) * pools.decode.count
            return min(prompts, decodes) / pools.num_gpus

        units = sorted(units, key=lambda pools: -promised_per_gpu(pools))[:MOST_UNITS]
        split = self._find_all(units, "prefill and decode apart")
        known |= {one.pools: one for one in split}
        best_split = _best(split, rate_per_s)
        held_against = {num_gpus} | ({best_split.pools.num_gpus} if best_split is not None else set())
        both = [pools for gpus in sorted(held_against) for pools in mixed_within(sizes, gpus, MIXED_CHUNKS)]
        mixed = self._find_all(both, "workers that do both")
        best_mixed = _best(mixed, rate_per_s)
        as_published: Answer | None = None
        if affinity is Affinity.LOW and (unit := algorithm_2(units, goodput, rate_per_s or 0.0)) is not None:
            as_published = Answer(algorithm=2, unit=unit[0], copies=unit[1])
        elif affinity is Affinity.HIGH and phases is not None:
            as_published = Answer(algorithm=1, unit=Pools(prefill=phases.prefill, decode=phases.decode), copies=1)
        return Plan(
            found=tuple(sorted([*split, *mixed], key=lambda one: (-one.rate_per_gpu, one.pools.num_gpus))),
            best=_best([*split, *mixed], rate_per_s),
            best_split=best_split,
            best_mixed=best_mixed,
            as_published=as_published,
            advice=advice(best_split, best_mixed),
        )

    def _find_all(self, candidates: Sequence[Pools], what: str) -> list[Found]:
        found = []
        for number, pools in enumerate(candidates):
            self._on_progress(f"{what}: {number} of {len(candidates)}, now {pools}")
            found.append(self.find(pools))
        return found


def advice(split: Found | None, mixed: Found | None) -> str:
    """Whether to disaggregate on these GPUs."""
    if split is None and mixed is None:
        return "No placement meets the objective; allow more time, or give a worker more GPUs."
    if split is None or mixed is None:
        which = "workers that do both phases meet" if split is None else "prefill and decode apart meet"
        return f"Only {which} the objective on these GPUs."
    said = (
        f"Apart ({split.pools}) a GPU serves {split.rate_per_gpu:.2f} requests/s, in workers that do both ({mixed.pools}) "
        f"{mixed.rate_per_gpu:.2f}"
    )
    if abs(split.rate_per_gpu - mixed.rate_per_gpu) <= max(split.rate_per_gpu, mixed.rate_per_gpu) / 10:
        return f"{said}: no difference this search can see, so take what is simpler to run."
    if split.rate_per_gpu > mixed.rate_per_gpu:
        return f"{said}: disaggregation pays."
    assert split.trial is not None and mixed.trial is not None
    pauses = f"{mixed.trial.pause_s * 1e3:.0f} ms instead of {split.trial.pause_s * 1e3:.0f} ms"
    told = f" Its answers pause for {pauses}, though, which TPOT, a mean, hides." if mixed.trial.pause_s > split.trial.pause_s else ""
    return f"{said}: disaggregation does not pay here.{told}"


def _best(found: Iterable[Found], rate_per_s: float | None) -> Found | None:
    """Of equal ones that with fewer GPUs, then that which meets the goal by more."""

    def key(one: Found) -> tuple[float, float, int, float]:
        assert one.trial is not None
        gpus = one.gpus_for(rate_per_s) if rate_per_s is not None else 0.0
        return gpus, -one.rate_per_gpu, one.pools.num_gpus, -one.trial.attainment

    return min((one for one in found if one.trial is not None), key=key, default=None)


def _or_never(one: Served, latency_s: float | None) -> float:
    return inf if latency_s is None or one.terminal != "finished" else latency_s


def _not_exceeded(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(0, ceil(share * len(values) - 1e-9) - 1)]
