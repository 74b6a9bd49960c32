"""What the report is drawn with: axes, labels that keep apart, units of columns, colours, escaped markup."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import inf, nan

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from simulator.report.labels import shortened, spread, width_of
from simulator.report.markup import Markup, element, together
from simulator.report.palette import DARK, LIGHT, colour_class, dash
from simulator.report.quantity import Column, Ratios
from simulator.report.scale import LogScale, linear_ticks

pytestmark = pytest.mark.pure

# Of linear red, green and blue, what is left to protanopes, deuteranopes and tritanopes (Machado et al., 2009, severity 1).
DICHROMACY = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)
APART = 25.0  # in CIELAB; a difference of 2 is just seen in two patches side by side
CONTRAST = 3.0  # WCAG 2.2, 1.4.11, of graphical objects against what is behind them


@given(st.lists(st.floats(0, 400), max_size=14), st.floats(1, 40))
@example([5.0, 22.0, 22.0], 12.0)
def test_labels_keep_their_order_their_gap_and_their_range(wanted: list[float], gap: float) -> None:
    """Seen to fail with the wanted places handed back, and with pools that are not merged backwards."""
    places = spread(wanted, gap, 0.0, 400.0)
    fits = min(gap, 400.0 / max(1, len(wanted) - 1))
    in_order = [place for _, place in sorted(zip(wanted, places, strict=True))]
    assert all(b - a >= fits - 1e-6 for a, b in pairwise(in_order))
    assert all(-1e-6 <= place <= 400 + 1e-6 for place in places)


@given(st.lists(st.integers(0, 20), max_size=14, unique=True))
def test_labels_that_are_apart_stay_where_they_are(steps: list[int]) -> None:
    """Seen to fail with all places moved by half a gap."""
    wanted = [20.0 * step for step in steps]
    assert spread(wanted, 20.0, 0.0, 400.0) == pytest.approx(wanted)


def test_two_labels_in_one_place_give_way_alike() -> None:
    assert spread([100.0, 100.0], 16.0, 0.0, 400.0) == [92.0, 108.0]
    assert spread([0.0, 0.0], 16.0, 0.0, 400.0) == [0.0, 16.0], "within the range"


@pytest.mark.parametrize("name", ["prefix_cost", "x" * 90, "module.of.somebody:Policy:beta=4,window_s=60", "策略" * 30])
def test_a_name_is_shortened_in_its_middle_to_what_fits(name: str) -> None:
    """Seen to fail with the width of a wide character taken for that of a narrow one."""
    short = shortened(name, 12, 200)
    assert width_of(short, 12) <= 200 and 12 * sum(character in "策略" for character in short) <= 200
    assert short == name if width_of(name, 12) <= 200 else (short[0] == name[0] and short[-1] == name[-1] and "…" in short)


@given(st.floats(1e-3, 1e3), st.floats(1.06, 1e4), st.floats(0.05, 0.5))
def test_ticks_are_round_apart_and_on_the_axis(low: float, span: float, gap: float) -> None:
    """Seen to fail with the gap left unchecked."""
    scale = LogScale(low=low, high=low * span)
    ticks = scale.ticks(gap)
    assert all(scale.holds(tick) for tick in ticks)
    assert all(scale.place(b) - scale.place(a) >= gap for a, b in pairwise(ticks))
    assert all(float(f"{tick:.4g}") == tick for tick in ticks), "four digits at most"


def test_axes_of_ratios_have_the_ticks_one_expects() -> None:
    """Seen to fail with steps that do not divide 1."""
    assert LogScale(low=0.9, high=1.35).ticks(0.1) == [0.9, 1.0, 1.1, 1.2, 1.3]
    assert LogScale(low=0.4, high=60.0).ticks(0.1) == [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    assert LogScale(low=0.99, high=1.01).ticks(0.2) == [0.99, 0.995, 1.0, 1.005, 1.01]
    assert linear_ticks(0.634, 6) == [0.0, 0.2, 0.4, 0.6] and linear_ticks(1.0, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_an_axis_leaves_out_what_can_not_be_drawn() -> None:
    """Seen to fail with an infinite end, and with one of zero."""
    scale = LogScale.around([1.0, 2.0, inf, nan, 0.0, -1.0], widest=50.0)
    assert 0.5 < scale.low < 1.0 and 2.0 < scale.high < 3.0
    assert LogScale.around([1.0, 1e9], widest=50.0).high < 70.0
    assert LogScale.around([], widest=50.0).holds(1.0), "nothing to draw is an axis around 1"


def test_a_column_has_one_unit_and_one_number_of_decimals() -> None:
    """Seen to fail with the unit of the smallest."""
    column = Column.of("s", [0.213, 0.0405, nan])
    assert (column.unit, column.text(0.213), column.text(0.0405), column.text(nan), column.text(inf)) == ("ms", "213.0", "40.5", "–", "∞")
    assert Column.of("s", [0.5, 3.25]).said(0.5) == "0.500 s" and Column.of("s", [4.1e-5]).said(4.1e-5) == "41.0 µs"
    assert Column.of("share", [0.5]).said(0.123) == "12.3 %" and Column.of("requests/s", [1234.5, 900.0]).said(1234.5) == "1,234 requests/s"
    assert Column.of("s", [0.0, 0.0]).text(0.0) == "0.00", "nothing but zeros"
    assert Ratios.of([0.98, 1.04]).text(1.004) == "1.004" and Ratios.of([0.98, 3.0]).text(1.004) == "1.00"


def test_what_is_not_markup_is_escaped() -> None:
    """Seen to fail with children joined as they are."""
    assert element("b", "<i>&", title='"x"') == '<b title="&quot;x&quot;">&lt;i&gt;&amp;</b>'
    assert together("a<", Markup("<wbr>"), between=element("col")) == "a&lt;<col><wbr>"


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, "#ffffff"), (DARK, "#14171b")])
def test_colours_are_told_apart_by_all_readers(colours: tuple[str, ...], page: str) -> None:
    """Seen to fail with Okabe and Ito's orange and yellow on white, and with two greens."""
    behind = luminance(linear(page))
    for colour in colours:
        lighter, darker = max(luminance(linear(colour)), behind), min(luminance(linear(colour)), behind)
        assert (lighter + 0.05) / (darker + 0.05) >= CONTRAST, colour
    for seen in (None, *DICHROMACY):
        for one, other in combinations(colours, 2):
            a, b = (lab(linear(colour) if seen is None else through(seen, linear(colour))) for colour in (one, other))
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 >= APART, (one, other, seen)


def test_eighteen_lines_are_drawn_differently() -> None:
    """And their marks in tables, by an outline. Seen to fail with the dash left out."""
    assert len({colour_class(place) for place in range(18)}) == 18
    assert len({(colour_class(place).split()[0], dash(place)) for place in range(18)}) == 18


def linear(colour: str) -> tuple[float, ...]:
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)


def luminance(rgb: tuple[float, ...]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def through(seen: tuple[tuple[float, ...], ...], rgb: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in seen)


def lab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    """CIELAB of linear sRGB, under D65."""
    x = 0.4124564 * rgb[0] + 0.3575761 * rgb[1] + 0.1804375 * rgb[2]
    z = 0.0193339 * rgb[0] + 0.1191920 * rgb[1] + 0.9503041 * rgb[2]
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x / 0.95047, luminance(rgb), z / 1.08883))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
