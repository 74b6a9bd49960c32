"""A plan in words and figures: the table that `baton plan` prints, and its document, which says the command that makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from baton.trace_options import command_of

if TYPE_CHECKING:
    from simulator.placement_search import Found, Goal, Plan
    from simulator.pools import Link
    from simulator.traces.trace import Trace
    from simulator.worker_models import WorkerModels

SCHEMA = "baton.plan.v1"
SPLIT, MIXED = "apart", "mixed"
NOT_MODELLED = (
    "no pipeline parallelism: a worker is one tensor-parallel group",
    "no prefix is found cached, and no worker fails",
    "a step that computes prompts beside decodes reads the weights once; no published profile shows it",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Names are those of the command's options; None and "": not given."""

    gpus: int
    model: str
    gpu: str
    paced: str  # a path
    gpus_per_machine: int
    affinity: str
    rate: float | None
    slo_ttft: float | None
    slo_tpot: float | None
    attainment: float
    criterion: str
    workload: str
    trace: str
    requests: int
    cv: float
    batch_tokens: int
    link_bytes_per_s: float | None
    link_latency_s: float
    draws: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """`spreads`: requests/s a GPU of the two best under each seed. `sample`: of what was sent."""

    asked: Asked
    plan: Plan
    workers: WorkerModels
    goal: Goal
    link: Link
    spreads: Mapping[str, Sequence[float]]
    sample: Trace

    def document(self) -> dict[str, object]:
        """No time is in it: the same command at the same commit makes the same."""
        from baton.bench.report import Row, make_document

        plan, published = self.plan, self.plan.as_published
        rows = [Row(name=str(one.pools), value=one.rate_per_gpu, unit="requests/s/GPU", details=self._details(one)) for one in plan.found]
        best = {"best": plan.best, SPLIT: plan.best_split, MIXED: plan.best_mixed}
        answer: dict[str, object] | None = None
        if published is not None:
            answer = {
                "algorithm": published.algorithm,
                "unit": str(published.unit),
                "copies": published.copies,
                "gpus": published.num_gpus,
            }
        sections = {
            "command": command_of("plan", asdict(self.asked)),
            "asked": asdict(self.asked),
            "step_times": self.workers.origin,
            "link": asdict(self.link),
            "lengths": lengths_of(self.sample),
            "best": {kind: str(one.pools) if one is not None else None for kind, one in best.items()},
            "as_published": answer,
            "draws": self.spreads,
            "advice": plan.advice,
            "not_modelled": NOT_MODELLED,
        }
        return make_document(SCHEMA, seed=self.asked.seed, rows=rows, sections=sections)

    def print(self) -> None:
        print(f"{self._headline()}\n")
        lines = [self._head(), *map(self._line, self.plan.found)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            print("  ".join([*left, *right]).rstrip())
        print(f"\n{self.plan.advice}")
        answer = self.plan.as_published
        if answer is not None:
            times = f"{answer.copies} x ({answer.unit})" if answer.copies > 1 else str(answer.unit)
            print(f"DistServe's algorithm {answer.algorithm} says: {times}, {answer.num_gpus} GPUs.")
        for kind, rates in self.spreads.items():
            low, high = min(rates), max(rates)
            print(f"Best {kind} under {len(rates)} seeds: {low:.2f} to {high:.2f} requests/s a GPU, median {median(rates):.2f}.")
        for note in (f"step times are {self.workers.origin}", *NOT_MODELLED):
            print(f"Note: {note}.")

    def _headline(self) -> str:
        asked, lengths, wanted = self.asked, lengths_of(self.sample), self.goal.objective
        what = f"{asked.model} on {asked.gpus} x {asked.gpu}" if not asked.paced else f"{asked.paced} on {asked.gpus} GPUs"
        parts = [f"{name} {limit * 1e3:g} ms" for name, limit in (("TTFT", wanted.ttft_s), ("TPOT", wanted.tpot_s)) if limit is not None]
        means = f"prompts of {lengths['input_mean']:,.0f} tokens, answers of {lengths['output_mean']:,.0f}, on average"
        return f"{what}: {' and '.join(parts)} for {asked.attainment:.0%} of {lengths['name']} ({means})"

    def _head(self) -> list[str]:
        share = f"p{self.asked.attainment * 100:g}"
        head = ["", "placement", "GPUs", "req/s/GPU", "req/s", "in time", f"TTFT {share} ms", f"TPOT {share} ms", f"pause {share} ms"]
        return head if self.asked.rate is None else [*head, f"GPUs for {self.asked.rate:g}/s"]

    def _line(self, one: Found) -> list[str]:
        trial = one.trial
        line = ["*" if one is self.plan.best else "", str(one.pools), str(one.pools.num_gpus)]
        if trial is None:
            return line + ["-"] * (len(self._head()) - len(line))
        line += [f"{one.rate_per_gpu:.2f}", f"{one.rate_per_s:.2f}", f"{trial.attainment:.1%}"]
        line += [f"{trial.ttft_s * 1e3:.0f}", f"{trial.tpot_s * 1e3:.1f}", f"{trial.pause_s * 1e3:.0f}"]
        return line if self.asked.rate is None else [*line, f"{one.gpus_for(self.asked.rate):.0f}"]

    def _details(self, one: Found) -> dict[str, object]:
        trial, rate = one.trial, self.asked.rate
        return {
            "gpus": one.pools.num_gpus,
            "kind": MIXED if one.pools.mixed is not None else SPLIT,
            "is_best": one is self.plan.best,
            "rate_per_s": one.rate_per_s,
            "attainment": None if trial is None else trial.attainment,
            "ttft_s": None if trial is None else round(trial.ttft_s, 6),
            "tpot_s": None if trial is None else round(trial.tpot_s, 6),
            "pause_s": None if trial is None else round(trial.pause_s, 6),
            "gpus_for_rate": None if trial is None or rate is None else one.gpus_for(rate),
        }


def lengths_of(trace: Trace) -> dict[str, object]:
    """The distribution a plan was made for."""
    from simulator.traces.trace import facts_of

    facts = facts_of(trace)
    mean = {
        "input_mean": fmean(request.num_prompt_tokens for request in trace.requests),
        "output_mean": fmean(request.output_tokens for request in trace.requests),
    }
    return {"name": facts.name, "input_tokens": facts.input_tokens, "output_tokens": facts.output_tokens, **mean}
