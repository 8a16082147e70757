"""A run, or several beside each other, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from typing import NamedTuple

from megatrain.report import html as html_module
from megatrain.report.chart import STYLE, Line, Mark, Shape, Span, chart
from megatrain.report.event_timeline import MOST_ROWS, TimelineRow, rows, said
from megatrain.report.run_folder import RunFolder
from megatrain.report.stage_times import StageTimes
from megatrain.report.timeline_page import timelines
from megatrain.telemetry.console import duration, short_number
from megatrain.telemetry.curves import Curve, Point
from megatrain.telemetry.plots import loss_name

_STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px 18px; margin: 16px 0; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: 13px; }
.marks span { margin-right: 14px; white-space: nowrap; } .marks i { display: inline-block; height: 12px; border-left: 2px dashed; margin-right: 6px; vertical-align: -1px; }
.bad { color: var(--rollback); font-weight: bold; }
.lanes { display: grid; grid-template-columns: max-content 1fr; gap: 5px 10px; align-items: center; max-width: 760px; margin: 8px 0; }
.lanes div { display: flex; height: 13px; } .lanes i { display: block; } .lanes span { color: var(--soft); font-size: 13px; }
.worded td { vertical-align: top; } .worded td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 260px; }
details pre { overflow-x: auto; font-size: 12.5px; } summary { cursor: pointer; }
@media (max-width: 600px) { .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 18px; }
  .narrow td, .narrow th { font-size: 11.5px; padding: 3px 5px 3px 0; }
  .worded table, .worded tbody, .worded tr { display: block; } .worded tr:first-child { display: none; } .worded tr { border-top: 1px solid var(--rule); padding: 5px 0; }
  .worded td { display: inline-block; padding: 0 10px 0 0; } .worded td:last-child { display: block; min-width: 0; color: var(--soft); font-size: 13.5px; }
}
"""
_LARGEST_TIMELINE = 1 << 20
"""Characters of a picture of the pipeline that a page may hold; `megatrain profile` draws any."""


_MOST_DOTS, _MOST_STEMS = 80, 200
"""Of a curve; more would hide what is behind them."""


