"""What every benchmark prints: `{schema, machine, commit, seed, rows}`, and the one definition of a paired ratio and its verdict.

Nothing here measures.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from math import comb, floor
from pathlib import Path
from typing import Literal

from simulator.verdict import Better

TREE = Path(__file__).resolve().parents[2]
CONFIDENCE = 0.95
PACKAGES = ("torch", "ray", "numpy")  # whose versions belong to a figure of ours
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")  # of /proc/cpuinfo, where they decide a kernel's path
GIT_TIMEOUT_S = 10.0


# --- the document -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a value must be: ">= 1.15"."""

    relation: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.relation == ">=" else value <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `value` None: it could not be measured, and `details["reason"]` says why."""

    name: str  # "125m/batch32/baton": slashes from the general to the particular
    value: float | None
    unit: str
    target: Target | None = None  # None: nothing is demanded of it
    details: Mapping[str, object] = field(default_factory=dict)  # further members of the row's object; JSON values
    is_decided: bool = True  # False: the value is shown, but was not measured so that it could be held against its target

    @property
    def ok(self) -> bool | None:
        """None: nothing is demanded, or nothing decided. A figure that was demanded and not measured at all is not well."""
        if self.target is None or not self.is_decided:
            return None
        return self.value is not None and self.target.is_met_by(self.value)

    def record(self) -> dict[str, object]:
        target = None if self.target is None else str(self.target)
        return {"name": self.name, "value": self.value, "unit": self.unit, "target": target, "ok": self.ok, **self.details}


def make_document(schema: str, *, seed: int, rows: Sequence[Row], sections: Mapping[str, object] | None = None) -> dict[str, object]:
    """The one JSON document of a benchmark, with the machine and the commit it ran on; `sections` are its further members."""
    head = {"schema": schema, "machine": machine_record(), "commit": commit_of_tree(), "seed": seed}
    return {**head, "rows": [row.record() for row in rows], **(sections or {})}


def machine_record() -> dict[str, object]:
    """What a figure's reader must know of this machine."""
    cpu = _fields_of("/proc/cpuinfo")
    flags = set(cpu.get("flags", "").split())
    memory_kib = int(_fields_of("/proc/meminfo").get("MemTotal", "0").split()[0])
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "num_cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version_of(name) for name in PACKAGES},
    }


def commit_of_tree() -> str | None:
    """Commit of the source tree this package lies in, "-dirty" behind it where tracked files differ; None outside of one."""
    if not (TREE / ".git").exists():
        return None
    command = ["git", "-C", str(TREE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None


def _fields_of(path: str) -> dict[str, str]:
    """ "name : value" lines of a file in /proc; of repeated names the first."""
    found: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- statistics -------------------------------------------------------------------------------------------------------


class Verdict(Enum):
    """Of ours against a peer's. TIED: the 95 % interval of the paired ratio contains 1."""

    WINS = "wins"
    TIED = "tied"
    LOSES = "loses"
    UNDECIDED = "undecided"  # fewer pairs than a 95 % interval needs (6)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRatio:
    """Ours against a peer's, pair by pair. Above 1 ours is the better one, whichever way the unit counts."""

    ratios: tuple[float, ...]
    median: float
    low: float
    high: float
    confidence: float  # that [low, high] holds the median of all pairs there could be: CONFIDENCE or more, less with fewer than 6 pairs
    verdict: Verdict

    def record(self) -> dict[str, object]:
        """As members of a row."""
        return {
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            "interval": [round(self.low, 4), round(self.high, 4)],
            "confidence": round(self.confidence, 4),
            "verdict": self.verdict.value,
        }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], better: Better) -> PairedRatio:
    """The ratio of each pair (measured in one round, one after the other), its median, and what follows.

    Args:
        better: of the values; where lower is better the ratio is theirs / ours, so that above 1 always means that ours is ahead.
    """
    assert len(ours) == len(theirs) and ours, "values come in pairs"
    assert all(value > 0 for value in (*ours, *theirs)), "a ratio needs values above 0"
    ratios = tuple(a / b if better is Better.HIGHER else b / a for a, b in zip(ours, theirs, strict=True))
    low, high, confidence = median_interval(ratios)
    return PairedRatio(
        ratios=ratios,
        median=statistics.median(ratios),
        low=low,
        high=high,
        confidence=confidence,
        verdict=_verdict(low, high, confidence),
    )


def _verdict(low: float, high: float, confidence: float) -> Verdict:
    if confidence < CONFIDENCE:
        return Verdict.UNDECIDED
    if low > 1:
        return Verdict.WINS
    return Verdict.LOSES if high < 1 else Verdict.TIED


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, confidence) of the median: the tightest pair of order statistics, equally far from both ends, with CONFIDENCE or more.

    Exact for any distribution, and nothing is drawn: with n values the chance that the median lies below the k-th smallest is that of
    fewer than k heads in n throws. 9 values: 2nd smallest to 2nd largest, 96 %. With fewer than 6, smallest to largest hold it with less.
    """
    ordered, n = sorted(values), len(values)
    assert n, "no values"
    outside, depth = 1, 0  # of 2 ** n: both tails beyond the interval, and how many values it leaves out at each end
    while depth + 1 < n / 2 and 2 * (outside + comb(n, depth + 1)) <= (1 - CONFIDENCE) * 2**n:
        depth += 1
        outside += comb(n, depth)
    return ordered[depth], ordered[n - 1 - depth], 1 - 2 * outside / 2**n


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, between neighbours in proportion."""
    assert values and 0 <= share <= 1
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


__all__ = [
    "PairedRatio",
    "Row",
    "Target",
    "Verdict",
    "commit_of_tree",
    "machine_record",
    "make_document",
    "median_interval",
    "paired_ratio",
    "percentile",
]
