"""What `baton compare` shows on a terminal: who waits least, by how much for certain, and what else each policy costs."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.report.document import Report
    from simulator.verdict import Standing

TABLE_COLUMNS = 140
PRIMARY = "ttft_mean"
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # title, metric, how it is written
    ("TTFT ms", PRIMARY, lambda s: f"{s * 1e3:,.0f}"),
    ("p50", "ttft_p50", lambda s: f"{s * 1e3:,.0f}"),
    ("p99", "ttft_p99", lambda s: f"{s * 1e3:,.0f}"),
    ("TPOT ms p50", "tpot_p50", lambda s: f"{s * 1e3:,.1f}"),
    ("p99", "tpot_p99", lambda s: f"{s * 1e3:,.1f}"),
    ("in time", "attainment", lambda share: f"{share:.1%}"),
    ("good req/s", "goodput", lambda rate: f"{rate:.3g}"),
    ("cached", "hit_share", lambda share: f"{share:.1%}"),
)


def print_comparison(report: Report) -> None:
    """The best first; figures are medians over replicates."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=TABLE_COLUMNS)
    table = Table(title=_title(report), title_justify="left", title_style="", box=None, pad_edge=False)
    for title in ("", *(title for title, _, _ in COLUMNS), "TTFT / best", "95 %", ""):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for policy in report.in_order:
        table.add_row(
            policy.label,
            *(_figure(report, metric, policy.label, written) for _, metric, written in COLUMNS),
            *_ratio(report, policy.label),
            _standing(report, policy.label),
            style="bold" if _is_unbeaten(report, policy.label) else None,
        )
    console.print(table)
    console.print(f"\n{report.verdict}", style="bold", markup=False)
    for note in report.setting.notes:
        console.print(f"  {note}", style="dim", markup=False)


def _title(report: Report) -> str:
    from simulator.report.document import pools_told

    setting = report.setting
    rate = "" if setting.rate_per_s is None else f", {setting.rate_per_s:.4g} requests/s"
    size = f"{setting.num_replicates} replicates of {setting.num_requests:,} requests"
    objective = [f"{name} {value:g} s" for name, value in (("TTFT", setting.ttft_s), ("TPOT", setting.tpot_s)) if value is not None]
    in_time = f"; in time: {', '.join(objective)}" if objective else ""
    workers = f"{pools_told(setting)}, {setting.fidelity}"
    return f"{setting.trace}{rate}, {size} ({setting.resampling}); {workers}{in_time}"


def _figure(report: Report, metric: str, label: str, written: Callable[[float], str]) -> str:
    values = [value for value in report.metrics[metric].values.get(label, ()) if not isnan(value)]
    return written(median(values)) if values else "-"


def _ratio(report: Report, label: str) -> tuple[str, str]:
    """Of mean TTFT over that of the best that could serve."""
    best = report.reference
    if best is None or best.label == label:
        return "1", ""
    pair = report.metrics[PRIMARY].ratio(label, best.label)
    return ("-", "") if pair is None else (f"{pair.ratio:.2f}", f"{pair.low:.2f} - {pair.high:.2f}")


def _standing(report: Report, label: str) -> str:
    if report.policy(label).is_oracle:
        return "oracle"
    standing = report.metrics[PRIMARY].standing(label)
    if standing is None:
        return ""
    if standing.beaten_by:
        return f"behind {standing.beaten_by[0]}" + (f" and {len(standing.beaten_by) - 1} more" if len(standing.beaten_by) > 1 else "")
    return "best" if len(_unbeaten(report)) == 1 else "tied"


def _unbeaten(report: Report) -> list[Standing]:
    return [standing for standing in report.ranking if standing.best_or_tied]


def _is_unbeaten(report: Report, label: str) -> bool:
    return any(standing.policy == label for standing in _unbeaten(report))


__all__ = ["print_comparison"]
