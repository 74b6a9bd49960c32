"""The page from top to bottom: the verdict and its ranking on the first screen, what is behind it below, the document itself at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from simulator.report.bars import hit_shares, regret, waterfall
from simulator.report.curves import ttft_curves
from simulator.report.document import PRIMARY, Metric, Report, read_document
from simulator.report.forest import small_forests
from simulator.report.heat import estimate_error, holds_where
from simulator.report.markup import Markup, element, together
from simulator.report.methods import all_pairs, methods, reproduce
from simulator.report.ranking import ABSENT, facts, headline, ranking
from simulator.report.style import sheet

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser refuses whatever is not in the file
GROUPS = (
    ("Time to first token", ("ttft_p50", "ttft_p90", "ttft_p99")),
    ("Time per output token", ("tpot_p50", "tpot_p90", "tpot_p99")),
    ("From arrival to the last token", ("e2e_mean", "e2e_p99")),
    ("Served in time", ("goodput", "attainment")),
)
ELSEWHERE = (PRIMARY, "hit_share")  # have drawings of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A drawing under its heading; None: the document has nothing to draw."""

    name: str  # of its anchor
    title: str
    lead: str  # how to read it
    drawing: Markup | None


def render(document: Mapping[str, object]) -> str:
    """One HTML file: no network, no script, the same bytes for the same document, and the document itself in `<script id="document">`.

    Args:
        document: `baton.compare.v1`, as `baton compare --json` prints it. A part that is missing is called "not measured". Figures
            that JSON has no word for (infinite, not a number) are null in the copy.

    Raises:
        ConfigError: another schema, or a member of another kind than the schema has.
    """
    report = read_document(document)
    title = report.verdict or "Comparison of placement policies"
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{title} · Baton"),
        element("style", Markup(sheet())),
    ]
    first = element(
        "header", element("p", "Baton · placement policies compared", class_="kind"), headline(report), facts(report), ranking(report)
    )
    body = [element("main", first, *(_drawn(section) for section in _sections(report))), _embedded(document)]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _sections(report: Report) -> Sequence[Section]:
    return [
        Section(name="figures", title="Every figure, beside the first of the ranking", lead=_forest_lead(report), drawing=_forests(report)),
        Section(
            name="curves",
            title="How long requests wait",
            lead="Lower is better. The right end of a line is the wait of the last in a hundred.",
            drawing=ttft_curves(report),
        ),
        Section(
            name="hits",
            title="Prefix hits against an infinite cache",
            lead="What was found in a cache, of all prompt tokens, and of what a cache without end would have found in the same replicate.",
            drawing=hit_shares(report),
        ),
        Section(
            name="waterfall",
            title="Where reuse is lost",
            lead="Prompt tokens that a cache without end would have found, by what became of them.",
            drawing=waterfall(report),
        ),
        Section(
            name="regret",
            title="What a decision costs",
            lead="A run is forked at a decision, each worker taken in turn: what the request, and all in the mean, waited beyond the best.",
            drawing=regret(report),
        ),
        Section(
            name="error",
            title="Where the winner still wins",
            lead=holds_where(report) or "Workers report their times wrong, and the router learns from that.",
            drawing=estimate_error(report),
        ),
        Section(name="methods", title="Setting and methods", lead="", drawing=together(methods(report), all_pairs(report) or "")),
        Section(name="reproduce", title="To reproduce", lead="", drawing=reproduce(report)),
    ]


def _drawn(section: Section) -> Markup:
    lead = [element("p", section.lead)] if section.lead and section.drawing is not None else []
    return element("section", element("h2", section.title), *lead, section.drawing or ABSENT, id=section.name)


def _forests(report: Report) -> Markup | None:
    if report.reference is None:
        return None
    others = tuple(name for name in report.metrics if name not in ELSEWHERE and all(name not in names for _, names in GROUPS))
    parts = []
    for title, names in (*GROUPS, *([("Other", others)] if others else [])):
        metrics: list[Metric] = [report.metrics[name] for name in names if name in report.metrics]
        parts.append(element("h3", title))
        parts.append(small_forests(report, metrics, report.reference) if metrics else ABSENT)
    return together(*parts)


def _forest_lead(report: Report) -> Markup:
    name = element("code", report.reference.label if report.reference is not None else "")
    return together(
        "Figure, then its ratio to that of ", name, " with the 95 % interval, on a log scale. Filled: nobody is better for certain."
    )


def _embedded(document: Mapping[str, object]) -> Markup:
    """The document, so written that nothing in it can end the element."""
    text = json.dumps(_plain(document), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", Markup(text), type="application/json", id="document")


def _plain(value: object) -> object:
    """Without what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


__all__ = ["render"]
