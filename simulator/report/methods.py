"""What the figures are, in words: how they were drawn, compared and counted, on what, and by which command they come again."""

from __future__ import annotations

from collections.abc import Iterator

from simulator.report.document import PRIMARY, Report
from simulator.report.markup import Markup, element, together
from simulator.report.quantity import Column, Ratios, short
from simulator.report.tables import cell, heading, table
from simulator.verdict import CONFIDENCE, Comparison

FIDELITY = {
    "token-accurate": "every step of every worker runs on the serving code, on a virtual clock",
    "policy-only": "the router's own code places every request; workers are arithmetic, not step by step",
    "live": "a running cluster; requests are sent when the trace says, whatever came of those before",
}
UNKNOWN = "not recorded"
NOT_TOLD = f"{UNKNOWN.capitalize()}."
MIN_FOR_INTERVAL = 6  # with fewer replicates no signed-rank interval holds 95 %


def methods(report: Report) -> Markup:
    """Terms and what they mean here."""
    pairs = [together(element("dt", name), element("dd", said)) for name, said in _terms(report)]
    notes = [element("li", note) for note in report.setting.notes]
    return together(element("dl", *pairs, class_="terms"), *([element("ul", *notes, class_="notes")] if notes else []))


def all_pairs(report: Report) -> Markup | None:
    """Every comparison of mean TTFT, folded away. None: there is none."""
    metric = report.metrics.get(PRIMARY)
    if metric is None or not metric.comparisons:
        return None
    names = ("first", "second", "first / second", "95 % interval", "p", "p, Holm")
    heads = [heading(name, style=None if index < 2 else "figure") for index, name in enumerate(names)]
    lines = [_pair(pair) for pair in metric.comparisons]
    folded = table("pairs", heads, lines)
    return element("details", element("summary", f"All {len(lines)} pairs, mean TTFT"), folded)


def reproduce(report: Report) -> Markup:
    """The command, the commit, the trace and the machine."""
    command = element("pre", element("code", report.command)) if report.command else element("p", f"command: {UNKNOWN}", class_="absent")
    is_dirty = report.commit is not None and report.commit.endswith("-dirty")
    commit: str = UNKNOWN if report.commit is None else element("code", report.commit)
    remark = " (tracked files differed from it: the commit alone does not give these figures)" if is_dirty else ""
    trace = report.setting.trace_sha256
    told: list[tuple[str, str]] = [
        ("commit", together(commit, remark)),
        ("seed", UNKNOWN if report.seed is None else element("code", str(report.seed))),
        ("trace, SHA-256", UNKNOWN if trace is None else element("code", trace)),
        *((name.replace("_", " "), said) for name, said in report.machine.items()),
    ]
    rows = [element("tr", element("th", name, scope="row"), element("td", said or "none")) for name, said in told]
    return together(command, element("table", element("tbody", *rows), class_="origin"))


def _terms(report: Report) -> Iterator[tuple[str, str]]:
    setting, metric = report.setting, report.metrics.get(PRIMARY)
    oracles = {policy.label for policy in report.policies if policy.is_oracle}
    num_pairs = 0 if metric is None else sum(not {pair.first, pair.second} & oracles for pair in metric.comparisons)
    corrected = f"the {num_pairs} pairs" if num_pairs else "all pairs"
    is_range = setting.num_replicates is not None and setting.num_replicates < MIN_FOR_INTERVAL
    caution = f" With fewer than {MIN_FOR_INTERVAL} replicates it is their whole range and holds less." if is_range else ""
    fidelity = setting.fidelity
    yield "Replicate", setting.resampling or NOT_TOLD
    yield (
        "Figure",
        "Of each replicate by itself, then the median over them. Requests of one run wait for each other: none is a sample by itself.",
    )
    yield "Ratio", "All policies meet the same replicates; each gives a ratio, and shown is the Hodges-Lehmann estimate of their middle."
    yield "Interval", f"{100 * CONFIDENCE:.0f} %, from Wilcoxon's signed ranks, exact, of each pair alone.{caution}"
    level = f"{100 * (1 - CONFIDENCE):.0f} %"
    beaten = f"Beaten: another policy is better, and different at {level} after Holm's correction over {corrected} of a metric."
    yield "Best, tied, beaten", f"{beaten} An interval, of one pair alone, may leave out 1 where the pair still counts as tied."
    yield "Warm-up", _warm_up(setting.warm_up_s)
    yield (
        "Refused",
        "A request that was refused, failed or never ended is a miss in goodput and attainment; the notes below say what it is in TTFT.",
    )
    yield "Fidelity", NOT_TOLD if fidelity is None else ": ".join([fidelity, *([FIDELITY[fidelity]] if fidelity in FIDELITY else [])]) + "."
    for bound in report.bounds.values():
        yield bound.title.capitalize() if bound.title.islower() else bound.title, bound.what


def _warm_up(seconds: float | None) -> str:
    if seconds is None:
        return NOT_TOLD
    if not seconds:
        return "Nothing is left out."
    return together("The first ", Column.of("s", [seconds]).shown(seconds, with_unit=True), " of each replicate are left out.")


def _pair(pair: Comparison) -> Markup:
    ratios = Ratios(decimals=3)
    interval = together(ratios.shown(pair.low), " – ", ratios.shown(pair.high))
    figures = (ratios.shown(pair.ratio), interval, short(pair.p_value), short(pair.p_adjusted))
    names = [element("td", element("code", name)) for name in (pair.first, pair.second)]
    return element("tr", *names, *(cell("figure", figure) for figure in figures))


__all__ = ["all_pairs", "methods", "reproduce"]
