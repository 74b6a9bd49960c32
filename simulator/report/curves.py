"""How long requests wait, from the first in ten to the last in a hundred: a line a policy, named at its end.

Across lie percentiles, spread by how many requests are left above them, so that p99 has as much room as p90 and
p50; upwards the wait, by its logarithm.
"""

from __future__ import annotations

from math import isfinite, log10

from simulator.report.document import Policy, Report
from simulator.report.labels import shortened, spread, width_of
from simulator.report.markup import Markup, element
from simulator.report.palette import colour_class, dash
from simulator.report.quantity import Column
from simulator.report.scale import LogScale

WIDTH, HEIGHT = 760, 400
TOP, BOTTOM, LEFT = 14, 46, 60
NAME_SIZE, NAME_GAP, NAMES_MAX = 12, 16, 250  # px
LEADER = 22  # from the end of a line to its name
TICK_SIZE = 11
FIRST, LAST = 0.1, 0.99  # before and beyond them single requests decide
PERCENTILES = (FIRST, 0.5, 0.75, 0.9, 0.95, LAST)


def ttft_curves(report: Report) -> Markup | None:
    """None: the document has none that can be drawn."""
    lines = {policy: points for policy in report.policies if len(points := _points(report.curves.get(policy.label, ()))) > 1}
    if not lines:
        return None
    waits = [wait for points in lines.values() for _, wait in points]
    column = Column.of("s", waits)
    scale = LogScale.around([wait / column.size for wait in waits], widest=1e9, margin=0.03)
    names = {policy: shortened(policy.label, NAME_SIZE, NAMES_MAX) for policy in lines}
    right = WIDTH - max(width_of(name, NAME_SIZE) for name in names.values()) - LEADER - 4

    def across(share: float) -> float:
        return LEFT + (right - LEFT) * (_left_above(share) - _left_above(FIRST)) / (_left_above(LAST) - _left_above(FIRST))

    def down(wait: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - scale.place(wait / column.size))

    parts = [_grid(scale, across(FIRST), across(LAST))]
    for tick in scale.ticks(1.8 * TICK_SIZE / (HEIGHT - TOP - BOTTOM)):
        parts.append(element("text", f"{tick:,g}", x=LEFT - 8, y=down(tick * column.size) + 4, text_anchor="end", class_="tick"))
    for share in PERCENTILES:
        x = across(share)
        parts.append(element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        parts.append(element("text", f"p{100 * share:g}", x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="tick"))
    upwards = f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)"
    parts.append(element("text", f"TTFT, {column.unit} (log scale)", transform=upwards, text_anchor="middle", class_="axis"))
    below = {"x": (LEFT + right) / 2, "y": HEIGHT - 8}
    parts.append(element("text", "percentile of requests, all replicates together", **below, text_anchor="middle", class_="axis"))
    ends = spread([down(points[-1][1]) for points in lines.values()], NAME_GAP, TOP + NAME_GAP / 2, HEIGHT - BOTTOM - NAME_GAP / 2)
    for (policy, points), y in zip(lines.items(), ends, strict=True):
        placed = [(across(share), down(wait)) for share, wait in points]
        parts.append(_line(policy, placed, right, y, names[policy]))
    drawn = element("title", "TTFT by percentile")
    return element("svg", drawn, *parts, class_="curves", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _points(quantiles: tuple[float, ...]) -> list[tuple[float, float]]:
    """(share, wait) as far as it can be drawn."""
    last = len(quantiles) - 1
    shares = [(index / last, wait) for index, wait in enumerate(quantiles)] if last > 0 else []
    return [(share, wait) for share, wait in shares if FIRST - 1e-9 <= share <= LAST + 1e-9 and isfinite(wait) and wait > 0]


def _left_above(share: float) -> float:
    """0 where none is left out, 1 for p90, 2 for p99."""
    return -log10(1 - share)


def _grid(scale: LogScale, left: float, right: float) -> Markup:
    lines = []
    for tick in scale.ticks(1.8 * TICK_SIZE / (HEIGHT - TOP - BOTTOM)):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - scale.place(tick))
        lines.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
    return element("g", *lines)


def _line(policy: Policy, points: list[tuple[float, float]], right: float, name_y: float, name: str) -> Markup:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    end_x, end_y = points[-1]
    leader = f"M{end_x + 2:.1f} {end_y:.1f}L{right + 4:.1f} {end_y:.1f}L{right + LEADER - 4:.1f} {name_y:.1f}"
    return element(
        "g",
        element("title", policy.label),
        element("path", d=path, class_="curve", stroke_dasharray=dash(policy.place)),
        element("path", d=leader, class_="leader"),
        element("text", name, x=right + LEADER, y=name_y + 4, class_="name"),
        class_=colour_class(policy.place),
    )


__all__ = ["ttft_curves"]
