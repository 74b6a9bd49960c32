"""Ratios to one policy with their intervals, a line a policy: the ranking, and small ones for every other figure.

    ────●────     filled: nobody else is better for certain      ◆  an oracle
    ────○────     hollow: somebody is                            ◂  the interval goes on

Places across are percent, so a plot is as wide as its column and as high as its row, while points and words keep their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from simulator.report.document import Metric, Policy, Report
from simulator.report.labels import DIGIT_EM, width_of
from simulator.report.markup import Markup, element, together
from simulator.report.palette import colour_class
from simulator.report.quantity import Column, Ratios
from simulator.report.scale import LogScale
from simulator.report.tables import EMPTY, cell, heading, plot, policy_cell, table, upright
from simulator.verdict import Better, Comparison

INSET = 3.0  # percent of the width kept free at both ends
RADIUS = 4.5
TICK_SIZE, TICK_SPACE = 11, 10  # px
RANKING_WIDTH, CELL_WIDTH = 220, 110  # px, of the narrowest plots there are: a page 800 wide
WIDEST = 50.0  # beyond this ratio a plot ends, and an arrow says that the interval goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Ratios, with 1 marked."""

    scale: LogScale
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, comparisons: Iterable[Comparison], *, width: float, also: Iterable[float] = ()) -> Axis:
        """
        Args:
            width: of the narrowest plot, in px; the ticks fit into it.
            also: further ratios that the axis has to hold.
        """
        ends = [value for pair in comparisons for value in (pair.low, pair.ratio, pair.high)]
        scale = LogScale.around([1.0, *ends, *also], widest=WIDEST)
        label = max((width_of(f"{tick:g}", TICK_SIZE, DIGIT_EM) for tick in scale.ticks(0.1)), default=0.0)
        return cls(scale=scale, ticks=tuple(scale.ticks((label + TICK_SPACE) / (width * (1 - 2 * INSET / 100)))))

    def at(self, value: float) -> str:
        return f"{INSET + (100 - 2 * INSET) * min(1.0, max(0.0, self.scale.place(value))):.2f}%"

    def drawn(self) -> Markup:
        """The row of tick labels."""
        words = [element("text", f"{tick:g}", x=self.at(tick), y=13, text_anchor="middle") for tick in self.ticks]
        return element("svg", *words, class_="plot ticks", width="100%", height=18, role="presentation")

    def grid(self) -> Markup:
        lines = [upright(self.at(tick), 0, "100%", "grid") for tick in self.ticks if tick != 1.0]
        return together(*lines, upright(self.at(1.0), 0, "100%", "one"))


def interval(axis: Axis, pair: Comparison | None, policy: Policy, *, is_filled: bool, replicates: Sequence[float] = ()) -> Markup:
    """One line's plot. Without a pair it is the policy that the others are divided by, at 1."""
    parts: list[str] = [upright(axis.at(ratio), -6, 6, "replicate") for ratio in replicates if axis.scale.holds(ratio)]
    middle = 1.0 if pair is None else pair.ratio
    if pair is not None and _is_drawn(pair):
        parts.append(element("line", x1=axis.at(pair.low), x2=axis.at(pair.high), y1=0, y2=0, class_="interval"))
        parts += [_arrow(axis, value) for value in (pair.low, pair.high) if not axis.scale.holds(value)]
    if isfinite(middle) and axis.scale.holds(middle):
        parts.append(_mark(axis.at(middle), policy, is_filled=is_filled))
    return plot(axis.grid(), *parts, title=policy.label, style=colour_class(policy.place))


def bound_plot(axis: Axis, ratio: float) -> Markup:
    """What no policy can be better than."""
    line = [upright(axis.at(ratio), -9, 9, "bound")] if isfinite(ratio) and ratio > 0 else []
    return plot(axis.grid(), *line, title="bound")


def small_forests(report: Report, metrics: Sequence[Metric], reference: Policy) -> Markup:
    """A column a metric: the figure of each policy, and its ratio to the reference. All columns have one axis."""
    pairs = [metric.ratio(policy.label, reference.label) for metric in metrics for policy in report.policies]
    axis = Axis.over([pair for pair in pairs if pair is not None], width=CELL_WIDTH)
    columns = {metric.name: Column.of(metric.unit, [standing.figure for standing in metric.standings]) for metric in metrics}
    lines = []
    for policy in report.in_order:
        cells = [_figure_and_plot(metric, policy, columns[metric.name], axis, report, reference) for metric in metrics]
        lines.append(element("tr", policy_cell(policy), *cells))
    heads = [heading("policy"), *(_metric_heading(metric, columns[metric.name]) for metric in metrics)]
    widths = element("colgroup", element("col", class_="policy"), *[element("col", class_="figure"), element("col")] * len(metrics))
    return table("forests", heads, lines, widths=widths, foot=[EMPTY, *[EMPTY, cell("cell", axis.drawn())] * len(metrics)])


def _metric_heading(metric: Metric, column: Column) -> Markup:
    better = "lower is better" if metric.better is Better.LOWER else "higher is better"
    return heading(title_of(metric.name), " ", element("small", f"{column.unit} · {better}"), colspan=2)


def _figure_and_plot(metric: Metric, policy: Policy, column: Column, axis: Axis, report: Report, reference: Policy) -> Markup:
    """Two cells."""
    standing, pair = metric.standing(policy.label), metric.ratio(policy.label, reference.label)
    if standing is None:
        return cell("absent", "not measured", colspan=2)
    is_leading, has_plot = standing.best_or_tied, pair is not None or policy is reference
    drawn = interval(axis, pair, policy, is_filled=is_leading) if has_plot else element("span", "not compared", class_="absent")
    return together(cell("figure best" if is_leading else "figure", column.shown(standing.figure)), cell("cell", drawn))


def ratio_cells(pair: Comparison | None, ratios: Ratios) -> list[Markup]:
    """The ratio, and its interval."""
    if pair is None:
        return [cell("figure", ratios.shown(1.0)), cell("figure range", "the reference")]
    ends = together(ratios.shown(pair.low), " – ", ratios.shown(pair.high))
    return [cell("figure", ratios.shown(pair.ratio)), cell("figure range", ends)]


def title_of(metric: str) -> str:
    """`ttft_p99`: p99 TTFT."""
    what, _, statistic = metric.partition("_")
    is_latency = what in ("ttft", "tpot", "e2e") and statistic
    return f"{statistic} {what.upper()}" if is_latency else metric.replace("_", " ")


def _is_drawn(pair: Comparison) -> bool:
    return all(value == value and value > 0 for value in (pair.low, pair.high))


def _mark(x: str, policy: Policy, *, is_filled: bool) -> Markup:
    if policy.is_oracle:
        return element("svg", element("path", d="M-5.5 0L0 -5.5L5.5 0L0 5.5Z", class_="mark"), x=x, overflow="visible")
    return element("circle", cx=x, r=RADIUS, class_="mark" if is_filled else "mark hollow")


def _arrow(axis: Axis, value: float) -> Markup:
    """At the end that the value lies beyond."""
    is_low = value < axis.scale.low
    path = element("path", d="M0 -4L-6 0L0 4Z" if is_low else "M0 -4L6 0L0 4Z", class_="arrow")
    return element("svg", path, x=axis.at(value), overflow="visible")


__all__ = ["Axis", "bound_plot", "interval", "ratio_cells", "small_forests", "title_of"]
