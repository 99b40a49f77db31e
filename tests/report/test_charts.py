"""Charts, by the coordinates of points worked out by hand from the frame: x in [46, 348], y in [178, 24]."""

from __future__ import annotations

import itertools
import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from selfeval.report.charts import (
    MOST_NEIGHBOURS,
    Bar,
    Bin,
    Line,
    Mark,
    Part,
    Track,
    bar_chart,
    interval_tracks,
    line_chart,
    reliability_chart,
    risk_coverage_chart,
    smooth,
    stacked_bar,
    thinned,
)


def by_class(svg: str, name: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if name in element.get("class", "").split()]


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.attrib[name]) for name in names]


def test_line_puts_known_points_where_they_belong() -> None:
    svg = line_chart([Line("kl", [(0, 0.0), (5, 1.0), (10, 4.0)])], label="KL", y_range=(0.0, 4.0))
    path = by_class(svg, "line")[0].attrib["d"]
    # x: 46 + 302 * 5/10 = 197; y: 178 - 154 * 1/4 = 139.5
    assert path == "M46 178L197 139.5L348 24"


def test_line_chart_reads_out_every_point() -> None:
    svg = line_chart([Line("kl", [(1, 0.5), (2, 0.75)])], label="KL")
    titles = [element.text for element in ET.fromstring(svg).iter("title")]
    assert titles == ["step 1: 0.500", "step 2: 0.750"]
    assert ET.fromstring(svg).attrib["aria-label"] == "KL. kl: 0.500 at step 1, 0.750 at step 2"


def test_read_out_strips_cover_the_plot_without_gaps() -> None:
    svg = line_chart([Line("kl", [(x, float(x)) for x in range(500)])], label="KL")
    edges = [numbers(hit, "x", "width") for hit in by_class(svg, "hit")]
    assert 40 <= len(edges) <= 81
    assert edges[0][0] == 46
    for (x, width), (after, _) in itertools.pairwise(edges):
        assert x + width == pytest.approx(after, abs=0.02)
    assert sum(edges[-1]) == pytest.approx(348, abs=0.02)


def test_raw_values_stay_visible_under_the_smoothed_line() -> None:
    svg = line_chart([Line("r", [(0, 0.0), (1, 2.0), (2, 0.0), (3, 2.0)], smoothing=1.0)], label="r", y_range=(0, 2))
    assert by_class(svg, "raw")[0].attrib["d"] == "M46 178L146.67 24L247.33 178L348 24"
    assert len(by_class(svg, "line")) == 2


def test_smooth_matches_a_weighted_fit_done_by_hand() -> None:
    # At x = 1 the points are 1, 0, 1 away, so the weights are e, 1, e with e = (1 - (1 / 1.0001)^3)^3 < 1e-10:
    # the fit passes through the middle point. At x = 0 the reach is 2, the weights are 1, (7/8)^3, e: through the
    # first two points.
    points = [(0.0, 0.0), (1.0, 6.0), (2.0, 0.0)]
    assert smooth(points, 1.0)[1][1] == pytest.approx(6.0, abs=1e-6)
    assert smooth(points, 1.0)[0][1] == pytest.approx(0.0, abs=1e-6)


def test_smooth_of_a_long_series_is_the_weighted_fit_at_every_point() -> None:
    rng = random.Random(0)
    points = [(float(x), rng.gauss(0.0, 1.0)) for x in range(2500)]
    calm = smooth(points, 1.0)
    reach = MOST_NEIGHBOURS // 2
    for at in (reach, 1000, 1023, 1024, 2048, 2499 - reach):
        near = points[at - reach : at + reach + 1]
        weights = [(1 - (abs(x - at) / (reach * 1.0001)) ** 3) ** 3 for x, _ in near]
        # numpy's weights multiply the residuals, not their squares.
        line = np.polyfit([x - at for x, _ in near], [y for _, y in near], 1, w=np.sqrt(weights))
        assert calm[at] == (at, pytest.approx(line[1], abs=1e-9))


