"""An x-ray as one HTML page without anything from elsewhere, as numbers, and as a trace for chrome://tracing and Perfetto."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

from megatrain.pipeline.plot import _IDLE, KINDS, _shade
from megatrain.pipeline.schedule import Action, Kind
from megatrain.pipeline.simulator import Span
from megatrain.report import html as html_module
from megatrain.report.bottlenecks import Advice, slow_layers
from megatrain.telemetry.bubble_analysis import PipelineProfile, TimeBreakdown, first_start, span_of
from megatrain.telemetry.trace_format import StepTrace

# Colours of Okabe and Ito's palette that no kind of action has in drawings.
PARTS = {
    "compute": ("computing", "#4d4d4d"),
    "schedule": ("waiting for a neighbour", "#bdbdbd"),
    "imbalance": ("imbalance between stages", "#cc79a7"),
    "microbatches": ("uneven microbatches", "#f0e442"),
    "communication": ("communication", "#0072b2"),
}
MEANINGS = {
    "schedule": "the schedule's own bubble: what the rank would wait if every stage took the stages' mean time and messages took none",
    "imbalance": "what it would wait with each stage's own mean time, less the above; the slowest stage waits less than in an even "
    "pipeline, so its part can be negative",
    "microbatches": "what it would wait with each action's own time, less the above",
    "communication": "the rest of the measured waiting: messages on their way, and what the host does between actions",
}


# -- the page ----------------------------------------------------------------------------------------------------------


def render_timeline_page(profile: PipelineProfile, advice: list[Advice]) -> str:
    """The whole page."""
    parts = [
        *_head(profile),
        *_advice(advice),
        *timelines(profile),
        *_split_table(profile),
        *_stage_table(profile),
        *_layer_table(profile),
        *_definitions(profile),
    ]
    return html_module.frame(f"x-ray of {profile.name}", parts)


def _head(profile: PipelineProfile) -> list[str]:
    measured, placement = profile.measured, profile.measured.placement
    chunks = f" x {placement.chunks} chunks" if placement.chunks > 1 else ""
    others = (
        f", {profile.replicas} x {profile.tensor} such pipelines (data x tensor)"
        if profile.replicas * profile.tensor > 1
        else ""
    )
    microbatches = 1 + max(action.microbatch for action in measured.schedule.actions[0])
    clock = (
        f"clocks of machines aligned to {html_module.seconds(profile.clock_error)} or better"
        if profile.clock_error
        else "one clock for all ranks"
    )
    return [
        f"<h1>X-ray of {escape(profile.name)}</h1>",
        f'<p class="facts">{escape(measured.schedule.name)}, {placement.ranks} pipeline ranks{chunks}, {microbatches} microbatches{others}; '
        f"{_steps(profile.steps)}, {html_module.seconds(measured.step_seconds)} a step, of which the pipeline {html_module.seconds(profile.span)}; {clock}.</p>",
    ]


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"mean of steps {steps[0]} to {steps[-1]}"


def _advice(advice: list[Advice]) -> list[str]:
    lines = []
    for item in advice:
        # What can be typed: a setting with its value, or words between backticks.
        lines.append(
            "<p>"
            + re.sub(
                r"`([^`]*)`|(parallel\.\w+=\[[^]]*\])", r"<code>\1\2</code>", escape(item.text)
            )
            + "</p>"
        )
    return ['<div class="advice">', *lines, "</div>"]


# -- timelines ---------------------------------------------------------------------------------------------------------


_LEFT, _ROW, _BOX, _AXIS = 70, 34, 28, 24
"""Pixels: beside the boxes, from one rank's line to the next, a box's height, the line of times below."""
_LABEL = 11
"""Pixels: height of a number in a box; boxes too narrow for theirs have none."""
_WHOLE, _NARROW = 1100, 7
"""Pixels: a timeline that fits the page; the width of a typical action below which it is rather longer than the page."""


class _Box(NamedTuple):
    action: Action
    start: float
    end: float
    words: str
    """What the picture says of it when it is pointed at."""


def timelines(profile: PipelineProfile) -> list[str]:
    """PipelineTimes above ideal, at one scale."""
    picture, chunks = profile.timeline, profile.measured.placement.chunks
    zero = first_start(picture.pipeline)
    measured = [
        [
            _Box(
                a.action,
                a.ready - zero,
                a.end - zero,
                f"{a.action}: {html_module.seconds(a.end - a.ready)}, waited {html_module.seconds(a.ready - a.start)}",
            )
            for a in trace.actions
        ]
        for trace in picture.pipeline
    ]
    ideal = [[_ideal_box(span) for span in spans] for spans in picture.ideal.spans]
    ends = [span_of(picture.pipeline), picture.ideal.makespan]
    typical = statistics.median(box.end - box.start for boxes in measured for box in boxes)
    width = min(max(_NARROW * max(ends) / max(typical, 1e-9), _WHOLE), 8 * _WHOLE)
    scale = width / max(ends)
    replica = (
        f", data {picture.pipeline[0].data}, tensor {picture.pipeline[0].tensor}"
        if profile.replicas * profile.tensor > 1
        else ""
    )
    return [
        f"<h2>PipelineTimes: step {picture.step}{replica}, {html_module.seconds(ends[0])}, bubble {_bubble(measured, ends[0])}</h2>",
        f'<div class="wide">{_lanes(measured, ends[0], max(ends), scale, chunks)}',
        f"<h2>Ideal of the same schedule: {html_module.seconds(ends[1])}, bubble {_bubble(ideal, ends[1])}</h2>",
        f"{_lanes(ideal, ends[1], max(ends), scale, chunks)}</div>",
        f'<p class="small">{_legend(profile)}</p>',
        '<p class="small">The ideal has the same actions, every stage at the stages\' mean time, and no communication. '
        "Numbers are microbatches; point at a box for its time.</p>",
    ]


def _ideal_box(span: Span) -> _Box:
    return _Box(
        span.action,
        span.start,
        span.end,
        f"{span.action}: {html_module.seconds(span.end - span.start)}",
    )


def _bubble(lanes: list[list[_Box]], end: float) -> str:
    busy = sum(box.end - box.start for boxes in lanes for box in boxes)
    return f"{1 - busy / (len(lanes) * end):.1%}"


def _lanes(lanes: list[list[_Box]], end: float, longest: float, scale: float, chunks: int) -> str:
    width, bottom = _LEFT + longest * scale + 30, _ROW * len(lanes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + _AXIS}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13">'
    ]
    for rank, boxes in enumerate(lanes):
        y = rank * _ROW
        parts.append(_text(_LEFT - 10, y + _BOX * 0.66, f"rank {rank}", anchor="end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{end * scale:.2f}" height="{_BOX}" fill="{_IDLE}"/>'
        )
        parts += [_lane_box(box, y, scale, chunks) for box in boxes]
    return "\n".join([*parts, *_axis(longest, scale, bottom), "</svg>"])


def _lane_box(box: _Box, y: float, scale: float, chunks: int) -> str:
    x, width, label = (
        _LEFT + box.start * scale,
        (box.end - box.start) * scale,
        str(box.action.microbatch),
    )
    colour = _shade(box.action.kind, box.action.chunk, chunks)
    drawn = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" fill="{colour}" stroke="white" stroke-width="{min(1, width / 6):.2f}"/>'
    if width > 0.62 * _LABEL * len(label):  # a digit is about 0.6 as wide as the letters are high
        drawn += _text(
            x + width / 2, y + _BOX / 2 + 0.36 * _LABEL, label, anchor="middle", size=_LABEL
        )
    return f"<g><title>{escape(box.words)}</title>{drawn}</g>"


def _axis(longest: float, scale: float, bottom: float) -> list[str]:
    """Some five to ten ticks, at round times."""
    step = 1.0
    while longest / step > 10:
        step *= 10
    while longest / step < 5:
        step /= 10
    for factor in (5, 2):
        if longest / step > 5 * factor:
            step *= factor
            break
    marks = []
    for number in range(int(longest / step + 1e-9) + 1):
        x = _LEFT + number * step * scale
        marks.append(f'<path d="M{x:.2f} {bottom - _ROW + _BOX}v5" stroke="#555"/>')
        value, unit = html_module.in_unit(number * step)
        marks.append(_text(x, bottom + 12, f"{value:g} {unit}" if number else "0", anchor="middle"))
    return marks


def _legend(profile: PipelineProfile) -> str:
    chunks = profile.measured.placement.chunks
    kinds = [kind for kind in KINDS if any(kind == found for found, _ in profile.measured.by_kind)]
    lines = [
        [
            html_module.key(
                _shade(kind, chunk, chunks),
                KINDS[kind] + (f", chunk {chunk}" if chunks > 1 else ""),
            )
            for kind in kinds
        ]
        for chunk in range(chunks)
    ]
    lines[0].append(html_module.key(_IDLE, "waiting"))
    return "<br>".join(" &nbsp; ".join(entries) for entries in lines)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 13) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size:.4g}">{escape(text)}</text>'


# -- tables ------------------------------------------------------------------------------------------------------------


def _split_table(profile: PipelineProfile) -> list[str]:
    """Where each rank's time went, as a bar and in numbers."""
    heads = [
        "rank",
        "",
        *(html_module.key(colour, name) for name, colour in PARTS.values()),
        "bubble",
        "peak memory",
    ]
    rows = [
        [f"{rank}", _split_bar(split), *_shares(split), html_module.size(memory)]
        for rank, (split, memory) in enumerate(
            zip(profile.breakdowns, profile.peak_memory, strict=True)
        )
    ]
    whole = [
        "all",
        _split_bar(profile.total),
        *_shares(profile.total),
        html_module.size(max(profile.peak_memory)),
    ]
    return [
        f"<h2>Where the time went, of {html_module.seconds(profile.span)}</h2>",
        *html_module.table(heads, [*rows, whole], last_is_whole=True, left=(1,)),
    ]


