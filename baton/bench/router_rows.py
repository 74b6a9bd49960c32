"""From turns to the rows of `baton bench router`: medians of rounds, what is asked of them, and others' beside them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from baton.bench.peers import OURS
from baton.bench.report import Row, Target, percentile
from baton.bench.router_run import STAGES, Measured, RouterPlan, Turn

SCHEMA = "baton.bench.router.v1"

# (row, stage, figure, percentile, what ours must be at most, in microseconds)
TIMES: tuple[tuple[str, str, str, int, float | None], ...] = (
    ("hash/4k", "index", "hash/4k", 50, 40.0),
    ("match/4k/confirmed", "index", "match/4k/walk", 50, 30.0),
    ("match/4k/prefix_closed", "index", "match/4k/search", 50, 12.0),
    ("decide/4k/p50", "decide", "decide/4k", 50, 100.0),
    ("decide/4k/p99", "decide", "decide/4k", 99, 500.0),
    ("decide/32k/p50", "decide", "decide/32k", 50, 250.0),
    ("decide/4k/window_100k", "decide", "decide/4k/100k", 50, None),
    ("socket/4k/p50", "socket", "socket/4k", 50, 300.0),
    ("socket/4k/p99", "socket", "socket/4k", 99, None),
    ("wide/match/4k", "wide", "match/4k", 50, None),
    ("wide/decide/4k/p50", "wide", "decide/4k", 50, None),
)
REFUSED = "it has no such figure"  # of a peer: no row
GROWTH_MAX = 1.3
DECISIONS_PER_S_MIN = 8000.0
LIVES = next(stage.figures["life/4k"] for stage in STAGES if "life/4k" in stage.figures)


def rows_of(plan: RouterPlan, measured: Measured) -> list[Row]:
    """Every figure of the stages that were asked for, ours and then others'."""
    asked = {stage.name for stage in plan.stages}
    rows: list[Row] = []
    for row, stage, figure, share, bound in TIMES:
        if stage in asked:
            rows += _times(plan, measured, row, (stage, figure), share, bound)
    if "decide" in asked:
        rows += [_growth(measured), _rate(measured, "decide/4k"), _rate(measured, "life/4k")]
    if "index" in asked:
        rows += _memory(measured)
    return rows


def _times(plan: RouterPlan, measured: Measured, row: str, at: tuple[str, str], share: int, bound: float | None) -> Iterator[Row]:
    for contender in plan.subjects:
        name, cell = f"{row}/{contender.name}", (*at, contender.name)
        target = Target(relation="<=", bound=bound) if bound is not None and contender.name == OURS else None
        turns = measured.turns.get(cell)
        if not turns:
            if contender.name == OURS or measured.lost.get(cell, REFUSED) != REFUSED:
                yield Row(name=name, value=None, unit="us", target=target, details={"reason": measured.lost.get(cell, "not measured")})
            continue
        rounds = [_us(turn.seconds, share) for turn in turns]
        details: dict[str, object] = {"rounds_us": rounds, "repeats": len(turns[0].seconds)}
        if turns[0].cpu_s:
            details["cpu_us"] = round(median(_us(turn.cpu_s, share) for turn in turns), 2)
        details["others"] = [round(cores, 3) for cores in measured.others.get(at[0], ())]
        yield Row(name=name, value=round(median(rounds), 2), unit="us", target=target, details=details)


def _growth(measured: Measured) -> Row:
    """Of a decision from 1,000 to 100,000 live requests: paired by round, the index the same."""
    few, many = (_turns(measured, figure) for figure in ("decide/4k", "decide/4k/100k"))
    target = Target(relation="<=", bound=GROWTH_MAX)
    if not few or not many:
        return Row(name="growth/1k_to_100k", value=None, unit="ratio", target=target, details={"reason": "not measured"})
    ratios = [_us(b.seconds, 50) / _us(a.seconds, 50) for a, b in zip(few, many, strict=True)]
    details = {
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(median(_us(b.cpu_s, 50) / _us(a.cpu_s, 50) for a, b in zip(few, many, strict=True)), 3),
    }
    return Row(name="growth/1k_to_100k", value=round(median(ratios), 3), unit="ratio", target=target, details=details)


def _rate(measured: Measured, figure: str) -> Row:
    """Of decisions alone, from their mean; and of whole lives, whose repeats are one act."""
    turns, is_life = _turns(measured, figure), figure.startswith("life")
    name = "rate/lives" if is_life else "rate/decisions"
    target = None if is_life else Target(relation=">=", bound=DECISIONS_PER_S_MIN)
    if not turns:
        return Row(name=name, value=None, unit="1/s", target=target, details={"reason": "not measured"})
    count = LIVES if is_life else 1
    rates = [count * len(turn.seconds) / sum(turn.seconds) for turn in turns]
    cpu = [count * len(turn.cpu_s) / sum(turn.cpu_s) for turn in turns]
    details = {"rounds": [round(rate) for rate in rates], "by_cpu_time": round(median(cpu))}
    return Row(name=name, value=round(median(rates)), unit="1/s", target=target, details=details)


def _memory(measured: Measured) -> Iterator[Row]:
    told = measured.subjects.get("index", {}).get(OURS)
    if told is None or "index_bytes" not in told:
        return
    details = {name: told[name] for name in ("num_blocks", "num_pairs", "index_bytes", "told_bytes")}
    yield Row(name="memory/pair", value=round(told["index_bytes"] / told["num_pairs"], 1), unit="B", details=details)


def _turns(measured: Measured, figure: str) -> list[Turn]:
    return measured.turns.get(("decide", figure, OURS), [])


def _us(seconds: Sequence[float], share: int) -> float:
    return round(percentile(seconds, share / 100) * 1e6, 2)
