"""Draws a simulated schedule as text or as an SVG picture: one line per rank, time to the right."""

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


# -- text ----------------------------------------------------------------------------------------


def draw_text(timeline: Timeline, width: int) -> str:
    """Returns the schedule in lines of at most `width` characters.

    Boxes too narrow for `F0` show the letter only. Small letters are chunks with odd numbers, dots
    idle time.

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
    """Returns the scale, with whole columns for the shortest action if there is room."""
    shortest = _shortest(timeline)
    longest_label = max(len(_label(span.action)) for spans in timeline.spans for span in spans)
    per_action = int(columns * shortest / timeline.makespan + 1e-9)
    if not per_action:
        return columns / timeline.makespan
    return min(per_action, longest_label + 1) / shortest


def _shortest(timeline: Timeline) -> float:
    lengths = [span.end - span.start for spans in timeline.spans for span in spans]
    return min((length for length in lengths if length > 0), default=1.0)


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


# -- picture -------------------------------------------------------------------------------------

# Okabe and Ito's palette for colour-blind readers; black text is legible on all of it.
_COLOURS: dict[Kind, tuple[int, int, int]] = {
    "F": (86, 180, 233),
    "B": (213, 94, 0),
    "I": (230, 159, 0),
    "W": (0, 158, 115),
}
IDLE = "#e2e2e2"
_LEFT, _RIGHT, _TOP, _ROW, _BOX, _LEGEND = 70, 150, 84, 36, 30, 210
"""Pixels: left, right, top margin; distance of rows; height of a box; width of a legend entry."""
DIGIT_WIDTH = 0.62
"""Width of a digit per font size."""


def shade(kind: Kind, chunk: int, chunks: int) -> str:
    """Returns the colour of a kind, mixed with more white for each chunk."""
    white = 0.6 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in _COLOURS[kind])


def svg_text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 13) -> str:
    """Returns an SVG text element."""
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size:.4g}">'
        f"{escape(text)}</text>"
    )


class _Canvas(NamedTuple):
    """Scale and size in pixels."""

    pixels_per_time: float
    width: float
    bottom: float

    def x(self, time: float) -> float:
        return _LEFT + time * self.pixels_per_time

    def y(self, rank: int) -> float:
        return _TOP + rank * _ROW


def draw_svg(timeline: Timeline) -> str:
    """Returns an SVG: microbatches in boxes, kinds by colour, chunks by shade, idle time grey."""
    plot = min(max(24 * timeline.makespan / _shortest(timeline), 700), 4000)
    width = _LEFT + max(plot + _RIGHT, _LEGEND * (len(_kinds(timeline)) + 1))
    canvas = _Canvas(plot / timeline.makespan, width, _TOP + _ROW * len(timeline.spans))
    height = canvas.bottom + 50 + 24 * timeline.schedule.placement.chunks
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        _title(timeline),
        *(_rank_row(timeline, rank, canvas) for rank in range(len(timeline.spans))),
        *_phases(timeline, canvas),
        *_axis(timeline, canvas),
        *_legend(timeline, canvas),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _title(timeline: Timeline) -> str:
    schedule, chunks = timeline.schedule, timeline.schedule.placement.chunks
    per_rank = f", {chunks} chunks each" if chunks > 1 else ""
    text = (
        f"{schedule.name}: {len(timeline.spans)} ranks{per_rank}, "
        f"{schedule.microbatches} microbatches, bubble {timeline.bubble:.1%}"
    )
    return svg_text(_LEFT, 24, text, size=16)


def _rank_row(timeline: Timeline, rank: int, canvas: _Canvas) -> str:
    y, end = canvas.y(rank), canvas.x(timeline.makespan)
    idle = 1 - timeline.busy[rank] / timeline.makespan
    note = f"idle {idle:.0%}, peak {timeline.peak_activations[rank]}"
    parts = [
        svg_text(_LEFT - 10, y + _BOX * 0.65, f"rank {rank}", anchor="end"),
        f'<rect x="{_LEFT}" y="{y}" width="{end - _LEFT:.2f}" height="{_BOX}" fill="{IDLE}"/>',
        *(_box(span, timeline, canvas, y) for span in timeline.spans[rank]),
        svg_text(end + 10, y + _BOX * 0.65, note),
    ]
    return "\n".join(parts)


def _box(span: Span, timeline: Timeline, canvas: _Canvas, y: float) -> str:
    x, width = canvas.x(span.start), (span.end - span.start) * canvas.pixels_per_time
    label = str(span.action.microbatch)
    colour = shade(span.action.kind, span.action.chunk, timeline.schedule.placement.chunks)
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" '
        f'fill="{colour}" stroke="white"/>'
    )
    if width > 0:
        size = min(13.0, width / (DIGIT_WIDTH * len(label)))
        box += svg_text(
            x + width / 2, y + _BOX / 2 + 0.36 * size, label, anchor="middle", size=size
        )
    return box


def _phases(timeline: Timeline, canvas: _Canvas) -> list[str]:
    """Returns brackets: warm-up until the first backward, cool-down after the last forward."""
    spans = [span for rank_spans in timeline.spans for span in rank_spans]
    backwards = (span.start for span in spans if span.action.kind != "F")
    first_backward = min(backwards, default=timeline.makespan)
    last_forward = max(span.end for span in spans if span.action.kind == "F")
    bounds = [0.0, first_backward, max(first_backward, last_forward), timeline.makespan]
    parts = []
    for name, start, end in zip(
        ("warm-up", "steady state", "cool-down"), bounds[:-1], bounds[1:], strict=True
    ):
        if end <= start:
            continue
        x, width = canvas.x(start), (end - start) * canvas.pixels_per_time
        parts.append(
            f'<path d="M{x + 2:.2f} {_TOP - 8}v-8h{width - 4:.2f}v8" fill="none" stroke="black"/>'
        )
        parts.append(svg_text(x + width / 2, _TOP - 24, name, anchor="middle"))
        if start:
            parts.append(
                f'<path d="M{x:.2f} {_TOP - 16}V{canvas.bottom}" stroke="black" '
                'stroke-opacity="0.4" stroke-dasharray="5 4"/>'
            )
    return parts


def _axis(timeline: Timeline, canvas: _Canvas) -> list[str]:
    """Returns five to ten labels at round times."""
    step = 1.0
    while timeline.makespan / step > 10:
        step *= 2 if str(step)[0] in "15" else 2.5
    while timeline.makespan / step < 4:
        step /= 2
    ticks = [number * step for number in range(int(timeline.makespan / step + 1e-9) + 1)]
    y = canvas.bottom + 16
    labels = [svg_text(canvas.x(tick), y, f"{tick:g}", anchor="middle") for tick in ticks]
    return [*labels, svg_text(_LEFT - 10, y, "time", anchor="end")]


def _legend(timeline: Timeline, canvas: _Canvas) -> list[str]:
    chunks = timeline.schedule.placement.chunks
    parts: list[str] = []
    for chunk in range(chunks):
        y = canvas.bottom + 34 + 24 * chunk
        entries = [
            (shade(kind, chunk, chunks), KINDS[kind] + (f", chunk {chunk}" if chunks > 1 else ""))
            for kind in _kinds(timeline)
        ]
        if chunk == 0:
            entries.append((IDLE, "bubble (idle)"))
        for column, (colour, name) in enumerate(entries):
            x = float(_LEFT + column * _LEGEND)
            parts.append(f'<rect x="{x}" y="{y}" width="16" height="16" fill="{colour}"/>')
            parts.append(svg_text(x + 22, y + 13, name))
    return parts
