"""Parts of a whole, a line a policy: what was found in caches of what could be, where the rest was lost, and what decisions cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from simulator.report.document import Bound, Report, Waterfall, middle_of
from simulator.report.labels import DIGIT_EM, width_of
from simulator.report.markup import Markup, element, together
from simulator.report.palette import colour_class
from simulator.report.quantity import Column, count
from simulator.report.scale import linear_ticks
from simulator.report.tables import EMPTY, cell, heading, plot, policy_cell, table, upright

BAR = 14  # px
CEILING = "infinite_cache"
INSET = 3.0  # percent of the width kept free at both ends
PARTS = {
    "found": "found in a cache",
    "eviction": "lost to eviction",
    "load_trade": "given up for load",
    "staleness": "lost to staleness",
}
NARROWEST = 320  # px of a bar's column in a page 800 wide
TICK_SIZE = 11
SHARES = Column.of("share", [])


def hit_shares(report: Report) -> Markup | None:
    """Bars up to the ceiling. None: the document has no hit shares."""
    metric = report.metrics.get("hit_share")
    if metric is None or not metric.standings:
        return None
    ceiling = report.bounds.get(CEILING)
    limit = ceiling.middle if ceiling is not None else float("nan")
    others = [bound for bound in report.bounds.values() if bound.unit == "share" and bound is not ceiling]
    figures = {standing.policy: standing.figure for standing in metric.standings}
    full = _largest((*figures.values(), *(bound.middle for bound in others), limit))
    lines = []
    for policy in report.in_order:
        figure, values = figures.get(policy.label, float("nan")), metric.values.get(policy.label, ())
        drawn = _hit_bar(figure / full, limit / full, title=policy.label, style=colour_class(policy.place))
        lines.append(element("tr", policy_cell(policy), *_hit_cells(figure, drawn, _of_ceiling(values, ceiling))))
    for bound in others:
        drawn = _hit_bar(bound.middle / full, limit / full, title=bound.title, style="")
        name = element("th", bound.title, scope="row", class_="policy", title=bound.what)
        lines.append(element("tr", name, *_hit_cells(bound.middle, drawn, _of_ceiling(bound.values, ceiling)), class_="bound"))
    said = "not measured" if not isfinite(limit) else together("median ", SHARES.shown(limit, with_unit=True))
    heads = [
        heading("policy"),
        heading("found, %", style="figure"),
        heading("share of prompt tokens; upright: the ceiling, ", said),
        heading("% of ceiling", style="figure"),
    ]
    return table("bars", heads, lines, foot=[EMPTY, EMPTY, cell("cell", _ticks(full)), EMPTY])


def waterfall(report: Report) -> Markup | None:
    """What was there to be found, stacked by what became of it. None: the document has none."""
    told = [(policy, report.waterfall[policy.label]) for policy in report.in_order if policy.label in report.waterfall]
    if not told:
        return None
    full = _largest([value for _, each in told for value in (_stacked(each), each.available)])
    lines = []
    for policy, each in told:
        at, bars = 0.0, []
        for name, share in _parts(each):
            wide = max(0.0, share) / full if isfinite(share) else 0.0
            bars.append(_bar(at, wide, f"part {name}"))
            at += wide
        drawn = plot(Markup(""), *bars, title=policy.label)
        figures = [cell("figure", SHARES.shown(share)) for _, share in [("available", each.available), *_parts(each)]]
        lines.append(element("tr", policy_cell(policy), cell("cell", drawn), *figures))
    heads = [heading("policy"), heading("share of prompt tokens"), heading("there to be found, %", style="figure")]
    heads += [heading(element("i", "", class_=f"swatch part {name}"), f"{words}, %", style="figure") for name, words in PARTS.items()]
    return table("bars", heads, lines, foot=[EMPTY, cell("cell", _ticks(full)), *[EMPTY] * (len(heads) - 2)])


def regret(report: Report) -> Markup | None:
    """What decisions cost, seen by taking each worker in turn. None: the document has none."""
    told = [(policy, report.regret[policy.label]) for policy in report.in_order if policy.label in report.regret]
    if not told:
        return None
    waits = [value for _, each in told for value in (each.mean_s, each.p90_s)]
    column, of_all = Column.of("s", waits), Column.of("s", [each.mean_of_all_s for _, each in told])
    full = _largest(waits)
    lines = []
    for policy, each in told:
        parts = [_bar(0.0, each.mean_s / full, "bar")] if isfinite(each.mean_s) else []
        if isfinite(each.p90_s) and isfinite(each.mean_s):
            parts.append(element("line", x1=_at(each.mean_s / full), x2=_at(each.p90_s / full), y1=0, y2=0, class_="tail"))
            parts.append(upright(_at(each.p90_s / full), -BAR / 4, BAR / 4, "tail"))
        drawn = plot(Markup(""), *parts, title=policy.label, style=colour_class(policy.place))
        cells = [
            cell("cell", drawn),
            cell("figure", column.shown(each.mean_s)),
            cell("figure", column.shown(each.p90_s)),
            cell("figure", of_all.shown(each.mean_of_all_s)),
            cell("figure", SHARES.shown(each.best_share)),
            cell("figure", count(each.num_forks)),
        ]
        lines.append(element("tr", policy_cell(policy), *cells))
    figures = (f"mean, {column.unit}", f"p90, {column.unit}", f"mean of all requests, {of_all.unit}", "best worker chosen, %", "decisions")
    heads = [heading("policy"), heading("TTFT over that of the best worker; bar: mean, line: up to p90")]
    return table("bars", [*heads, *(heading(words, style="figure") for words in figures)], lines)


def _hit_bar(share: float, limit: float, *, title: str, style: str) -> Markup:
    ceiling = [upright(_at(limit), 0, "100%", "ceiling")] if isfinite(limit) else []
    return plot(together(*ceiling), _bar(0.0, share, "bar"), title=title, style=style)


def _hit_cells(figure: float, drawn: Markup, of_ceiling: float) -> list[Markup]:
    told = SHARES.shown(of_ceiling) if isfinite(of_ceiling) else element("span", "not measured", class_="absent")
    return [cell("figure", SHARES.shown(figure)), cell("cell", drawn), cell("figure", told)]


def _parts(each: Waterfall) -> list[tuple[str, float]]:
    return [("found", each.found), ("eviction", each.eviction), ("load_trade", each.load_trade), ("staleness", each.staleness)]


def _stacked(each: Waterfall) -> float:
    return sum(share for _, share in _parts(each) if isfinite(share) and share > 0)


def _largest(values: Iterable[float]) -> float:
    """What a bar of the whole width is."""
    return max((value for value in values if isfinite(value) and value > 0), default=1.0)


def _of_ceiling(values: Sequence[float], ceiling: Bound | None) -> float:
    """Replicate by replicate, then the median."""
    if ceiling is None or len(values) != len(ceiling.values):
        return float("nan")
    return middle_of([a / b for a, b in zip(values, ceiling.values, strict=True) if b])


def _ticks(full: float) -> Markup:
    """Percent, as far as they fit."""
    most = int(NARROWEST / (width_of("100", TICK_SIZE, DIGIT_EM) + 14))
    words = [element("text", f"{100 * tick:g}", x=_at(tick / full), y=13, text_anchor="middle") for tick in linear_ticks(full, most)]
    return element("svg", *words, class_="plot ticks", width="100%", height=18, role="presentation")


def _bar(at: float, wide: float, style: str) -> Markup:
    if not (isfinite(wide) and wide > 0):
        return Markup("")
    left, right = INSET + (100 - 2 * INSET) * at, INSET + (100 - 2 * INSET) * (at + wide)
    return element("rect", x=f"{left:.2f}%", width=f"{right - left:.2f}%", y=-BAR / 2, height=BAR, class_=style)


def _at(share: float) -> str:
    return f"{INSET + (100 - 2 * INSET) * share:.2f}%"


__all__ = ["hit_shares", "regret", "waterfall"]
