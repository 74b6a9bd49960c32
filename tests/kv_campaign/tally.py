"""Counts of a corruption campaign, and the rows that are made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt

from baton.bench.report import Row, Target
from protocol.kv import DigestMode
from tests.kv_campaign.cases import Kind
from tests.kv_campaign.layouts import LAYOUTS
from tests.kv_campaign.pools import MODES, Verdict

Z_95 = 1.959964


@dataclass(slots=True)
class Tally:
    """Of one part, bulk or live. Adding tallies of slices gives that of the whole."""

    injected: Counter[tuple[str, Kind, int]] = field(default_factory=Counter)  # (backend, kind, layout)
    escaped: Counter[tuple[str, Kind, int, DigestMode]] = field(default_factory=Counter)
    errors: Counter[tuple[str, Kind, str]] = field(default_factory=Counter)  # what the transfer itself said, before any digest
    by_layer: Counter[tuple[int, int]] = field(default_factory=Counter)  # (layout, layer)
    reaching: Counter[Kind] = field(default_factory=Counter)  # damage that a decode step reads
    wrong: Counter[Kind] = field(default_factory=Counter)  # and whose token is another with all checks off

    def add(self, verdict: Verdict) -> None:
        case = verdict.case
        cell = (case.backend, case.kind, case.layout_index)
        self.injected[cell] += 1
        for mode, caught in zip(MODES, verdict.caught, strict=True):
            self.escaped[*cell, mode] += not caught
        if verdict.error is not None:
            self.errors[case.backend, case.kind, verdict.error.value] += 1
        self.by_layer[case.layout_index, case.layer] += 1
        self.reaching[case.kind] += verdict.reaches_tokens
        self.wrong[case.kind] += verdict.reaches_tokens and verdict.wrong_token

    def merge(self, other: Tally) -> None:
        for name in ("injected", "escaped", "errors", "by_layer", "reaching", "wrong"):
            getattr(self, name).update(getattr(other, name))

    def num_injected(self, kinds: Iterable[Kind] = tuple(Kind), backend: str | None = None) -> int:
        wanted = set(kinds)
        return sum(n for (b, k, _), n in self.injected.items() if k in wanted and backend in (None, b))

    def num_escaped(self, mode: DigestMode, kinds: Iterable[Kind] = tuple(Kind), backend: str | None = None) -> int:
        wanted = set(kinds)
        return sum(n for (b, k, _, m), n in self.escaped.items() if m is mode and k in wanted and backend in (None, b))

    def cells(self) -> list[dict[str, object]]:
        """One object a backend, kind and layout."""
        return [
            {
                "backend": backend,
                "kind": kind.value,
                "layout": LAYOUTS[layout].name,
                "injected": n,
                "escaped": {mode.value: self.escaped[backend, kind, layout, mode] for mode in MODES},
            }
            for (backend, kind, layout), n in sorted(self.injected.items(), key=lambda item: (item[0][0], item[0][1].value, item[0][2]))
        ]


STALENESS = tuple(kind for kind in Kind if kind.is_staleness)
CONTENT = tuple(kind for kind in Kind if not kind.is_staleness)


def corruption_rows(name: str, tally: Tally) -> list[Row]:
    """What was asked for: with `full` nothing escapes, no staleness escapes in any mode; how much `sampled` lets through, by kind."""
    total = tally.num_injected()
    rows = [Row(name=f"{name}/injections", value=total, unit="injections")]
    rows.append(_none(f"{name}/full/escaped", tally.num_escaped(DigestMode.FULL), total))
    for mode in (DigestMode.SAMPLED, DigestMode.OFF):
        rows.append(_none(f"{name}/{mode.value}/staleness_escaped", tally.num_escaped(mode, STALENESS), tally.num_injected(STALENESS)))
    for mode in (DigestMode.SAMPLED, DigestMode.OFF):
        for kind in CONTENT:
            rows.append(
                _share(f"{name}/{mode.value}/escape_rate/{kind.value}", tally.num_escaped(mode, [kind]), tally.num_injected([kind]))
            )
    reaching, wrong = sum(tally.reaching.values()), sum(tally.wrong.values())
    rows.append(_share(f"{name}/unchecked/wrong_tokens", wrong, reaching, target=Target(relation=">=", bound=0.9)))
    for kind in Kind:
        rows.append(_share(f"{name}/unchecked/wrong_tokens/{kind.value}", tally.wrong[kind], tally.reaching[kind]))
    return rows


def _none(name: str, count: int, total: int) -> Row:
    _, high = interval(count, total)
    details = {"injections": total, "rate_below": _rounded(high)}
    return Row(name=name, value=count, unit="injections", target=Target(relation="<=", bound=0), details=details)


def _share(name: str, count: int, total: int, *, target: Target | None = None) -> Row:
    details = {"count": count, "of": total, "interval": [_rounded(end) for end in interval(count, total)]}
    return Row(name=name, value=_rounded(count / total) if total else None, unit="share", target=target, details=details)


def interval(count: int, total: int) -> tuple[float, float]:
    """Of the share behind `count` of `total`, with 95 % confidence (Wilson's)."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, Z_95**2 / total
    middle, half = (share + square / 2) / (1 + square), Z_95 * sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return (0.0 if not count else max(0.0, middle - half)), (1.0 if count == total else min(1.0, middle + half))


def _rounded(share: float) -> float:
    return float(f"{share:.6g}")