def _shares(split: TimeBreakdown) -> list[str]:
    return [
        *(
            f"{html_module.seconds(seconds)} ({seconds / split.span:.1%})".replace("-", "−")
            for seconds in split
        ),
        f"{split.waiting / split.span:.1%}",
    ]


def _split_bar(split: TimeBreakdown) -> str:
    """What is negative is left out, and the others are drawn that much shorter."""
    lengths = zip(split, (colour for _, colour in PARTS.values()), strict=True)
    return html_module.bars(lengths, whole=sum(max(seconds, 0.0) for seconds in split), width=180)


def _stage_table(profile: PipelineProfile) -> list[str]:
    mean = statistics.fmean(stage.total for stage in profile.stages)
    rows = [
        [
            f"{stage.stage}",
            f"{stage.rank}",
            escape(stage.layers),
            html_module.seconds(stage.forward),
            html_module.seconds(stage.backward),
            f"{stage.total / mean - 1:+.1%}".replace("-", "−"),
        ]
        for stage in profile.stages
    ]
    return [
        "<h2>A microbatch on each stage</h2>",
        *html_module.table(
            ["stage", "rank", "layers", "forward", "backward", "to the mean"], rows, left=(2,)
        ),
    ]


def _layer_table(profile: PipelineProfile) -> list[str]:
    longest = max(layer.total for layer in profile.layers)
    if not longest:
        return []
    slow = {layer.layer for layer, _ in slow_layers(profile)}
    rows = []
    for layer in profile.layers:
        lengths = [
            (seconds, _shade(kind, 0, 1))
            for kind, seconds in _forward_and_backward(layer.forward, layer.backward)
        ]
        title = (
            f'<span class="slow">{escape(layer.title)}</span>'
            if layer.layer in slow
            else escape(layer.title)
        )
        backward = html_module.seconds(layer.backward) if layer.backward else "–"
        rows.append(
            [
                title,
                f"{layer.stage}",
                html_module.seconds(layer.forward),
                backward,
                html_module.bars(lengths, whole=longest, width=240),
            ]
        )
    note = "<p class=\"small\">The first layer's backward cannot be told from what else its action does, nor a W's share of a layer from the others'.</p>"
    return [
        "<h2>A microbatch in each layer</h2>",
        *html_module.table(["layer", "stage", "forward", "backward", ""], rows, left=(4,)),
        note,
    ]


