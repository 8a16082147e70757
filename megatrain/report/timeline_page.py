"""A pipeline profile as one self-contained HTML page, and as numbers for programs."""

from __future__ import annotations

import re
import statistics
from html import escape
from typing import Any, NamedTuple

from markupsafe import Markup

from megatrain.pipeline.plot import DIGIT_WIDTH, IDLE, KINDS, shade, svg_text
from megatrain.pipeline.schedule import Action
from megatrain.report import html as html_module
from megatrain.report.bottlenecks import Advice, slow_layers
from megatrain.telemetry.bubble_analysis import PipelineProfile, TimeBreakdown, first_start, span_of

# Colours of Okabe and Ito's palette that no kind of action has in drawings.
PARTS = {
    "compute": ("computing", "#4d4d4d"),
    "schedule": ("waiting for a neighbour", "#bdbdbd"),
    "imbalance": ("imbalance between stages", "#cc79a7"),
    "microbatches": ("uneven microbatches", "#f0e442"),
    "communication": ("communication", "#0072b2"),
}
"""Names and colours of the parts of a `TimeBreakdown`."""
DEFINITIONS = {
    "schedule": "the schedule's own bubble: the rank's waiting if every stage took the mean time "
    "of all stages and messages took no time",
    "imbalance": "its waiting if each stage took its own mean time, minus the above; the slowest "
    "stage waits less than in an even pipeline, so its part can be negative",
    "microbatches": "its waiting if each action took its measured time, minus the above",
    "communication": "the rest of the measured waiting: messages in transit, and the host between "
    "actions",
}


# -- page ----------------------------------------------------------------------------------------


def render_timeline_page(profile: PipelineProfile, advice: list[Advice]) -> str:
    """Returns the page as HTML."""
    parts = [
        *_head(profile),
        *_advice(advice),
        *timelines(profile),
        *_breakdown_table(profile),
        *_stage_table(profile),
        *_layer_table(profile),
        *_definitions(profile),
    ]
    return html_module.render_page(f"Profile of {profile.name}", body=Markup("\n".join(parts)))


def _head(profile: PipelineProfile) -> list[str]:
    measured, placement = profile.measured, profile.measured.placement
    chunks = f" x {placement.chunks} chunks" if placement.chunks > 1 else ""
    clock = "one clock for all ranks"
    if profile.clock_error:
        error = html_module.seconds(profile.clock_error)
        clock = f"clocks of machines aligned to {error} or better"
    layout = f"{placement.ranks} pipeline ranks{chunks}"
    work = f"{measured.schedule.microbatches} microbatches"
    if profile.replicas * profile.tensor > 1:
        work += f", {profile.replicas} x {profile.tensor} such pipelines (data x tensor)"
    first, *later = profile.steps
    steps = f"mean of steps {first} to {later[-1]}" if later else f"step {first}"
    return [
        f"<h1>Profile of {escape(profile.name)}</h1>",
        f'<p class="facts">{escape(measured.schedule.name)}, {layout}, {work}; '
        f"{steps}, {html_module.seconds(measured.step_seconds)} per step, "
        f"{html_module.seconds(profile.span)} in the pipeline; {clock}.</p>",
    ]


def _advice(advice: list[Advice]) -> list[str]:
    """Returns the advice; commands in backticks and settings with values are set as code."""
    pattern = re.compile(r"`([^`]*)`|(parallel\.\w+=\[[^]]*\])")
    lines = [pattern.sub(r"<code>\1\2</code>", escape(item.text)) for item in advice]
    return ['<div class="advice">', *(f"<p>{line}</p>" for line in lines), "</div>"]


# -- timelines -----------------------------------------------------------------------------------

_LEFT, _ROW, _BOX, _AXIS = 70, 34, 28, 24
"""Pixels: left margin, distance of rows, height of a box, height of the axis."""
_LABEL = 11
"""Font size of the number in a box, which is left out if the box is too narrow."""
_PAGE_WIDTH, _MIN_ACTION_WIDTH = 1100, 7
"""Pixels: preferred width of a timeline, and of a typical action, which can make it wider."""


class _Box(NamedTuple):
    action: Action
    start: float
    end: float
    tooltip: str


