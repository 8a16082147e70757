"""Traces of simulated pipeline steps."""

import itertools

from megatrain.pipeline.simulator import Times, simulate
from megatrain.planner.cost_model import cut_of
from megatrain.telemetry.trace_format import (
    RankTrace,
    TracedAction,
)


def titles(counts):
    """Returns the titles of each stage's layers for the given numbers of blocks."""
    blocks = iter(range(sum(counts)))
    stages = [[f"block {next(blocks)}" for _ in range(count)] for count in counts]
    return (
        [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "head"]]
        if len(stages) > 1
        else [["embedding", *stages[0], "head"]]
    )


def traced(
    schedule, times, *, counts=None, layers=None, step=1, data=0, replicas=1, run=1.0, memory=()
):
    """Returns the traces of a step that runs as simulated, starting at 50 s of the ranks' clocks.

    `layers(kind, layer)` are the seconds of a layer; None leaves them out.
    """
    placement = schedule.placement
    stages = titles(counts or [1] * placement.stages)
    firsts = list(itertools.accumulate([0, *map(len, stages)]))
    timeline = simulate(schedule, times)
    traces = []
    for rank, spans in enumerate(timeline.spans):
        actions, free = [], 0.0
        for span in spans:
            stage = placement.stage(rank, span.action.chunk)
            known = (
                range(firsts[stage], firsts[stage + 1])
                if layers and span.action.kind != "W"
                else ()
            )
            inside = {layer: layers(span.action.kind, layer) for layer in known}
            actions.append(
                TracedAction(span.action, 50 + free, 50 + span.start, 50 + span.end, inside)
            )
            free = span.end
        traces.append(
            RankTrace(
                run=run,
                step=step,
                rank=data * placement.ranks + rank,
                world_size=replicas * placement.ranks,
                pipeline=rank,
                data=data,
                tensor=0,
                schedule=schedule.name,
                placement=placement,
                stages=stages,
                seconds=timeline.makespan * 1.25,
                peak_memory=memory[rank] if memory else 2**30,
                memory="resident memory",
                clock_error=0.0,
                config={"run": {"output_dir": "runs/a<b>", "name": ""}},
                actions=actions,
            )
        )
    return traces


def stage_times(counts, layers, *, slowness=(), beside=0.0, send=0.0):
    """Returns stage times: sums of layer times, scaled by `slowness`, plus `beside` per action."""
    cut = cut_of(tuple(counts))

    def sums(kind):
        return [
            beside
            + (slowness[stage] if slowness else 1)
            * sum(layers(kind, layer) for layer in cut[stage])
            for stage in range(len(cut))
        ]

    return Times(sums("F"), sums("I"), sums("W"), send)
