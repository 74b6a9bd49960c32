"""Rows and cells as all tables of the page have them, and the drawing that fills a cell."""

from __future__ import annotations

import re
from collections.abc import Sequence

from simulator.report.document import Policy
from simulator.report.markup import Markup, element, together
from simulator.report.palette import colour_class

EMPTY = element("td", "")


def cell(style: str, *children: str, **attributes: object) -> Markup:
    """One of a class: `figure` to the right, `cell` for a drawing that fills it."""
    return element("td", *children, class_=style, **attributes)


def heading(*words: str, style: str | None = None, **attributes: object) -> Markup:
    """Of a column."""
    return element("th", *words, scope="col", class_=style, **attributes)


def table(
    style: str, heads: Sequence[str], lines: Sequence[str], *, foot: Sequence[str] = (), widths: str = Markup(""), name: str | None = None
) -> Markup:
    """
    Args:
        lines: whole rows.
        foot: cells of one row below, for an axis.
        widths: a colgroup.
        name: of an anchor.
    """
    below = [element("tfoot", element("tr", *foot))] if foot else []
    body = [widths, element("thead", element("tr", *heads)), element("tbody", *lines), *below]
    return element("table", *body, class_=style, id=name)


def policy_cell(policy: Policy, *, has_spec: bool = False) -> Markup:
    """Its name, the colour it has everywhere, whether it is an oracle, and how it is asked for where that is more than its name."""
    mark = element("span", "", class_=f"swatch {colour_class(policy.place)}")
    oracle = [" ", element("span", "oracle", class_="tag")] if policy.is_oracle else []
    spec = [element("code", breakable(policy.spec), class_="spec")] if has_spec and policy.spec != policy.label else []
    name = element("div", element("code", breakable(policy.label)), *oracle, *spec)
    return element("th", element("div", mark, name, class_="name"), scope="row", class_="policy")


def plot(behind: Markup, *parts: str, title: str, style: str = "") -> Markup:
    """Fills its cell: `behind` is as high as the row, and the parts' upward 0 is the middle of it."""
    middle = element("svg", *parts, y="50%", overflow="visible")
    return element("svg", element("title", title), behind, middle, class_=f"plot {style}".strip(), role="img")


def upright(x: str, top: float, bottom: float | str, style: str) -> Markup:
    """A line across the row."""
    return element("line", x1=x, x2=x, y1=top, y2=bottom, class_=style)


def breakable(name: str) -> Markup:
    """A long name may go on in another line behind a colon, a comma or a dot."""
    return together(*re.split(r"(?<=[:,.])", name), between=element("wbr"))


__all__ = ["EMPTY", "breakable", "cell", "heading", "plot", "policy_cell", "table", "upright"]
