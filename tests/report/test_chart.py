"""Tests of where a chart draws points, ticks and marks."""

import math
import re

import pytest

from megatrain.report.chart import HEIGHT, WIDTH, AxisRange, Line, Mark, chart, nice_ticks
from megatrain.telemetry.curves import Point


def parse_lines(text):
    """Returns the points (step, value) of each line, computed from the SVG."""
    first, last = map(float, re.search(r'data-steps="(\S+) (\S+)"', text).groups())
    low, high = map(float, re.search(r'data-values="(\S+) (\S+)"', text).groups())
    is_log = 'data-scale="log"' in text
    lines = {}
    for name, path in re.findall(r'data-line="([^"]*)".*?d="([^"]*)"', text):
        pairs = [pair.split() for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]
        values = [high - float(y) / HEIGHT * (high - low) for _, y in pairs]
        lines[name] = [
            (first + float(x) / WIDTH * (last - first), 10**value if is_log else value)
            for (x, _), value in zip(pairs, values, strict=True)
        ]
    return lines


def test_points_are_at_their_steps_and_values():
    points = [Point(1, 4.0), Point(50, 2.5), Point(101, 3.0)]
    (line,) = parse_lines(chart("loss", [Line("a", points)], steps=AxisRange(1, 101))).values()
    for (x, y), point in zip(line, points, strict=True):
        assert x == pytest.approx(point.step, abs=0.02)
        assert y == pytest.approx(point.value, abs=0.002)


def test_axis_is_logarithmic_for_values_of_different_magnitude():
    points = [Point(step, 0.5) for step in range(50)] + [Point(50, 4000.0)]
    html = chart("gradient norm", [Line("a", points)], steps=AxisRange(0, 50))
    assert 'data-scale="log"' in html
    (line,) = parse_lines(html).values()
    assert line[0][1] == pytest.approx(0.5, rel=0.01)
    assert line[-1][1] == pytest.approx(4000.0, rel=0.01)


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [-2.0, -2.0], [0.0, 1e-7], [1e12, 1.0], [-5.0, 5.0]]
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_axis_contains_all_values(values, from_zero):
    html = chart(
        "x",
        [Line("a", [Point(step, value) for step, value in enumerate(values)])],
        steps=AxisRange(0, 1),
        from_zero=from_zero,
    )
    (line,) = parse_lines(html).values()
    assert len(line) == len(values)
    tops = [float(top) for top in re.findall(r'class="y" style="top:([\d.-]+)%', html)]
    assert tops
    assert all(0 <= top <= 100 for top in tops)


def test_chart_without_points_is_empty():
    assert chart("x", [Line("a", [])], steps=AxisRange(0, 1)) == ""


def test_marks_are_vertical_lines_at_their_steps():
    marks = [Mark(25, "restart"), Mark(25, "restart"), Mark(75, "rollback"), Mark(101, "restart")]
    text = chart(
        "x", [Line("a", [Point(0, 1.0), Point(100, 2.0)])], steps=AxisRange(0, 100), marks=marks
    )
    assert re.findall(r'class="mark (\w+)".*?d="([^"]*)"', text) == [
        ("restart", f"M250 0V{HEIGHT}"),
        ("rollback", f"M750 0V{HEIGHT}"),
    ]


def test_names_are_escaped():
    text = chart(
        "a<b", [Line('c"d', [Point(0, 1.0)]), Line("<i>", [Point(0, 1.0)])], steps=AxisRange(0, 1)
    )
    assert "<i>" not in text
    assert "a&lt;b" in text


@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (0, 160), (1, 1_000_000), (0.001, 0.0011), (-3, 7), (159, 160)]
)
def test_ticks_are_round_numbers(first, last):
    ticks = nice_ticks(first, last, 5)
    assert 3 <= len(ticks) <= 7
    assert all(first - 1e-9 <= tick <= last + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert (
        min(
            abs(step / 10 ** math.floor(math.log10(step * 1.0001)) - factor)
            for factor in (1, 2, 5, 10)
        )
        < 1e-6
    )
