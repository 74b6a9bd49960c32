"""The drawing of `baton bench policies`: each policy's TTFT over ours with its interval, a panel for each statistic; 1 is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from baton.bench.policy_rows import OURS, STATISTICS, Cell, pair
from baton.bench.report import PairedRatio, Verdict
from router.policies import label

WIDTH = 460  # of a panel
NAMES, RIGHT, TOP, LINE, BOTTOM = 210, 30, 40, 18, 40
TICKS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
COLOURS = {Verdict.WINS: "#1a7f37", Verdict.TIED: "#57606a", Verdict.LOSES: "#cf222e", Verdict.UNDECIDED: "#9a6700"}


def policies_svg(cells: Sequence[Cell]) -> str:
    """Logarithmic axes, the same in both panels; a policy that nothing can be said of is left out."""
    lines = [(w, p) for w in dict.fromkeys(c.workload for c in cells) for p in dict.fromkeys(c.policy for c in cells) if label(p) != OURS]
    panels = [{line: ratio for line in lines if (ratio := _ratio(cells, *line, statistic))} for statistic in STATISTICS]
    values = [1.0, *(value for panel in panels for ratio in panel.values() for value in (ratio.low, ratio.high))]
    low, high = math.log(min(values) / 1.15), math.log(max(values) * 1.15)
    height = TOP + LINE * len(lines) + BOTTOM
    total = NAMES + WIDTH * len(panels)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" font-family="sans-serif" font-size="11">']
    parts.append(f'<rect width="{total}" height="{height}" fill="white"/>')
    for row, (workload, policy) in enumerate(lines):
        parts.append(_text(NAMES - 10, _y(row) + 4, f"{workload}, {label(policy)}", anchor="end"))
    for index, (statistic, panel) in enumerate(zip(STATISTICS, panels, strict=True)):
        left = NAMES + WIDTH * index

        def x(value: float, left: int = left) -> float:
            return left + (WIDTH - RIGHT) * (math.log(value) - low) / (high - low)

        parts.append(_text(left + (WIDTH - RIGHT) / 2, 16, f"{statistic} TTFT over that of {OURS}"))
        for tick in (t for t in TICKS if low <= math.log(t) <= high):
            stroke = "#000" if tick == 1.0 else "#ddd"
            parts.append(f'<path d="M{x(tick):.1f} {TOP - 10}V{height - BOTTOM}" stroke="{stroke}"/>')
            parts.append(_text(x(tick), height - BOTTOM + 16, f"{tick:g}"))
        for row, line in enumerate(lines):
            if (ratio := panel.get(line)) is not None:
                parts.append(_interval(ratio, x(ratio.low), x(ratio.median), x(ratio.high), _y(row)))
    return "\n".join([*parts, "</svg>", ""])


def _ratio(cells: Sequence[Cell], workload: str, policy: str, statistic: str) -> PairedRatio | None:
    return pair([c for c in cells if c.workload == workload], policy, statistic)


def _interval(ratio: PairedRatio, low: float, middle: float, high: float, y: float) -> str:
    colour = COLOURS[ratio.verdict]
    told = f"<title>{ratio.median:.3g} [{ratio.low:.3g}, {ratio.high:.3g}], {ratio.verdict.value}</title>"
    bar = f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-width="2"/>'
    return f'<g>{told}{bar}<circle cx="{middle:.1f}" cy="{y}" r="4" fill="{colour}"/></g>'


def _y(row: int) -> float:
    return TOP + LINE * row + LINE / 2


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


__all__ = ["policies_svg"]