def test_smooth_does_not_lag_behind_a_trend() -> None:
    line = [(float(x), 3.0 - 0.5 * x) for x in range(50)]
    assert [y for _, y in smooth(line, 0.3)] == pytest.approx([y for _, y in line])


def test_thinning_keeps_the_spike_and_the_ends() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= 602
    assert points[4321] in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_band_follows_its_ends() -> None:
    line = Line("gold", [(0, 0.5), (1, 0.5)], band=[(0.25, 0.75), (0.0, 1.0)])
    svg = line_chart([line], label="gold", y_range=(0.0, 1.0))
    # 178 - 154 * 0.25 = 139.5, 178 - 154 * 0.75 = 62.5
    assert by_class(svg, "band")[0].attrib["d"] == "M46 139.5L348 178L348 24L46 62.5Z"


def test_watchdog_stands_at_its_step() -> None:
    line = Line("kl", [(0, 0.0), (10, 1.0)])
    svg = line_chart([line], label="KL", marks=[Mark(5, "drift & more"), Mark(99, "outside")])
    marks = by_class(svg, "mark")
    assert [numbers(mark, "x1", "x2") for mark in marks] == [[197, 197]]
    assert "drift &amp; more" in svg
    assert "outside" not in svg


def test_an_empty_series_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Line("kl", [])], label="KL")


def test_bar_and_the_ends_of_its_interval() -> None:
    svg = bar_chart([Bar("judge", 0.5, 0.25, 0.75, "50%")], label="accuracy", reference=0.5)
    # x runs from 2 to 346: 2 + 344 * 0.25 = 88, 2 + 344 * 0.5 = 174, 2 + 344 * 0.75 = 260
    assert numbers(by_class(svg, "bar")[0], "x", "width") == [2, 172]
    assert by_class(svg, "whisker")[0].attrib["d"] == "M88 23V31M88 27H260M260 23V31"
    assert numbers(by_class(svg, "reference")[0], "x1", "x2") == [174, 174]
    assert ET.fromstring(svg).attrib["aria-label"] == "accuracy. judge: 50%"


def test_bar_without_interval_has_no_whisker() -> None:
    assert by_class(bar_chart([Bar("judge", 0.5, None, None, "50%")], label="accuracy"), "whisker") == []


def test_track_spans_its_interval() -> None:
    svg = interval_tracks([Track("after", 0.5, 0.4, 0.6)], label="gold")
    # x runs from 82 to 292: 82 + 210 * 0.4 = 166, 82 + 210 * 0.6 = 208
    assert numbers(by_class(svg, "span")[0], "x1", "x2") == [166, 208]
    assert numbers(by_class(svg, "dot")[0], "cx") == [187]


def test_risk_coverage_runs_over_the_whole_range() -> None:
    svg = risk_coverage_chart([(1.0, 0.1), (0.5, 0.05)])
    # sorted by coverage; the top is 0.1: (0.5 -> 197, 0.05 -> 101), (1 -> 348, 0.1 -> 24)
    assert by_class(svg, "line")[0].attrib["d"] == "M197 101L348 24"
    assert "coverage 50.0%: 5.0%" in svg


def test_reliability_dot_and_stem() -> None:
    svg = reliability_chart([Bin(0.75, 0.5, 25), Bin(1.0, 1.0, 100)])
    # from 0.5 to 1: confidence 0.75 -> 197; accuracy 0.5 -> 178; the diagonal at 0.75 -> 101
    stem, dots = by_class(svg, "stem")[0], by_class(svg, "dot")
    assert numbers(stem, "x1", "y1", "x2", "y2") == [197, 101, 197, 178]
    assert numbers(dots[0], "cx", "cy", "r") == [197, 178, 5.25]  # 2.5 + 5.5 * sqrt(25 / 100)
    assert numbers(dots[1], "r") == [8]
    assert dots[0][0].text == "confidence 75.0%: right 50.0% (n = 25)"


