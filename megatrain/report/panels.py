"""The charts of a report: which metrics each chart shows, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from megatrain.report.chart import AxisRange, Line, Shape, chart
from megatrain.report.run_folder import RunFolder
from megatrain.telemetry.curves import Curve, Point
from megatrain.telemetry.plots import loss_name

_MAX_DOTS, _MAX_STEMS = 80, 200
"""Per curve; more would hide what is behind them."""


class Panel(NamedTuple):
    """A chart; `lines` holds (name in metrics.jsonl, name in the legend, shape)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, Shape], ...]
    from_zero: bool = True
    factor: float = 1.0


def _smoothed(metric: str) -> tuple[tuple[str, str, Shape], ...]:
    return (metric, "each step", "faint"), (metric, "smoothed", "line")


_MEMORY = "highest peak memory of a rank"
_CPU_MEMORY = "on CPUs: growth of the process's resident memory since before the model was built"
PANELS = (
    Panel("learning rate", "", (("lr", "", "line"),)),
    Panel("gradient norm", "", _smoothed("grad_norm"), from_zero=False),
    Panel("throughput", "tokens/s", _smoothed("tokens_per_second")),
    Panel("compute", "TFLOP/s per rank", _smoothed("tflops_per_rank")),
    Panel("model FLOPs utilisation", "%", _smoothed("mfu"), factor=100.0),
    Panel(
        _MEMORY,
        "GiB",
        (("memory_gib", "measured", "line"), ("memory_predicted_gib", "predicted", "line")),
    ),
    Panel("training blocked by saves", "s", (("checkpoint_blocking_seconds", "", "stems"),)),
)
_SHOWN = {name for panel in PANELS for name, *_ in panel.lines} | {
    "loss",
    "valid_loss",
    "tokens",
    "seconds",
    "skipped",
}


def render_charts(runs: Sequence[RunFolder]) -> Markup:
    """Returns all charts of the runs, or an empty text if there are no metrics."""
    if not any(run.curves for run in runs):
        return Markup()
    steps = _step_range(runs)
    marks = [mark for run in runs for mark in run.timeline.marks]
    losses = dict.fromkeys(
        loss_name(run.setting("task", "sft"), run.setting("classification.problem", "single-label"))
        for run in runs
    )
    loss_lines, unit = list(_loss_lines(runs)), ", ".join(losses)
    charts = [chart("loss", loss_lines, steps=steps, unit=unit, marks=marks, first=True)]
    for panel in [*PANELS, *_task_panels(runs)]:
        unit = panel.unit
        if panel.title == _MEMORY and any(run.is_on_cpu for run in runs):
            unit = f"{unit}, {_CPU_MEMORY}"
        lines, from_zero = list(_lines(panel, runs)), panel.from_zero
        charts.append(
            chart(panel.title, lines, steps=steps, unit=unit, marks=marks, from_zero=from_zero)
        )
    return Markup("\n").join(charts)


def _step_range(runs: Sequence[RunFolder]) -> AxisRange:
    first = min(curve.points()[0].step for run in runs for curve in run.curves.values())
    ends = [point.step for run in runs for point in run.last.values()]
    ends += [mark.step for run in runs for mark in run.timeline.marks]
    ends += [run.rolled_back.last.step for run in runs if run.rolled_back is not None]
    return AxisRange(first, max(*ends, first + 1))


def _loss_lines(runs: Sequence[RunFolder]) -> Iterable[Line]:
    is_comparison = len(runs) > 1
    for index, run in enumerate(runs):
        suffix = f" {run.name}" if is_comparison else ""
        loss, validation = run.curves.get("loss"), run.curves.get("valid_loss")
        if loss is not None:
            yield Line("" if is_comparison else "each step", loss.points(), "faint", index)
            name = f"training{suffix}" if is_comparison else "smoothed"
            yield Line(name, loss.smooth(), "line", index)
        if run.rolled_back is not None:
            colour = index if is_comparison else 3
            yield Line(f"rolled back{suffix}", run.rolled_back.points(), "specks", colour)
        if validation is not None:
            colour = index if is_comparison else 1
            name = "" if is_comparison else "validation"
            yield Line(name, validation.points(), "line", colour)
            if validation.count <= _MAX_DOTS:
                yield Line("", validation.points(), "dots", colour)


def _lines(panel: Panel, runs: Sequence[RunFolder]) -> Iterable[Line]:
    is_comparison = len(runs) > 1
    metrics = list(dict.fromkeys(metric for metric, *_ in panel.lines))
    for index, run in enumerate(runs):
        for metric, label, shape in panel.lines:
            curve = run.curves.get(metric)
            if curve is None or (is_comparison and shape == "faint"):
                continue
            points = _points(curve, panel, shape, metric)
            if shape == "stems" and curve.count > _MAX_STEMS:
                shape = "line"
            if is_comparison:
                yield Line(run.name, points, shape, index)
            else:
                yield Line(label, points, shape, metrics.index(metric))


def _points(curve: Curve, panel: Panel, shape: Shape, metric: str) -> list[Point]:
    has_raw_line = (metric, "faint") in {(name, kind) for name, _, kind in panel.lines}
    points = curve.smooth() if shape == "line" and has_raw_line else curve.points()
    return [Point(step, value * panel.factor) for step, value in points]


def _task_panels(runs: Sequence[RunFolder]) -> list[Panel]:
    """Returns a chart for each metric of the task, with its training and validation values."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    metrics = dict.fromkeys(name.removeprefix("valid_") for name in names if name not in _SHOWN)
    return [
        Panel(
            metric.replace("_", " "),
            "" if metric in names else "in validation",
            ((metric, "training", "line"), (f"valid_{metric}", "validation", "line")),
            from_zero=False,
        )
        for metric in metrics
    ]
