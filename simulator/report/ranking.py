"""What a reader sees first: who waits least, how sure that is, and of how much it was seen."""

from __future__ import annotations

from math import isfinite

from simulator.report.document import PRIMARY, Bound, Metric, Policy, Report, has_one_best
from simulator.report.forest import RANKING_WIDTH, Axis, bound_plot, interval, ratio_cells
from simulator.report.markup import Markup, element, together
from simulator.report.quantity import Column, Ratios, count, exact
from simulator.report.tables import EMPTY, cell, heading, policy_cell, table
from simulator.verdict import MIN_REPLICATES, Standing

ABSENT = element("p", "not measured", class_="absent")
WORDS = {"token-accurate": "token-accurate", "policy-only": "policy-only (fast)"}


def headline(report: Report) -> Markup:
    """The sentence, and how far it can be trusted."""
    parts: list[str] = []
    if report.is_exploratory:
        seen = report.setting.num_replicates
        of = f"{MIN_REPLICATES} replicates make a verdict" + ("" if seen is None else f", this has {seen}")
        parts.append(element("p", element("strong", "exploratory"), element("span", of), class_="exploratory", id="exploratory"))
    parts.append(element("h1", report.verdict or "No verdict: the document has none", id="verdict"))
    return together(*parts)


def facts(report: Report) -> Markup:
    """A line of what was run."""
    setting = report.setting
    sizes = (setting.num_replicates, setting.num_requests)
    samples = None if None in sizes else together(count(sizes[0] or 0), " replicates × ", count(sizes[1] or 0), " requests")
    named = ((setting.num_prefill, "prefill"), (setting.num_decode, "decode"), (setting.num_mixed, "that do both"))
    each = [together(count(number), " ", role) for number, role in named if number]
    pools = together(*[part for pool in each for part in (" + ", pool)][1:]) if each else None
    rate = None if setting.rate_per_s is None else together(exact(setting.rate_per_s, f"{setting.rate_per_s:,.4g}"), " requests/s")
    told = {
        "samples": samples,
        "trace": None if setting.trace is None else element("code", setting.trace),
        "rate": rate,
        "workers": pools,
        "fidelity": None if setting.fidelity is None else WORDS.get(setting.fidelity, setting.fidelity),
        "objective": _objective(report),
    }
    pairs = [element("div", element("dt", name), element("dd", value or "not recorded"), id=f"fact-{name}") for name, value in told.items()]
    return element("dl", *pairs, class_="facts")


def ranking(report: Report) -> Markup:
    """Mean TTFT of each policy, its ratio to the first, and whether anybody is better for certain."""
    reference, metric = report.reference, report.metrics.get(PRIMARY)
    if reference is None:
        return element("p", "ranking: not measured", class_="absent")
    pairs = {s.policy: None if metric is None else metric.ratio(s.policy, reference.label) for s in report.ranking}
    told = [pair for pair in pairs.values() if pair is not None]
    ratios = Ratios.of([value for pair in told for value in (pair.ratio, pair.low, pair.high)])
    bounds = [bound for bound in report.bounds.values() if bound.unit == "s"]
    limits = {bound.name: bound.middle / _figure_of(report, reference) for bound in bounds}
    axis = Axis.over(told, width=RANKING_WIDTH, also=limits.values())
    unit = metric.unit if metric is not None else "s"
    column = Column.of(unit, [*(s.figure for s in report.ranking), *(bound.middle for bound in bounds)])
    lines = []
    for place, standing in enumerate(report.ranking, 1):
        policy, pair = report.policy(standing.policy), pairs[standing.policy]
        seen = _paired(metric, policy, reference)
        has_plot = pair is not None or policy == reference
        drawn = interval(axis, pair, policy, is_filled=standing.best_or_tied, replicates=seen) if has_plot else ""
        ratio = ratio_cells(pair, ratios) if has_plot else [cell("absent", "not compared", colspan=2)]
        figure = cell("figure", column.shown(standing.figure))
        number = cell("place", "" if policy.is_oracle else str(place))
        cells = [number, policy_cell(policy, has_spec=True), figure, *ratio, cell("cell", drawn), _mark(standing, report)]
        lines.append(element("tr", *cells, class_="best" if standing.best_or_tied else None))
    lines += [_bound_line(bound, column, ratios, axis, limits[bound.name]) for bound in bounds]
    heads = [
        heading(style="place"),
        heading("policy"),
        heading("mean TTFT, ", element("span", column.unit, id="unit"), style="figure"),
        heading("ratio", style="figure"),
        heading("95 % interval", style="figure"),
        heading("mean TTFT over that of ", element("code", reference.label), " (log scale; 1 is equal, left waits less)"),
        heading("standing"),
    ]
    key = "● nobody is better for certain · ○ somebody is · short strokes: one replicate each · a line: 95 % interval"
    if any(policy.is_oracle for policy in report.policies):
        key += " · ◆ an oracle sees what no router can see, and is no candidate"
    drawn = table("ranking", heads, lines, foot=[*[EMPTY] * 5, cell("cell", axis.drawn()), EMPTY], name="ranking")
    return together(drawn, element("p", key, class_="key"))


def _mark(standing: Standing, report: Report) -> Markup:
    """best, tied or beaten."""
    if report.policy(standing.policy).is_oracle:
        return cell("standing", "no candidate")
    if standing.best_or_tied:
        return cell("standing best", "best" if has_one_best(report.ranking) else "tied for best")
    by = standing.beaten_by
    return cell("standing beaten", f"beaten by {len(by)}" if by else "beaten", title=", ".join(by) or None)


def _bound_line(bound: Bound, column: Column, ratios: Ratios, axis: Axis, ratio: float) -> Markup:
    """No policy: how little anybody could wait."""
    name = element("th", bound.title, scope="row", class_="policy", title=bound.what)
    figures = [cell("figure", column.shown(bound.middle)), cell("figure", ratios.shown(ratio)), EMPTY]
    return element("tr", EMPTY, name, *figures, cell("cell", bound_plot(axis, ratio)), cell("standing", "no policy"), class_="bound")


def _figure_of(report: Report, policy: Policy) -> float:
    """NaN where it can not divide."""
    return next((s.figure for s in report.ranking if s.policy == policy.label and s.figure), float("nan"))


def _paired(metric: Metric | None, policy: Policy, reference: Policy) -> list[float]:
    """The ratio of each replicate."""
    if metric is None or policy == reference:
        return []
    mine, theirs = metric.values.get(policy.label, ()), metric.values.get(reference.label, ())
    return [a / b for a, b in zip(mine, theirs, strict=False) if isfinite(a) and isfinite(b) and a > 0 and b > 0]


def _objective(report: Report) -> Markup | None:
    named = (("TTFT", report.setting.ttft_s), ("TPOT", report.setting.tpot_s))
    asked = [together(f"{name} ≤ ", Column.of("s", [limit]).shown(limit, with_unit=True)) for name, limit in named if limit is not None]
    return together(*asked, between=", ") if asked else None


__all__ = ["ABSENT", "facts", "headline", "ranking"]
