"""The report in a browser: what must be seen first is on the first screen, words keep off each other, nothing hangs over the edge.

Needs `chromium` (Debian's package). A script is put into a copy of the page; it measures every visible piece of text and leaves what it
found in the DOM.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from simulator.report import render
from tests.comparison_document import make_comparison

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; Debian's package is `chromium`")]

WIDTH, HEIGHT, NARROW = 1280, 800, 800
BROWSER_TIMEOUT_S = 120.0
LONG = [f"somebody.has.a.package:PolicyWithAVeryLongName:alpha=0.12345,beta=0.6789,window_s={10 * i},rebalance=off" for i in range(12)]
PROBE = """
<script>
const luminance = rgb => {
  const [r, g, b] = rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const colour = text => (text.match(/[\\d.]+/g) || []).map(Number);
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const seen = colour(getComputedStyle(at).backgroundColor);
    if (seen.length === 3 || seen[3] > 0) return seen.slice(0, 3);
  }
  return [255, 255, 255];
};
const words = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode());) {
  const parent = node.parentElement, svg = parent.closest("svg.curves");
  if (!node.data.trim() || parent.closest("script,title") || !parent.checkVisibility()) continue;
  const style = getComputedStyle(parent), isDrawn = parent instanceof SVGElement;
  const ink = luminance(colour(isDrawn ? style.fill : style.color).slice(0, 3)), page = luminance(behind(parent));
  const range = document.createRange();
  range.selectNodeContents(node);
  const frame = svg && svg.getBoundingClientRect();
  for (const box of range.getClientRects())
    words.push({
      text: node.data, box: [box.left, box.top + scrollY, box.right, box.bottom + scrollY], name: parent.getAttribute("class") || "",
      contrast: (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05),
      cut: !!frame && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top || box.bottom > frame.bottom),
    });
}
const ends = {};
for (const element of document.querySelectorAll("[id]")) ends[element.id] = element.getBoundingClientRect().bottom + scrollY;
const page = getComputedStyle(document.body).backgroundColor, scroll = document.documentElement.scrollWidth;
const found = {width: innerWidth, scroll, words, ends, page};
const told = document.createElement("script");
told.type = "application/json"; told.id = "found"; told.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
document.body.append(told);
</script>
"""

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "six": lambda: make_comparison(6),
    "twelve": lambda: make_comparison(12, has_oracle=True),
    "exploratory": lambda: make_comparison(3, num_replicates=5),
    "long names": lambda: make_comparison(12, labels=LONG),
    "alike": lambda: alike(12),
    "as run": lambda: as_run(),
    "nothing measured": lambda: {"schema": "baton.compare.v1"},
}


@cache
def as_run() -> dict[str, Any]:
    """By the command itself, of a small tournament."""
    words = (
        "compare --generate toolbench --rate 30 --requests 80 --replicates 2 --jobs 1 --policies prefix_cost,round_robin,oracle_e2 --json"
    )
    outcome = CliRunner().invoke(app, words.split())
    assert outcome.exit_code == 0, outcome.output
    document: dict[str, Any] = json.loads(outcome.stdout)
    return document


def alike(num_policies: int) -> dict[str, Any]:
    """All lines end in one place."""
    document = make_comparison(num_policies)
    curve = next(iter(document["curves"].values()))
    return {**document, "curves": dict.fromkeys(document["curves"], curve)}


@pytest.mark.parametrize("width", [WIDTH, NARROW])
@pytest.mark.parametrize("case", CASES)
def test_words_keep_off_each_other_and_within_the_page(case: str, width: int, tmp_path: Path) -> None:
    """By the box of every line of text.

    Seen to fail with names of curves left where they end, with ticks closer, and with long names kept whole.
    """
    found = measured(render(CASES[case]()), tmp_path, width)
    assert found["width"] == width and len(found["words"]) > 30
    assert found["scroll"] <= width, "nothing to scroll sideways to"
    for word in found["words"]:
        left, _, right, _ = word["box"]
        assert left >= 0 and right <= width, f"{word['text']!r} hangs over the edge"
        assert not word["cut"], f"{word['text']!r} hangs over its drawing"
    assert not overlaps(found["words"])


@pytest.mark.parametrize("case", CASES)
def test_first_screen_holds_verdict_units_and_sample_sizes(case: str, tmp_path: Path) -> None:
    """Within the first 800 px of a page 1280 wide. Seen to fail with the ranking above the verdict, and with the facts below it."""
    ends = measured(render(CASES[case]()), tmp_path, WIDTH)["ends"]
    for name in ("verdict", "fact-samples", "fact-trace", "fact-rate", "fact-workers", "fact-fidelity"):
        assert ends[name] <= HEIGHT, name
    if case == "exploratory":
        assert ends["exploratory"] < ends["verdict"]
    if case != "nothing measured":
        assert ends["unit"] <= HEIGHT
    if case in ("six", "twelve", "exploratory"):
        assert ends["ranking"] <= HEIGHT, "the whole of it"


@pytest.mark.parametrize("is_dark", [False, True])
def test_words_stand_out_from_the_page_in_light_and_in_dark(is_dark: bool, tmp_path: Path) -> None:
    """4.5 : 1 (WCAG 2.2, 1.4.3), names of curves in their colour 3 : 1. Seen to fail with the colours of light in the dark."""
    found = measured(
        render(make_comparison(12, has_oracle=True)), tmp_path, WIDTH, *(["--blink-settings=preferredColorScheme=0"] if is_dark else [])
    )
    assert (found["page"] == "rgb(255, 255, 255)") != is_dark
    for word in found["words"]:
        assert word["contrast"] >= (3.0 if word["name"] == "name" else 4.5), word


def test_the_browser_has_nothing_to_complain_of(tmp_path: Path) -> None:
    """The page as it is, with its own rules of what it may load. Seen to fail with a picture fetched, and with a script that runs."""
    page = tmp_path / "report.html"
    page.write_text(render(make_comparison(12, has_oracle=True)), encoding="utf-8")
    _, said = browse(page, tmp_path, WIDTH, "--enable-logging=stderr")
    assert "CONSOLE" not in said, re.findall(r".*CONSOLE.*", said)


def overlaps(words: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of boxes that share more than a pixel each way."""
    boxes = sorted(words, key=lambda word: word["box"][1])
    found = []
    for i, one in enumerate(boxes):
        left, top, right, bottom = one["box"]
        for other in boxes[i + 1 :]:
            if other["box"][1] >= bottom - 1:
                break
            if (
                min(right, other["box"][2]) - max(left, other["box"][0]) > 1
                and min(bottom, other["box"][3]) - max(top, other["box"][1]) > 1
            ):
                found.append((one["text"], other["text"]))
    return found


def measured(text: str, folder: Path, width: int, *options: str) -> dict[str, Any]:
    """What the probe found; the page's own rules, which let no script run, are taken out of the copy."""
    copy, num_rules = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert num_rules == 1
    page = folder / "probed.html"
    page.write_text(copy.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    dom, _ = browse(page, folder, width, *options)
    told = re.search(r'<script type="application/json" id="found">(.*?)</script>', dom, re.DOTALL)
    assert told is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(unescape(told[1]) if told[1].startswith("{&quot;") else told[1])
    return found


def browse(page: Path, folder: Path, width: int, *options: str) -> tuple[str, str]:
    """The DOM in the end, and what the browser said."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--virtual-time-budget=3000",
        "--no-sandbox",  # the page is ours, and the sandbox refuses to run as root, as in a container
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{HEIGHT}", *options, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_TIMEOUT_S, check=True)
    return outcome.stdout, outcome.stderr