def timelines(profile: PipelineProfile) -> list[str]:
    """Returns the measured timeline above the ideal one, at one scale."""
    view, chunks = profile.timeline, profile.measured.placement.chunks
    measured, ideal = _measured_boxes(profile), _ideal_boxes(profile)
    ends = [span_of(view.pipeline), view.ideal.makespan]
    longest = max(ends)
    typical = statistics.median(box.end - box.start for boxes in measured for box in boxes)
    width = max(_MIN_ACTION_WIDTH * longest / max(typical, 1e-9), _PAGE_WIDTH)
    scale = min(width, 8 * _PAGE_WIDTH) / longest
    replica = ""
    if profile.replicas * profile.tensor > 1:
        replica = f", data {view.pipeline[0].data}, tensor {view.pipeline[0].tensor}"
    return [
        f"<h2>Measured: step {view.step}{replica}, {html_module.seconds(ends[0])}, "
        f"bubble {_bubble(measured, ends[0])}</h2>",
        f'<div class="wide">{_rows(measured, ends[0], longest, scale, chunks)}',
        f"<h2>Ideal of the same schedule: {html_module.seconds(ends[1])}, "
        f"bubble {_bubble(ideal, ends[1])}</h2>",
        f"{_rows(ideal, ends[1], longest, scale, chunks)}</div>",
        f'<p class="small">{_legend(profile)}</p>',
        '<p class="small">The ideal has the same actions, with the mean time of all stages on each '
        "stage and without communication. Numbers are microbatches; hover over a box for its time."
        "</p>",
    ]


def _measured_boxes(profile: PipelineProfile) -> list[list[_Box]]:
    pipeline = profile.timeline.pipeline
    zero = first_start(pipeline)
    return [
        [
            _Box(
                a.action,
                a.ready - zero,
                a.end - zero,
                f"{a.action}: {html_module.seconds(a.end - a.ready)}, "
                f"waited {html_module.seconds(a.ready - a.start)}",
            )
            for a in trace.actions
        ]
        for trace in pipeline
    ]


def _ideal_boxes(profile: PipelineProfile) -> list[list[_Box]]:
    return [
        [
            _Box(*span, f"{span.action}: {html_module.seconds(span.end - span.start)}")
            for span in row
        ]
        for row in profile.timeline.ideal.spans
    ]


def _bubble(rows: list[list[_Box]], end: float) -> str:
    busy = sum(box.end - box.start for boxes in rows for box in boxes)
    return f"{1 - busy / (len(rows) * end):.1%}"


def _rows(rows: list[list[_Box]], end: float, longest: float, scale: float, chunks: int) -> str:
    width, bottom = _LEFT + longest * scale + 30, _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + _AXIS}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    ]
    for rank, boxes in enumerate(rows):
        y = rank * _ROW
        parts.append(svg_text(_LEFT - 10, y + _BOX * 0.66, f"rank {rank}", anchor="end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{end * scale:.2f}" height="{_BOX}" fill="{IDLE}"/>'
        )
        parts += [_draw_box(box, y, scale, chunks) for box in boxes]
    return "\n".join([*parts, *_axis(longest, scale, bottom), "</svg>"])


def _draw_box(box: _Box, y: float, scale: float, chunks: int) -> str:
    x, width = _LEFT + box.start * scale, (box.end - box.start) * scale
    label = str(box.action.microbatch)
    colour = shade(box.action.kind, box.action.chunk, chunks)
    drawn = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" fill="{colour}" '
        f'stroke="white" stroke-width="{min(1, width / 6):.2f}"/>'
    )
    if width > DIGIT_WIDTH * _LABEL * len(label):
        middle = y + _BOX / 2 + 0.36 * _LABEL
        drawn += svg_text(x + width / 2, middle, label, anchor="middle", size=_LABEL)
    return f"<g><title>{escape(box.tooltip)}</title>{drawn}</g>"


def _axis(longest: float, scale: float, bottom: float) -> list[str]:
    """Returns five to ten ticks at round times."""
    step = 1.0
    while longest / step > 10:
        step *= 10
    while longest / step < 5:
        step /= 10
    step *= next((factor for factor in (5, 2) if longest / step > 5 * factor), 1)
    marks = []
    for number in range(int(longest / step + 1e-9) + 1):
        x = _LEFT + number * step * scale
        marks.append(f'<path d="M{x:.2f} {bottom - _ROW + _BOX}v5" stroke="#555"/>')
        value, unit = html_module.in_unit(number * step)
        label = f"{value:g} {unit}" if number else "0"
        marks.append(svg_text(x, bottom + 12, label, anchor="middle"))
    return marks


def _legend(profile: PipelineProfile) -> str:
    chunks = profile.measured.placement.chunks
    kinds = [kind for kind in KINDS if any(kind == found for found, _ in profile.measured.by_kind)]
    lines = [
        [
            html_module.key(
                shade(kind, chunk, chunks), KINDS[kind] + (f", chunk {chunk}" if chunks > 1 else "")
            )
            for kind in kinds
        ]
        for chunk in range(chunks)
    ]
    lines[0].append(html_module.key(IDLE, "waiting"))
    return "<br>".join(" &nbsp; ".join(entries) for entries in lines)


# -- tables --------------------------------------------------------------------------------------


