"""Traced steps in the Chrome trace format, for chrome://tracing and Perfetto."""

from __future__ import annotations

from typing import Any

from megatrain.pipeline.plot import KINDS
from megatrain.telemetry.bubble_analysis import first_start
from megatrain.telemetry.trace_format import RankTrace, StepTrace, TracedAction

Event = dict[str, Any]


def chrome_trace(steps: list[StepTrace]) -> dict[str, Any]:
    """Returns all actions and waits: one process per pipeline rank, one thread per other rank."""
    zero = min(first_start(pipeline) for step in steps for pipeline in step.pipelines())
    tensor_size = 1 + max(trace.tensor for trace in steps[0].ranks)
    events: list[Event] = []
    for trace in steps[0].ranks:
        names = {
            "process_name": f"pipeline rank {trace.pipeline}",
            "thread_name": f"data {trace.data}, tensor {trace.tensor}",
        }
        for kind, name in names.items():
            track = _track(trace, tensor_size)
            events.append({"name": kind, "ph": "M", **track, "args": {"name": name}})
    for step in steps:
        for trace in step.ranks:
            for traced in trace.actions:
                track = {"ph": "X", **_track(trace, tensor_size)}
                events += [
                    {**track, **event} for event in _action_events(step.step, trace, traced, zero)
                ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _track(trace: RankTrace, tensor_size: int) -> Event:
    return {"pid": trace.pipeline, "tid": trace.data * tensor_size + trace.tensor}


def _action_events(step: int, trace: RankTrace, traced: TracedAction, zero: float) -> list[Event]:
    """Returns the event of an action, after that of its wait if it waited a microsecond or more."""
    action = traced.action
    args = {
        "step": step,
        "microbatch": action.microbatch,
        "chunk": action.chunk,
        "stage": trace.placement.stage(trace.pipeline, action.chunk),
    }
    spans = [(str(action), KINDS[action.kind], traced.ready, traced.end)]
    if traced.ready - traced.start >= 1e-6:
        spans.insert(0, (f"wait for {action}", "wait", traced.start, traced.ready))
    return [
        {
            "name": name,
            "cat": category,
            "ts": round((start - zero) * 1e6, 3),
            "dur": round((end - start) * 1e6, 3),
            "args": args,
        }
        for name, category, start, end in spans
    ]
