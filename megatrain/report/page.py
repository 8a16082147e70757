"""The report of a run, or a comparison of several, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from markupsafe import Markup

from megatrain.report import html
from megatrain.report.chart import COLOURS
from megatrain.report.event_timeline import MAX_ROWS, TimelineRow, fold_events, format_fields
from megatrain.report.panels import render_charts
from megatrain.report.run_folder import RunFolder
from megatrain.report.stage_times import StageTimes
from megatrain.report.timeline_page import timelines
from megatrain.telemetry.console import duration, short_number
from megatrain.telemetry.events import Event

_MAX_TIMELINE_LENGTH = 1 << 20
"""Characters of pipeline timelines in a report; `megatrain profile` has no limit."""
_STAGE_COLOURS = {
    "forward": "#56b4e9",
    "backward": "#d55e00",
    "waiting": "#bdbdbd",
    "other": "#8a8a8a",
}
_MARKS = {
    "restart": "restart after a failure or stop",
    "rollback": "rollback",
    "spike": "loss spike",
    "stall": "hang",
}


class _RunSection(NamedTuple):
    """One run, as the template shows it."""

    name: str
    path: str
    facts: str
    status: str
    tiles: dict[str, str]
    is_on_cpu: bool
    stages: list[StageTimes]
    stage_rows: list[list[str]]
    timelines: Markup | None
    """Pipeline timelines of traced steps; None if they are too large."""
    lost_samples: list[list[str]]
    num_lost_samples: int
    events: list[list[str]]
    num_events: int
    config_text: str


def render_report(runs: Sequence[RunFolder], *, now: datetime) -> str:
    """Returns the page. Of several runs, each has its colour in the charts and its own section."""
    title = " and ".join(run.name for run in runs)
    sections = [_section(run, now) for run in runs]
    kinds = dict.fromkeys(mark.kind for run in runs for mark in run.timeline.marks)
    return html.render_page(
        f"Report of {title}",
        "report",
        heading=title,
        runs=sections,
        comparison=_comparison(sections) if len(sections) > 1 else None,
        charts=render_charts(runs),
        marks={kind: _MARKS[kind] for kind in kinds},
        stage_colours=_STAGE_COLOURS,
        utc_offset=f"{now:%z}",
        written=f"{now:%Y-%m-%d %H:%M:%S %z}",
    )


def _section(run: RunFolder, now: datetime) -> _RunSection:
    lost = [event for event in run.timeline.events if event.event in ("skip", "rollback")]
    rows = list(fold_events(run.timeline.events))
    return _RunSection(
        name=run.name,
        path=str(run.path),
        facts=_facts(run),
        status=_status(run, now),
        tiles=_tiles(run),
        is_on_cpu=run.is_on_cpu,
        stages=run.stages,
        stage_rows=[_stage_row(stage) for stage in run.stages],
        timelines=_timelines(run),
        lost_samples=[_sample_row(event) for event in lost[: -MAX_ROWS - 1 : -1]],
        num_lost_samples=len(lost),
        events=[_event_row(row, now) for row in rows[: -MAX_ROWS - 1 : -1]],
        num_events=len(rows),
        config_text=run.config_text,
    )


def _comparison(sections: Sequence[_RunSection]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for section in sections for name in section.tiles))
    rows = [
        [
            html.key(f"var(--c{index % COLOURS})", section.name),
            *(section.tiles.get(name, "–") for name in names),
            section.status,
        ]
        for index, section in enumerate(sections)
    ]
    return {"heads": ["run", *names, "status"], "rows": rows}


def _facts(run: RunFolder) -> str:
    """Returns one line: model, layout, machines, batch, optimizer."""
    model = run.setting("model", "")
    facts = [str(model.get("model_type", "")) if isinstance(model, dict) else str(model)]
    if run.timeline.start is not None:
        facts += _start_facts(run.timeline.start.fields)
    size, length = run.setting("train.global_batch_size"), run.setting("data.sequence_length")
    facts.append(f"{size} x {length} tokens per step" if size and length else "")
    optimizer = (str(run.setting(name, "")) for name in ("optimizer.name", "train.dtype"))
    facts.append(" ".join(optimizer).strip())
    return " · ".join(fact for fact in facts if fact)


def _start_facts(start: dict[str, Any]) -> list[str]:
    layout, versions = start.get("layout") or {}, start.get("versions") or {}
    axes = [axis for axis in ("tensor", "pipeline", "data") if axis in layout]
    machines = _count(len(start.get("hosts") or []), "machine")
    return [
        " x ".join(f"{axis} {layout[axis]}" for axis in axes),
        str(layout.get("schedule", "")),
        f"ZeRO {layout['zero']}" if "zero" in layout else "",
        f"{_count(start.get('ranks'), 'rank')} on {machines}, {start.get('device')}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def _count(count: object, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _status(run: RunFolder, now: datetime) -> str:
    """Returns how the run ended or whether it runs; failures as HTML that stands out."""
    bad = Markup('<span class="bad">{}</span>')
    if run.timeline.end is not None:
        text = run.timeline.end[:1].upper() + run.timeline.end[1:]
        has_failed = run.timeline.events[-1].event in ("fail", "stall")
        return bad.format(text) if has_failed else text
    if run.last_written is None:
        return "No step has been logged yet."
    silent = max(0.0, (now - run.last_written).total_seconds())
    usual = run.curves["seconds"].mean if "seconds" in run.curves else 60.0
    if silent < max(600.0, 20 * usual):
        return f"Running; last metrics {duration(silent)} ago."
    return bad.format(f"Killed or hung: no end was logged; last metrics {duration(silent)} ago.")


def _tiles(run: RunFolder) -> dict[str, str]:
    curves, last, timeline = run.curves, run.last, run.timeline
    step = f"{max((point.step for point in last.values()), default=0):,.0f}"
    steps = run.setting("train.steps")
    tiles = {"step": f"{step} of {steps:,}" if isinstance(steps, int) else step}
    if "tokens" in last:
        tiles["tokens"] = short_number(last["tokens"].value)
    if "loss" in curves:
        tiles["last smoothed loss"] = f"{curves['loss'].smooth()[-1].value:.4f}"
    if "valid_loss" in curves:
        best = curves["valid_loss"].lowest
        tiles["last validation loss"] = f"{last['valid_loss'].value:.4f}"
        tiles["lowest validation loss (step)"] = f"{best.value:.4f} ({best.step:,.0f})"
    if "tokens_per_second" in curves:
        tiles["mean tokens/s"] = short_number(curves["tokens_per_second"].mean)
    if "mfu" in curves:
        tiles["model FLOPs utilisation"] = f"{curves['mfu'].mean:.1%}"
    if "seconds" in curves:
        tiles["time in steps"] = duration(curves["seconds"].total)
    if "checkpoint_blocking_seconds" in curves:
        blocked = curves["checkpoint_blocking_seconds"].total
        tiles["blocked by saves"] = duration(blocked) if blocked >= 100 else html.seconds(blocked)
    tiles["restarts"] = str(timeline.restarts)
    for name, event in (("rollbacks", "rollback"), ("hangs", "stall")):
        if timeline.count(event):
            tiles[name] = str(timeline.count(event))
    if "skipped" in curves:
        tiles["skipped steps"] = f"{curves['skipped'].total:.0f}"
    return tiles


def _stage_row(stage: StageTimes) -> list[str]:
    times = [*(getattr(stage, name) for name in _STAGE_COLOURS), stage.total]
    return [str(stage.pipeline_rank), *map(html.seconds, times), html.size(stage.peak_memory)]


def _timelines(run: RunFolder) -> Markup | None:
    if run.profile is None:
        return Markup()
    drawn = Markup("\n".join(timelines(run.profile)))
    return drawn if len(drawn) <= _MAX_TIMELINE_LENGTH else None


def _sample_row(event: Event) -> list[str]:
    """Returns a row of samples that do not contribute to the run's weights."""
    fields = dict(event.fields)
    first, last = fields.pop("first_sample", None), fields.pop("last_sample", None)
    is_known = isinstance(first, int) and isinstance(last, int)
    samples = f"{first:,} to {last:,}" if is_known else "–"
    return [f"{event.step or 0:,}", event.event, samples, format_fields(fields)]


def _event_row(row: TimelineRow, now: datetime) -> list[str]:
    time = f"{row.time.astimezone(now.tzinfo):%Y-%m-%d %H:%M:%S}"
    if row.num_events > 1:
        steps = f"{row.first_step:,}–{row.last_step:,}"
        return [time, f"{row.event} × {row.num_events:,}", steps, row.description]
    step = "–" if row.first_step is None else f"{row.first_step:,}"
    return [time, row.event, step, row.description]
