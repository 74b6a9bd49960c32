"""From the cells of `baton bench policies` to rows and verdicts: figures of each policy, and each against ours in the same repeats. Pure.

A pair is two policies under the same arrivals in the same repeat; a ratio is theirs / ours, so above 1 ours waits less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from baton.bench.report import PairedRatio, Row, Target, Verdict, paired_ratio, percentile
from router.policies import label
from simulator.verdict import Better

OURS = "prefix_cost"
BASELINE = "least_work"
UNSHARED = "unshared"
BASELINE_TARGET = Target(relation=">=", bound=round(1 / 1.05, 4))  # ours is at most 5 % worse where nothing is shared
NOT_WORSE = Target(relation=">=", bound=1.0)  # wins or ties, as 1; loses, as 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy under one workload in one repeat."""

    policy: str  # as it was asked for
    workload: str
    repeat: int
    num_requests: int
    ttft: Mapping[str, float]  # milliseconds, by statistic, of the requests that ended well; empty: none did
    hit_share: float  # of prompt tokens asked for, those that nobody computed
    lag_p99_s: float  # between a request's moment and its sending
    busy_share: float  # of the machine's cores, by whomever
    own_share: float  # by the cluster and its client
    decision_p50_s: float | None  # in the router
    invalid: tuple[str, ...]  # why it does not count; none where it does
    commit: str | None = None  # of the tree that was measured, where the document is of another

    @property
    def key(self) -> CellKey:
        return self.repeat, self.workload, self.policy

    @property
    def is_valid(self) -> bool:
        return not self.invalid and bool(self.ttft)

    def ttft_ms(self, statistic: str) -> float:
        return self.ttft[statistic]

    def record(self) -> dict[str, object]:
        """As a member of the document."""
        told = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items() if name != "ttft"}
        return told | {statistic: round(ms, 4) for statistic, ms in self.ttft.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Cell:
        own = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        return cls(**own | {"invalid": tuple(record["invalid"]), "ttft": {s: record[s] for s in STATISTICS if s in record}})


CellKey = tuple[int, str, str]  # repeat, workload, policy
STATISTICS = ("mean", "p99")


def ttft_of(seconds: Sequence[float]) -> dict[str, float]:
    """The statistics of a cell, from each request's time to first token."""
    return {"mean": sum(seconds) / len(seconds) * 1e3, "p99": percentile(seconds, 0.99) * 1e3} if seconds else {}


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """So far: figures of each policy under each workload, then the pairs, then the verdicts."""
    rows: list[Row] = []
    for workload in _in_order(c.workload for c in cells):
        of_workload = [c for c in cells if c.workload == workload]
        for policy in _in_order(c.policy for c in of_workload):
            rows += _figures(workload, policy, [c for c in of_workload if c.policy == policy])
        rows += _against(workload, of_workload)
    return rows


def _figures(workload: str, policy: str, cells: Sequence[Cell]) -> Iterator[Row]:
    """Medians over the repeats that count."""
    valid, name = [c for c in cells if c.is_valid], label(policy)
    counts: dict[str, object] = {"repeats": len(valid), "invalid": len(cells) - len(valid)}
    for statistic in STATISTICS:
        values = [c.ttft_ms(statistic) for c in valid]
        yield Row(
            name=f"{workload}/ttft_{statistic}/{name}",
            value=_rounded(median(values)) if values else None,
            unit="ms",
            details=counts | {"values": [_rounded(v) for v in values]} | _why(values, cells),
        )
    hits = [c.hit_share for c in valid]
    yield Row(name=f"{workload}/hit_share/{name}", value=_rounded(median(hits)) if hits else None, unit="share", details=_why(hits, cells))


def _why(values: Sequence[float], cells: Sequence[Cell]) -> dict[str, object]:
    return {} if values else {"reason": next((c.invalid[0] for c in cells if c.invalid), "no request ended well")}


def _against(workload: str, cells: Sequence[Cell]) -> Iterator[Row]:
    """Each other policy beside ours, and whether ours is best or tied."""
    others = [p for p in _in_order(c.policy for c in cells) if label(p) != OURS]
    if len(others) == len(_in_order(c.policy for c in cells)):
        return
    for statistic in STATISTICS:
        ratios = {policy: ratio for policy in others if (ratio := pair(cells, policy, statistic)) is not None}
        for policy, ratio in ratios.items():
            is_baseline = workload == UNSHARED and policy == BASELINE and statistic == "mean"
            yield Row(
                name=f"{workload}/ttft_{statistic}/{OURS}_vs_{label(policy)}",
                value=_rounded(ratio.median),
                unit="theirs / ours",
                target=BASELINE_TARGET if is_baseline else None,
                details=ratio.record(),
            )
        lost = [label(p) for p, ratio in ratios.items() if ratio.verdict is Verdict.LOSES]
        open_ = [label(p) for p in others if p not in ratios or ratios[p].verdict is Verdict.UNDECIDED]
        yield Row(
            name=f"{workload}/ttft_{statistic}/best_or_tied",
            value=0.0 if lost else 1.0,
            unit="yes / no",
            target=NOT_WORSE,
            details={"loses_to": lost, "undecided": open_},
            is_decided=bool(lost) or not open_,
        )


def pair(cells: Sequence[Cell], policy: str, statistic: str) -> PairedRatio | None:
    """`policy` beside ours in the repeats of one workload where both count; None: there is none."""
    ours = {c.repeat: c.ttft_ms(statistic) for c in cells if label(c.policy) == OURS and c.is_valid}
    theirs = {c.repeat: c.ttft_ms(statistic) for c in cells if c.policy == policy and c.is_valid}
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    return paired_ratio([ours[repeat] for repeat in both], [theirs[repeat] for repeat in both], Better.LOWER)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


__all__ = ["OURS", "STATISTICS", "Cell", "CellKey", "pair", "rows_of", "ttft_of"]