def test_stacked_bar_shares_its_width() -> None:
    svg = stacked_bar([Part("kept", 3, "p1"), Part("tie", 0, "p3"), Part("unsure", 1, "p2")], label="verdicts")
    assert [numbers(part, "x", "width") for part in by_class(svg, "part")] == [[0, 750], [750, 250]]
    assert "kept: 3 (75.0%)" in svg
    with pytest.raises(ValueError, match="larger than zero"):
        stacked_bar([Part("kept", 0, "p1")], label="verdicts")


def test_names_are_escaped() -> None:
    svg = bar_chart([Bar("<b>&", 0.5, 0.4, 0.6, '"quoted"')], label='<i>"')
    assert ET.fromstring(svg).attrib["aria-label"] == '<i>". <b>&: "quoted"'
    assert "<b>" not in svg


VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 5e-324, 6e-14, -1e-300, 1e17, 1e300, 1.7e308, -1.7e308]),
)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40), st.sampled_from([0.0, 0.25, 1.0]))
@example([(9007199254740994.0, 0.0)], 0.0)  # a room of 1 on both sides of 2^53 + 2 is too small to divide
@settings(max_examples=200, deadline=None)
def test_every_finite_series_is_drawn_inside_its_frame(points: list[tuple[float, float]], smoothing: float) -> None:
    ordered = sorted(dict(points).items())
    svg = line_chart([Line("series", ordered, smoothing=smoothing)], label="series")
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    for path in by_class(svg, "line"):
        for place in path.attrib["d"].lstrip("M").split("L"):
            x, y = (float(part) for part in place.split())
            assert 46 <= x <= 348
            assert 24 <= y <= 178


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 40))
@settings(deadline=None)
def test_a_constant_series_is_a_level_line(value: float, length: int) -> None:
    svg = line_chart([Line("series", [(float(x), value) for x in range(length)])], label="series")
    heights = {place.split()[1] for place in by_class(svg, "line")[0].attrib["d"].lstrip("M").split("L")}
    assert len(heights) == 1


def test_the_approximate_kl_of_an_on_policy_run_is_drawn() -> None:
    svg = line_chart([Line("approximate KL", [(1, 0.0), (2, 6.2e-14), (3, 3.2e-14)])], label="Approximate KL")
    # The range is 0 to 8e-14: 178 - 154 * 6.2/8 = 58.65, 178 - 154 * 3.2/8 = 116.4
    assert by_class(svg, "line")[0].attrib["d"] == "M46 178L197 58.65L348 116.4"


def test_smooth_keeps_the_digits_of_tiny_and_huge_values() -> None:
    # A straight line is its own local fit, whatever its unit.
    for unit in (1e-14, 1.0, 1e290):
        line = [(float(x), x * unit) for x in range(8)]
        assert [y for _, y in smooth(line, 0.5)] == pytest.approx([y for _, y in line], rel=1e-9, abs=1e-11 * unit)


def test_a_legend_has_rows_of_its_own_and_names_do_not_overlap() -> None:
    names = ("evaluator", "gold", "evaluator, fitted", "gold, fitted")
    svg = line_chart([Line(name, [(0, 0.25), (9, 0.5)]) for name in names], label="Promise and gold", percent_axes="y")
    told = [element for element in ET.fromstring(svg).iter() if element.text in names]
    boxes = [(x, x + 6.2 * len(e.text or ""), y) for e in told for x, y in [numbers(e, "x", "y")]]
    readout = by_class(svg, "readout")[0]
    assert all(y >= numbers(readout, "y")[0] + 16 for _, _, y in boxes)
    assert all(right <= 360 for _, right, _ in boxes)
    for (_, right, y), (left, _, other) in itertools.pairwise(boxes):
        assert other > y or left - 16 > right  # the key of the next name is 16 wide and ends 5 before it
    # Two rows of 16: the plot starts at 24 + 32 and the whole chart is 210 + 32 high.
    assert ET.fromstring(svg).attrib["viewBox"] == "0 0 360 242"
    assert min(numbers(line, "y1")[0] for line in by_class(svg, "grid")) == 56
