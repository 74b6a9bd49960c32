"""A published tournament on a page: its verdict, its command, and a line a policy. The rest is in the report that its command draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from simulator.report.document import Policy, Report, has_one_best, pools_told, read_document

FIGURES = ("ttft_mean", "ttft_p99", "e2e_mean", "attainment", "hit_share")

Table = Callable[[Sequence[Sequence[str]]], str]


def tournament(document: Mapping[str, object], table: Table) -> str:
    """What stands below the heading."""
    report = read_document(document)
    setting, ratio_of = report.setting, report.metrics["ttft_mean"].ratio
    heads = [
        "mean TTFT, ms",
        "over the best, 95 % interval",
        "",
        "p99 TTFT, ms",
        "mean end to end, s",
        "in time",
        "hit share",
        "of the ceiling",
    ]
    lines, rows = [["", *heads]], {row["name"]: row["value"] for row in document.get("rows", ())}
    for policy in report.in_order:
        pair = ratio_of(policy.label, report.reference.label) if report.reference is not None else None
        ratio = "" if pair is None else f"{pair.ratio:.2f} ({pair.low:.2f} .. {pair.high:.2f})"
        mean, p99, end, attainment, hits = (_figure(report, policy, name) for name in FIGURES)
        ceiling = rows.get(f"{policy.label}/share_of_ceiling")
        shares = [f"{attainment:.1%}", f"{hits:.1%}", "" if ceiling is None else f"{ceiling:.0%}"]
        times = [f"{mean * 1e3:,.0f}", ratio, _place(report, policy), f"{p99 * 1e3:,.0f}", "" if isnan(end) else f"{end:.3g}"]
        lines.append([policy.label, *times, *shares])
    size = f"{setting.num_replicates} replicates of {setting.num_requests:,} requests ({setting.resampling})"
    workers = f"{pools_told(setting)}, {setting.fidelity}"
    about = f"{size}, {setting.rate_per_s:.4g} a second; {workers}; medians over replicates. `{report.command}`"
    parts = [report.verdict, about, table(lines)]
    if wrong := document.get("estimate_error"):
        parts += [
            "Mean TTFT, ms, where workers report times wrong, by a factor and by noise (sigma); bold where best or tied.",
            table(_under(wrong)),
        ]
    return "\n\n".join(parts)


def _under(wrong: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line a policy, a column an error of the reports."""
    cells = {standing["policy"]: [] for standing in wrong[0]["standings"]}
    for error in wrong:
        for standing in error["standings"]:
            told = f"{standing['figure'] * 1e3:,.0f}"
            cells[standing["policy"]].append(f"**{told}**" if standing["best_or_tied"] else told)
    return [["", *(f"x{error['factor']:g}, {error['sigma']:g}" for error in wrong)], *([label, *of] for label, of in cells.items())]


def _figure(report: Report, policy: Policy, metric: str) -> float:
    standing = report.metrics[metric].standing(policy.label) if metric in report.metrics else None
    return float("nan") if standing is None else standing.figure


def _place(report: Report, policy: Policy) -> str:
    standing = next((standing for standing in report.ranking if standing.policy == policy.label), None)
    if policy.is_oracle or standing is None:
        return "oracle" if policy.is_oracle else "not ranked"
    if standing.best_or_tied:
        return "best" if has_one_best(report.ranking) else "tied for best"
    return f"beaten by {len(standing.beaten_by)}"