def _forward_and_backward(forward: float, backward: float) -> Iterable[tuple[Kind, float]]:
    return (("F", forward), ("B", backward))


def _definitions(profile: PipelineProfile) -> list[str]:
    meanings = [
        f"<dt>{html_module.key(PARTS[part][1], PARTS[part][0])}</dt><dd>{escape(meaning)}.</dd>"
        for part, meaning in MEANINGS.items()
    ]
    return [
        "<h2>What the words mean</h2>",
        "<p>A rank computes or waits from the first action's start to the last one's end. Its waiting is split by simulating the same "
        "actions; the parts add up to it.</p>",
        "<dl>",
        *meanings,
        f"<dt>peak memory</dt><dd>{escape(profile.memory)}.</dd>",
        "<dt>predictions</dt><dd>the same simulation with other layers on the stages, each layer with its measured time; of the whole step's time, "
        "with the optimizer and all that is not the pipeline taken as it is.</dd></dl>",
    ]


# -- numbers -----------------------------------------------------------------------------------------------------------


def numbers(profile: PipelineProfile, advice: list[Advice]) -> dict[str, Any]:
    """What the page says, for programs; seconds and bytes."""
    measured = profile.measured
    return {
        "schedule": measured.schedule.name,
        "steps": profile.steps,
        "step_seconds": measured.step_seconds,
        "span_seconds": profile.span,
        "ideal_span_seconds": profile.timeline.ideal.makespan,
        "bubble": profile.total.waiting / profile.span,
        "message_seconds": measured.message_seconds,
        "clock_error_seconds": profile.clock_error,
        "ranks": [
            {**split._asdict(), "peak_memory": memory}
            for split, memory in zip(profile.breakdowns, profile.peak_memory, strict=True)
        ],
        "stages": [stage._asdict() for stage in profile.stages],
        "layers": [layer._asdict() for layer in profile.layers],
        "layers_per_stage": [
            sum(0 < layer < len(measured.titles) - 1 for layer in cut) for cut in measured.cut
        ],
        "advice": [item._asdict() for item in advice],
    }


