"""The report says what its document says, all of it and nothing else, whatever the document lacks or holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from html.parser import HTMLParser
from math import inf, isfinite, nan
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from protocol.errors import ConfigError
from simulator.report import render
from simulator.report.markup import VOID
from tests.comparison_document import ORACLE, make_comparison

pytestmark = pytest.mark.pure

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"


@dataclass(slots=True)
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, style: str = "") -> list[Node]:
        return [node for node in self.walk() if node.tag == tag and (not style or style in (node.attributes.get("class") or "").split())]

    def by_id(self, name: str) -> Node:
        (found,) = [node for node in self.walk() if node.attributes.get("id") == name]
        return found

    @property
    def text(self) -> str:
        """What is read: without titles of drawings."""
        return "".join(child if isinstance(child, str) else "" if child.tag == "title" else child.text for child in self.children)


class Page(HTMLParser):
    """A tree; an element that is not ended where it should be is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], "every element is ended"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(document: dict[str, Any]) -> Node:
    return Page(render(document)).root


def test_every_figure_shown_is_one_of_the_document() -> None:
    """Each carries its exact value, which is in the document or follows from it as its heading says, and is written as rounded from it.

    Seen to fail with the ratio of two medians in place of that of the document, and with values rounded.
    """
    document = make_comparison(6, has_oracle=True)
    page = read(document)
    known = {*numbers_of(document), *followed_from(document)}
    shown = page.all("data")
    assert len(shown) > 250
    for node in shown:
        value = float(node.attributes["value"] or "nan")
        assert any(abs(value - other) <= 1e-12 * abs(other) for other in known), (value, node.text)
        assert is_rounding(node.text, value), (node.text, value)
    for cell in page.all("td", "figure"):
        rest = cell.text
        for data in cell.all("data"):
            rest = rest.replace(data.text, "", 1)
        assert not re.search(r"\d", rest), f"{cell.text!r} holds a figure without its value"


