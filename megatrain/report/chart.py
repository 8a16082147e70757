"""A chart of curves over steps, as HTML: lines in an SVG that is stretched to the page's width, words over it that are not.

So labels can be read on a phone as on a screen. Steps are the same for all charts of a page; the figure's axis is the chart's own.
The SVG says in `data-steps` and `data-values` what its edges stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple

from megatrain.telemetry.curves import Point

WIDTH, HEIGHT = 1000, 300
"""Of the SVG, in units of its own."""
COLOURS = 6
"""How many the style has; further curves begin again."""

Shape = Literal["line", "faint", "dots", "specks", "stems"]


class Line(NamedTuple):
    """A curve as it is drawn. `name` is shown in the legend unless it is empty."""

    name: str
    points: Sequence[Point]
    shape: Shape = "line"
    colour: int = 0


class Mark(NamedTuple):
    """A moment of the run: a vertical line on every chart."""

    step: int
    kind: Literal["restart", "rollback", "stall", "spike"]


class Span(NamedTuple):
    first: float
    last: float

    def share(self, value: float) -> float:
        return (value - self.first) / (self.last - self.first)


STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #a8487f; --c4: #b07700; --c5: #2f7fae; --restart: #595959; --rollback: #c00000; --stall: #b07700; --spike: #a8487f; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #56b4e9; --c1: #ff8f47; --c2: #2fc79c; --c3: #e59ac6; --c4: #e8b04a; --c5: #9fd4f5; --restart: #a0a4aa; --rollback: #ff6b6b; --stall: #e8b04a; --spike: #e59ac6; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 22px 28px; margin-top: 14px; }
figure { margin: 0; min-width: 0; } figure.first { grid-column: 1 / -1; } figcaption { font-size: 14px; margin-bottom: 4px; }
figcaption b { margin-right: 8px; } figcaption .unit { color: var(--soft); margin-right: 8px; } .legend { white-space: nowrap; margin-right: 10px; font-size: 13px; }
.swatch { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; border-radius: 2px; }
.plot { position: relative; height: 170px; margin: 0 6px 20px 46px; border-left: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
figure.first .plot { height: 260px; } .plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.plot span { position: absolute; font-size: 11.5px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .y { right: calc(100% + 6px); transform: translateY(-50%); } .plot .x { top: calc(100% + 5px); transform: translateX(-50%); }
.plot .x.end { transform: translateX(-100%); } .plot .x.begin { transform: none; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; stroke-width: 1.6px; }
.plot .faint { stroke-width: 1px; opacity: .55; } .plot .dots { stroke-width: 5.5px; } .plot .specks { stroke-width: 3.4px; } .plot .grid { stroke: var(--rule); stroke-width: 1px; opacity: .45; stroke-linecap: butt; }
.plot .mark { stroke-width: 1.3px; opacity: .6; stroke-dasharray: 5 3; stroke-linecap: butt; }
"""


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    steps: Span,
    unit: str = "",
    marks: Iterable[Mark] = (),
    from_zero: bool = False,
    first: bool = False,
) -> list[str]:
    """A figure with its legend; nothing where no line has a point. `first` is drawn larger."""
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    values = [point.value for line in lines for point in line.points]
    axis = _Axis(values, from_zero=from_zero)
    rows = [(axis.place(tick), _number(tick)) for tick in axis.ticks]
    grid = "".join(f"M0 {_at(HEIGHT * (1 - row))}H{WIDTH}" for row, _ in rows)
    drawn = [
        f"<figure{' class=first' if first else ''}><figcaption><b>{escape(title)}</b>{f'<span class=unit>{escape(unit)}</span>' if unit else ''}"
        f"{_legend(lines)}</figcaption>",
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(_words(title, lines))}" '
        f'data-name="{escape(title)}" data-steps="{steps.first:g} {steps.last:g}" data-values="{axis.span.first!r} {axis.span.last!r}" '
        f'data-scale="{"log" if axis.is_log else "linear"}">',
        f'<path class="grid" d="{grid}"/>',
        *_marks(marks, steps),
        *(_path(line, steps, axis) for line in lines),
        "</svg>",
        *(
            f'<span class="y" style="top:{100 * (1 - row):.2f}%">{words}</span>'
            for row, words in rows
        ),
        *_step_labels(steps),
        "</div></figure>",
    ]
    return drawn