def _breakdown_table(profile: PipelineProfile) -> list[str]:
    """Returns computing and waiting of each rank, as bars and numbers."""
    heads = [
        "rank",
        "",
        *(html_module.key(colour, name) for name, colour in PARTS.values()),
        "bubble",
        "peak memory",
    ]
    ranks = zip(profile.breakdowns, profile.peak_memory, strict=True)
    rows = [_breakdown_row(str(rank), *values) for rank, values in enumerate(ranks)]
    rows.append(_breakdown_row("all", profile.total, max(profile.peak_memory)))
    return [
        f"<h2>Where the time went, of {html_module.seconds(profile.span)}</h2>",
        html_module.table(heads, rows, has_total=True, left=(1,)),
    ]


def _breakdown_row(name: str, breakdown: TimeBreakdown, memory: int) -> list[str]:
    shares = [
        f"{html_module.seconds(seconds)} ({seconds / breakdown.span:.1%})".replace("-", "−")
        for seconds in breakdown
    ]
    bubble = f"{breakdown.waiting / breakdown.span:.1%}"
    return [name, _breakdown_bar(breakdown), *shares, bubble, html_module.size(memory)]


def _breakdown_bar(breakdown: TimeBreakdown) -> str:
    """Returns a bar of the positive parts."""
    lengths = zip(breakdown, (colour for _, colour in PARTS.values()), strict=True)
    total = sum(max(seconds, 0.0) for seconds in breakdown)
    return html_module.bars(lengths, total=total, width=180)


def _stage_table(profile: PipelineProfile) -> list[str]:
    mean = statistics.fmean(stage.total for stage in profile.stages)
    heads = ["stage", "rank", "layers", "forward", "backward", "vs mean"]
    rows = [
        [
            f"{stage.stage}",
            f"{stage.rank}",
            stage.layers,
            html_module.seconds(stage.forward),
            html_module.seconds(stage.backward),
            f"{stage.total / mean - 1:+.1%}".replace("-", "−"),
        ]
        for stage in profile.stages
    ]
    return ["<h2>A microbatch on each stage</h2>", html_module.table(heads, rows, left=(2,))]


def _layer_table(profile: PipelineProfile) -> list[str]:
    longest = max(layer.total for layer in profile.layers)
    if not longest:
        return []
    slow = {layer.layer for layer, _ in slow_layers(profile)}
    rows = []
    for layer in profile.layers:
        title = layer.title
        if layer.layer in slow:
            title = Markup('<span class="slow">{}</span>').format(title)
        lengths = [(layer.forward, shade("F", 0, 1)), (layer.backward, shade("B", 0, 1))]
        rows.append(
            [
                title,
                f"{layer.stage}",
                html_module.seconds(layer.forward),
                html_module.seconds(layer.backward) if layer.backward else "–",
                html_module.bars(lengths, total=longest, width=240),
            ]
        )
    return [
        "<h2>A microbatch in each layer</h2>",
        html_module.table(["layer", "stage", "forward", "backward", ""], rows, left=(4,)),
        '<p class="small">The backward of the first layer cannot be separated from the rest of its '
        "action, nor the W of a layer from those of the others.</p>",
    ]


def _definitions(profile: PipelineProfile) -> list[str]:
    definitions = [
        f"<dt>{html_module.key(PARTS[part][1], PARTS[part][0])}</dt><dd>{escape(text)}.</dd>"
        for part, text in DEFINITIONS.items()
    ]
    return [
        "<h2>Definitions</h2>",
        "<p>From the start of the first action to the end of the last, a rank computes or waits. "
        "Its waiting is split by simulating the same actions; the parts add up to it.</p>",
        "<dl>",
        *definitions,
        f"<dt>peak memory</dt><dd>{escape(profile.memory)}.</dd>",
        "<dt>predictions</dt><dd>the same simulation with other layers on the stages, each layer "
        "with its measured time, as a share of the step; the optimizer and other work outside "
        "the pipeline are taken as measured.</dd></dl>",
    ]


# -- numbers -------------------------------------------------------------------------------------


def numbers(profile: PipelineProfile, advice: list[Advice]) -> dict[str, Any]:
    """Returns the contents of the page for programs, in seconds and bytes."""
    measured = profile.measured
    ranks = zip(profile.breakdowns, profile.peak_memory, strict=True)
    last_layer = len(measured.titles) - 1
    return {
        "schedule": measured.schedule.name,
        "steps": profile.steps,
        "step_seconds": measured.step_seconds,
        "span_seconds": profile.span,
        "ideal_span_seconds": profile.timeline.ideal.makespan,
        "bubble": profile.total.waiting / profile.span,
        "message_seconds": measured.message_seconds,
        "clock_error_seconds": profile.clock_error,
        "ranks": [{**breakdown._asdict(), "peak_memory": memory} for breakdown, memory in ranks],
        "stages": [stage._asdict() for stage in profile.stages],
        "layers": [layer._asdict() for layer in profile.layers],
        "layers_per_stage": [
            sum(0 < layer < last_layer for layer in layers) for layers in measured.cut
        ],
        "advice": [item._asdict() for item in advice],
    }
