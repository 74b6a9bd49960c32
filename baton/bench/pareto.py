"""A small SVG of panels: points of two latencies, both better towards the corner, and a line through the settings of one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 70, 80, 20, 50
NUM_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    name: str
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Axes start at 0; `curve` names the points to join, in order."""

    points: tuple[Point, ...]
    x_title: str
    y_title: str
    curve: tuple[str, ...]


def pareto_svg(panels: Sequence[Panel]) -> str:
    """The drawing, as text: panels side by side."""
    width = len(panels) * WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" font-size="12">'
    drawn = [f'<g transform="translate({i * WIDTH} 0)">\n{_panel(panel)}\n</g>' for i, panel in enumerate(panels)]
    return "\n".join([head, f'<rect width="{width}" height="{HEIGHT}" fill="white"/>', *drawn, "</svg>"]) + "\n"


def _panel(panel: Panel) -> str:
    x_max = 1.1 * max(point.x for point in panel.points)
    y_max = 1.1 * max(point.y for point in panel.points)

    def across(x: float) -> float:
        return LEFT + x / x_max * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="black"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(panel.x_title)}</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(panel.y_title)}</text>',
    ]
    for tick in range(NUM_TICKS + 1):
        x, y = x_max * tick / NUM_TICKS, y_max * tick / NUM_TICKS
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="gray">{x:.0f}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end" fill="gray">{y:.0f}</text>')
    by_name = {point.name: point for point in panel.points}
    if panel.curve:
        joined = " ".join(f"{across(by_name[name].x):.1f},{down(by_name[name].y):.1f}" for name in panel.curve)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="gray" stroke-dasharray="4 3"/>')
    for point in panel.points:
        colour = "gray" if point.name in panel.curve else "crimson"
        parts.append(f'<circle cx="{across(point.x):.1f}" cy="{down(point.y):.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{across(point.x) + 8:.1f}" y="{down(point.y) + 4:.1f}">{escape(point.name)}</text>')
    return "\n".join(parts)


__all__ = ["Panel", "Point", "pareto_svg"]