class Panel(NamedTuple):
    """A chart's figures by the names that metrics.jsonl has for them, each with the name of its line."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, Shape], ...]
    from_zero: bool = False
    factor: float = 1.0


_MEMORY = "peak memory of the fullest rank"
_GROWTH = (
    "on CPUs: how much the process's resident memory has grown since before the model was built"
)
_RESIDENT = "the resident memory of its process, with the interpreter and libraries"

PANELS = (
    Panel("learning rate", "", (("lr", "", "line"),), True),
    Panel(
        "gradient norm",
        "",
        (("grad_norm", "each step", "faint"), ("grad_norm", "smoothed", "line")),
    ),
    Panel(
        "throughput",
        "tokens/s",
        (("tokens_per_second", "each step", "faint"), ("tokens_per_second", "smoothed", "line")),
        True,
    ),
    Panel(
        "compute",
        "TFLOP/s a rank",
        (("tflops_per_rank", "each step", "faint"), ("tflops_per_rank", "smoothed", "line")),
        True,
    ),
    Panel(
        "model FLOPs utilisation",
        "%",
        (("mfu", "each step", "faint"), ("mfu", "smoothed", "line")),
        True,
        100.0,
    ),
    Panel(
        _MEMORY,
        "GiB",
        (("memory_gib", "measured", "line"), ("memory_predicted_gib", "predicted", "line")),
        True,
    ),
    Panel(
        "time that training stood still for saves",
        "s",
        (("checkpoint_blocking_seconds", "", "stems"),),
        True,
    ),
)
_SHOWN = {name for panel in PANELS for name, *_ in panel.lines} | {
    "loss",
    "valid_loss",
    "tokens",
    "seconds",
    "skipped",
}
MARKS = {
    "restart": "failed or stopped here, and started again",
    "rollback": "gone back",
    "spike": "loss spike",
    "stall": "hung",
}


def render_report(runs: Sequence[RunFolder], *, now: datetime) -> str:
    """The whole page. With several runs, each has its colour in the charts and a part of its own below them."""
    title = " and ".join(run.name for run in runs)
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += _head(runs[0], now) if len(runs) == 1 else _compared(runs, now)
    parts += _charts(runs)
    for run in runs:
        parts += [f"<h2>{escape(run.name)}</h2>"] if len(runs) > 1 else []
        parts += [
            *_stages(run.stages, on_cpus=_is_on_cpus(run)),
            *_timeline(run),
            *_passed_over(run),
            *_events(run, now),
            *_config(run),
        ]
    parts.append(
        f'<p class="small">Written {now:%Y-%m-%d %H:%M:%S %z}. Curves keep the lowest and the highest value of each piece of the run, so that no spike is lost.</p>'
    )
    return html_module.frame(f"report of {title}", parts, style=STYLE + _STYLE)


# -- what it is and how it stands ---------------------------------------------------------------------------------------


def _head(run: RunFolder, now: datetime) -> list[str]:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _tiles(run)
    )
    return [
        f'<p class="facts">{escape(_facts(run))}</p>',
        f"<p>{_state(run, now)}</p>",
        f'<div class="tiles">{tiles}</div>',
    ]


def _compared(runs: Sequence[RunFolder], now: datetime) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name, _ in _tiles(run)))
    heads = ["run", *(escape(name) for name in names), "state"]
    lines = [
        [
            html_module.key(f"var(--c{place % 6})", run.name),
            *(escape(dict(_tiles(run)).get(name, "–")) for name in names),
            _state(run, now),
        ]
        for place, run in enumerate(runs)
    ]
    return html_module.table(heads, lines, left=(len(names) + 1,))


def _facts(run: RunFolder) -> str:
    """One line: model, layout, machines."""
    model = run.setting("model", "")
    facts = [str(model.get("model_type", "")) if isinstance(model, dict) else str(model)]
    if run.story.start is not None:
        fields = run.story.start.fields
        layout = fields.get("layout") or {}
        facts.append(
            " x ".join(
                f"{axis} {layout[axis]}"
                for axis in ("tensor", "pipeline", "data")
                if axis in layout
            )
        )
        facts += [
            str(layout.get("schedule", "")),
            f"ZeRO {layout.get('zero')}" if "zero" in layout else "",
        ]
        hosts = fields.get("hosts") or []
        facts.append(
            f"{_number_of(fields.get('ranks'), 'rank')} on {_number_of(len(hosts), 'machine')}, {fields.get('device')}"
        )
        facts.append(
            ", ".join(
                f"{name} {version}" for name, version in (fields.get("versions") or {}).items()
            )
        )
    size, length = run.setting("train.global_batch_size"), run.setting("data.sequence_length")
    facts.append(f"{size} x {length} tokens a step" if size and length else "")
    facts.append(
        " ".join(str(run.setting(name, "")) for name in ("optimizer.name", "train.dtype")).strip()
    )
    return " · ".join(fact for fact in facts if fact)


def _number_of(count: object, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _state(run: RunFolder, now: datetime) -> str:
    """How the run stands, in HTML. A run that was killed cannot say so."""
    if run.story.end is not None:
        failed = run.story.events[-1].event in ("fail", "stall")
        return f'<span class="{"bad" if failed else ""}">{escape(run.story.end[:1].upper() + run.story.end[1:])}</span>'
    if run.told is None:
        return "No step has been told of yet."
    silent = max(0.0, (now - run.told).total_seconds())
    usual = run.curves["seconds"].mean if "seconds" in run.curves else 60.0
    if silent < max(600.0, 20 * usual):
        return f"Going on; its last figures are {duration(silent)} old."
    return f'<span class="bad">Killed, or hung: it has not said how it ended, and its last figures are {duration(silent)} old.</span>'


def _tiles(run: RunFolder) -> list[tuple[str, str]]:
    curves, last, story = run.curves, run.last, run.story
    tiles = []
    step = max((point.step for point in last.values()), default=0)
    steps = run.setting("train.steps")
    tiles.append(
        ("step", f"{step:,.0f}" if not isinstance(steps, int) else f"{step:,.0f} of {steps:,}")
    )
    if "tokens" in last:
        tiles.append(("tokens", short_number(last["tokens"].value)))
    if "loss" in curves:
        tiles.append(("smoothed loss at the end", f"{curves['loss'].smooth()[-1].value:.4f}"))
    if "valid_loss" in curves:
        best = curves["valid_loss"].lowest
        tiles += [
            ("validation loss at the end", f"{last['valid_loss'].value:.4f}"),
            ("lowest validation loss (after step)", f"{best.value:.4f} ({best.step:,.0f})"),
        ]
    if "tokens_per_second" in curves:
        tiles.append(("tokens/s on average", short_number(curves["tokens_per_second"].mean)))
    if "mfu" in curves:
        tiles.append(("model FLOPs utilisation", f"{curves['mfu'].mean:.1%}"))
    if "seconds" in curves:
        tiles.append(("in steps", duration(curves["seconds"].total)))
    if "checkpoint_blocking_seconds" in curves:
        tiles.append(
            ("stood still for saves", _duration(curves["checkpoint_blocking_seconds"].total))
        )
    tiles.append(("started again", str(story.restarts)))
    tiles += [
        (words, str(story.count(name)))
        for name, words in (("rollback", "gone back"), ("stall", "hung"))
        if story.count(name)
    ]
    if "skipped" in curves:
        tiles.append(("steps skipped", f"{curves['skipped'].total:.0f}"))
    return tiles


# -- curves ------------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[RunFolder]) -> list[str]:
    ends = [point.step for run in runs for point in run.last.values()]
    begins = [curve.points()[0].step for run in runs for curve in run.curves.values()]
    if not ends:
        return ["<p>There are no figures yet.</p>"]
    marks = [mark for run in runs for mark in run.story.marks]
    ends += [mark.step for mark in marks] + [
        run.undone.last.step for run in runs if run.undone is not None
    ]
    steps = Span(min(begins), max(max(ends), min(begins) + 1))
    losses = dict.fromkeys(
        loss_name(run.setting("task", "sft"), run.setting("classification.problem", "single-label"))
        for run in runs
    )
    parts = chart(
        "loss", list(_losses(runs)), steps=steps, unit=", ".join(losses), marks=marks, first=True
    )
    panels = [
        panel._replace(unit=f"{panel.unit}, {_GROWTH}")
        if panel.title == _MEMORY and any(map(_is_on_cpus, runs))
        else panel
        for panel in PANELS
    ]
    for panel in [*panels, *_measures(runs)]:
        parts += chart(
            panel.title,
            list(_lines(panel, runs)),
            steps=steps,
            unit=panel.unit,
            marks=marks,
            from_zero=panel.from_zero,
        )
    return ["<h2>Over steps</h2>", *_meaning_of(marks), '<div class="charts">', *parts, "</div>"]


def _is_on_cpus(run: RunFolder) -> bool:
    return run.story.start is not None and run.story.start.fields.get("device") == "cpu"


def _meaning_of(marks: Iterable[Mark]) -> list[str]:
    kinds = dict.fromkeys(mark.kind for mark in marks)
    keys = "".join(
        f'<span><i style="border-color:var(--{kind})"></i>{MARKS[kind]}</span>' for kind in kinds
    )
    return [f'<p class="small marks">{keys}</p>'] if keys else []


def _losses(runs: Sequence[RunFolder]) -> Iterable[Line]:
    for place, run in enumerate(runs):
        several = len(runs) > 1
        of = f" {run.name}" if several else ""
        loss, valid = run.curves.get("loss"), run.curves.get("valid_loss")
        if loss is not None:
            yield Line("" if several else "each step", loss.points(), "faint", place)
            yield Line(f"training{of}" if several else "smoothed", loss.smooth(), "line", place)
        if run.undone is not None:
            yield Line(f"undone{of}", run.undone.points(), "specks", place if several else 3)
        if valid is not None:
            colour = place if several else 1
            yield Line("" if several else "validation", valid.points(), "line", colour)
            if valid.count <= _MOST_DOTS:
                yield Line("", valid.points(), "dots", colour)


def _lines(panel: Panel, runs: Sequence[RunFolder]) -> Iterable[Line]:
    several = len(runs) > 1
    for place, run in enumerate(runs):
        names = list(dict.fromkeys(name for name, *_ in panel.lines))
        for name, words, shape in panel.lines:
            curve = run.curves.get(name)
            if curve is None or (several and shape == "faint"):
                continue
            colour = place if several else names.index(name)
            shape = "line" if shape == "stems" and curve.count > _MOST_STEMS else shape
            yield Line(
                run.name if several else words, _scaled(curve, panel, shape, name), shape, colour
            )


def _scaled(curve: Curve, panel: Panel, shape: Shape, name: str) -> list[Point]:
    smoothed = shape == "line" and (name, "faint") in {
        (other, kind) for other, _, kind in panel.lines
    }
    return [
        Point(step, value * panel.factor)
        for step, value in (curve.smooth() if smoothed else curve.points())
    ]


def _measures(runs: Sequence[RunFolder]) -> list[Panel]:
    """What the task measures beside the loss, training and validation in one chart."""
    names = {name for run in runs for name in run.curves}
    plain = dict.fromkeys(
        name.removeprefix("valid_") for run in runs for name in run.curves if name not in _SHOWN
    )
    return [
        Panel(
            name.replace("_", " "),
            "" if name in names else "in validation",
            ((name, "training", "line"), (f"valid_{name}", "validation", "line")),
        )
        for name in plain
    ]


# -- stages ------------------------------------------------------------------------------------------------------------

_PARTS = {"forward": "#56b4e9", "backward": "#d55e00", "waiting": "#bdbdbd", "rest": "#8a8a8a"}


def _stages(stages: list[StageTimes], *, on_cpus: bool) -> list[str]:
    if not stages:
        return []
    longest = max(stage.whole for stage in stages)
    heads = ["rank", *_PARTS, "step", "memory"]
    lines = [
        [
            str(stage.pipeline),
            *(html_module.seconds(getattr(stage, name)) for name in _PARTS),
            html_module.seconds(stage.whole),
            html_module.size(stage.peak_memory),
        ]
        for stage in stages
    ]
    return [
        "<h2>A step on each pipeline rank</h2>",
        f'<p class="small">{" &nbsp; ".join(html_module.key(colour, name) for name, colour in _PARTS.items())}</p>',
        '<div class="lanes">',
        *(_lane(stage, longest) for stage in stages),
        "</div>",
        *html_module.table(heads, lines, kind="narrow"),
        '<p class="small">Means of the last steps that ranks have told of in their logs, over tensor and data ranks; memory is the most of any'
        f"{f', {_RESIDENT}' if on_cpus else ''}. "
        "Waiting is for what neighbours send; "
        "the rest is the optimizer, what data ranks add up, data and the host.</p>",
    ]


def _lane(stage: StageTimes, longest: float) -> str:
    parts = "".join(
        f'<i style="width:{100 * getattr(stage, name) / longest:.2f}%;background:{colour}"></i>'
        for name, colour in _PARTS.items()
    )
    return f"<span>rank {stage.pipeline}</span><div>{parts}</div>"


def _timeline(run: RunFolder) -> list[str]:
    if run.profile is None:
        return []
    drawn = timelines(run.profile)
    if sum(map(len, drawn)) > _LARGEST_TIMELINE:
        return [
            f'<p class="small">Steps were traced; their picture is too large for this page: <code>megatrain profile {escape(str(run.path))}</code> draws it.</p>'
        ]
    return drawn


# -- events ------------------------------------------------------------------------------------------------------------


def _passed_over(run: RunFolder) -> list[str]:
    """Which samples changed no weight that the run has now."""
    told = [event for event in run.story.events if event.event in ("skip", "rollback")]
    if not told:
        return []
    lines = []
    for event in told[: -MOST_ROWS - 1 : -1]:
        fields = dict(event.fields)
        first, last = fields.pop("first", None), fields.pop("last", None)
        samples = (
            f"{first:,} to {last:,}" if isinstance(first, int) and isinstance(last, int) else "–"
        )
        lines.append([f"{event.step or 0:,}", event.event, samples, escape(said(fields))])
    hidden = [f"<p>The last {MOST_ROWS} of {len(told):,}.</p>"] if len(told) > MOST_ROWS else []
    return [
        "<h2>Samples passed over</h2>",
        *hidden,
        *html_module.table(
            ["step", "event", "samples, in the run's order", ""],
            lines,
            left=(1, 2, 3),
            kind="worded",
        ),
    ]


def _events(run: RunFolder, now: datetime) -> list[str]:
    """The newest first."""
    told = list(rows(run.story.events))
    if not told:
        return []
    shown = told[: -MOST_ROWS - 1 : -1]
    lines = [
        [
            f"{row.time.astimezone(now.tzinfo):%Y-%m-%d %H:%M:%S}",
            f"{escape(row.event)}{f' × {row.number:,}' if row.number > 1 else ''}",
            _step(row),
            escape(row.words),
        ]
        for row in shown
    ]
    hidden = (
        [
            f"<p>The last {len(shown)} of {len(told):,}; all of them are in {escape(str(run.path))}/events.jsonl.</p>"
        ]
        if len(told) > len(shown)
        else []
    )
    return [
        f"<h2>What happened, the newest first ({now:%z})</h2>",
        *hidden,
        *html_module.table(["time", "event", "step", ""], lines, left=(1, 3), kind="worded"),
    ]


def _step(row: TimelineRow) -> str:
    if row.first_step is None:
        return "–"
    return f"{row.first_step:,}" if row.number == 1 else f"{row.first_step:,}–{row.last_step:,}"


def _config(run: RunFolder) -> list[str]:
    return (
        [f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"]
        if run.config_text
        else []
    )


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 100 else html_module.seconds(seconds)
