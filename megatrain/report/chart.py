"""A chart of curves over steps, as HTML: an SVG stretched to the page's width, with labels over it.

The labels are HTML and keep their size, so they are readable on a phone and on a screen. All charts
of a page have the same steps; each has its own value axis. The SVG's `data-steps` and `data-values`
hold the steps and values of its edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from megatrain.report.html import render
from megatrain.telemetry.curves import Point

WIDTH, HEIGHT = 1000, 300
"""Size of the SVG's coordinate system."""
COLOURS = 6
"""Line colours in style.css; further lines repeat them."""

Shape = Literal["line", "faint", "dots", "specks", "stems"]


class Line(NamedTuple):
    """A curve and its shape; the legend shows `name` unless it is empty."""

    name: str
    points: Sequence[Point]
    shape: Shape = "line"
    colour: int = 0

    @property
    def css_colour(self) -> str:
        return f"var(--c{self.colour % COLOURS})"


class Mark(NamedTuple):
    """An event of the run, drawn as a vertical line on every chart."""

    step: int
    kind: Literal["restart", "rollback", "stall", "spike"]


class AxisRange(NamedTuple):
    first: float
    last: float

    def fraction(self, value: float) -> float:
        """Returns 0 for `first`, 1 for `last`."""
        return (value - self.first) / (self.last - self.first)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    steps: AxisRange,
    unit: str = "",
    marks: Iterable[Mark] = (),
    from_zero: bool = False,
    first: bool = False,
) -> Markup:
    """Returns a figure with its legend, or an empty text if no line has points.

    Args:
        from_zero: whether the value axis begins at 0. first: whether the chart is drawn larger.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup()
    axis = _ValueAxis([point.value for line in lines for point in line.points], from_zero)
    heights = [axis.fraction(tick) for tick in axis.ticks]
    named = [line for line in lines if line.name]
    ticks = nice_ticks(steps.first, steps.last, 5, integers=True)
    return render(
        "chart",
        title=title,
        unit=unit,
        first=first,
        legend=named if len(named) > 1 else [],
        description=_description(title, lines),
        width=WIDTH,
        height=HEIGHT,
        steps=f"{steps.first:g} {steps.last:g}",
        values=f"{axis.range.first!r} {axis.range.last!r}",
        scale="log" if axis.is_log else "linear",
        grid="".join(f"M0 {_coordinate(HEIGHT * (1 - height))}H{WIDTH}" for height in heights),
        marks=_mark_paths(marks, steps),
        paths=[(line, _path(line, steps, axis)) for line in lines],
        value_labels=[
            (100 * (1 - height), _number(tick))
            for height, tick in zip(heights, axis.ticks, strict=True)
        ],
        step_labels=[(100 * steps.fraction(tick), _number(tick)) for tick in ticks],
    )


def _path(line: Line, steps: AxisRange, axis: _ValueAxis) -> str:
    places = [
        (
            _coordinate(WIDTH * steps.fraction(step)),
            _coordinate(HEIGHT * (1 - axis.fraction(value))),
        )
        for step, value in line.points
    ]
    if line.shape in ("dots", "specks"):
        return "".join(f"M{x} {y}h0" for x, y in places)
    if line.shape == "stems":
        return "".join(f"M{x} {HEIGHT}V{y}" for x, y in places)
    return "M" + "L".join(f"{x} {y}" for x, y in places) + ("h0" if len(places) == 1 else "")


def _mark_paths(marks: Iterable[Mark], steps: AxisRange) -> list[tuple[str, str]]:
    """Returns one path per kind; marks at the same place are drawn once."""
    places: dict[str, set[int]] = {}
    for mark in marks:
        if steps.first <= mark.step <= steps.last:
            places.setdefault(mark.kind, set()).add(round(WIDTH * steps.fraction(mark.step)))
    return [
        (kind, "".join(f"M{x} 0V{HEIGHT}" for x in sorted(found))) for kind, found in places.items()
    ]


def _description(title: str, lines: Sequence[Line]) -> str:
    """Returns alternative text for screen readers."""
    curves = [
        f"{line.name or title} "
        f"from {_number(line.points[0].value)} at step {line.points[0].step:.0f} "
        f"to {_number(line.points[-1].value)} at step {line.points[-1].step:.0f}"
        for line in lines
        if line.shape != "faint"
    ]
    return f"{title}: {'; '.join(curves)}" if curves else title


class _ValueAxis:
    """Value axis with a margin; logarithmic if the values differ by orders of magnitude."""

    def __init__(self, values: Sequence[float], from_zero: bool) -> None:
        low, high = min(values), max(values)
        median = sorted(values)[len(values) // 2]
        self.is_log = low > 0 and high > 20 * median and high > 50 * low
        if self.is_log:
            margin = 0.04 * math.log10(high / low)
            self.range = AxisRange(math.log10(low) - margin, math.log10(high) + margin)
            self.ticks = _log_ticks(self.range)
        else:
            low = min(low, 0.0) if from_zero else low
            margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
            self.range = AxisRange(low if from_zero and low == 0 else low - margin, high + margin)
            self.ticks = nice_ticks(self.range.first, self.range.last, 4)

    def fraction(self, value: float) -> float:
        """Returns 0 for the bottom, 1 for the top."""
        return self.range.fraction(math.log10(value) if self.is_log else value)


def nice_ticks(first: float, last: float, count: int, *, integers: bool = False) -> list[float]:
    """Returns about `count` multiples of 1, 2 or 5 times a power of ten in [first, last]."""
    rough = (last - first) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if integers:
        step = max(1.0, step)
    begin, end = math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9)
    return [number * step for number in range(begin, end + 1)]


def _log_ticks(exponents: AxisRange) -> list[float]:
    decades = range(math.ceil(exponents.first), math.floor(exponents.last) + 1)
    if len(decades) >= 2:
        return [10.0**decade for decade in decades][:: max(1, len(decades) // 5)]
    candidates = (
        factor * 10.0**decade
        for decade in range(math.floor(exponents.first), math.ceil(exponents.last) + 1)
        for factor in (1, 2, 5)
    )
    return [tick for tick in candidates if exponents.first <= math.log10(tick) <= exponents.last]


def _number(value: float) -> str:
    """Returns a short label: 0, 0.25, 3e-4, 1500, 20k, 1.5M."""
    size = abs(value)
    if size and size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