def chrome_trace(steps: list[StepTrace]) -> dict[str, Any]:
    """Every action and every wait of all steps and ranks: a process a pipeline rank, a thread a (data, tensor) rank; µs."""
    zero = min(first_start(pipeline) for step in steps for pipeline in step.pipelines())
    tensor = 1 + max(trace.tensor for trace in steps[0].ranks)
    events: list[dict[str, Any]] = []
    for trace in steps[0].ranks:
        place: dict[str, Any] = {"pid": trace.pipeline, "tid": trace.data * tensor + trace.tensor}
        events.append(
            {
                "name": "process_name",
                "ph": "M",
                **place,
                "args": {"name": f"pipeline rank {trace.pipeline}"},
            }
        )
        events.append(
            {
                "name": "thread_name",
                "ph": "M",
                **place,
                "args": {"name": f"data {trace.data}, tensor {trace.tensor}"},
            }
        )
    for step in steps:
        for trace in step.ranks:
            place = {"ph": "X", "pid": trace.pipeline, "tid": trace.data * tensor + trace.tensor}
            for a in trace.actions:
                about = {
                    "step": step.step,
                    "microbatch": a.action.microbatch,
                    "chunk": a.action.chunk,
                    "stage": trace.placement.stage(trace.pipeline, a.action.chunk),
                }
                if a.ready - a.start >= 1e-6:
                    events.append(
                        {
                            **place,
                            "name": f"wait for {a.action}",
                            "cat": "wait",
                            **_times(a.start, a.ready, zero),
                            "args": about,
                        }
                    )
                events.append(
                    {
                        **place,
                        "name": str(a.action),
                        "cat": KINDS[a.action.kind],
                        **_times(a.ready, a.end, zero),
                        "args": about,
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _times(start: float, end: float, zero: float) -> dict[str, float]:
    return {"ts": round((start - zero) * 1e6, 3), "dur": round((end - start) * 1e6, 3)}