def numbers_of(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        yield from (number for each in value.values() for number in numbers_of(each))
    elif isinstance(value, list):
        yield from (number for each in value for number in numbers_of(each))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def followed_from(document: dict[str, Any]) -> Iterator[float]:
    """Ratios the other way round, of bounds, of the ceiling, of the best other."""
    reference, bounds = document["ranking"][0], document["bounds"]
    yield 1.0
    for metric in document["metrics"]:
        for pair in metric["comparisons"]:
            if pair["first"] == reference["policy"]:
                yield from (1 / pair[name] for name in ("ratio", "low", "high"))
    for bound in bounds.values():
        yield median(bound["values"])
    yield median(bounds["ttft_bound"]["values"]) / reference["figure"]
    (hits,) = [metric["values"] for metric in document["metrics"] if metric["name"] == "hit_share"]
    for values in (*hits.values(), bounds["pooled_cache"]["values"]):
        yield median(a / b for a, b in zip(values, bounds["infinite_cache"]["values"], strict=True))
    for each in document["estimate_error"]:
        figures = {standing["policy"]: standing["figure"] for standing in each["standings"] if standing["policy"] != ORACLE}
        yield figures.pop(reference["policy"]) / min(figures.values())


def is_rounding(text: str, value: float) -> bool:
    """In one of the units that figures are shown in."""
    number = re.match(r"×?(-?[\d,]*\.?\d+(?:e-?\d+)?)", text)
    assert number is not None, text
    said = float(number[1].replace(",", ""))
    decimals = len(number[1].partition(".")[2]) if "e" not in number[1] else 12
    slack = max(0.5000001 * 10**-decimals, 0.06 * abs(said) if "e" in number[1] else 0.0)
    return any(abs(said - value / size) <= slack for size in (1.0, 1e-3, 1e-6, 0.01))


def test_a_line_of_the_ranking_has_its_own_figure_and_interval() -> None:
    """Seen to fail with the pair looked up the wrong way round."""
    document = make_comparison(6)
    lines = read(document).by_id("ranking").all("tbody")[0].all("tr")
    reference = document["ranking"][0]["policy"]
    pairs = document["metrics"][0]["comparisons"]
    for standing, line in zip(document["ranking"], lines, strict=False):
        assert line.all("code")[0].text == standing["policy"]
        figure, ratio, low, high = [*(float(data.attributes["value"] or "") for data in line.all("data")), 1.0, 1.0][:4]
        assert figure == standing["figure"]
        for pair in pairs:
            if {pair["first"], pair["second"]} == {standing["policy"], reference}:
                told = (pair["ratio"], pair["low"], pair["high"])
                expected = told if pair["second"] == reference else tuple(1 / value for value in (told[0], told[2], told[1]))
                assert (ratio, low, high) == expected and low <= ratio <= high


def test_the_mark_of_a_line_is_what_the_document_says() -> None:
    """Seen to fail with the first line always called best, and with an oracle taken for a candidate."""
    document = make_comparison(6, has_oracle=True)
    rows = read(document).by_id("ranking").all("tbody")[0].all("tr")
    marks = {row.all("code")[0].text: row.all("td", "standing")[0].text for row in rows if row.all("code")}
    assert marks.pop(ORACLE) == "no candidate"
    for standing in document["ranking"][:-1]:
        expected = f"beaten by {len(standing['beaten_by'])}" if standing["beaten_by"] else "best"
        assert marks.pop(standing["policy"]).removeprefix("tied for ") == expected
    assert not marks
    document = make_comparison(3)
    second = document["ranking"][1]["policy"]
    for place, standing in enumerate(document["ranking"]):
        standing |= {"best_or_tied": place == 1, "beaten_by": [] if place == 1 else [second]}
    assert [td.text for td in read(document).by_id("ranking").all("td", "standing")][:3] == ["beaten by 1", "best", "beaten by 1"]


def test_first_screen_says_what_was_run() -> None:
    """Seen to fail with requests and replicates exchanged."""
    page = read(make_comparison(3, num_replicates=5))
    header = page.all("header")[0]
    assert page.by_id("verdict").text == make_comparison(3, num_replicates=5)["verdict"]
    assert page.by_id("fact-samples").text == "samples5 replicates × 2,000 requests"
    assert page.by_id("fact-workers").text == "workers8 prefill + 8 decode" and "10 requests/s" in page.by_id("fact-rate").text
    assert "mooncake_conversation" in page.by_id("fact-trace").text and "token-accurate" in page.by_id("fact-fidelity").text
    assert "TTFT ≤ 2.00 s, TPOT ≤ 50.0 ms" in page.by_id("fact-objective").text
    assert "exploratory" in header.text and "this has 5" in header.text
    assert not [node for node in read(make_comparison(3)).walk() if node.attributes.get("id") == "exploratory"], (
        "20 replicates make a verdict"
    )


def test_nothing_in_a_document_becomes_markup() -> None:
    """Every text made hostile. Seen to fail with the escape of `<` in the embedded document left out, and with a label joined unescaped."""
    plain = make_comparison(3, has_oracle=True)
    hostile = poisoned(plain)
    page, expected = read(hostile), read(plain)
    assert sorted(node.tag for node in page.walk() if node.tag not in ("wbr", "code")) == sorted(
        node.tag for node in expected.walk() if node.tag not in ("wbr", "code")
    )
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [name for node in page.walk() for name in node.attributes if name.startswith("on")]
    embedded = page.by_id("document").text
    assert json.loads(embedded) == hostile, "a file is its own data"
    assert "<" not in embedded, "neither an end nor a comment"
    assert HOSTILE in page.by_id("verdict").text


def poisoned(value: Any, name: str = "") -> Any:
    """All texts but those that the drawing has to know."""
    if isinstance(value, dict):
        known = name in ("", "setting", "workers", "objective", "bounds", "rows") or "schema" in value
        return {(key if known or key in KEYS else key + HOSTILE): poisoned(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, name) for each in value]
    return value + HOSTILE if isinstance(value, str) and name not in ("schema", "name", "unit", "better", "fidelity") else value


KEYS = {
    "what", "values", "unit", "label", "policy", "is_oracle", "name", "better", "standings", "comparisons", "figure", "best_or_tied",
    "beaten_by", "first", "second", "ratio", "low", "high", "p_value", "p_adjusted", "ttft_s", "available", "staleness", "load_trade",
    "eviction", "found", "num_forks", "mean_s", "p90_s", "mean_of_all_s", "best_share", "factor", "sigma",
}  # fmt: skip


def test_a_file_needs_nothing_beside_it() -> None:
    """No address, no script that runs, no style from elsewhere; the browser is told to refuse them. Seen to fail with a font linked."""
    text = render(make_comparison(12, has_oracle=True))
    page = Page(text).root
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", text)
    assert [script.attributes["type"] for script in page.all("script")] == ["application/json"]
    assert any("default-src 'none'" in (meta.attributes.get("content") or "") for meta in page.all("meta"))
    assert len(text) < 600_000, "12 policies and an oracle by 20 replicates"


def test_the_same_document_is_the_same_bytes() -> None:
    """Whatever the order of its members and the process. Seen to fail with policies drawn in the order of a set."""
    document = make_comparison(4)
    text = render(document)
    assert render(turned(deepcopy(document))) == text == render(json.loads(json.dumps(document)))
    code = "import sys, json; from simulator.report import render; sys.stdout.write(render(json.load(sys.stdin)))"
    outcome = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=json.dumps(document), capture_output=True, text=True, check=True, timeout=60,
        env=dict(os.environ, PYTHONHASHSEED="7", PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8"),
    )  # fmt: skip
    assert outcome.stdout == text


def turned(value: Any) -> Any:
    """Members of objects in the opposite order; the order of lists says something."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("part", "section"),
    [("metrics", "figures"), ("metrics", "hits"), ("ranking", "figures"), ("curves", "curves"), ("bounds", "hits"),
     ("waterfall", "waterfall"), ("regret", "regret"), ("estimate_error", "error")],
)  # fmt: skip
@pytest.mark.parametrize("empty", [True, False])
def test_a_part_that_is_missing_is_not_measured(part: str, section: str, empty: bool) -> None:
    """And no other section changes its mind. Seen to fail with bars of zero in its place."""
    document = make_comparison(4)
    whole = read(document)
    assert "not measured" not in whole.text
    document[part] = type(document[part])()
    if not empty:
        del document[part]
    if part == "ranking":
        document["metrics"] = document["metrics"][1:]  # which is ranked by
    page = read(document)
    assert "not measured" in page.by_id(section).text
    if part not in ("metrics", "ranking", "bounds"):
        assert [name for name in SECTIONS if "not measured" in page.by_id(name).text] == [section]


SECTIONS = ("figures", "curves", "hits", "waterfall", "regret", "error", "methods", "reproduce")


def test_a_document_of_nothing_but_its_schema_is_a_page() -> None:
    page = read({"schema": "baton.compare.v1"})
    assert [name for name in SECTIONS if "not measured" in page.by_id(name).text] == list(SECTIONS[:6])
    assert page.by_id("fact-samples").text == "samplesnot recorded" and "No verdict" in page.by_id("verdict").text
    assert page.by_id("reproduce").text.count("not recorded") == 4, "command, commit, seed, trace"


@pytest.mark.parametrize("num_policies", range(1, 13))
def test_any_number_of_policies_and_one_replicate(num_policies: int) -> None:
    """Seen to fail with gaps between labels shrunk for one label too, and with an axis of a single value that has no width."""
    for num_replicates in (1, 20):
        document = make_comparison(num_policies, num_replicates=num_replicates)
        page = read(document)
        assert {code.text for code in page.by_id("ranking").all("code")} == {policy["label"] for policy in document["policies"]}
        assert len(page.by_id("curves").all("text", "name")) == num_policies
        for value in (value or "" for node in page.by_id("curves").walk() for value in node.attributes.values()):
            assert not re.search(r"\bnan\b|\binf\b", value)


@pytest.mark.parametrize("bad", [None, inf, nan, 0.0, -1.0])
def test_figures_nothing_can_be_said_of_are_not_drawn(bad: float | None) -> None:
    """In place of some figures, and of all. Seen to fail with an infinite end of an interval, and with a ceiling of 0."""
    document = make_comparison(3, has_oracle=True)
    for text in (render(replaced(document, bad, of=lambda place: place % 7 == 3)), render(replaced(document, bad, of=lambda place: True))):
        page = Page(text).root
        for node in page.walk():
            if node.tag != "data":
                assert not re.search(r"\b(nan|inf)\b", " ".join(value or "" for value in node.attributes.values())), (
                    node.tag,
                    node.attributes,
                )
        assert not re.search(r"\b(nan|inf)\b", page.all("main")[0].text)
        assert not [title.children for title in page.all("title") if re.search(r"\b(nan|inf)\b", str(title.children))]
        embedded = page.by_id("document").text
        json.loads(embedded, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def replaced(document: dict[str, Any], bad: float | None, of: Any) -> dict[str, Any]:
    """Fractions only: counts and names stay."""
    place = 0

    def walk(value: Any) -> Any:
        nonlocal place
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, list):
            return [walk(each) for each in value]
        if isinstance(value, float) and isfinite(value):
            place += 1
            return bad if of(place) else value
        return value

    return {key: walk(value) if key not in ("setting", "machine") else value for key, value in document.items()}


def test_long_names_are_whole_in_tables_and_short_in_drawings() -> None:
    """Seen to fail with names cut at a fixed number of characters: two of them were then the same."""
    labels = [f"somebody.has.a.package:PolicyWithAVeryLongName:alpha=0.12345,beta=0.6789,window_s={window}" for window in (30, 60, 90)]
    page = read(make_comparison(3, labels=labels))
    assert {code.text for code in page.by_id("ranking").all("td") for code in code.all("code")} <= set(labels)
    assert {th.all("code")[0].text for th in page.by_id("ranking").all("th", "policy") if th.all("code")} == set(labels)
    drawn = [text.text for text in page.by_id("curves").all("text", "name")]
    assert len(set(drawn)) == 3 and all("…" in text for text in drawn)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "baton.sim.v1"}, "baton.sim.v1"),
        ({"policies": {}}, "policies"),
        ({"policies": [{"label": 3}]}, "label"),
        ({"setting": {"replicates": "many"}}, "many"),
        ({"setting": {"replicates": 2.5}}, "2.5"),
        ({"curves": {"a": {"ttft_s": "x"}}}, "ttft_s"),
        ({"metrics": [{"name": "ttft_mean", "values": {"a": [True]}}]}, "True"),
    ],
)
def test_a_member_of_another_kind_is_named(change: dict[str, Any], named: str) -> None:
    """Seen to fail with booleans taken for numbers."""
    with pytest.raises(ConfigError, match=re.escape(named)):
        render({**make_comparison(2), **change})