def _path(line: Line, steps: Span, axis: _Axis) -> str:
    places = [
        (_at(WIDTH * steps.share(step)), _at(HEIGHT * (1 - axis.place(value))))
        for step, value in line.points
    ]
    if line.shape in ("dots", "specks"):
        path = "".join(f"M{x} {y}h0" for x, y in places)
    elif line.shape == "stems":
        path = "".join(f"M{x} {HEIGHT}V{y}" for x, y in places)
    else:
        path = "M" + "L".join(f"{x} {y}" for x, y in places) + ("h0" if len(places) == 1 else "")
    return f'<path class="{line.shape}" data-line="{escape(line.name)}" style="stroke:var(--c{line.colour % COLOURS})" d="{path}"/>'


def _marks(marks: Iterable[Mark], steps: Span) -> list[str]:
    """One path a kind; marks that would lie on each other are one."""
    places: dict[str, dict[int, None]] = {}
    for mark in marks:
        if steps.first <= mark.step <= steps.last:
            places.setdefault(mark.kind, {})[round(WIDTH * steps.share(mark.step))] = None
    return [
        f'<path class="mark {kind}" style="stroke:var(--{kind})" d="{"".join(f"M{x} 0V{HEIGHT}" for x in sorted(at))}"/>'
        for kind, at in places.items()
    ]


def _step_labels(steps: Span) -> list[str]:
    labels = []
    for tick in nice_ticks(steps.first, steps.last, 5, whole=True):
        place = 100 * steps.share(tick)
        edge = " begin" if place < 3 else " end" if place > 93 else ""
        labels.append(f'<span class="x{edge}" style="left:{place:.2f}%">{_number(tick)}</span>')
    return labels


def _legend(lines: Sequence[Line]) -> str:
    shown = [line for line in lines if line.name]
    return "".join(
        f'<span class="legend"><span class="swatch" style="background:var(--c{line.colour % COLOURS});{"opacity:.45" if line.shape == "faint" else ""}">'
        f"</span>{escape(line.name)}</span>"
        for line in (shown if len(shown) > 1 else [])
    )


def _words(title: str, lines: Sequence[Line]) -> str:
    """For who cannot see the chart."""
    said = [
        f"{line.name or title} from {_number(line.points[0].value)} at step {line.points[0].step:.0f} to {_number(line.points[-1].value)} "
        f"at step {line.points[-1].step:.0f}"
        for line in lines
        if line.shape != "faint"
    ]
    return f"{title}: {'; '.join(said)}" if said else title


class _Axis:
    """The figure's axis: from the lowest to the highest value with a little room, in decades where values are of very different size."""

    def __init__(self, values: Sequence[float], *, from_zero: bool) -> None:
        low, high = min(values), max(values)
        middle = sorted(values)[len(values) // 2]
        self.is_log = low > 0 and high > 20 * middle and high > 50 * low
        if self.is_log:
            room = 0.04 * math.log10(high / low)
            self.span = Span(math.log10(low) - room, math.log10(high) + room)
            self.ticks = _log_ticks(self.span)
        else:
            low = min(low, 0.0) if from_zero else low
            room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
            self.span = Span(low if from_zero and low == 0 else low - room, high + room)
            self.ticks = nice_ticks(self.span.first, self.span.last, 4)

    def place(self, value: float) -> float:
        """From 0 at the bottom to 1 at the top."""
        return self.span.share(math.log10(value) if self.is_log else value)


def nice_ticks(first: float, last: float, about: int, *, whole: bool = False) -> list[float]:
    """Some `about` multiples of 1, 2 or 5 times a power of ten between two values, whole numbers if so asked."""
    rough = (last - first) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    begin, end = math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9)
    return [number * step for number in range(begin, end + 1)]


def _log_ticks(span: Span) -> list[float]:
    decades = range(math.ceil(span.first), math.floor(span.last) + 1)
    if len(decades) >= 2:
        return [10.0**decade for decade in decades][:: max(1, len(decades) // 5)]
    wanted = (
        factor * 10.0**decade
        for decade in range(math.floor(span.first), math.ceil(span.last) + 1)
        for factor in (1, 2, 5)
    )
    return [tick for tick in wanted if span.first <= math.log10(tick) <= span.last]


def _number(value: float) -> str:
    """As short as a label has to be: 0, 0.25, 3e-4, 1500, 20k, 1.5M."""
    size = abs(value)
    if size and size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")
