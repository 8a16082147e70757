"""Draws a schedule in time: as text for a terminal, and as an SVG picture. Time goes to the right, one line a rank."""

from __future__ import annotations

import textwrap
from typing import NamedTuple
from xml.sax.saxutils import escape

from megatrain.pipeline.schedule import Action, Kind
from megatrain.pipeline.simulator import Span, Timeline

KINDS: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}


# -- text --------------------------------------------------------------------------------------------------------------


def draw_text(timeline: Timeline, width: int) -> str:
    """The schedule in lines of at most `width` characters.

    Boxes that are too narrow for `F0` show the letter alone. Small letters are the chunks with odd
    numbers, dots idle time.

        0  F0 F1 B0--- B1---
        1  ...F0 B0--- F1 B1---
    """
    ranks = len(timeline.spans)
    gutter = len(str(ranks - 1)) + 2
    scale = _columns_per_time(timeline, max(width - gutter, 1))
    columns = round(timeline.makespan * scale)
    lines = [
        f"{rank:<{gutter}}{_text_line(spans, scale, columns)}"
        for rank, spans in enumerate(timeline.spans)
    ]
    return "\n".join([*lines, "", textwrap.fill(_text_legend(timeline), width)])


def _columns_per_time(timeline: Timeline, columns: int) -> float:
    """A whole number of columns for the shortest action, where there is room for that."""
    shortest = min(
        (
            span.end - span.start
            for spans in timeline.spans
            for span in spans
            if span.end > span.start
        ),
        default=1.0,
    )
    longest_label = max(len(_label(span.action)) for spans in timeline.spans for span in spans)
    whole = int(columns * shortest / timeline.makespan + 1e-9)
    return min(whole, longest_label + 1) / shortest if whole else columns / timeline.makespan


def _text_line(spans: list[Span], scale: float, columns: int) -> str:
    line = ["."] * columns
    for span in spans:
        first, last = round(span.start * scale), min(round(span.end * scale), columns)
        line[first:last] = _text_box(span.action, last - first)
    return "".join(line).rstrip()


def _text_box(action: Action, width: int) -> str:
    label = _label(action)
    if len(label) > width:
        label = label[:1]
    space = " " if width > len(label) else ""
    return label[:width] + "-" * (width - len(label) - len(space)) + space


def _label(action: Action) -> str:
    return (action.kind.lower() if action.chunk % 2 else action.kind) + str(action.microbatch)


def _text_legend(timeline: Timeline) -> str:
    legend = ", ".join(f"{kind} {KINDS[kind]}" for kind in _kinds(timeline))
    chunks = timeline.schedule.placement.chunks
    if chunks > 1:
        legend += "; small letters: chunk 1" if chunks == 2 else "; small letters: chunks 1, 3, ..."
    return legend + "; dots: idle"


def _kinds(timeline: Timeline) -> list[Kind]:
    found = {action.kind for actions in timeline.schedule.actions for action in actions}
    return [kind for kind in KINDS if kind in found]


# -- picture -----------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette, told apart by colour-blind people; all of it bears black letters.
_COLOURS: dict[Kind, tuple[int, int, int]] = {
    "F": (86, 180, 233),
    "B": (213, 94, 0),
    "I": (230, 159, 0),
    "W": (0, 158, 115),
}
_IDLE = "#e2e2e2"
_LEFT, _RIGHT, _TOP, _ROW, _BOX, _LEGEND = 70, 150, 84, 36, 30, 210
"""Pixels: beside the boxes, above them, from one rank's line to the next, a box's height, a legend entry's width."""


class _Canvas(NamedTuple):
    """Where time and ranks are, in pixels."""

    pixels_per_time: float
    width: float
    bottom: float

    def x(self, time: float) -> float:
        return _LEFT + time * self.pixels_per_time

    def y(self, rank: int) -> float:
        return _TOP + rank * _ROW


