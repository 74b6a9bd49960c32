"""From turns to rows: how fast each path moved what, and ours beside what bounds it and beside others, round by round. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from baton.bench.report import Row, Target, Verdict, median_interval, paired_ratio, percentile
from baton.bench.transfer_run import OTHERS_MAX, Cell, Chunk, Measured, Total, TransferPlan, Turn
from simulator.verdict import Better

SCHEMA = "baton.bench.transfer.v1"

SMALL_CHUNK_BYTES = 4 << 10
LARGE_CHUNK_BYTES = 16 << 10
LARGE_TOTAL_BYTES = 4 << 20
LATENCY_TOTAL_BYTES = 256 << 10
STORE_TOTAL_BYTES = 64 << 20
DIGESTS = ("sampled", "full")

BESIDE = (  # ours, and what it is set beside
    ("shm", "copy"),
    ("shm", "nixl"),
    ("shm", "ray"),
    ("tcp", "socket"),
    ("tcp", "nixl_tcp"),
    ("tcp", "gloo"),
    ("ucx", "ucxx"),
)


def target_of(ours: str, theirs: str, chunk: Chunk, total: Total) -> Target | None:
    """What the ratio theirs / ours is to be (both in seconds); None: nothing is demanded of it."""
    bound: float | None = None
    if ours == "shm" and theirs in ("copy", "nixl") and total.size_bytes >= LARGE_TOTAL_BYTES:
        if chunk.size_bytes >= LARGE_CHUNK_BYTES:
            bound = 0.8 if theirs == "copy" else 1.5
        elif chunk.size_bytes == SMALL_CHUNK_BYTES:
            bound = 0.6 if theirs == "copy" else 3.0
    elif (ours, theirs) == ("shm", "ray"):
        bound = {STORE_TOTAL_BYTES: 2.5, LATENCY_TOTAL_BYTES: 20.0}.get(total.size_bytes)
    elif ours == "tcp" and chunk.size_bytes == LARGE_CHUNK_BYTES and total.size_bytes >= LARGE_TOTAL_BYTES:
        bound = {"socket": 0.55, "nixl_tcp": 3.0, "gloo": 1.8}.get(theirs)
    return None if bound is None else Target(relation=">=", bound=bound)


def rows_of(plan: TransferPlan, measured: Measured) -> list[Row]:
    """Speeds, then ratios, of every chunk size and total that was measured."""
    rows: list[Row] = []
    for chunk in plan.chunks:
        for total in plan.totals_of(chunk):
            rows += _speeds(plan, measured, chunk, total)
            rows += _ratios(plan, measured, chunk, total)
    return rows


def _speeds(plan: TransferPlan, measured: Measured, chunk: Chunk, total: Total) -> Iterator[Row]:
    cell = (chunk.label, total.label)
    is_small = total.size_bytes <= LATENCY_TOTAL_BYTES
    for path in _paths(plan):
        name, unit = f"{total.label}/{chunk.label}/{path}", "us" if is_small else "GB/s"
        turns = measured.turns.get((cell, path))
        if not turns:
            yield Row(name=name, value=None, unit=unit, details={"reason": measured.lost.get((cell, path), "not measured")})
            continue
        seconds = [turns[index].median_s for index in _quiet(measured, cell, turns)]
        size_bytes = measured.moved_bytes[cell]
        value = statistics.median(seconds) * 1e6 if is_small else size_bytes / statistics.median(seconds) / 1e9
        each_us = [s * 1e6 for index in _quiet(measured, cell, turns) for s in turns[index].seconds]
        details: dict[str, object] = {
            "p50_us": _round(statistics.median(each_us)),  # of all transfers, as the next one
            "p99_us": _round(percentile(each_us, 0.99)),
            "rounds_us": [_round(turn.median_s * 1e6) for turn in turns.values()],
            "size_bytes": size_bytes,
            "others": [round(cores, 3) for cores in measured.others[cell].values()],
        }
        yield Row(name=name, value=_round(value), unit=unit, details=details)


def _ratios(plan: TransferPlan, measured: Measured, chunk: Chunk, total: Total) -> Iterator[Row]:
    """Above 1: ours is the faster one. Rows of a peer that is not there are left out."""
    cell = (chunk.label, total.label)
    present = _paths(plan)
    for ours, theirs in BESIDE:
        if ours not in present or theirs not in present:
            continue
        row = Row(
            name=f"{total.label}/{chunk.label}/{ours}_vs_{theirs}", value=None, unit="ratio", target=target_of(ours, theirs, chunk, total)
        )
        lost = next((path for path in (ours, theirs) if not measured.turns.get((cell, path))), None)
        if lost is not None:
            yield replace(row, details={"reason": f"{lost}: {measured.lost.get((cell, lost), 'not measured')}"})
            continue
        a, b = measured.turns[cell, ours], measured.turns[cell, theirs]
        both = {index: turn for index, turn in a.items() if index in b}
        chosen = _quiet(measured, cell, both)
        paired = paired_ratio([a[i].median_s for i in chosen], [b[i].median_s for i in chosen], Better.LOWER)
        is_disturbed = measured.others[cell][chosen[0]] >= OTHERS_MAX
        if is_disturbed:
            paired = replace(paired, verdict=Verdict.UNDECIDED)
        details = {
            **paired.record(),
            "disturbed_pairs": sum(measured.others[cell][i] >= OTHERS_MAX for i in both),
            "digest_ms_per_gb": digest_cost(measured, cell, ours),
        }
        yield replace(row, value=_round(paired.median), is_decided=paired.verdict is not Verdict.UNDECIDED, details=details)


def digest_cost(measured: Measured, cell: Cell, ours: str) -> dict[str, dict[str, float]]:
    """What each digest mode adds to a transfer, milliseconds a GB: `pull` at the target beyond digests off, `offer` at the source.

    `pull_interval` is that of the median over the rounds.
    """
    costs: dict[str, dict[str, float]] = {}
    plain = measured.turns.get((cell, ours), {})
    gigabytes = measured.moved_bytes[cell] / 1e9
    for mode in DIGESTS:
        digested = measured.turns.get((cell, f"{ours}_{mode}"), {})
        rounds = [index for index in _quiet(measured, cell, plain) if index in digested]
        if not rounds:
            continue
        added = [(digested[index].median_s - plain[index].median_s) * 1e3 / gigabytes for index in rounds]
        low, high, _ = median_interval(added)
        cost = {"pull": _round(statistics.median(added)), "pull_low": _round(low), "pull_high": _round(high)}
        offers = [digested[index].offer_s for index in rounds]
        if all(seconds is not None for seconds in offers):
            cost["offer"] = _round(statistics.median(seconds for seconds in offers if seconds is not None) * 1e3 / gigabytes)
        costs[mode] = cost
    return costs


def _paths(plan: TransferPlan) -> list[str]:
    return [path for subject in plan.subjects for path in subject.paths]


def _quiet(measured: Measured, cell: Cell, turns: dict[int, Turn]) -> list[int]:
    """The undisturbed rounds; all where there is none."""
    return [index for index in turns if measured.others[cell][index] < OTHERS_MAX] or list(turns)


def _round(value: float) -> float:
    """Five digits say more than any of these figures holds."""
    return float(f"{value:.5g}")
