"""Whether the winner still wins where the router's estimates are worse: a cell for each error that was tried."""

from __future__ import annotations

from math import isfinite

from simulator.report.document import EstimateError, Policy, Report, has_one_best
from simulator.report.markup import Markup, element, together
from simulator.report.quantity import Ratios, short, short_text
from simulator.report.tables import EMPTY, breakable, cell, heading
from simulator.verdict import Standing

WORDS = {"wins": "wins", "tied": "tied", "beaten": "beaten", "absent": "not measured"}


def estimate_error(report: Report) -> Markup | None:
    """Of the first of the ranking: factors across, noise downwards. None: the document has none."""
    reference = report.reference
    if not report.estimate_error or reference is None:
        return None
    factors = sorted({each.factor for each in report.estimate_error})
    sigmas = sorted({each.sigma for each in report.estimate_error})
    cells = {(each.factor, each.sigma): each for each in report.estimate_error}
    head = [heading("lognormal noise, σ"), *(heading("×", short(factor)) for factor in factors)]
    lines = []
    for sigma in sigmas:
        name = element("th", short(sigma), scope="row")
        lines.append(element("tr", name, *(_cell(cells.get((factor, sigma)), reference, report) for factor in factors)))
    title = element("tr", EMPTY, element("th", "reported times multiplied by", colspan=len(factors), scope="colgroup"))
    return element("table", element("thead", title, element("tr", *head)), element("tbody", *lines), class_="heat")


def holds_where(report: Report) -> str | None:
    """In words: in how many of the errors that were tried nobody beats the winner."""
    reference = report.reference
    if reference is None or not report.estimate_error:
        return None
    held = [each for each in report.estimate_error if _outcome(each, reference) in ("wins", "tied")]
    lost = [each for each in report.estimate_error if _outcome(each, reference) == "beaten"]
    said = f"{reference.label} is best or tied in {len(held)} of {len(report.estimate_error)} settings"
    return said + (
        "."
        if not lost
        else "; it is beaten at " + ", ".join(f"×{short_text(each.factor)} σ {short_text(each.sigma)}" for each in lost) + "."
    )


def _cell(each: EstimateError | None, reference: Policy, report: Report) -> Markup:
    if each is None:
        return cell("absent", WORDS["absent"])
    outcome = _outcome(each, reference)
    ratio = _lead(each, reference, report)
    said: list[str] = [element("strong", WORDS[outcome])]
    if isfinite(ratio):
        said.append(element("span", Ratios(decimals=2).shown(ratio), " of the next best" if outcome == "wins" else " of the best other"))
    standing = _standing(each, reference)
    if outcome == "beaten" and standing is not None and standing.beaten_by:
        said.append(
            element("span", "by ", together(*(element("code", breakable(label)) for label in standing.beaten_by[:2]), between=", "))
        )
    return cell(f"heat-{outcome}", *said)


def _outcome(each: EstimateError, reference: Policy) -> str:
    standing = _standing(each, reference)
    if standing is None:
        return "absent"
    if not standing.best_or_tied:
        return "beaten"
    return "wins" if has_one_best(each.standings) else "tied"


def _lead(each: EstimateError, reference: Policy, report: Report) -> float:
    """Its figure over the best other's that could be switched on."""
    mine = _standing(each, reference)
    able = [s for s in each.standings if s.policy != reference.label and not report.policy(s.policy).is_oracle]
    others = [s.figure for s in able if isfinite(s.figure) and s.figure > 0]
    return float("nan") if mine is None or not others else mine.figure / min(others)


def _standing(each: EstimateError, reference: Policy) -> Standing | None:
    return next((standing for standing in each.standings if standing.policy == reference.label), None)


__all__ = ["estimate_error", "holds_where"]