def draw_svg(timeline: Timeline) -> str:
    """The schedule as an SVG: microbatches in the boxes, kinds by colour, chunks by shade, idle time grey."""
    shortest = min(
        span.end - span.start for spans in timeline.spans for span in spans if span.end > span.start
    )
    plot = min(max(24 * timeline.makespan / shortest, 700), 4000)
    width = _LEFT + max(plot + _RIGHT, _LEGEND * (len(_kinds(timeline)) + 1))
    canvas = _Canvas(plot / timeline.makespan, width, _TOP + _ROW * len(timeline.spans))
    height = canvas.bottom + 50 + 24 * timeline.schedule.placement.chunks
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{canvas.width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {canvas.width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        _title(timeline),
        *(_rank_line(timeline, rank, canvas) for rank in range(len(timeline.spans))),
        *_phases(timeline, canvas),
        *_axis(timeline, canvas),
        *_legend(timeline, canvas),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _title(timeline: Timeline) -> str:
    microbatches = 1 + max(action.microbatch for action in timeline.schedule.actions[0])
    chunks = timeline.schedule.placement.chunks
    of_chunks = f", {chunks} chunks each" if chunks > 1 else ""
    return _text(
        _LEFT,
        24,
        f"{timeline.schedule.name}: {len(timeline.spans)} ranks{of_chunks}, {microbatches} microbatches, "
        f"bubble {timeline.bubble:.1%}",
        size=16,
    )


def _rank_line(timeline: Timeline, rank: int, canvas: _Canvas) -> str:
    y, end = canvas.y(rank), canvas.x(timeline.makespan)
    idle = 1 - timeline.busy[rank] / timeline.makespan
    parts = [
        _text(_LEFT - 10, y + _BOX * 0.65, f"rank {rank}", anchor="end"),
        f'<rect x="{_LEFT}" y="{y}" width="{end - _LEFT:.2f}" height="{_BOX}" fill="{_IDLE}"/>',
        *(_box(span, timeline, canvas, y) for span in timeline.spans[rank]),
        _text(
            end + 10, y + _BOX * 0.65, f"idle {idle:.0%}, peak {timeline.peak_activations[rank]}"
        ),
    ]
    return "\n".join(parts)


def _box(span: Span, timeline: Timeline, canvas: _Canvas, y: float) -> str:
    x, width = canvas.x(span.start), (span.end - span.start) * canvas.pixels_per_time
    label = str(span.action.microbatch)
    colour = _shade(span.action.kind, span.action.chunk, timeline.schedule.placement.chunks)
    box = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" fill="{colour}" stroke="white"/>'
    if width > 0:
        size = min(
            13.0, width / (0.62 * len(label))
        )  # A digit is about 0.6 as wide as the letters are high.
        box += _text(x + width / 2, y + _BOX / 2 + 0.36 * size, label, anchor="middle", size=size)
    return box


def _shade(kind: Kind, chunk: int, chunks: int) -> str:
    """The kind's colour, mixed with more white for each chunk."""
    white = 0.6 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in _COLOURS[kind])


def _phases(timeline: Timeline, canvas: _Canvas) -> list[str]:
    """Lines around warm-up (until the first backward) and cool-down (after the last forward), with their names above."""
    spans = [span for of_rank in timeline.spans for span in of_rank]
    first_backward = min(
        (span.start for span in spans if span.action.kind != "F"), default=timeline.makespan
    )
    last_forward = max(span.end for span in spans if span.action.kind == "F")
    bounds = [0.0, first_backward, max(first_backward, last_forward), timeline.makespan]
    parts = []
    for name, start, end in zip(
        ("warm-up", "steady state", "cool-down"), bounds, bounds[1:], strict=False
    ):
        if end <= start:
            continue
        x, width = canvas.x(start), (end - start) * canvas.pixels_per_time
        parts.append(
            f'<path d="M{x + 2:.2f} {_TOP - 8}v-8h{width - 4:.2f}v8" fill="none" stroke="black"/>'
        )
        parts.append(_text(x + width / 2, _TOP - 24, name, anchor="middle"))
        if start:
            parts.append(
                f'<path d="M{x:.2f} {_TOP - 16}V{canvas.bottom}" stroke="black" stroke-opacity="0.4" stroke-dasharray="5 4"/>'
            )
    return parts


def _axis(timeline: Timeline, canvas: _Canvas) -> list[str]:
    """Some five to ten ticks, at round times."""
    step = 1.0
    while timeline.makespan / step > 10:
        step *= 2 if str(step)[0] in "15" else 2.5
    while timeline.makespan / step < 4:
        step /= 2
    ticks = [number * step for number in range(int(timeline.makespan / step + 1e-9) + 1)]
    marks = [
        _text(canvas.x(tick), canvas.bottom + 16, f"{tick:g}", anchor="middle") for tick in ticks
    ]
    return [*marks, _text(_LEFT - 10, canvas.bottom + 16, "time", anchor="end")]


def _legend(timeline: Timeline, canvas: _Canvas) -> list[str]:
    chunks = timeline.schedule.placement.chunks
    parts: list[str] = []
    for chunk in range(chunks):
        y = canvas.bottom + 34 + 24 * chunk
        x = float(_LEFT)
        for kind in _kinds(timeline):
            name = KINDS[kind] + (f", chunk {chunk}" if chunks > 1 else "")
            parts += _legend_entry(x, y, _shade(kind, chunk, chunks), name)
            x += _LEGEND
        if chunk == 0:
            parts += _legend_entry(x, y, _IDLE, "bubble (idle)")
    return parts


def _legend_entry(x: float, y: float, colour: str, name: str) -> list[str]:
    return [
        f'<rect x="{x}" y="{y}" width="16" height="16" fill="{colour}"/>',
        _text(x + 22, y + 13, name),
    ]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 13) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size:.4g}">{escape(text)}</text>'
